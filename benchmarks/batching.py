"""Many prompts of uneven lengths: the batch kept full, against fixed batches that last as long as their longest row.

    python benchmarks/batching.py

64 prompts, 8 rows, prompt and output lengths drawn from a log-normal distribution; both ways run in turn in each round.
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

import fire
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from llama import runtime
from llama.args import ModelArgs
from llama.checkpoint import tensor_shapes
from llama.decoding import decode
from llama.model import Transformer
from llama.projection import can_pack
from llama.sampling import Sampler

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
        model.pack(dtype, lambda weight: None)
    return model


def skewed_lengths(n: int, median: int, longest: int, seed: int) -> list[int]:
    """Log-normal, as lengths of real requests are: most are short, a few are many times longer."""
    draw = random.Random(seed)
    return [min(longest, max(1, round(draw.lognormvariate(math.log(median), 1.0)))) for _ in range(n)]


def complete(model: Transformer, prompts: list[list[int]], targets: list[int]) -> None:
    """Generates until each prompt has its target's number of tokens."""
    n_lanes = min(len(prompts), model.params.max_batch_size)
    sampler = Sampler(0.0, 1.0, n_lanes, torch.Generator())
    counts = [0] * len(prompts)

    def ends(prompt: int, token: int) -> bool:
        counts[prompt] += 1
        return counts[prompt] >= targets[prompt]

    for _ in decode(model, prompts, sampler, lanes=range(n_lanes), max_gen_len=max(targets), eos_id=NO_EOS, ends=ends):
        pass
    assert counts == targets


def in_fixed_batches(model: Transformer, prompts: list[list[int]], targets: list[int]) -> None:
    """Each batch runs until its longest row is through; rows that ended earlier still hold their places."""
    size = model.params.max_batch_size
    for start in range(0, len(prompts), size):
        batch = targets[start : start + size]
        complete(model, prompts[start : start + size], [max(batch)] * len(batch))


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
    """Prints tokens a second of both ways and their ratio, median and range over the rounds, and a JSON line."""
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
    rates: dict[str, list[float]] = {"kept full": [], "fixed batches": []}
    for _ in range(repeats):
        rates["kept full"].append(tokens / timed(lambda: complete(model, prompts, targets)))
        rates["fixed batches"].append(tokens / timed(lambda: in_fixed_batches(model, prompts, targets)))
    for name, values in rates.items():
        print(f"{name:14} {statistics.median(values):8.1f} tok/s  ({min(values):.1f} to {max(values):.1f})")
    ratios = [full / fixed for full, fixed in zip(rates["kept full"], rates["fixed batches"], strict=True)]
    print(f"{'ratio':14} {statistics.median(ratios):8.2f}        ({min(ratios):.2f} to {max(ratios):.2f})")
    print(json.dumps({"benchmark": "batching", "tokens": tokens, "rates": rates, "ratios": ratios}))


if __name__ == "__main__":
    fire.Fire(main)
