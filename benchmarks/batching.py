"""Many prompts of uneven lengths: the batch kept full, against calls with as many prompts as there are rows.

    python benchmarks/batching.py

64 prompts, 8 rows, prompt and output lengths drawn from a log-normal distribution. Calls of 8 are measured twice: as
this library makes them, where a row that ends leaves the batch, and as the published code does, where it stays until
the longest row is through. All ways run in turn in each round.
"""

from __future__ import annotations

import json
import math
import random
import statistics
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

if __name__ == "__main__":  # run as a file: packages are looked for in the repository, not in this folder
    sys.path[0] = str(Path(__file__).parent.parent)

from benchmarks.machine import seconds
from benchmarks.ours import greedy_steps
from benchmarks.shapes import make_job
from llama import Llama
from llama.tools.commandline import run

MAX_SEQ_LEN = 512
LONGEST = 255  # tokens of a prompt or an output


def skewed_lengths(n: int, median: int, longest: int, seed: int) -> list[int]:
    """Log-normal, as lengths of real requests are: most are short, a few are many times longer."""
    draw = random.Random(seed)
    return [min(longest, max(1, round(draw.lognormvariate(math.log(median), 1.0)))) for _ in range(n)]


def random_requests(n: int, prompt_median: int, output_median: int, vocab_size: int) -> list[tuple[list[int], int]]:
    """Prompts of ids past the control pieces, and the number of tokens to generate for each."""
    draw = random.Random(0)
    lengths = skewed_lengths(n, prompt_median, LONGEST, seed=1)
    prompts = [[draw.randrange(3, vocab_size) for _ in range(length)] for length in lengths]
    return list(zip(prompts, skewed_lengths(n, output_median, LONGEST, seed=2), strict=True))


def complete(llama: Llama, prompts: list[list[int]], targets: list[int]) -> None:
    """Generates until each prompt has its target's number of tokens."""
    assert sum(1 for _ in greedy_steps(llama, prompts, targets)) == sum(targets)


def in_calls(llama: Llama, prompts: list[list[int]], targets: list[int], *, rows_stay: bool) -> None:
    """One call for each `max_batch_size` prompts.

    Args:
        rows_stay: whether all rows of a call go on until its longest one is through.
    """
    size = llama.model.params.max_batch_size
    for start in range(0, len(prompts), size):
        batch = targets[start : start + size]
        complete(llama, prompts[start : start + size], [max(batch)] * len(batch) if rows_stay else batch)


def main(
    shape: str = "200m",
    *,
    n_prompts: int = 64,
    batch: int = 8,
    prompt_median: int = 32,
    output_median: int = 32,
    repeats: int = 3,
    dtype: str = "bfloat16",
) -> None:
    """Prints tokens per second of each way and the ratios to it, median and range over the rounds, and a JSON line."""
    with tempfile.TemporaryDirectory() as folder:
        args, job = make_job(shape, None, Path(folder), dtype)
        llama = Llama.build(job.ckpt_dir, job.tokenizer_path, MAX_SEQ_LEN, batch, device="cpu", dtype=dtype)
    requests = random_requests(n_prompts, prompt_median, output_median, args.vocab_size)
    prompts, targets = [prompt for prompt, _ in requests], [n_tokens for _, n_tokens in requests]
    tokens = sum(targets)
    print(f"{n_prompts} prompts of up to {max(map(len, prompts))} tokens, outputs of {min(targets)} to {max(targets)}")
    ways: dict[str, Callable[[], None]] = {
        "kept full": lambda: complete(llama, prompts, targets),
        f"calls of {batch}": lambda: in_calls(llama, prompts, targets, rows_stay=False),
        f"calls of {batch}, rows stay": lambda: in_calls(llama, prompts, targets, rows_stay=True),
    }
    rates: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(repeats):
        for name, way in ways.items():
            rates[name].append(tokens / seconds(way))
    for name, values in rates.items():
        ratios = [full / value for full, value in zip(rates["kept full"], values, strict=True)]
        print(
            f"{name:22} {statistics.median(values):7.1f} tok/s ({min(values):.1f} to {max(values):.1f})   "
            f"kept full is {statistics.median(ratios):.2f} times as fast ({min(ratios):.2f} to {max(ratios):.2f})"
        )
    print(json.dumps({"benchmark": "batching", "tokens": tokens, "rates": rates}))


if __name__ == "__main__":
    run(main)
