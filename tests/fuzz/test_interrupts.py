"""Ctrl-C, the garbage collector and forks at any point of a call: the network stays usable, and tokens stay right.

Something happens at an event of a call: at a call, line or return in the library's Python code. `pytest -m fuzz` tries
every line's first event of each kind and its last one, every run of the tests a few of them.
"""

from __future__ import annotations

import contextlib
import gc
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch

import llama as library
from llama import Llama
from llama.engine.lock import lock_of

# Python ignores an interruption that comes while it closes a generator expression.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
FOLDER = str(Path(library.__file__).parent)
ROOT = Path(__file__).parents[2]
PROMPTS = [[1, 9, 4, 30, 22], [1, 77]]
TIMEOUT_S = 60


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def llama(request: pytest.FixtureRequest, small_checkpoint: Path, tokenizer_path: Path) -> Llama:
    """Prefixes are reused, which moves rows of the cache."""
    reuse = request.param == "float32"  # rounds differently elsewhere
    return Llama.build(small_checkpoint, tokenizer_path, 96, 2, device="cpu", dtype=request.param, reuse_prefixes=reuse)


class AtEvent:
    """Does something once, at the n-th event of this thread in the library's code within a `with` block.

    Attributes:
        places: where the events up to then were.
    """

    def __init__(self, n: int, action: Callable[[], object]) -> None:
        self.n, self.action = n, action
        self.places: list[str] = []

    def _trace(self, frame: FrameType, event: str, arg: object) -> Any:
        if not frame.f_code.co_filename.startswith(FOLDER):
            return None
        self.places.append(f"{event} at {frame.f_code.co_filename}:{frame.f_lineno}")
        if len(self.places) > self.n:
            sys.settrace(None)
            self.action()
        return self._trace

    @property
    def place(self) -> str:
        return self.places[-1] if self.places else ""

    def __enter__(self) -> AtEvent:
        sys.settrace(self._trace)
        return self

    def __exit__(self, *exc_info: object) -> None:
        sys.settrace(None)


def some_events(work: Callable[[], Any], n_tried: int | None) -> list[int]:
    """The indices of each place's first and last event, or of evenly spaced ones of these."""
    at = AtEvent(sys.maxsize, lambda: None)
    with at:
        work()
    first = {place: i for i, place in reversed([*enumerate(at.places)])}
    last = {place: i for i, place in enumerate(at.places)}
    indices = sorted({*first.values(), *last.values()})
    return indices if n_tried is None else indices[len(indices) // n_tried // 2 :: len(indices) // n_tried]


def interrupt() -> None:
    raise KeyboardInterrupt


def closed_stream(llama: Llama) -> None:
    stream = llama.stream_text_completion("The", 0, max_gen_len=6)
    next(stream)
    stream.close()


CALLS: dict[str, Callable[[Llama], Any]] = {
    "greedy": lambda llama: llama.generate(PROMPTS, 4, temperature=0),
    "sampled": lambda llama: llama.text_completion(["The", "A", "tiny"], 1.0, max_gen_len=3, seed=5, stop=["zz"]),
    "stream": closed_stream,
    "score": lambda llama: llama.score_tokens(PROMPTS),
    "speculative": lambda llama: llama.generate([[1, 9, 4] * 4], 6, temperature=0, speculative="prompt_lookup"),
}


def few_and_all(*names: str) -> pytest.MarkDecorator:
    """Parametrizes a test with calls and numbers of events: with few of each named call, and with all of every call."""
    every = [pytest.param(name, None, marks=pytest.mark.fuzz, id=f"{name}, all events") for name in CALLS]
    return pytest.mark.parametrize(("name", "n_tried"), [*((name, 8) for name in names), *every])


def answers(llama: Llama) -> list[Any]:
    return [
        llama.generate(PROMPTS, 5, temperature=0),
        llama.text_completion(["The"], 1.0, max_gen_len=3, seed=6, stop=["zz"]),
    ]


def in_a_thread(work: Callable[[], Any]) -> Any:
    """A daemon, so that one that hangs fails the test alone."""
    found: list[Any] = []
    thread = threading.Thread(target=lambda: found.append(work()), daemon=True)
    thread.start()
    thread.join(TIMEOUT_S)
    assert found, "it hangs or failed"
    return found[0]


def check_usable(llama: Llama, expected: list[Any], place: str) -> None:
    assert not torch.is_inference_mode_enabled() and torch.is_grad_enabled(), place
    assert answers(llama) == expected, place
    assert in_a_thread(lambda: answers(llama)) == expected, place
    assert llama.engine.is_idle and lock_of(llama.model).holder is None, place


@few_and_all(*CALLS)
def test_an_interrupted_call_leaves_the_network_usable(llama: Llama, name: str, n_tried: int | None) -> None:
    call = CALLS[name]
    call(llama)
    expected = answers(llama)
    events = some_events(lambda: call(llama), n_tried)
    assert len(events) >= 8
    for n in events:
        at = AtEvent(n, interrupt)
        with contextlib.suppress(KeyboardInterrupt), at:
            call(llama)
        check_usable(llama, expected, at.place)


@pytest.mark.parametrize("llama", ["float32"], indirect=True)  # elsewhere tokens depend on the batch
@few_and_all("greedy", "stream")
def test_others_get_every_token_once_next_to_an_interrupted_call(llama: Llama, name: str, n_tried: int | None) -> None:
    """A call and a stream of other threads share the batch with it, and get what they get alone."""
    call = CALLS[name]

    def streamed() -> str:
        return "".join(llama.stream_text_completion("The fox", 1.2, max_gen_len=20, seed=4))

    def generated() -> Any:
        return llama.generate([[1, 30, 5]], 20, temperature=0, logprobs=True)

    call(llama)
    expected = [streamed(), generated()[0]]
    with ThreadPoolExecutor(2) as pool:
        for n in some_events(lambda: call(llama), n_tried):
            at = AtEvent(n, interrupt)
            futures = [pool.submit(streamed), pool.submit(generated)]
            while llama.engine.is_idle and not futures[0].done():
                time.sleep(0.0005)
            with contextlib.suppress(KeyboardInterrupt), at:
                call(llama)
            text, (tokens, logprobs) = [future.result(timeout=TIMEOUT_S) for future in futures]
            assert [text, tokens] == expected, at.place
            assert len(logprobs[0]) == len(tokens[0]), at.place
            llama.generate([[1]], 1)  # the first step after an interruption frees the rows
            assert llama.engine.is_idle, at.place


class Abandoned:
    """An open stream that only the garbage collector can close."""

    def __init__(self, llama: Llama) -> None:
        self.itself = self
        self.stream = llama.stream_text_completion("The", 0, max_gen_len=30)
        next(self.stream)


@few_and_all("greedy", "stream")
def test_the_garbage_collector_may_close_a_stream_during_a_call(llama: Llama, name: str, n_tried: int | None) -> None:
    call = CALLS[name]
    expected = call(llama)
    events = some_events(lambda: call(llama), n_tried)
    gc.disable()
    gc.freeze()  # what there is now need not be looked through
    try:
        for n in events:
            Abandoned(llama)
            at = AtEvent(n, gc.collect)

            def work(at: AtEvent = at) -> Any:
                with at:
                    return call(llama)

            assert in_a_thread(work) == expected, at.place
            gc.collect()
            if name == "score":  # holds the network, and takes no step that would free the stream's row
                llama.engine.advance()
            assert llama.engine.is_idle, at.place
    finally:
        gc.unfreeze()
        gc.enable()


# Forks: an operation large enough for torch's second thread runs in each pass.
FORKS = """
import os, random, sys, threading, time
import torch
from llama import Llama

llama = Llama.build(sys.argv[1], sys.argv[2], 256, 2, device="cpu", dtype="float32", reuse_prefixes=True, threads=2)
def work_in_parallel(*args):
    torch.ones(1 << 17).exp_()

llama.model.norm.register_forward_pre_hook(work_in_parallel)
rng = random.Random(0)

def answer():
    return llama.generate([[1, 9, 4]], 6, temperature=0)[0], llama.generate([[1, 5]], 4, 1.0, seed=2)[0]

def fork(use):
    child = os.fork()
    if child == 0:
        os._exit(0 if use() else 1)
    end = time.monotonic() + 30
    while (done := os.waitpid(child, os.WNOHANG)) == (0, 0):
        if time.monotonic() > end:
            os.kill(child, 9)
            raise SystemExit("a child hangs")
        time.sleep(0.002)
    assert done[1] == 0, "a child's answer is wrong"

expected = answer()
whole = "".join(llama.stream_text_completion("The", 0, max_gen_len=8))
stop = threading.Event()

def generate():
    while not stop.is_set():
        assert llama.generate([[1, 9, 4], [1, 5]], 40, temperature=0)[0][0][:6] == expected[0][0]
        "".join(llama.stream_text_completion("The", 0, max_gen_len=20))

def with_thread():
    time.sleep(rng.random() * 0.02)
    fork(lambda: answer() == expected and answer() == expected)

def with_stream():
    stream = llama.stream_text_completion("The", 0, max_gen_len=8)
    start = "".join(next(stream) for _ in range(rng.randint(1, 3)))
    fork(lambda: answer() == expected)
    fork(lambda: start + "".join(stream) == whole)
    assert start + "".join(stream) == whole

for _ in range(int(sys.argv[3])):
    with_stream()
threads = [threading.Thread(target=generate, daemon=True) for _ in range(2)]
for thread in threads:
    thread.start()
for _ in range(int(sys.argv[3])):
    with_thread()
    with_stream()
assert all(thread.is_alive() for thread in threads)
stop.set()
for thread in threads:
    thread.join(30)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="forks a process that has threads")
@pytest.mark.parametrize("n", [1, pytest.param(30, marks=pytest.mark.fuzz)])
def test_a_forked_process_generates(checkpoint: Path, tokenizer_path: Path, n: int) -> None:
    command = [sys.executable, "-c", FORKS, str(checkpoint), str(tokenizer_path), str(n)]
    environment = os.environ | {"OMP_WAIT_POLICY": "passive"}  # waiting workers leave the cores to the other threads
    subprocess.run(command, check=True, timeout=60 + 30 * n, cwd=ROOT, env=environment)
