"""`python benchmarks/step_profile.py --shape 1b --batch 8`: where the time of a decode step goes, as a table.

First what bounds a step: its products alone, reading their weights, multiplying with them. Then one row per operation
(on CUDA: per kernel), most expensive first, and the rest: the time of a profiled step in which none of them runs.
Nothing is fetched.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

if __name__ == "__main__":  # run as a file: packages are looked for in the repository, not in this folder
    sys.path[0] = str(Path(__file__).parent.parent)

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.machine import cpu_model, matmul_rate, seconds, typical_bandwidth
from benchmarks.shapes import SHAPES, check_shape, write_checkpoint, write_tokenizer
from llama import Llama
from llama.engine.cuda_graphs import PlainStepper
from llama.layers.linear import packable_layers
from llama.tools.commandline import run

STEPS = 10  # that are profiled
TURNS, REPEATS = 5, 5  # of steps, their products and plain reading; how often each in its turn


def main(
    shape: str = "1b",
    *,
    batch: int = 1,
    context: int = 128,
    device: str = "cpu",
    dtype: str = "bfloat16",
    max_batch_size: int | None = None,
    threads: int | None = None,
    rows: int = 16,
    quantize: str | None = None,
    ckpt_dir: str | None = None,
) -> None:
    """Profiles greedy decode steps of random weights.

    Args:
        shape: tiny, 200m, 1b, 7b or 13b.
        batch: rows of a step.
        context: tokens in the cache before the first of the steps.
        device: "cpu" or "cuda".
        dtype: "bfloat16", "float16" or "float32".
        max_batch_size: of the build; None for `batch`.
        threads: None for torch's choice.
        rows: of the table.
        quantize: "int8" for int8 weights.
        ckpt_dir: a checkpoint of that shape in one file, if there is one already.
    """
    check_shape(shape)
    if threads:
        torch.set_num_threads(threads)
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = Path(ckpt_dir or folder)
        if ckpt_dir is None:
            write_checkpoint(checkpoint, shape, getattr(torch, dtype))
        tokenizer = Path(folder) / "tokenizer.model"
        write_tokenizer(tokenizer, SHAPES[shape]["vocab_size"])
        length = context + 2 * STEPS + TURNS * (REPEATS + 1) + 1
        llama = Llama.build(
            checkpoint, tokenizer, length, max_batch_size or batch, device=device, dtype=dtype, quantize=quantize
        )
    step, products = _Steps(llama, batch, context), _Products(llama, batch, quantized=bool(quantize))
    for _ in range(STEPS):
        step()
        products()
    turns = [(_warm_seconds(step), _warm_seconds(products), typical_bandwidth(device)) for _ in range(TURNS)]
    activities = [ProfilerActivity.CUDA if device.startswith("cuda") else ProfilerActivity.CPU]
    with profile(activities=activities) as recorded:
        profiled = statistics.mean(seconds(step) for _ in range(STEPS))
    where = torch.cuda.get_device_name(device) if device.startswith("cuda") else cpu_model()
    sizes = f"batch {batch} of {llama.model.params.max_batch_size}, context {context}"
    print(
        f"{shape}, {quantize or dtype}, {sizes}: {where}, {torch.get_num_threads()} threads, torch {torch.__version__}"
    )
    _print_bounds(turns, profiled, batch, products)
    print(table(recorded, 1e6 * profiled, rows, on_cuda=device.startswith("cuda")))


def _print_bounds(turns: list[tuple[float, float, float]], profiled: float, batch: int, products: _Products) -> None:
    """Prints the time of a step, and what it cannot be shorter than."""
    step, in_products, bandwidth = (statistics.median(values) for values in zip(*turns, strict=True))
    matmul = products.best_rate()
    print(f"a step takes {1e3 * step:.1f} ms ({1e3 * profiled:.1f} profiled): {batch / step:.1f} tokens per second")
    print(f"its products alone take {1e3 * in_products:.1f} ms")
    rate = f"at the {bandwidth / 1e9:.1f} GB/s of plain reading"
    print(f"they read {products.n_bytes / 1e9:.2f} GB: {1e3 * products.n_bytes / bandwidth:.1f} ms {rate}")
    rate = f"at the {matmul / 1e9:.0f} GFLOP/s of the best product"
    print(f"they multiply for {1e3 * products.operations / matmul:.1f} ms {rate}\n")


class _Steps:
    def __init__(self, llama: Llama, batch: int, context: int) -> None:
        self.llama = llama
        self.length = context
        self.stepper = llama.stepper or PlainStepper(llama.model, llama.model.params.max_seq_len)
        device = llama.model.norm.weight.device
        prompts = torch.randint(3, llama.model.vocab_size, (batch, context), device=device)
        with torch.inference_mode():
            self.tokens = llama.model(prompts, 0)[:, -1].argmax(-1)

    @torch.inference_mode()
    def __call__(self) -> None:
        self.tokens = self.stepper(self.tokens.unsqueeze(1), [self.length] * len(self.tokens))[:, -1].argmax(-1)
        self.tokens.tolist()
        self.length += 1


class _Products:
    """The products of a step, one after the other, on inputs that are there: the part that no step can do without."""

    def __init__(self, llama: Llama, batch: int, *, quantized: bool) -> None:
        weights = llama.model.norm.weight
        self._args, self._device, self._dtype = llama.model.params, weights.device, weights.dtype
        layers = packable_layers(llama.model)
        inputs = {layer.weight.size(1): weights.new_ones(batch, 1, layer.weight.size(1)) for layer in layers}
        self._calls = [(layer, inputs[layer.weight.size(1)]) for layer in layers]
        n_weights = sum(layer.weight.numel() for layer in layers)
        self.n_bytes = (1 if quantized else self._dtype.itemsize) * n_weights
        self.operations = 2.0 * batch * n_weights

    @torch.inference_mode()
    def __call__(self) -> None:
        for layer, x in self._calls:
            out = layer(x)
        out.flatten()[:1].tolist()  # waits for a GPU

    def best_rate(self) -> float:
        """Operations a second of a large product."""
        return matmul_rate(self._args.dim, self._args.hidden_dim, 512, str(self._device), self._dtype)


def _warm_seconds(work: Callable[[], None]) -> float:
    """The median of a few, after one that brings Python's own memory back into the caches."""
    work()
    return statistics.median(seconds(work) for _ in range(REPEATS))


def table(recorded: profile, step_us: float, rows: int, *, on_cuda: bool) -> str:
    """Calls, microseconds and share of a step of each operation by itself."""
    times = {}
    for event in recorded.key_averages():
        us = event.self_device_time_total if on_cuda else event.self_cpu_time_total
        times[event.key] = (event.count / STEPS, us / STEPS)
    ranked = sorted(times.items(), key=lambda item: -item[1][1])
    shown = [(name[:60], calls, us) for name, (calls, us) in ranked[:rows] if us > 0]
    others = [numbers for _, numbers in ranked[rows:]]
    shown.append(("all others", sum(calls for calls, _ in others), sum(us for _, us in others)))
    shown.append(("between them", 0, step_us - sum(us for _, us in times.values())))
    lines = [f"{'operation':60}  {'calls':>7}  {'us':>9}  {'share':>6}"]
    lines += [f"{name:60}  {calls:7.0f}  {us:9.0f}  {us / step_us:6.1%}" for name, calls, us in shown]
    return "\n".join(lines)


if __name__ == "__main__":
    run(main)
