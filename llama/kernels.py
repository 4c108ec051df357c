"""The products of the linear layers on a CPU, and the probe that finds the fastest of them on this processor."""

from __future__ import annotations

import contextlib
import statistics
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

MiB = 1024**2
_PADDED_ROWS = 5  # what fewer rows are padded to where that pays
_PROBE_BYTES = 96 * MiB  # weights that are read for a timing: more than most caches hold
_CLEARLY = 0.97  # of another time, to be preferred to it

_onednn_switch = threading.Lock()


@dataclass(frozen=True)
class Kernels:
    """Which of several equal products is the fastest on this processor. See `measure_kernels`.

    Attributes:
        pads_one: whether the packed product takes one row as `_PADDED_ROWS`, on processors where it reads weights
            faster for several rows.
        pads_few: likewise two or three rows.
        native_row: whether ATen's own matrix-vector product reads an unpacked bfloat16 weight faster than oneDNN's.
        packs_one_row: whether the packed product of one row is faster than the best unpacked one.
    """

    pads_one: bool = False
    pads_few: bool = False
    native_row: bool = False
    packs_one_row: bool = False


DEFAULT_KERNELS = Kernels()


def pack_weight(weight: Tensor) -> Tensor:
    """A bfloat16 weight (out, in) in oneDNN's blocked layout: opaque, for `packed_linear` alone."""
    blocked: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous())
    return blocked


def packed_linear(x: Tensor, blocked: Tensor, kernels: Kernels = DEFAULT_KERNELS) -> Tensor:
    """x (..., in) times a weight of `pack_weight`, transposed: (..., out)."""
    n_rows = x.numel() // x.size(-1)
    if n_rows == 1 and kernels.pads_one:  # a stride of 0 costs less than other ways to pad
        return _onednn_linear(x.reshape(1, -1).expand(_PADDED_ROWS, -1), blocked)[:1].view(*x.shape[:-1], -1)
    padded = _PADDED_ROWS if 1 < n_rows < 4 and kernels.pads_few else _row_bucket(n_rows)
    if padded == n_rows:
        return _onednn_linear(x, blocked)
    rows = F.pad(x.flatten(0, -2), (0, 0, 0, padded - n_rows))
    return _onednn_linear(rows, blocked)[:n_rows].view(*x.shape[:-1], -1)


def _onednn_linear(x: Tensor, blocked: Tensor) -> Tensor:
    out: Tensor = torch.ops.mkldnn._linear_pointwise(x, blocked, None, "none", [], "")
    return out


def _row_bucket(n_rows: int) -> int:
    """The least number of rows, from `n_rows` on, that products are made for.

    oneDNN keeps code and buffers for each number of rows that it has met. With eight sizes between a power of two and
    the next, at most an eighth is padding, and what it keeps is bounded.
    """
    unit = 1 << max(0, n_rows.bit_length() - 4)
    return -(-n_rows // unit) * unit


@contextlib.contextmanager
def _without_onednn() -> Iterator[None]:
    """Has ATen take its own kernels. The switch is the process's: one thread at a time turns it, and puts it back."""
    with _onednn_switch:
        enabled = torch._C._get_mkldnn_enabled()
        torch._C._set_mkldnn_enabled(False)
        try:
            yield
        finally:
            torch._C._set_mkldnn_enabled(enabled)


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

    def packed(n_rows: int, pads: bool) -> Callable[[], None]:
        kernels = Kernels(pads_one=pads, pads_few=pads)
        return partial(_for_each, blocked, partial(packed_linear, rows[:n_rows], kernels=kernels))

    kernels = Kernels(
        pads_one=_is_faster(packed(1, True), packed(1, False)), pads_few=_is_faster(packed(2, True), packed(2, False))
    )
    if packed_only:
        return kernels
    native, plain = (partial(_for_each, sample, partial(f, rows[:1])) for f in (native_linear, F.linear))
    native_row = _is_faster(native, plain)
    packs_one_row = _is_faster(packed(1, kernels.pads_one), native if native_row else plain)
    return replace(kernels, native_row=native_row, packs_one_row=packs_one_row)


def _sample(weights: Iterable[Tensor]) -> list[Tensor]:
    """Matrices of the shape that has the most values, of `_PROBE_BYTES` together."""
    by_shape: dict[torch.Size, list[Tensor]] = {}
    for weight in weights:
        if weight.dim() == 2:
            by_shape.setdefault(weight.shape, []).append(weight)
    shape, most = max(by_shape.items(), key=lambda item: item[0].numel() * len(item[1]))
    return most[: max(1, _PROBE_BYTES // (2 * shape.numel()))]


def _for_each(weights: Iterable[Tensor], product: Callable[[Tensor], Tensor]) -> None:
    for weight in weights:
        product(weight)


def _is_faster(work: Callable[[], None], other: Callable[[], None]) -> bool:
    """Whether it takes clearly less time than the other: by the median of ratios of neighbouring runs."""
    ratios = []
    for _ in range(5):
        times = [time.perf_counter()]
        for each in (work, other):
            each()
            times.append(time.perf_counter())
        ratios.append((times[1] - times[0]) / (times[2] - times[1]))
    return statistics.median(ratios) < _CLEARLY


def native_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`F.linear` by ATen's own kernels, where it would call oneDNN's."""
    with _without_onednn():
        return F.linear(x, weight, bias)
