"""int4 weights on a CPU, in groups with a scale and a zero point each, and their products with bfloat16 inputs.

torch's operators for them are not documented: `can_quantize_int4` tries them before they are used.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from llama.layers.kernels import QUANTIZED_ELEMENTS, is_slow_reference, median_ratio, row_bucket

GROUP = 32  # inputs with one scale and one zero point
OUTPUTS = 64  # outputs of a block of the operators' layout: a weight must have a multiple
_OUTPUTS_AT_ONCE = 512  # that are dequantized for a product: they stay in the processor's caches
_PROBED_ROWS = (32, 64, 128, 256, 512)


@dataclass(frozen=True)
class Int4Weight:
    """A weight as int4 numbers, for `int4_linear`. See `quantize_int4`."""

    # (out, in / 2) uint8, in blocks of 64 outputs: 32 bytes hold an input's numbers for the first 32 outputs in their
    # low halves, and those for the other 32 in their high ones.
    packed: Tensor
    scales_and_zeros: Tensor  # (in / 32, out, 2) bfloat16


def suits_int4(n_out: int, n_in: int) -> bool:
    """Whether a weight (out, in) can be quantized to int4."""
    return n_out % OUTPUTS == 0 and n_in % GROUP == 0


@torch.no_grad()
def quantize_int4(weight: Tensor) -> Int4Weight:
    """Quantizes a weight (out, in) of any dtype, for which `suits_int4` holds.

    Each group of 32 inputs of an output has a scale and a zero point: first those that lay 16 numbers over the range of
    its values, then those that fit these numbers to the values with the least squared error.
    """
    n_out, n_in = weight.shape
    packed = torch.empty((n_out, n_in // 2), dtype=torch.uint8, device="cpu")
    scales_and_zeros = torch.empty((n_in // GROUP, n_out, 2), dtype=torch.bfloat16, device="cpu")
    n_rows = max(1, QUANTIZED_ELEMENTS // (n_in * OUTPUTS)) * OUTPUTS
    for first in range(0, n_out, n_rows):
        rows = slice(first, first + n_rows)
        part = weight[rows]
        numbers, scales, zeros = _rounded(part.float().view(len(part), -1, GROUP))
        packed[rows] = torch.ops.aten._convert_weight_to_int4pack_for_cpu(numbers.view(part.shape).int(), 1)
        scales_and_zeros[:, rows] = torch.cat((scales, zeros), -1).transpose(0, 1)
    return Int4Weight(packed, scales_and_zeros)


def _rounded(groups: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Numbers from 0 to 15 (out, groups, 32), and scales and zero points (out, groups, 1), of groups of values."""
    low, high = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
    scales = (high - low).div_(15).clamp_min_(1e-30)
    scales, zeros = _fitted(groups, _nearest(groups, scales, low + 8 * scales), scales)
    return _nearest(groups, scales, zeros) + 8, scales, zeros


def _nearest(groups: Tensor, scales: Tensor, zeros: Tensor) -> Tensor:
    """The numbers from -8 to 7 that stand for these values best."""
    return (groups - zeros).div_(scales).round_().clamp_(-8, 7)


def _fitted(groups: Tensor, numbers: Tensor, scales: Tensor) -> tuple[Tensor, Tensor]:
    """Scales and zero points, of bfloat16's precision, by least squares; `scales` where all numbers are equal."""
    mean, mean_number = groups.mean(-1, keepdim=True), numbers.mean(-1, keepdim=True)
    centered = numbers - mean_number
    fitted = (centered * groups).sum(-1, keepdim=True) / centered.square().sum(-1, keepdim=True)
    scales = torch.where(fitted > 1e-30, fitted, scales).bfloat16().float()  # not where it is not a number
    return scales, (mean - scales * mean_number).bfloat16().float()


def int4_linear(x: Tensor, weight: Int4Weight, dequantized_rows: int | None = None) -> Tensor:
    """x (..., in) bfloat16 times a weight of `quantize_int4`, transposed: (..., out) bfloat16.

    Args:
        dequantized_rows: from how many rows on the product is one of bfloat16 numbers, with the weight dequantized part
            by part. It reads the same weight, and sums in another order. None: for no number of rows.
    """
    rows = x.reshape(-1, x.size(-1))
    if dequantized_rows is None or len(rows) < dequantized_rows:
        out: Tensor = torch.ops.aten._weight_int4pack_mm_for_cpu(rows, weight.packed, GROUP, weight.scales_and_zeros)
    else:
        out = _dequantized_linear(rows, weight)
    return out.view(*x.shape[:-1], len(weight.packed))


def _dequantized_linear(rows: Tensor, weight: Int4Weight) -> Tensor:
    n_rows, n_out = len(rows), len(weight.packed)
    rows = F.pad(rows, (0, 0, 0, row_bucket(n_rows) - n_rows))
    out = torch.empty((len(rows), n_out), dtype=rows.dtype, device="cpu")
    for first in range(0, n_out, _OUTPUTS_AT_ONCE):
        outputs = slice(first, first + _OUTPUTS_AT_ONCE)
        out[:, outputs] = rows @ _dequantized(weight.packed[outputs], weight.scales_and_zeros[:, outputs])
    return out[:n_rows]


def dequantize_int4(weight: Int4Weight) -> Tensor:
    """The weight (out, in), in bfloat16, that `int4_linear` computes with."""
    return _dequantized(weight.packed, weight.scales_and_zeros).T


def _dequantized(packed: Tensor, scales_and_zeros: Tensor) -> Tensor:
    """The transposed weight (in, out) in bfloat16 of some blocks of outputs, from parts of an `Int4Weight`."""
    n_out, n_in = len(packed), 2 * packed.size(1)
    pairs = packed.view(n_out // OUTPUTS, n_in, OUTPUTS // 2).transpose(0, 1).to(torch.int16)
    numbers = torch.empty((n_in, n_out // OUTPUTS, 2, OUTPUTS // 2), dtype=torch.int16, device="cpu")
    torch.bitwise_and(pairs, 15, out=numbers[:, :, 0])
    torch.bitwise_right_shift(pairs, 4, out=numbers[:, :, 1])
    # These are the bits of 128 + number in bfloat16, which is faster than to convert it.
    values = numbers.bitwise_or_(0x4300).view(torch.bfloat16).view(n_in // GROUP, GROUP, n_out).sub_(128 + 8)
    scales, zeros = (part.contiguous().unsqueeze(1) for part in scales_and_zeros.unbind(-1))
    return torch.addcmul(zeros, values, scales, out=values).view(n_in, n_out)


def can_quantize_int4(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether torch's operators are there, right, of the layout that `Int4Weight` has, and no slow reference."""
    if device.type != "cpu" or dtype != torch.bfloat16:
        return False
    weight = torch.linspace(-1, 1, 256 * 128, dtype=torch.float32, device=device).view(128, 256).sin_()
    weight[1::2] *= -0.5
    x = weight[:9].to(dtype)
    try:
        quantized = quantize_int4(weight)
        products = [int4_linear(rows, quantized).float() for rows in (x[:1], x)]
    except (AttributeError, RuntimeError):
        return False
    expected = x.float() @ dequantize_int4(quantized).float().T
    if not all(torch.allclose(out, expected[: len(out)], rtol=0.02, atol=0.02) for out in products):
        return False
    return not is_slow_reference(partial(int4_linear, x, quantized), partial(F.linear, x.float(), weight))


@torch.inference_mode()
def measure_int4(weights: Sequence[Int4Weight]) -> int | None:
    """From how many rows on `int4_linear` is faster with a weight dequantized; None if never. For its last argument.

    Takes some tens of milliseconds, with a part of the largest weight.
    """
    largest = max(weights, key=lambda weight: weight.packed.numel())
    outputs = slice(2 * _OUTPUTS_AT_ONCE)
    sample = Int4Weight(largest.packed[outputs], largest.scales_and_zeros[:, outputs].contiguous())
    for n_rows in _PROBED_ROWS:
        x = torch.zeros((n_rows, 2 * sample.packed.size(1)), dtype=torch.bfloat16, device="cpu")
        dequantized, direct = (partial(int4_linear, x, sample, from_rows) for from_rows in (0, None))
        if median_ratio(dequantized, direct) < 1:
            return n_rows
    return None
