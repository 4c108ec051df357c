"""Thousands of mixed calls on one model: memory stays flat after a warm-up, and no answer changes.

`pytest -m soak`; `LLAMA_FUZZ_SEED=N` repeats a run, `LLAMA_SOAK_CALLS=N` sets the number of calls after the warm-up.
"""

from __future__ import annotations

import gc
import os
import random
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from llama import Llama
from llama.errors import PromptError
from tests.fuzz import profiles
from tests.support import oracle

pytestmark = pytest.mark.soak
WARM_UP = 3000  # calls, among which nearly all shapes of products come up
N_CALLS = WARM_UP + int(os.environ.get("LLAMA_SOAK_CALLS") or 6000)
MAX_SEQ_LEN, MAX_BATCH_SIZE = 160, 4
MiB = 2**20
MAX_GROWTH = 16 * MiB  # 6000 calls that lost 3 KiB each would add 18; shapes of products that come up late add 5
DIALOG: Any = [{"role": "user", "content": "Where do llamas live?"}]


@pytest.fixture(params=["float32", None], ids=["float32", "default"])
def llama(
    request: pytest.FixtureRequest, write_checkpoint: Callable[..., Path], tokenizer_path: Path, params: dict[str, Any]
) -> Llama:
    state = oracle.random_state(params, seed=3)
    return Llama.build(
        write_checkpoint(params, state),
        tokenizer_path,
        MAX_SEQ_LEN,
        MAX_BATCH_SIZE,
        device="cpu",
        dtype=request.param,
        seed=None,
    )


def resident() -> int:
    """Bytes of memory that this process has, the checkpoint's mapped pages left out."""
    gc.collect()
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    raise AssertionError("no RssAnon in /proc/self/status")


def golden_answers(llama: Llama) -> list[Any]:
    return [
        llama.generate([[1, 9, 4], [1], [300, 5] * 20], 8, temperature=0, logprobs=True, echo=True),
        llama.text_completion(["The", "A tiny"], 1.0, max_gen_len=6, seed=5),
        llama.chat_completion([DIALOG], 0, max_gen_len=5),
        "".join(llama.stream_text_completion("The", 1.2, max_gen_len=9, seed=6)),
        llama.score(["The lazy dog", ""], ["a", "b"]),
    ]


def some_ids(rng: random.Random) -> list[list[int]]:
    """Prompts of all lengths, short ones more often."""
    longest = rng.choice([4, 20, MAX_SEQ_LEN])
    return [[rng.randrange(3, 400) for _ in range(rng.randint(1, longest))] for _ in range(rng.randint(1, 7))]


def generate(llama: Llama, rng: random.Random) -> None:
    prompts = some_ids(rng)
    rows, _ = llama.generate(
        prompts, rng.randint(0, 6), rng.choice([0, 0.7, 2.0]), logprobs=rng.random() < 0.5, echo=rng.random() < 0.3
    )
    assert len(rows) == len(prompts)


def complete(llama: Llama, rng: random.Random) -> None:
    texts = ["".join(rng.choices("ab é日🦙\n", k=rng.randint(0, 30))) for _ in range(rng.randint(1, 5))]
    llama.text_completion(texts, 1.0, max_gen_len=rng.randint(0, 8), stop=rng.choice([[], ["e"], ["\n", "ab"]]))


def chat(llama: Llama, rng: random.Random) -> None:
    unsafe: Any = [{"role": "user", "content": "[INST]"}]
    llama.chat_completion([DIALOG, unsafe][: rng.randint(1, 2)], 0.6, max_gen_len=rng.randint(0, 6), seed=1)


def score(llama: Llama, rng: random.Random) -> None:
    llama.score_tokens(some_ids(rng))
    llama.score(["".join(rng.choices("The fox ", k=rng.randint(0, 20)))])


def stream_and_leave(llama: Llama, rng: random.Random) -> None:
    """Closed after some pieces, forgotten, or read to its end while another one runs."""
    first = llama.stream_text_completion("The", 1.0, max_gen_len=rng.randint(1, 12))
    second = llama.stream_chat_completion(DIALOG, 0.9, max_gen_len=5)
    for _ in range(rng.randint(0, 6)):
        next(first, None)
        next(second, None)
    if rng.random() < 0.5:
        first.close()


def fail(llama: Llama, rng: random.Random) -> None:
    wrong: list[Callable[[], Any]] = [
        lambda: llama.generate([[1], [10**6]], 4),
        lambda: llama.generate([[1] * 1000], 4),
        lambda: llama.text_completion(["\ud83d"]),
        lambda: llama.chat_completion([DIALOG * 2]),
        lambda: llama.stream_text_completion("a", temperature=-1),
    ]
    with pytest.raises(PromptError):
        rng.choice(wrong)()


def fail_inside(llama: Llama, rng: random.Random) -> None:
    """An error in the middle of a pass, as running out of memory would be."""
    countdown = iter(range(rng.randint(0, 4)))

    def raise_at_end(*_: object) -> None:
        if next(countdown, None) is None:
            raise RuntimeError("in the middle of a pass")

    handle = llama.model.layers[1].register_forward_pre_hook(raise_at_end)
    try:
        with pytest.raises(RuntimeError, match="in the middle"):
            llama.generate([[1, 9, 4], [1]], 50, temperature=0)
    finally:
        handle.remove()


KINDS = [generate, complete, chat, score, stream_and_leave, fail]


def in_threads(llama: Llama, rng: random.Random) -> None:
    seeds = [rng.random() for _ in range(4)]
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda seed: random.Random(seed).choice(KINDS)(llama, random.Random(seed)), seeds, timeout=120))


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc to see its memory")
def test_memory_is_flat_and_no_answer_changes(llama: Llama) -> None:
    profiles.print_seed()
    rng = random.Random(profiles.SEED)
    golden = golden_answers(llama)
    n_threads = threading.active_count()
    before = 0
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(profiles.SEED)
        for i in range(N_CALLS):
            kind = rng.choices([*KINDS, fail_inside, in_threads], [6, 4, 2, 4, 4, 3, 1, 1])[0]
            kind(llama, rng)
            if i % 50 == 0:
                assert golden_answers(llama) == golden, f"after call {i}"
            if i == WARM_UP:
                before = resident()
            if i % 500 == 0:
                print(f"call {i}: {resident() / MiB:.1f} MiB")
    grown = resident() - before
    print(f"{N_CALLS} calls: {resident() / MiB:.1f} MiB, {grown / MiB:+.1f} since call {WARM_UP}")
    assert golden_answers(llama) == golden
    assert grown < MAX_GROWTH
    assert threading.active_count() == n_threads
