"""The products of linear layers: equal values in every form, and the choice among them by their times."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from llama import kernels
from llama.kernels import Kernels, can_pack, measure_kernels, pack_weight, packed_linear
from tests import oracle

CPU = torch.device("cpu")
IN, OUT = 64, 48
PADDING = Kernels(pads_one=True, pads_few=True)
needs_packing = pytest.mark.skipif(not can_pack(CPU, torch.bfloat16), reason="needs a CPU with bfloat16 in oneDNN")


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@needs_packing
@pytest.mark.parametrize("n_rows", [1, 2, 3])
def test_padding_few_rows_changes_no_value(n_rows: int) -> None:
    """Up to rounding: another number of rows may add in another order."""
    blocked = pack_weight(normal(OUT, IN).bfloat16())
    x = normal(n_rows, IN, seed=1).bfloat16()
    torch.testing.assert_close(packed_linear(x, blocked, PADDING), packed_linear(x, blocked), atol=0.03, rtol=0.01)


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


def test_onednns_switch_is_put_back_after_an_error() -> None:
    before = torch._C._get_mkldnn_enabled()
    with pytest.raises(ZeroDivisionError), kernels._without_onednn():
        1 / torch._C._get_mkldnn_enabled()
    assert torch._C._get_mkldnn_enabled() == before


# What this processor has


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_other_dtypes_are_not_packed(dtype: torch.dtype) -> None:
    assert not can_pack(CPU, dtype)


def test_other_devices_are_not_packed() -> None:
    assert not can_pack(torch.device("cuda"), torch.bfloat16)


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
        ([False, False, True, False], False, Kernels(native_row=True)),
        ([False, False, False, True], False, Kernels(packs_one_row=True)),
    ],
)
def test_the_form_that_was_faster_is_taken(
    timed: list[bool], answers: list[bool], packed_only: bool, expected: Kernels
) -> None:
    timed += answers
    weights = [normal(OUT, IN, seed=i) for i in range(3)]
    assert measure_kernels(weights, torch.bfloat16, packed_only=packed_only) == expected


def test_weights_of_the_most_common_size_are_timed() -> None:
    """Norms are no matrices, and one large embedding weighs less than many kernels."""
    weights = [torch.empty(5000), *[torch.empty(40, 10) for _ in range(9)], torch.empty(300, 10)]
    assert {weight.shape for weight in kernels._sample(weights)} == {(40, 10)}


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
