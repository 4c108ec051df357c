"""How much memory a network needs on each rank, and how much a device has.

`Llama.build` compares the two before it loads.
"""

from __future__ import annotations

import os
import resource
import sys
import traceback
from bisect import bisect
from contextlib import suppress
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path

import torch

from llama.checkpoint.format import is_linear, tensor_shapes
from llama.layers.cache import SPARE_POSITIONS
from llama.model import ModelArgs

GIB = 1024**3
_MEMINFO = Path("/proc/meminfo")
_CGROUP_FILES = (  # (limit, usage) of the container that this process may run in: version 2, version 1
    ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
    ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
)


@dataclass(frozen=True)
class MemoryPlan:
    """The bytes that one rank needs: for the weights, the KV cache, and the largest activations of a pass.

    Attributes:
        args: the network; its `max_batch_size` and `max_seq_len` size cache and activations.
        dtype, quantize: as in `Llama.build`.
        device_type: on "cuda", the product of a quantized layer has its weight in `dtype` meanwhile.
    """

    args: ModelArgs
    model_parallel_size: int
    dtype: torch.dtype
    quantize: str | None = None
    device_type: str = "cpu"

    @property
    def weights(self) -> int:
        total = 0
        for name, shape in tensor_shapes(replace(self.args, n_layers=1), self.model_parallel_size).items():
            n_bytes = prod(shape) * self.dtype.itemsize
            if self.quantize is not None and is_linear(name):
                n_bytes = prod(shape) + 4 * shape[0]  # a scale in float32 per row
            total += n_bytes * (self.args.n_layers if name.startswith("layers.") else 1)
        return total

    @property
    def kv_cache(self) -> int:
        args = self.args
        per_position = 2 * args.n_layers * (args.kv_heads // self.model_parallel_size) * args.head_dim
        return self.dtype.itemsize * per_position * args.max_batch_size * (args.max_seq_len + SPARE_POSITIONS)

    @property
    def activations(self) -> int:
        """The widest moment of a pass: the feed-forward of a prefill, or the sampling over a batch's logits."""
        args, size, ranks = self.args, self.dtype.itemsize, self.model_parallel_size
        residual_and_norm = args.dim * (3 * size + 2 * 4)  # x, h and the normed x; the norm itself in float32
        heads = (args.dim + 2 * args.kv_heads * args.head_dim) // ranks
        attention = heads * (size + 2 * 4)  # rotary: float32
        feed_forward = 3 * args.hidden_dim // ranks * size  # w1 x, silu of it, w3 x
        if self.quantize is not None:  # the input of w2, twice in float32 and once as int8, its output in float32
            feed_forward = max(feed_forward, args.hidden_dim // ranks * (size + 10)) + args.dim * 8
        mask = args.max_seq_len * size
        prefill = args.prefill_tokens * (residual_and_norm + max(attention, feed_forward) + mask)
        sampling = 15 * args.max_batch_size * args.vocab_size * 4  # logits, probabilities, order, random numbers
        return prefill + sampling + self._dequantized

    @property
    def _dequantized(self) -> int:
        """The largest layer's weight in the dtype, where a product needs it."""
        if self.quantize is None or self.device_type != "cuda":
            return 0
        shapes = tensor_shapes(self.args, self.model_parallel_size)
        return self.dtype.itemsize * max(prod(shape) for name, shape in shapes.items() if is_linear(name))

    @property
    def total(self) -> int:
        return self.weights + self.kv_cache + self.activations

    def largest(self, size: str, upper: int, available: int, **others: int) -> int:
        """The largest value up to `upper` of a size of `args`, the `others` given, that fits; 0 if none does."""

        def total(n: int) -> int:
            return replace(self, args=replace(self.args, **others, **{size: n})).total

        return bisect(range(1, upper + 1), available, key=total)

    def check(self, available: int, where: str) -> None:
        """Raises MemoryError, with each part and the sizes that would fit, if `available` bytes are not enough.

        The error calls the device `where`, such as "cuda:0".
        """
        if self.total <= available:
            return
        batch = self.largest("max_batch_size", self.args.max_batch_size, available)
        seq = self.largest("max_seq_len", self.args.max_seq_len, available)
        both = self.largest("max_seq_len", self.args.max_seq_len, available, max_batch_size=1)
        ways = [f"max_batch_size to {batch}"] * (batch > 0) + [f"max_seq_len to {seq}"] * (seq > 0)
        advice = f"lower {' or '.join(ways) or f'max_batch_size to 1 and max_seq_len to {both}'}"
        if not both:
            advice = (
                "the weights leave no room: use a dtype of fewer bytes, more memory, or a checkpoint split over more "
                "ranks"
            )
        raise MemoryError(
            f"this model needs {self.total / GIB:.2f} GiB on {where}, which has {available / GIB:.2f} GiB available\n"
            f"{self}\n{advice}"
        )

    def __str__(self) -> str:
        """One line per part, with the arguments that it depends on."""
        form = str(self.dtype).removeprefix("torch.") + (f", quantize={self.quantize}" if self.quantize else "")
        sizes = f"(max_batch_size={self.args.max_batch_size}, max_seq_len={self.args.max_seq_len})"
        return (
            f"  weights      {self.weights / GIB:8.2f} GiB  ({form}, MP={self.model_parallel_size})\n"
            f"  KV cache     {self.kv_cache / GIB:8.2f} GiB  {sizes}\n"
            f"  activations  {self.activations / GIB:8.2f} GiB"
        )


def out_of_memory(error: torch.OutOfMemoryError, plan: MemoryPlan, where: str) -> MemoryError:
    """A GPU's error with the plan; frees the memory of the work that failed.

    `build` checks the plan beforehand: this happens where other programs use the same memory.
    """
    traceback.clear_frames(error.__traceback__)  # they hold the work's tensors
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return MemoryError(
        f"{where} ran out of memory ({str(error).splitlines()[0]})\n"
        f"the plan of this model is {plan.total / GIB:.2f} GiB\n{plan}\n"
        "use fewer or shorter prompts, or build with a lower max_batch_size or max_seq_len, or end the other "
        "programs on the device"
    )


def available_memory(device: torch.device) -> int:
    """Bytes that can still be allocated on `device`, by all its processes together."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    if device.type == "mps":
        return torch.mps.recommended_max_memory() - torch.mps.driver_allocated_memory()
    # What the kernel calls available (free, or page cache it can drop), and no more than the container may take.
    host = 1024 * _read_numbers(_MEMINFO).get("MemAvailable:", 0)
    amounts = [host or os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
    for limit_file, usage_file in _CGROUP_FILES:
        stat = _read_numbers(Path(usage_file).with_name("memory.stat"))
        prefix = "total_" if "total_inactive_file" in stat else ""
        cached = sum(stat.get(f"{prefix}{name}", 0) for name in ("inactive_file", "active_file"))  # can be dropped too
        with suppress(OSError, ValueError):  # no such controller, or a limit of "max"
            amounts.append(int(Path(limit_file).read_text()) - int(Path(usage_file).read_text()) + cached)
    return max(0, min(amounts))


def free_address_space() -> int:
    """Bytes that this process may still allocate or map by its own limit (`ulimit -v`), which mapped files count in."""
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    if limit == resource.RLIM_INFINITY:
        return sys.maxsize
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[0])
    except OSError:  # no /proc
        return limit
    return limit - pages * os.sysconf("SC_PAGE_SIZE")


def _read_numbers(path: Path) -> dict[str, int]:
    """What a file says that has a name and a number per line; nothing if it is missing or of another form."""
    try:
        lines = [line.split() for line in path.read_text().splitlines()]
        return {name: int(number) for name, number, *_ in lines}
    except (OSError, ValueError):
        return {}
