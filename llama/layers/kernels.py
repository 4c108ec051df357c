"""The products of the linear layers on a CPU: packed bfloat16, int8, and the probe that finds the fastest form.

oneDNN's operators for them are not documented by torch: `can_pack` and `can_quantize` try them before they are used.
"""

from __future__ import annotations

import ctypes
import math
import os
import statistics
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

MiB = 1024**2
PADDED_ROWS = 5  # what fewer rows are padded to where that pays
_PROBE_BYTES = 96 * MiB  # weights that are read for a timing: more than most caches hold
_CLEARLY = 0.97  # of another time, to be preferred to it
_MOST_ROTATED = 32  # inputs per block of the rotation before quantization
QUANTIZED_ELEMENTS = 1 << 17  # that a thread quantizes at a time, so that they stay in the caches of its core
_QUANTIZED_ON_GPU = 1 << 24  # likewise at a time, to launch few kernels
_HUGE, _MADV_HUGEPAGE, _MADV_COLLAPSE = 2 * MiB, 14, 25  # of Linux: size of a page, and advice
_PRODUCT_ROWS = 512  # of an int8 product at most
_REMEMBERED = 1 << 23  # elements of an input at most that is kept for the next product

_ROUNDING = torch.tensor(1.5 * 2**23 + 128, dtype=torch.float32, device="cpu")
_NO_ZERO_POINT = torch.zeros(1, dtype=torch.int64, device="cpu")  # of symmetric weights


@dataclass(frozen=True)
class Kernels:
    """Which of several equal products is the fastest on this processor. See `measure_kernels`."""

    pads_one: bool = False  # the packed product takes one row as PADDED_ROWS: some processors read weights faster then
    pads_few: bool = False  # likewise two or three rows
    packs_one_row: bool = False  # the packed product of one row is faster than the unpacked one


DEFAULT_KERNELS = Kernels()


def pack_weight(weight: Tensor) -> Tensor:
    """A bfloat16 weight (out, in) in oneDNN's blocked layout: opaque, for `packed_linear` alone."""
    blocked: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous())
    return blocked


def packed_linear(x: Tensor, blocked: Tensor, kernels: Kernels = DEFAULT_KERNELS) -> Tensor:
    """x (..., in) times a weight of `pack_weight`, transposed: (..., out)."""
    n_rows = x.numel() // x.size(-1)
    if n_rows == 1 and kernels.pads_one:  # a stride of 0 costs less than other ways to pad
        return _onednn_linear(x.reshape(1, -1).expand(PADDED_ROWS, -1), blocked)[:1].view(*x.shape[:-1], -1)
    padded = PADDED_ROWS if 1 < n_rows < 4 and kernels.pads_few else row_bucket(n_rows)
    if padded == n_rows:
        return _onednn_linear(x, blocked)
    rows = F.pad(x.flatten(0, -2), (0, 0, 0, padded - n_rows))
    return _onednn_linear(rows, blocked)[:n_rows].view(*x.shape[:-1], -1)


def _onednn_linear(x: Tensor, blocked: Tensor) -> Tensor:
    out: Tensor = torch.ops.mkldnn._linear_pointwise(x, blocked, None, "none", [], "")
    return out


def row_bucket(n_rows: int) -> int:
    """The least number of rows, from `n_rows` on, that products are made for.

    oneDNN keeps code and buffers for each number of rows that it has met. With eight sizes between a power of two and
    the next, at most an eighth is padding, and what it keeps is bounded.
    """
    unit = 1 << max(0, n_rows.bit_length() - 4)
    return -(-n_rows // unit) * unit


@dataclass(frozen=True)
class QuantizedWeight:
    """A weight as int8 numbers with one scale per output channel, for `quantized_linear`. See `quantize_values`."""

    blocked: Tensor  # the numbers, in oneDNN's blocked layout: opaque
    scales: Tensor  # (out,) float32
    rotation: Tensor  # (block, block) float32, for each block of the inputs


@torch.no_grad()
def quantize_values(weight: Tensor, scratch: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Quantizes a weight (out, in) to int8, symmetrically, per output channel.

    Inputs and weight are first rotated by a Hadamard matrix in blocks of up to 32 inputs. This leaves the product
    as it is, but spreads the few large inputs that trained networks have, which the scale of a token's inputs would
    otherwise be wasted on (QuaRot, Ashkboos et al. 2024).

    Args:
        scratch: (n,) contiguous memory of any dtype for the numbers, at least as large; None for new memory.

    Returns:
        The numbers (out, in) int8, from -127 to 127, and the scales (out,) float32.
    """
    (n_out, n_in), device = weight.shape, weight.device
    rotation = rotation_of(n_in, device)
    block = rotation.size(0)
    if scratch is None:
        scratch = torch.empty(n_out * n_in, dtype=torch.int8, device=device)
    values = scratch.view(torch.int8)[: n_out * n_in].view(n_out, n_in)
    peaks = torch.empty((n_out, 1), dtype=torch.float32, device=device)
    n_rows = max(1, (QUANTIZED_ELEMENTS if weight.is_cpu else _QUANTIZED_ON_GPU) // n_in)
    for part, values_of_part, peaks_of_part in zip(
        weight.split(n_rows), values.split(n_rows), peaks.split(n_rows), strict=True
    ):
        rotated = (part.float().reshape(-1, block) @ rotation).view(-1, n_in)
        torch.amax(rotated.abs(), dim=1, keepdim=True, out=peaks_of_part)
        values_of_part.copy_(rotated.mul_(127 / peaks_of_part.clamp_min(1e-30)).round_())
    return values, peaks.flatten() / (127 * block)  # entries of the rotation are 1 and -1 instead of orthonormal


@dataclass(frozen=True)
class Int8Weight:
    """A weight as `quantize_values` rounds it, for `dequantized_linear`."""

    numbers: Tensor  # (out, in) int8
    scales: Tensor  # (out,)
    rotation: Tensor  # (block, block) float32, for each block of the inputs


def dequantized_linear(x: Tensor, weight: Int8Weight) -> Tensor:
    """x (..., in) times a weight, transposed: (..., out), in the dtype of x. On any device, with gradients.

    The inputs are rotated in place of the weight, and not rounded to int8.
    """
    block = weight.rotation.size(0)
    # Rotating twice multiplies by the size of a block: divided out of the inputs, which float16 then has room for.
    rotated: Tensor = (x.unflatten(-1, (-1, block)) @ (weight.rotation / block).to(x.dtype)).flatten(-2)
    scales = weight.scales.float() * block
    if torch.compiler.is_compiling() and rotated.numel() == rotated.size(-1):
        # One row: the compiler fuses this to a single reading of the int8 numbers.
        out: Tensor = (weight.numbers * rotated.flatten().float()).sum(-1) * scales
        return out.to(x.dtype).view(*x.shape[:-1], -1)
    if torch.is_grad_enabled() or torch.compiler.is_compiling():
        return F.linear(rotated, (weight.numbers * scales.unsqueeze(1)).to(x.dtype))
    plain = x.new_empty(weight.numbers.shape)  # in one pass on CUDA, without a float32 copy
    return F.linear(rotated, torch.mul(weight.numbers, scales.unsqueeze(1), out=plain))


@torch.no_grad()
def block_quantized(values: Tensor, scales: Tensor) -> QuantizedWeight:
    """Numbers and scales as of `quantize_values`, for `quantized_linear`."""
    blocked = torch.ops.onednn.qlinear_prepack(values.contiguous(), None)
    # The peaks of inputs are in units of 127 too.
    return QuantizedWeight(blocked, scales.float() / 127, rotation_of(values.size(1), values.device))


def quantized_linear(x: Tensor, weight: QuantizedWeight) -> Tensor:
    """x (..., in) times a weight of `block_quantized`, transposed: (..., out), in the dtype of x.

    Each row of x is rotated and quantized to int8 by its own largest value; the sums are integers. A row's
    result does not depend on the other rows.
    """
    rows = x.reshape(-1, x.size(-1))
    numbers, peaks = _quantized_input(rows, weight.rotation)
    # Of so many rows that malloc keeps the memory of their sums: getting new pages takes longer than a product.
    parts = zip(numbers.split(_PRODUCT_ROWS), peaks.split(_PRODUCT_ROWS), strict=True)
    outs = [_sums(part, weight).mul_(scale).to(x.dtype) for part, scale in parts]
    return (outs[0] if len(outs) == 1 else torch.cat(outs)).view(*x.shape[:-1], -1)


def _sums(numbers: Tensor, weight: QuantizedWeight) -> Tensor:
    padding = row_bucket(len(numbers)) - len(numbers)
    padded = F.pad(numbers, (0, 0, 0, padding)) if padding else numbers
    return onednn_int8_linear(padded.view(torch.uint8), weight.blocked, weight.scales)[: len(numbers)]


_last_input: tuple[Tensor, tuple[Tensor, Tensor]] | None = None  # a copy of it, and what it was quantized to


def _quantized_input(rows: Tensor, rotation: Tensor) -> tuple[Tensor, Tensor]:
    """`_quantized_rows` of any number of rows.

    Several layers in a row take the same input, such as wq, wk and wv: comparing it to the last one takes a tenth of
    the time. It is compared by its values, since a hook may edit it in between. A tracer, which cannot compare values,
    and other dispatch modes see each product quantize its input.
    """
    global _last_input
    remembers = torch._C._len_torch_dispatch_stack() == 0
    last = _last_input if remembers else None  # another thread may replace it
    if last is not None and last[0].dtype == rows.dtype and last[0].shape == rows.shape and _same_bits(last[0], rows):
        return last[1]
    n_rows, n_in = rows.shape
    at_once = max(1, QUANTIZED_ELEMENTS * torch.get_num_threads() // n_in)
    if n_rows <= at_once:
        quantized = _quantized_rows(rows, rotation)
    else:
        parts = [_quantized_rows(part, rotation) for part in rows.split(at_once)]
        quantized = torch.cat([numbers for numbers, _ in parts]), torch.cat([peaks for _, peaks in parts])
    if remembers:
        _last_input = (rows.clone(), quantized) if rows.numel() <= _REMEMBERED else None
    return quantized


def _same_bits(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors of a shape and dtype are equal, compared by eight bytes where they can be.

    That takes a fifth of the time. NaN equals itself then, and 0.0 is not -0.0.
    """
    n = 8 // one.element_size()
    if all(t.is_contiguous() and t.size(-1) % n == t.storage_offset() % n == t.is_neg() == 0 for t in (one, other)):
        one, other = one.view(torch.int64), other.view(torch.int64)
    return torch.equal(one, other)


def _quantized_rows(rows: Tensor, rotation: Tensor) -> tuple[Tensor, Tensor]:
    """Each row (n, in), rotated, as int8 numbers whose bits are uint8 around 128, and its peak (n, 1), which 127 is.

    The numbers are the low bits of an int32. Converted to uint8 itself they would take five times as long.
    """
    rotated = (rows.reshape(-1, rotation.size(0)).float() @ rotation).view(rows.shape)
    peaks = rotated.abs().amax(-1, keepdim=True)
    # Adding 1.5 * 2^23 rounds to whole numbers, and leaves them in the low bits; adding 128 more is the zero point. A
    # row of zeros is not a number here, and becomes any uint8; its peak makes the products 0.
    rounded = torch.add(_ROUNDING, rotated.div_(peaks), alpha=127, out=rotated).view(torch.int32)
    return rounded.to(torch.int8), peaks


def onednn_int8_linear(x: Tensor, blocked: Tensor, scales: Tensor) -> Tensor:
    """(x - 128) (rows, in) times int8 numbers, times the scale of each output: (rows, out) float32.

    x is uint8: oneDNN's product of signed inputs is its slow reference.
    """
    out: Tensor = torch.ops.onednn.qlinear_pointwise.default(
        x, 1.0, 128, blocked, scales, _NO_ZERO_POINT, None, 1.0, 0, torch.float32, "none", [], ""
    )
    return out


def rotation_of(n_in: int, device: torch.device) -> Tensor:
    """What `n_in` inputs are rotated by, block after block: a symmetric Hadamard matrix, of entries 1 and -1.

    Its square is its size, a power of two, times the identity.
    """
    if torch.compiler.is_compiling():
        return _rotation.__wrapped__(n_in, device)  # a tracer's tensor is not to be kept
    return _rotation(n_in, device)


@cache
def _rotation(n_in: int, device: torch.device) -> Tensor:
    matrix = torch.ones((1, 1), dtype=torch.float32, device=device)
    while len(matrix) < math.gcd(n_in, _MOST_ROTATED):
        matrix = torch.cat((torch.cat((matrix, matrix), 1), torch.cat((matrix, -matrix), 1)))
    return matrix


def use_huge_pages(weights: Iterable[Tensor]) -> threading.Thread | None:
    """Has Linux 6.1 or later move weights, packed or plain, to pages of 2 MiB, in a thread of low priority.

    A processor finds such pages faster: where memory is slow, as in a busy virtual machine, steps take two thirds of
    their time. Many systems give them only where they are asked for. Weights may be used, and freed, meanwhile.

    Returns:
        The thread; None, without effect, where there are no such pages or no weights as large as one.
    """
    large = []
    if sys.platform == "linux" and "[never]" not in _huge_page_policy():
        with suppress(AttributeError, RuntimeError):  # a torch without the operators that say where a packed weight is
            large = [weakref.ref(weight) for weight in weights if _span(weight)[1] > _HUGE]
    if not large:
        return None

    def move() -> None:
        with suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 19)
        seconds = 0.0
        for reference in large:
            time.sleep(4 * seconds)  # leaves the memory to the network's steps
            started = time.perf_counter()
            if (weight := reference()) is not None and not _move_to_huge_pages(weight):
                return
            del weight  # may be freed meanwhile
            seconds = time.perf_counter() - started

    thread = threading.Thread(target=move, name="huge pages", daemon=True)
    thread.start()
    return thread


def _move_to_huge_pages(weight: Tensor) -> bool:
    """Returns whether it worked: not for a mapped weight, by an old kernel, or without free memory in one piece."""
    begin, n_bytes = _span(weight)
    first, end = -(-begin // _HUGE) * _HUGE, (begin + n_bytes) // _HUGE * _HUGE
    address, size, madvise = ctypes.c_void_p(first), ctypes.c_size_t(max(0, end - first)), ctypes.CDLL(None).madvise
    return not (madvise(address, size, _MADV_HUGEPAGE) or madvise(address, size, _MADV_COLLAPSE))


def _span(weight: Tensor) -> tuple[int, int]:
    """The address of a weight, and its number of bytes."""
    if weight.layout is torch.strided:
        return weight.data_ptr(), weight.nbytes
    return torch.ops.mkldnn.data_ptr(weight), torch.ops.mkldnn._nbytes(weight)


def _huge_page_policy() -> str:
    with suppress(OSError):
        return Path("/sys/kernel/mm/transparent_hugepage/enabled").read_text()
    return "[never]"


def can_pack(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether oneDNN's operators, which torch does not promise to keep, are there: tried on a small product."""
    if device.type != "cpu" or dtype != torch.bfloat16:
        return False
    weight = torch.linspace(-1, 1, 64 * 32, device=device).view(64, 32).to(dtype)
    try:
        if not torch.ops.mkldnn._is_mkldnn_bf16_supported():
            return False
        blocked = pack_weight(weight)
        products = [(x, packed_linear(x, blocked, Kernels())) for x in (weight[:1], weight[:8])]
    except (AttributeError, RuntimeError):
        return False
    return all(torch.allclose(y, x @ weight.T, rtol=0.02, atol=0.02) for x, y in products)


def can_quantize(device: torch.device) -> bool:
    """Whether oneDNN's int8 product is there, exact (older processors saturate in between) and no slow reference."""
    if device.type != "cpu":
        return False
    values = torch.full((64, 256), 127, dtype=torch.int8, device=device)
    values[1::2, ::3] = -127
    x = torch.full((9, 256), 255, dtype=torch.uint8, device=device)
    x[1::2, ::5] = 1
    scales = torch.linspace(0.5, 1, len(values), dtype=torch.float32, device=device)
    try:
        blocked = torch.ops.onednn.qlinear_prepack(values, None)
        products = [(rows, onednn_int8_linear(rows, blocked, scales)) for rows in (x[:1], x)]
    except (AttributeError, RuntimeError):
        return False
    exact = all(
        torch.allclose(out, (rows.float() - 128) @ values.float().T * scales, rtol=1e-6) for rows, out in products
    )
    ours, plain = partial(onednn_int8_linear, x, blocked, scales), partial(F.linear, x.float(), values.float())
    return exact and not is_slow_reference(ours, plain)


def is_slow_reference(product: Callable[[], object], plain: Callable[[], object]) -> bool:
    """Whether an operator's code was not made for this processor, by the duration of a small product.

    Such a product takes up to 3 times as long as float32's, `plain`, and a reference a hundred times or more.
    """
    n_threads = torch.get_num_threads()
    torch.set_num_threads(1)  # several would wait for each other where other programs use the processor
    try:
        for work in (product, plain):
            work()
        return min(duration(product) for _ in range(5)) > 40 * min(duration(plain) for _ in range(5))
    finally:
        torch.set_num_threads(n_threads)


def duration(work: Callable[[], object]) -> float:
    """How long a function takes, in seconds."""
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


@torch.inference_mode()
def measure_kernels(weights: Iterable[Tensor], dtype: torch.dtype, *, packed_only: bool) -> Kernels:
    """Times the forms of a product with some of the weights; takes some tens of milliseconds.

    All forms give the same values, except that a single row may be rounded differently.

    Args:
        weights: of a network on a CPU for which `can_pack` holds.
        dtype: of the products.
        packed_only: leaves out unpacked products, for a network that is packed in any case.
    """
    sample = [weight.detach().to(dtype) for weight in _sample(weights)]
    if sum(weight.nbytes for weight in sample) < _PROBE_BYTES // 4:
        return Kernels()  # they stay in the processor's caches, where the forms differ too little to be told apart
    blocked = [pack_weight(weight) for weight in sample]
    rows = torch.zeros((2, sample[0].size(1)), dtype=dtype)

    def packed(n_rows: int, pads: bool) -> Callable[[], object]:
        kernels = Kernels(pads_one=pads, pads_few=pads)
        return lambda: [packed_linear(rows[:n_rows], weight, kernels) for weight in blocked]

    one, few = (_is_faster(packed(n_rows, True), packed(n_rows, False)) for n_rows in (1, 2))
    faster = not packed_only and _is_faster(packed(1, one), lambda: [F.linear(rows[:1], weight) for weight in sample])
    return Kernels(pads_one=one, pads_few=few, packs_one_row=faster)


def _sample(weights: Iterable[Tensor]) -> list[Tensor]:
    """Matrices of the shape that has the most values, of `_PROBE_BYTES` together."""
    by_shape: dict[torch.Size, list[Tensor]] = {}
    for weight in weights:
        if weight.dim() == 2:
            by_shape.setdefault(weight.shape, []).append(weight)
    shape, most = max(by_shape.items(), key=lambda item: item[0].numel() * len(item[1]))
    return most[: max(1, _PROBE_BYTES // (2 * shape.numel()))]


def _is_faster(work: Callable[[], object], other: Callable[[], object]) -> bool:
    """Whether it clearly takes less time: by the median over neighboring runs."""
    return statistics.median([duration(work) / duration(other) for _ in range(5)]) < _CLEARLY
