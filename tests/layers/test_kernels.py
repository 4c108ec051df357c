"""The products of linear layers: equal values in every form, and the choice among them by their times."""

from __future__ import annotations

import math
import re
import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from llama.engine.compiled import CAN_COMPILE
from llama.engine.compiler import has_cpp_compiler
from llama.layers import kernels
from llama.layers.kernels import (
    Int8Weight,
    Kernels,
    QuantizedWeight,
    block_quantized,
    can_pack,
    can_quantize,
    dequantized_linear,
    measure_kernels,
    packed_linear,
    quantize_values,
    quantized_linear,
    rotation_of,
)
from tests.support import oracle

CPU = torch.device("cpu")
IN, OUT = 64, 48
PADDING = Kernels(pads_one=True, pads_few=True)
needs_packing = pytest.mark.skipif(not can_pack(CPU, torch.bfloat16), reason="needs a CPU with bfloat16 in oneDNN")
needs_int8 = pytest.mark.skipif(not can_quantize(CPU), reason="needs a CPU with int8 products (VNNI)")


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def huge_pages() -> int:
    """The memory of this process in pages of 2 MiB, in kB."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith("AnonHugePages"))


@pytest.mark.skipif(sys.platform != "linux", reason="of Linux")
@pytest.mark.parametrize("form", ["plain", pytest.param("packed", marks=needs_packing)])
def test_weights_move_to_huge_pages(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = normal(4096, 2048).bfloat16()
    weight = kernels.pack_weight(plain) if form == "packed" else plain
    product = packed_linear if form == "packed" else torch.nn.functional.linear
    expected, before = product(plain[:3], weight), huge_pages()
    monkeypatch.setattr(kernels, "_huge_page_policy", lambda: "always madvise [never]")
    assert kernels.use_huge_pages([weight]) is None
    monkeypatch.setattr(kernels, "_huge_page_policy", lambda: "always [madvise] never")
    assert kernels.use_huge_pages([plain[:64]]) is None  # smaller than a page
    thread = kernels.use_huge_pages([weight])
    assert thread is not None
    thread.join()
    assert torch.equal(product(plain[:3], weight), expected)
    if huge_pages() <= before:
        pytest.skip("this kernel does not move memory to huge pages when asked to")


@pytest.mark.skipif(sys.platform != "linux", reason="of Linux")
def test_weights_that_are_freed_are_not_kept_for_huge_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "_huge_page_policy", lambda: "always [madvise] never")
    freed = threading.Event()

    moved: list[int] = []

    def move(weight: Tensor) -> bool:
        moved.append(weight.numel())
        return freed.wait(10)

    monkeypatch.setattr(kernels, "_move_to_huge_pages", move)
    weights = [torch.empty(n * 2**20) for n in (4, 5, 6)]
    second = weakref.ref(weights[1])
    thread = kernels.use_huge_pages(weights)
    assert thread is not None
    del weights[1]
    assert second() is None
    freed.set()
    thread.join()
    assert moved == [4 * 2**20, 6 * 2**20]


@needs_packing
def test_the_numbers_of_rows_that_products_are_made_for_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """oneDNN keeps code for each: of 4096 numbers, 80 remain, and padding adds an eighth at most."""
    made: list[int] = []

    def record(x: Tensor, blocked: Tensor) -> Tensor:
        made.append(len(x))
        return x.new_zeros(len(x), OUT)

    monkeypatch.setattr(kernels, "_onednn_linear", record)
    x = torch.zeros(4096, 1, dtype=torch.bfloat16)
    for n_rows in range(1, 4097):
        assert packed_linear(x[:n_rows], x).shape == (n_rows, OUT)
        assert n_rows <= made[-1] <= n_rows * 9 / 8
    assert len(set(made)) <= 80
    assert set(range(1, 17)) <= set(made)  # the batch sizes of decoding get no padding


# int8 products


def quantize_weight(weight: Tensor, scratch: Tensor | None = None) -> QuantizedWeight:
    return block_quantized(*quantize_values(weight, scratch))


def int8_weight(weight: Tensor) -> Int8Weight:
    return Int8Weight(*quantize_values(weight), rotation_of(weight.size(1), CPU))


def quantized_product(x: Tensor, weight: Tensor, block: int) -> Tensor:
    """The oracle, in float64: each block of inputs rotated, both operands rounded to 127 steps of their largest value.

    The entry (i, j) of a Hadamard matrix is 1 or -1 by whether i and j have an even number of ones in common.
    """
    signs = [[(-1.0) ** (i & j).bit_count() for j in range(block)] for i in range(block)]
    rotation = torch.tensor(signs, dtype=torch.float64) / block**0.5

    def rounded(values: Tensor) -> Tensor:
        rotated = (values.double().view(len(values), -1, block) @ rotation).flatten(1)
        step = rotated.abs().amax(1, keepdim=True) / 127
        return (rotated / step).round() * step

    return rounded(x) @ rounded(weight).T


@needs_int8
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("n_in", "block"), [(64, 32), (96, 32), (48, 16), (12, 4), (7, 1)])
def test_the_int8_product_matches_rotated_and_rounded_operands(n_in: int, block: int, dtype: torch.dtype) -> None:
    x, weight = normal(70, n_in, seed=1).to(dtype), normal(OUT, n_in)
    out = quantized_linear(x, quantize_weight(weight))
    assert out.dtype == dtype
    expected = quantized_product(x, weight, block)
    # Halves may be rounded either way: of one input, by a step.
    step = x.abs().max().item() * block**0.5 / 127 * weight.abs().max().item() * block**0.5
    torch.testing.assert_close(out.double(), expected, atol=step, rtol=0.01)
    off = (out.double() - expected).norm() / expected.norm()
    assert off < (0.005 if dtype == torch.bfloat16 else 0.002)  # bfloat16: of the output's rounding


@needs_int8
@pytest.mark.parametrize("file_dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_weight_of_any_dtype_is_quantized_as_what_it_is(file_dtype: torch.dtype) -> None:
    weight, x = normal(OUT, IN).to(file_dtype), normal(5, IN, seed=1)
    assert torch.equal(
        quantized_linear(x, quantize_weight(weight)), quantized_linear(x, quantize_weight(weight.float()))
    )


@needs_int8
def test_what_is_quantized_part_by_part_is_quantized_as_a_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights, and inputs of many rows."""
    weight, x = normal(OUT, IN), normal(21, IN, seed=1)
    whole = quantized_linear(x, quantize_weight(weight))
    scratch = torch.full((OUT * IN + 7,), torch.nan, dtype=torch.bfloat16)
    in_scratch = quantize_weight(weight, scratch)
    scratch.fill_(torch.nan)
    assert torch.equal(quantized_linear(x, in_scratch), whole)
    for n_elements in (1, 5 * IN, 7 * IN + 3):
        monkeypatch.setattr(kernels, "QUANTIZED_ELEMENTS", n_elements)
        assert torch.equal(quantized_linear(x, quantize_weight(weight)), whole)


@pytest.mark.parametrize("n_in", [64, 96, 12, 7])
def test_numbers_and_scales_are_the_weight_to_half_a_step(n_in: int) -> None:
    """Of the rotated weight; rotating back leaves the norm of the error as it is."""
    weight = normal(OUT, n_in) * torch.logspace(-3, 3, OUT).unsqueeze(1)
    weight[5] = 0
    values, scales = quantize_values(weight)
    assert values.dtype == torch.int8 and values.abs().max() <= 127 and scales.shape == (OUT,)
    block = math.gcd(n_in, 32)
    error = (dequantized_linear(torch.eye(n_in), int8_weight(weight)).T - weight).norm(dim=1)
    assert (error <= 0.5 * scales * block**0.5 * n_in**0.5 * 1.001).all()
    assert error[6:].min() > 0


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_the_dequantized_product_has_the_inputs_dtype_and_range(dtype: torch.dtype) -> None:
    weight = int8_weight(0.02 * normal(OUT, IN))
    rounded = dequantized_linear(torch.eye(IN, dtype=torch.float64), weight).T
    for x in (normal(IN), normal(2, 3, IN), torch.full((1, IN), 6e4), normal(0, IN)):
        out = dequantized_linear(x.to(dtype), weight)
        with torch.no_grad():
            assert torch.equal(dequantized_linear(x.to(dtype), weight), out)
        expected = x.to(dtype).double() @ rounded.T
        assert out.dtype == dtype and out.shape == (*x.shape[:-1], OUT)
        assert (out.double() - expected).norm() <= 4 * torch.finfo(dtype).eps * x.double().norm() * rounded.norm()


@pytest.mark.skipif(not (CAN_COMPILE and has_cpp_compiler()), reason="needs torch 2.9 and a C++ compiler")
def test_a_compiled_dequantized_product_of_one_row_reads_the_numbers_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """It makes no float weight in memory, and gives what the uncompiled one does."""
    from torch._inductor.utils import run_and_get_code

    monkeypatch.setenv("TORCHINDUCTOR_VEC_ISA_OK", "1")
    weight, x = int8_weight(normal(OUT, IN)), normal(1, 1, IN)
    out, (code, *_) = run_and_get_code(torch.compile(dequantized_linear), x, weight)
    torch.testing.assert_close(out, dequantized_linear(x, weight))
    allocated = re.findall(r"= empty_strided_cpu\(\(([\d, ]+)\)", code)
    assert allocated and not {f"{OUT}, {IN}", f"{IN}, {OUT}", str(OUT * IN)} & {*allocated}


def test_an_export_leaves_no_tensor_of_the_tracer_behind() -> None:
    class Product(torch.nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return dequantized_linear(x, Int8Weight(values, scales, rotation_of(24, CPU)))

    (values, scales), x = quantize_values(normal(OUT, 24)), normal(3, 24)
    exported = torch.export.export(Product(), (x,), strict=False).module()
    torch.testing.assert_close(exported(x), Product()(x))


@needs_int8
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("n_in", "n_out"), [(IN, OUT), (352, 100)])
def test_a_row_has_the_same_int8_product_whatever_the_other_rows(n_in: int, n_out: int, dtype: torch.dtype) -> None:
    weight = quantize_weight(normal(n_out, n_in))
    x = (normal(300, n_in, seed=1) * torch.logspace(-3, 3, 300).unsqueeze(1)).to(dtype)
    together = quantized_linear(x, weight)
    for n_rows in (1, 2, 3, 4, 5, 8, 16, 17, 33, 131):
        for first in (0, 1, 160):
            part = slice(first, first + n_rows)
            assert torch.equal(quantized_linear(x[part], weight), together[part])


@needs_int8
@pytest.mark.parametrize("shape", [(IN,), (1, IN), (1, 3, IN), (3, 1, IN), (17, IN), (3, 11, IN)], ids=str)
def test_an_int8_product_has_the_inputs_shape(shape: tuple[int, ...]) -> None:
    weight, x = quantize_weight(normal(OUT, IN)), normal(*shape, seed=1)
    out = quantized_linear(x, weight)
    assert out.shape == (*shape[:-1], OUT)
    assert torch.equal(out.flatten(0, -2) if len(shape) > 1 else out[None], quantized_linear(x.view(-1, IN), weight))
    spread = torch.stack((x, -x), -1).flatten(-2)[..., ::2]  # not contiguous
    assert torch.equal(quantized_linear(spread, weight), out)


@needs_int8
def test_an_int8_product_can_be_traced_after_it_ran() -> None:
    weight, x = block_quantized(*quantize_values(normal(OUT, IN))), normal(2, IN)
    with torch.no_grad():
        quantized_linear(x, weight)
        traced = make_fx(lambda x: quantized_linear(x, weight))(x)
        assert torch.equal(traced(x + 1), quantized_linear(x + 1, weight))


@needs_int8
def test_an_input_that_was_edited_is_quantized_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    """Layers that share an input quantize it once, also where it is as another call's; an edit of it counts."""
    weight = block_quantized(*quantize_values(normal(OUT, IN)))
    quantized: list[Tensor] = []
    made = kernels._quantized_rows
    monkeypatch.setattr(kernels, "_quantized_rows", lambda *args: quantized.append(args[0]) or made(*args))
    x = normal(3, IN, seed=1)
    with torch.inference_mode():  # where tensors do not count their edits
        first = quantized_linear(x, weight)
        assert torch.equal(quantized_linear(x.clone(), weight), first) and len(quantized) == 1
        x[1, 5] += 1
        edited = quantized_linear(x, weight)
    assert len(quantized) == 2 and not torch.equal(edited[1], first[1]) and torch.equal(edited[::2], first[::2])
    assert quantized_linear(x.bfloat16(), weight).dtype == torch.bfloat16 and len(quantized) == 3


@needs_int8
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_an_input_in_any_place_of_memory_is_told_from_the_last_one(dtype: torch.dtype) -> None:
    base, n_in = normal(4 * 130).to(dtype), 62  # odd for a comparison by eight bytes
    for n in (n_in, 64):
        weight = quantize_weight(normal(OUT, n))
        views = [base[offset:][: 3 * n].view(3, n) for offset in (0, 1, 4)]
        views += [base.as_strided((3, n), strides, 1) for strides in ((n + 1, 1), (1, 4))]
        views.append(torch._neg_view(-views[0]))
        outs = [quantized_linear(view.resolve_neg().clone().contiguous(), weight) for view in views]
        for view, out in zip(views, outs, strict=True):
            for _ in range(2):  # the second time, it is the last one
                assert torch.equal(quantized_linear(view, weight), out)
            edited = view.clone()
            edited[2, -1] += 1
            assert not torch.equal(quantized_linear(edited, weight), out)


@needs_int8
def test_rows_of_zeros_and_of_nan_stay_what_they_are_and_leave_the_others_alone() -> None:
    plain, x = normal(OUT, IN), normal(4, IN, seed=1)
    plain[3] = 0
    weight = quantize_weight(plain)
    expected = quantized_linear(x, weight)
    assert not expected[:, 3].any()
    x[1], x[2, 5] = 0, torch.nan
    out = quantized_linear(x, weight)
    assert not out[1].any() and out[2].isnan().all()
    assert torch.equal(out[[0, 3]], expected[[0, 3]])


@needs_int8
def test_the_rotation_spreads_a_few_large_inputs() -> None:
    """As trained networks have them: the steps of rounding would be theirs, and the other inputs lost."""
    x, weight = normal(50, 256, seed=1), normal(OUT, 256)
    x[:, 17] *= 100
    exact = x.double() @ weight.double().T
    error, unrotated = (
        (product.double() - exact).norm() / exact.norm()
        for product in (quantized_linear(x, quantize_weight(weight)), quantized_product(x, weight, block=1))
    )
    assert error < 0.6 * unrotated


# What this processor has


@pytest.mark.parametrize("error", [AttributeError, RuntimeError, None])
def test_operators_that_are_gone_or_wrong_are_found_out(
    monkeypatch: pytest.MonkeyPatch, error: type[Exception] | None
) -> None:
    """As in a build of torch without oneDNN, or one that gives these private operators another meaning."""

    def linear(x: Tensor, blocked: Tensor) -> Tensor:
        if error:
            raise error
        return torch.zeros(len(x), 64, dtype=x.dtype)

    monkeypatch.setattr(kernels, "_onednn_linear", linear)
    assert not can_pack(CPU, torch.bfloat16)


@pytest.mark.parametrize("kind", [AttributeError, RuntimeError, "another zero point", "saturating", "slow", "exact"])
def test_int8_operators_that_are_gone_wrong_or_slow_are_found_out(
    monkeypatch: pytest.MonkeyPatch, kind: type[Exception] | str
) -> None:
    """Processors before VNNI add pairs of products in 16 bits."""

    def linear(x: Tensor, blocked: Tensor, scales: Tensor) -> Tensor:
        if not isinstance(kind, str):
            raise kind
        values = torch.full((64, 256), 127.0)
        values[1::2, ::3] = -127
        products = x.float().unsqueeze(1) * values
        pairs = products.view(len(x), 64, -1, 2).sum(-1)
        limit = 2.0**15 if kind == "saturating" else 2.0**17
        zero_point = 127 if kind == "another zero point" else 128
        return (pairs.clamp(-limit, limit - 1).sum(-1) - zero_point * values.sum(1)) * scales

    monkeypatch.setattr(kernels, "onednn_int8_linear", linear)
    monkeypatch.setattr(kernels, "duration", lambda work: 100.0 if kind == "slow" and work.func is linear else 1.0)
    assert can_quantize(CPU) == (kind == "exact" and hasattr(torch.ops.onednn, "qlinear_prepack"))


def test_other_devices_and_dtypes_are_not_packed() -> None:
    assert not can_quantize(torch.device("cuda")) and not can_quantize(torch.device("mps"))
    assert not can_pack(torch.device("cuda"), torch.bfloat16)
    assert not can_pack(CPU, torch.float32) and not can_pack(CPU, torch.float16)


def _refuse_to_time(*_: Any) -> bool:
    raise AssertionError("a product was timed")


@needs_packing
def test_small_networks_are_not_timed(monkeypatch: pytest.MonkeyPatch, params: dict[str, Any]) -> None:
    """Their build would take longer, and the forms differ too little. Its few milliseconds are those of a look."""
    monkeypatch.setattr(kernels, "_is_faster", _refuse_to_time)
    weights = oracle.random_state(params, seed=3).values()
    for packed_only in (False, True):
        assert measure_kernels(weights, torch.bfloat16, packed_only=packed_only) == Kernels()


@pytest.fixture
def timed(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[bool]]:
    """Has the timings decide as a test says, one after another, with each form run once."""
    answers: list[bool] = []

    def decide(work: Callable[[], None], other: Callable[[], None]) -> bool:
        work()
        other()
        return answers.pop(0)

    monkeypatch.setattr(kernels, "_is_faster", decide)
    monkeypatch.setattr(kernels, "_PROBE_BYTES", 4 * OUT * IN)
    yield answers
    assert not answers


@needs_packing
@pytest.mark.parametrize(
    ("answers", "packed_only", "expected"),
    [
        ([True, False], True, Kernels(pads_one=True)),
        ([False, True], True, Kernels(pads_few=True)),
        ([False, False, True], False, Kernels(packs_one_row=True)),
    ],
)
def test_the_form_that_was_faster_is_taken(
    timed: list[bool], answers: list[bool], packed_only: bool, expected: Kernels
) -> None:
    timed += answers
    weights = [normal(OUT, IN, seed=i) for i in range(3)]
    assert measure_kernels(weights, torch.bfloat16, packed_only=packed_only) == expected


def test_a_form_is_faster_if_it_takes_clearly_less_time_than_the_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """By a clock of the test's own, which the work moves on; the other's time counts as much as the work's."""
    now = [0.0]
    monkeypatch.setattr(kernels.time, "perf_counter", lambda: now[0])

    def taking(*seconds: float) -> Callable[[], None]:
        times = list(seconds) * 5

        def work() -> None:
            now[0] += times.pop(0)

        return work

    assert kernels._is_faster(taking(0.9), taking(1.0))
    assert not kernels._is_faster(taking(0.99), taking(1.0))
    assert not kernels._is_faster(taking(1.1), taking(1.0))
    assert kernels._is_faster(taking(0.9, 0.9, 9.0, 0.9, 0.9), taking(1.0))  # once, something else had the processor
