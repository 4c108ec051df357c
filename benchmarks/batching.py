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
import time
from collections.abc import Callable
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from llama import runtime
from llama.args import ModelArgs
from llama.checkpoint import tensor_shapes
from llama.engine import Call, Sequence, engine_of
from llama.kernels import can_pack
from llama.model import Transformer
from llama.sampling import Sampler
from llama.tools.commandline import run

NO_EOS = -1


def random_model(args: ModelArgs, dtype: torch.dtype) -> Transformer:
    """A network of random weights on the CPU, in the form that `Llama.build` would give it."""
    device = torch.device("cpu")
    runtime.init_process_groups(1, device)
    random_numbers = torch.Generator().manual_seed(0)
    state = {
        name: torch.empty(shape, dtype=dtype).normal_(0, 0.02, generator=random_numbers)
        for name, shape in tensor_shapes(args, 1).items()
    }
    model = Transformer.from_state(args, state)
    if can_pack(device, dtype):
        model.pack()
    return model


def skewed_lengths(n: int, median: int, longest: int, seed: int) -> list[int]:
    """Log-normal, as lengths of real requests are: most are short, a few are many times longer."""
    draw = random.Random(seed)
    return [min(longest, max(1, round(draw.lognormvariate(math.log(median), 1.0)))) for _ in range(n)]


def complete(model: Transformer, prompts: list[list[int]], targets: list[int]) -> None:
    """Generates until each prompt has its target's number of tokens."""
    greedy = Sampler(0.0, 1.0, 1, torch.Generator())
    pairs = zip(prompts, targets, strict=True)
    call = Call(Sequence(list(prompt), greedy, 0, target, NO_EOS) for prompt, target in pairs)
    assert sum(1 for _ in engine_of(model).run(call)) == sum(targets)


def in_calls(model: Transformer, prompts: list[list[int]], targets: list[int], *, rows_stay: bool) -> None:
    """One call for each `max_batch_size` prompts.

    Args:
        rows_stay: whether all rows of a call go on until its longest one is through.
    """
    size = model.params.max_batch_size
    for start in range(0, len(prompts), size):
        batch = targets[start : start + size]
        complete(model, prompts[start : start + size], [max(batch)] * len(batch) if rows_stay else batch)


def timed(work: Callable[[], None]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def main(
    dim: int = 1024,
    n_layers: int = 12,
    n_prompts: int = 64,
    batch: int = 8,
    prompt_median: int = 32,
    output_median: int = 32,
    repeats: int = 3,
    dtype: str = "bfloat16",
) -> None:
    """Prints tokens a second of each way and the ratios to it, median and range over the rounds, and a JSON line."""
    args = ModelArgs(
        dim=dim, n_layers=n_layers, n_heads=16, n_kv_heads=4, vocab_size=32000, max_batch_size=batch, max_seq_len=512
    )
    model = random_model(args, runtime.DTYPES[dtype])
    draw = random.Random(0)
    lengths = skewed_lengths(n_prompts, prompt_median, 255, seed=1)
    prompts = [[draw.randrange(3, args.vocab_size) for _ in range(length)] for length in lengths]
    targets = skewed_lengths(n_prompts, output_median, 255, seed=2)
    tokens = sum(targets)
    print(
        f"{n_prompts} prompts of {min(lengths)} to {max(lengths)} tokens, outputs of {min(targets)} to {max(targets)}"
    )
    ways: dict[str, Callable[[], None]] = {
        "kept full": lambda: complete(model, prompts, targets),
        f"calls of {batch}": lambda: in_calls(model, prompts, targets, rows_stay=False),
        f"calls of {batch}, rows stay": lambda: in_calls(model, prompts, targets, rows_stay=True),
    }
    rates: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(repeats):
        for name, way in ways.items():
            rates[name].append(tokens / timed(way))
    for name, values in rates.items():
        ratios = [full / value for full, value in zip(rates["kept full"], values, strict=True)]
        print(
            f"{name:22} {statistics.median(values):7.1f} tok/s ({min(values):.1f} to {max(values):.1f})   "
            f"kept full is {statistics.median(ratios):.2f} times as fast ({min(ratios):.2f} to {max(ratios):.2f})"
        )
    print(json.dumps({"benchmark": "batching", "tokens": tokens, "rates": rates}))


if __name__ == "__main__":
    run(main)
