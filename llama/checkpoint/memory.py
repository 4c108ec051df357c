"""How much memory a network needs on each rank, and how much a device has.

`Llama.build` compares the two before it loads.
"""

from __future__ import annotations

import os
import resource
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path

import torch

from llama.checkpoint.format import is_linear, tensor_shapes
from llama.layers.cache import SPARE_POSITIONS
from llama.model import ModelArgs

GIB = 1024**3
_CGROUP_FILES = (  # (limit, usage) of the container that this process may run in: version 2, version 1
    ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
    ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
)


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes that one rank needs: the weights, the KV cache, and the largest activations of a prefill."""

    weights: int
    kv_cache: int
    activations: int

    @property
    def total(self) -> int:
        return self.weights + self.kv_cache + self.activations


def plan_memory(
    args: ModelArgs, model_parallel_size: int, dtype: torch.dtype, *, quantize: str | None = None
) -> MemoryPlan:
    """The plan of one rank for `args`, whose `max_batch_size` and `max_seq_len` size cache and activations.

    Args:
        quantize: as in `Llama.build`.
    """
    size = dtype.itemsize
    return MemoryPlan(
        weights=_weight_bytes(args, model_parallel_size, size, quantize),
        kv_cache=size
        * (2 * args.n_layers * (args.kv_heads // model_parallel_size) * args.head_dim)
        * (args.max_batch_size * (args.max_seq_len + SPARE_POSITIONS)),
        activations=_activation_bytes(args, model_parallel_size, size, quantize),
    )


def _weight_bytes(args: ModelArgs, model_parallel_size: int, size: int, quantize: str | None) -> int:
    total = 0
    for name, shape in tensor_shapes(replace(args, n_layers=1), model_parallel_size).items():
        n_bytes = prod(shape) * size
        if quantize is not None and is_linear(name):
            is_int4 = quantize == "int4" and name != "output.weight"
            # int4: 4 bits, and 2 + 2 bytes per group of 32. int8: a byte, and a scale in float32 per row.
            n_bytes = prod(shape) * 5 // 8 if is_int4 else prod(shape) + 4 * shape[0]
        total += n_bytes * (args.n_layers if name.startswith("layers.") else 1)
    return total


def _activation_bytes(args: ModelArgs, model_parallel_size: int, size: int, quantize: str | None) -> int:
    """The widest moment of a pass: the feed-forward of a prefill, or the sampling over a batch's logits."""
    residual_and_norm = args.dim * (3 * size + 2 * 4)  # x, h and the normed x; the norm itself in float32
    heads = (args.dim + 2 * args.kv_heads * args.head_dim) // model_parallel_size
    attention = heads * (size + 2 * 4)  # rotary: float32
    feed_forward = 3 * args.hidden_dim // model_parallel_size * size  # w1 x, silu of it, w3 x
    if quantize is not None:  # the input of w2, twice in float32 and once as int8, its output in float32
        feed_forward = max(feed_forward, args.hidden_dim // model_parallel_size * (size + 10)) + args.dim * 8
    mask = args.max_seq_len * size
    prefill = args.prefill_tokens * (residual_and_norm + max(attention, feed_forward) + mask)
    sampling = 15 * args.max_batch_size * args.vocab_size * 4  # logits, probabilities, order, random numbers
    return prefill + sampling


def check_memory(
    args: ModelArgs,
    model_parallel_size: int,
    dtype: torch.dtype,
    available: int,
    where: str,
    *,
    quantize: str | None = None,
) -> None:
    """Raises MemoryError, with each part and the sizes that would fit, if the plan exceeds `available` bytes.

    Args:
        where: name of the device in the error, such as "cuda:0".
        quantize: as in `Llama.build`.
    """
    plan = plan_memory(args, model_parallel_size, dtype, quantize=quantize)
    if plan.total <= available:
        return

    def fits(candidate: ModelArgs) -> bool:
        return plan_memory(candidate, model_parallel_size, dtype, quantize=quantize).total <= available

    batch = largest(args.max_batch_size, lambda n: fits(replace(args, max_batch_size=n)))
    seq = largest(args.max_seq_len, lambda n: fits(replace(args, max_seq_len=n)))
    both = largest(args.max_seq_len, lambda n: fits(replace(args, max_batch_size=1, max_seq_len=n)))
    ways = [f"max_batch_size to {batch}"] * (batch > 0) + [f"max_seq_len to {seq}"] * (seq > 0)
    advice = f"lower {' or '.join(ways) or f'max_batch_size to 1 and max_seq_len to {both}'}"
    if not both:
        advice = (
            "the weights leave no room: use a dtype of fewer bytes, more memory, or a checkpoint split over more ranks"
        )
    raise MemoryError(
        f"this model needs {plan.total / GIB:.2f} GiB on {where}, which has {available / GIB:.2f} GiB available\n"
        f"{_table(plan, args, model_parallel_size, dtype, quantize)}\n{advice}"
    )


def _table(
    plan: MemoryPlan, args: ModelArgs, model_parallel_size: int, dtype: torch.dtype, quantize: str | None = None
) -> str:
    """One line per part, with the arguments that it depends on."""
    form = str(dtype).removeprefix("torch.") + (f", quantize={quantize}" if quantize else "")
    sizes = f"(max_batch_size={args.max_batch_size}, max_seq_len={args.max_seq_len})"
    return (
        f"  weights      {plan.weights / GIB:8.2f} GiB  ({form}, MP={model_parallel_size})\n"
        f"  KV cache     {plan.kv_cache / GIB:8.2f} GiB  {sizes}\n"
        f"  activations  {plan.activations / GIB:8.2f} GiB"
    )


@contextmanager
def out_of_memory_explained(
    args: ModelArgs, model_parallel_size: int, dtype: torch.dtype, where: str
) -> Iterator[None]:
    """Raises a GPU's out-of-memory error inside as a MemoryError with the plan, and frees the memory of the work.

    `build` checks the plan beforehand: this happens where other programs use the same memory.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise out_of_memory(error, args, model_parallel_size, dtype, where) from None


def out_of_memory(
    error: torch.OutOfMemoryError, args: ModelArgs, model_parallel_size: int, dtype: torch.dtype, where: str
) -> MemoryError:
    """The error with the plan; frees the memory of the work that failed."""
    traceback.clear_frames(error.__traceback__)  # they hold the work's tensors
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    plan = plan_memory(args, model_parallel_size, dtype)
    return MemoryError(
        f"{where} ran out of memory ({str(error).splitlines()[0]})\n"
        f"the plan of this model is {plan.total / GIB:.2f} GiB\n"
        f"{_table(plan, args, model_parallel_size, dtype)}\n"
        "use fewer or shorter prompts, or build with a lower max_batch_size or max_seq_len, or end the other "
        "programs on the device"
    )


def largest(upper: int, fits: Callable[[int], bool]) -> int:
    """The largest n from 1 to `upper` that fits, by bisection; 0 if none does."""
    low, high = 0, upper
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low


def available_memory(device: torch.device) -> int:
    """Bytes that can still be allocated on `device`, by all its processes together."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    if device.type == "mps":
        return torch.mps.recommended_max_memory() - torch.mps.driver_allocated_memory()
    return _available_host_memory()


def _available_host_memory() -> int:
    """What the kernel calls available (free, or page cache it can drop), and no more than the container may take."""
    amounts = [_read_meminfo() or os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
    for limit_file, usage_file in _CGROUP_FILES:
        try:
            used = int(Path(usage_file).read_text()) - _file_cache(Path(usage_file).with_name("memory.stat"))
            amounts.append(int(Path(limit_file).read_text()) - used)
        except (OSError, ValueError):  # no such controller, or a limit of "max"
            continue
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


def _file_cache(stat_file: Path) -> int:
    """Bytes of a container's usage that are cached files, which the kernel drops when memory is asked for."""
    stat = _read_numbers(stat_file)
    prefix = "total_" if "total_inactive_file" in stat else ""
    return sum(stat.get(f"{prefix}{name}", 0) for name in ("inactive_file", "active_file"))


def _read_meminfo() -> int | None:
    """MemAvailable in bytes; None where there is no /proc."""
    kib = _read_numbers(Path("/proc/meminfo")).get("MemAvailable:")
    return None if kib is None else 1024 * kib


def _read_numbers(path: Path) -> dict[str, int]:
    """What a file says that has a name and a number per line; nothing if it is missing or of another form."""
    try:
        lines = [line.split() for line in path.read_text().splitlines()]
        return {name: int(number) for name, number, *_ in lines}
    except (OSError, ValueError):
        return {}
