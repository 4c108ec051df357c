"""int4 weights: their rounding and products. Their layers are in test_quantize.py."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from llama.layers import int4, kernels
from llama.layers.int4 import Int4Weight, can_quantize_int4, dequantize_int4, int4_linear, measure_int4, quantize_int4

CPU = torch.device("cpu")
IN, OUT = 64, 128
WAYS = pytest.mark.parametrize("dequantized_rows", [None, 1], ids=["direct", "dequantized"])

needs_int4 = pytest.mark.skipif(
    not can_quantize_int4(CPU, torch.bfloat16), reason="needs a CPU with torch's int4 products"
)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


# Rounding and products


@needs_int4
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_each_value_is_rounded_to_one_of_16_of_its_group(dtype: torch.dtype) -> None:
    weight = normal(OUT, 96).to(dtype)
    rounded = dequantize_int4(quantize_int4(weight)).float().view(OUT, 3, 32)
    groups = weight.float().view(OUT, 3, 32)
    assert all(len(group.unique()) <= 16 for group in rounded.flatten(0, 1))
    steps = (groups.amax(-1) - groups.amin(-1)) / 15
    assert ((rounded - groups).abs().amax(-1) <= 1.1 * steps).all()
    assert ((rounded - groups).square().mean(-1).sqrt() <= 0.4 * steps).all()  # evenly spread errors: 0.29


@needs_int4
def test_the_fit_is_closer_than_the_range_of_the_values() -> None:
    groups = normal(256, 2, 32)
    low, high = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
    plain = ((groups - low) / (high - low) * 15).round() / 15 * (high - low) + low
    fitted = dequantize_int4(quantize_int4(groups.view(256, 64))).float().view(256, 2, 32)
    assert (fitted - groups).norm() < 0.98 * (plain - groups).norm()


@needs_int4
def test_values_of_a_grid_of_16_and_equal_values_are_kept() -> None:
    numbers = torch.randint(16, (OUT, 2, 32), generator=torch.Generator().manual_seed(0))
    numbers[..., :2] = torch.tensor([0, 15])
    grid = (numbers * 0.25 - 1.5).view(OUT, IN)
    for weight in (grid, *(torch.full((OUT, IN), value) for value in (0.0, 0.25, -3.0))):
        assert torch.equal(dequantize_int4(quantize_int4(weight)).float(), weight)


@needs_int4
def test_a_weight_that_is_quantized_part_by_part_is_quantized_as_a_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = normal(320, IN)
    whole = quantize_int4(weight)
    monkeypatch.setattr(int4, "QUANTIZED_ELEMENTS", 64 * IN)
    parts = quantize_int4(weight)
    assert torch.equal(parts.packed, whole.packed) and torch.equal(parts.scales_and_zeros, whole.scales_and_zeros)


@needs_int4
@WAYS
@pytest.mark.parametrize(("n_out", "n_in"), [(64, 32), (128, 96), (1088, 64)])
def test_the_product_matches_the_rounded_weight(n_out: int, n_in: int, dequantized_rows: int | None) -> None:
    weight = quantize_int4(normal(n_out, n_in))
    for n_rows in (1, 3, 33):
        x = normal(n_rows, n_in, seed=1).bfloat16()
        out = int4_linear(x, weight, dequantized_rows)
        assert out.dtype == torch.bfloat16
        torch.testing.assert_close(
            out.float(), x.float() @ dequantize_int4(weight).float().T, rtol=0.01, atol=0.02 * n_in**0.5
        )


@needs_int4
@WAYS
@pytest.mark.parametrize("shape", [(IN,), (1, IN), (2, 3, IN), (0, IN)])
def test_a_product_has_the_inputs_shape(shape: tuple[int, ...], dequantized_rows: int | None) -> None:
    x, weight = normal(*shape, seed=1).bfloat16(), quantize_int4(normal(OUT, IN))
    out = int4_linear(x, weight, dequantized_rows)
    assert out.shape == (*shape[:-1], OUT)
    assert torch.equal(out.view(-1, OUT), int4_linear(x.view(-1, IN), weight, dequantized_rows))


@needs_int4
def test_below_the_number_of_rows_a_row_has_the_same_product_whatever_the_other_rows() -> None:
    weight, x = quantize_int4(normal(OUT, 512)), normal(33, 512, seed=1).bfloat16()
    together = int4_linear(x, weight, 34)
    for part in (slice(0, 1), slice(7, 8), slice(4, 9), slice(16, 33)):
        assert torch.equal(int4_linear(x[part], weight, 34), together[part])


# What the processor has


@needs_int4
@pytest.mark.parametrize("kind", [AttributeError, RuntimeError, "wrong", "another layout", "slow"])
def test_operators_that_are_gone_wrong_or_slow_are_found_out(
    monkeypatch: pytest.MonkeyPatch, kind: type[Exception] | str
) -> None:
    product = int4_linear

    def linear(x: Tensor, weight: Int4Weight, dequantized_rows: int | None = None) -> Tensor:
        if not isinstance(kind, str):
            raise kind
        out = product(x, weight)
        return out.roll(1, -1) if kind == "another layout" else out * 1.2 if kind == "wrong" else out

    monkeypatch.setattr(int4, "int4_linear", linear)
    monkeypatch.setattr(kernels, "duration", lambda work: 100.0 if kind == "slow" and work.func is linear else 1.0)
    assert not can_quantize_int4(CPU, torch.bfloat16)


def test_other_devices_and_dtypes_are_not_quantized() -> None:
    assert not can_quantize_int4(torch.device("cuda"), torch.bfloat16)
    assert not can_quantize_int4(CPU, torch.float32) and not can_quantize_int4(CPU, torch.float16)


@needs_int4
@pytest.mark.parametrize(("faster_from", "expected"), [(1, 32), (100, 128), (1000, None)])
def test_weights_are_dequantized_from_the_number_of_rows_where_it_is_faster(
    faster_from: int, expected: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def seconds(work: Any) -> float:
        x, _, from_rows = work.args
        return 10.0 if (from_rows == 0) == (len(x) < faster_from) else 1.0

    monkeypatch.setattr(kernels, "duration", seconds)
    assert measure_int4([quantize_int4(normal(64, 32)), quantize_int4(normal(2048, 64))]) == expected
