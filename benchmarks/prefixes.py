"""Prefix reuse: the next turn of a chat, and requests with one system prompt, with and without it in turn.

python benchmarks/prefixes.py --shape 1b
"""

from __future__ import annotations

import random
import statistics
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

if __name__ == "__main__":  # run as a file: packages are looked for in the repository, not in this folder
    sys.path[0] = str(Path(__file__).parent.parent)

from benchmarks.shapes import make_job
from llama import Llama
from llama.tools.commandline import run

_TURNS = 5
_CHAT_TOKENS = 1000  # of the last turn's prompt
_ANSWER_TOKENS = 100  # and as many of each question
_SYSTEM_TOKENS = 500
_CLIENTS = 16
_OUTPUT_TOKENS = 16


def random_tokens(draw: random.Random, n: int, vocab_size: int) -> list[int]:
    return [draw.randrange(3, vocab_size) for _ in range(n)]


def last_turn(llama: Llama, seed: int) -> float:
    """Seconds from the last question of a chat to its first token."""
    draw, vocab_size = random.Random(seed), llama.model.params.vocab_size
    history: list[int] = []
    new = _CHAT_TOKENS // _TURNS - _ANSWER_TOKENS
    for turn in range(_TURNS):
        history += random_tokens(draw, new, vocab_size)
        if turn == _TURNS - 1:
            break
        history += llama.generate([history], _ANSWER_TOKENS, 0.0, ignore_eos=True)[0][0]
    started = time.perf_counter()
    llama.generate([history], 1, 0.0)
    return time.perf_counter() - started


def requests_per_second(llama: Llama, seed: int) -> float:
    """Clients in threads of their own, whose prompts begin alike."""
    draw, vocab_size = random.Random(seed), llama.model.params.vocab_size
    system = random_tokens(draw, _SYSTEM_TOKENS, vocab_size)
    prompts = [system + random_tokens(draw, 20, vocab_size) for _ in range(_CLIENTS)]
    started = time.perf_counter()
    with ThreadPoolExecutor(_CLIENTS) as pool:
        list(pool.map(lambda prompt: llama.generate([prompt], _OUTPUT_TOKENS, 0.0, ignore_eos=True), prompts))
    return _CLIENTS / (time.perf_counter() - started)


def main(shape: str = "1b", rounds: int = 5, batch: int = 8, dtype: str = "bfloat16") -> str:
    """Measures prefix reuse on random weights.

    Args:
        shape: tiny, 110m, 200m, 1b or 7b.
        rounds: number of times that each way is measured, in turn.
        batch: max_batch_size.
        dtype: of weights and cache.
    """
    with tempfile.TemporaryDirectory() as folder:
        _, job = make_job(shape, None, Path(folder), dtype)
        ways = [
            Llama.build(job.ckpt_dir, job.tokenizer_path, 1200, batch, dtype=dtype, reuse_prefixes=reuse)
            for reuse in (True, False)
        ]
        turns, rates = [], []
        for seed in range(rounds + 1):
            turns.append([last_turn(llama, seed) for llama in ways])
            rates.append([requests_per_second(llama, 1000 + seed) for llama in ways])
    turns, rates = turns[1:], rates[1:]  # the first round is a warm-up
    lines = [f"{shape}, {dtype}, max_batch_size {batch}, medians of {rounds} rounds in turn"]
    with_reuse, without = (statistics.median(column) for column in zip(*turns, strict=True))
    ratio = statistics.median(a / b for a, b in turns)
    lines.append(
        f"first token of turn {_TURNS} ({_CHAT_TOKENS} tokens): {with_reuse:.3f} s, {without:.3f} without; {ratio:.2f}"
    )
    with_reuse, without = (statistics.median(column) for column in zip(*rates, strict=True))
    ratio = statistics.median(a / b for a, b in rates)
    lines.append(
        f"{_CLIENTS} clients, {_SYSTEM_TOKENS} tokens in common: {with_reuse:.2f} requests/s, {without:.2f} without; "
        f"{ratio:.2f} times"
    )
    return "\n".join(lines)


if __name__ == "__main__":
    run(main)
