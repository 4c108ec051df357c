"""int4 weights: their rounding and products, layers that step aside, a build close to the exact network."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from llama import Llama, ModelArgs, Transformer
from llama.checkpoint import loading
from llama.checkpoint.memory import MemoryPlan
from llama.checkpoint.reading import read_shard
from llama.distributed.groups import init_process_groups
from llama.layers import int4, kernels
from llama.layers.int4 import (
    Int4Weight,
    can_quantize_int4,
    dequantize_int4,
    int4_linear,
    measure_int4,
    quantize_int4,
    suits_int4,
)
from llama.layers.kernels import Kernels, QuantizedWeight, can_quantize
from llama.layers.linear import ColumnParallelLinear, packable_layers, sharded
from llama.tools.memory import memory_table
from llama.tools.quantize import quantize as write_quantized
from tests.layers.test_linear import EDITS
from tests.support import oracle
from tests.support.ranks import run_ranks

CPU = torch.device("cpu")
IN, OUT = 64, 128
MAX_SEQ_LEN = 64
WAYS = pytest.mark.parametrize("dequantized_rows", [None, 1], ids=["direct", "dequantized"])
has_int4 = can_quantize_int4(CPU, torch.bfloat16)
needs_int4 = pytest.mark.skipif(not has_int4, reason="needs a CPU with torch's int4 products")
needs_both = pytest.mark.skipif(not (has_int4 and can_quantize(CPU)), reason="needs a CPU with int4 and int8 products")


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
def test_values_of_a_grid_of_16_are_kept() -> None:
    numbers = torch.randint(16, (OUT, 2, 32), generator=torch.Generator().manual_seed(0))
    numbers[..., :2] = torch.tensor([0, 15])
    grid = (numbers * 0.25 - 1.5).view(OUT, IN)
    assert torch.equal(dequantize_int4(quantize_int4(grid)).float(), grid)


@needs_int4
@pytest.mark.parametrize("value", [0.0, 0.25, -3.0])
def test_equal_values_are_kept(value: float) -> None:
    weight = torch.full((OUT, IN), value)
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


# A layer


@pytest.fixture(scope="module", autouse=True)
def groups() -> None:
    """fairscale's layers need a model-parallel group."""
    init_process_groups(1, CPU)


def make(dtype: torch.dtype = torch.bfloat16, dequantized_rows: int | None = 8) -> ColumnParallelLinear:
    layer = sharded(ColumnParallelLinear, IN, OUT, bias=False, gather_output=False)
    layer.weight = nn.Parameter(normal(OUT, IN).to(dtype), False)
    layer.kernels = Kernels(dequantized_rows=dequantized_rows)
    layer.quantize = "int4"
    layer.pack(torch.bfloat16)
    return layer


def is_int4(layer: ColumnParallelLinear) -> bool:
    return isinstance(layer.packed_form, Int4Weight)


def assert_computes(layer: nn.Module, weight: Tensor, *, exactly: bool) -> None:
    """The product with that weight: by a layer that has stepped aside, or with the weight rounded to int4."""
    for n_rows in (1, 3, 20):
        x = normal(n_rows, IN, seed=1).bfloat16()
        with torch.no_grad():
            got = layer(x).double()
        expected = x.double() @ weight.detach().double().T
        assert (got - expected).norm() <= (0.01 if exactly else 0.15) * expected.norm()
        assert exactly or (got - expected).norm() > 0.02 * expected.norm()


@needs_int4
@pytest.mark.parametrize("edit", EDITS)
def test_an_edit_of_an_int4_weight_counts_and_packing_quantizes_it_again(edit: str) -> None:
    layer = make(torch.float32)
    assert is_int4(layer)
    assert_computes(layer, layer.weight, exactly=False)
    with torch.no_grad():
        EDITS[edit](layer)
        assert_computes(layer, layer.weight, exactly=True)
        assert layer._packed is None
        layer.pack(torch.bfloat16)
        assert is_int4(layer) == (edit not in ("a parametrization", "pruning", "swap_tensors"))


@needs_int4
def test_inputs_of_another_dtype_and_gradients_use_the_weight_itself() -> None:
    layer = make()
    x = normal(3, IN, seed=1)
    torch.testing.assert_close(layer(x), x @ layer.weight.float().T)
    x = x.bfloat16().requires_grad_()
    layer(x).sum().backward()
    torch.testing.assert_close(x.grad, layer.weight.sum(0).expand(3, IN), rtol=0.02, atol=0.1)
    assert is_int4(layer)


@needs_int4
def test_copies_go_without_the_int4_form_and_can_make_it_again() -> None:
    copied = copy.deepcopy(make())
    assert_computes(copied, copied.weight, exactly=True)
    copied.pack(torch.bfloat16)
    assert_computes(copied, copied.weight, exactly=False)


@needs_int4
def test_the_default_device_and_dtype_make_no_difference() -> None:
    x, expected = normal(9, IN).bfloat16(), make()(normal(9, IN).bfloat16())
    layer = make()
    torch.set_default_device("meta")
    torch.set_default_dtype(torch.float64)
    try:
        assert can_quantize_int4(CPU, torch.bfloat16)
        layer.pack(torch.bfloat16)
        out = layer(x)
    finally:
        torch.set_default_device(None)
        torch.set_default_dtype(torch.float32)
    assert torch.equal(out, expected)


# A build


@pytest.fixture(scope="module")
def params_of_64(params: dict[str, Any]) -> dict[str, Any]:
    """A network whose layers have a multiple of 64 outputs."""
    return params | {"dim": 128, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "multiple_of": 256}


@pytest.fixture(scope="module")
def state_of_64(params_of_64: dict[str, Any]) -> oracle.State:
    return oracle.random_state(params_of_64, seed=5)


@pytest.fixture(scope="module")
def folder(write_checkpoint: Callable[..., Path], params_of_64: dict[str, Any], state_of_64: oracle.State) -> Path:
    return write_checkpoint(params_of_64, state_of_64)


def build(folder: Path, tokenizer_path: Path, dtype: str | None = None, **options: Any) -> Llama:
    return Llama.build(folder, tokenizer_path, MAX_SEQ_LEN, 4, device="cpu", dtype=dtype, quantize="int4", **options)


def tokens(n_rows: int, seqlen: int, params: dict[str, Any]) -> Tensor:
    return torch.randint(params["vocab_size"], (n_rows, seqlen), generator=torch.Generator().manual_seed(0))


@needs_both
def test_logits_are_close_to_the_exact_ones(
    folder: Path,
    tokenizer_path: Path,
    params_of_64: dict[str, Any],
    state_of_64: oracle.State,
    caplog: pytest.LogCaptureFixture,
) -> None:
    with caplog.at_level(logging.INFO, logger="llama"):
        model = build(folder, tokenizer_path).model
    assert any("int4 weights are dequantized for products of" in record.message for record in caplog.records)
    *layers, output = packable_layers(model)
    assert all(is_int4(layer) for layer in layers) and len(layers) == 14
    assert isinstance(output.packed_form, QuantizedWeight)
    stored = read_shard(folder / "consolidated.00.pth")
    assert all(
        torch.equal(layer.weight, stored[f"{name}.weight"]) for name, layer in model.named_modules() if layer in layers
    )
    prompts = tokens(4, 20, params_of_64)
    expected = oracle.logits(state_of_64, params_of_64, prompts)
    for dequantized_rows in (None, 16):
        for layer in layers:
            layer.kernels = Kernels(dequantized_rows=dequantized_rows)
        with torch.inference_mode():
            got = model(prompts, 0)
            step = model(prompts[:, -1:], 19)[:, 0]
        for logits, exact in ((got, expected), (step, expected[:, -1])):
            assert 0.01 < (logits - exact).norm() / exact.norm() < 0.3


@needs_both
def test_hooks_run_and_edits_count(
    folder: Path, tokenizer_path: Path, params_of_64: dict[str, Any], state_of_64: oracle.State
) -> None:
    model = build(folder, tokenizer_path).model
    calls: list[nn.Module] = []
    for layer in packable_layers(model):
        layer.register_forward_hook(lambda module, *_: calls.append(module))
    prompts = tokens(2, 9, params_of_64)
    edited = {name: w * 0 if ".wo." in name else w for name, w in state_of_64.items()}
    expected = oracle.logits(edited, params_of_64, prompts)
    with torch.inference_mode():
        before = model(prompts, 0)
        assert len(calls) == 15
        for block in model.layers:
            block.attention.wo.weight.zero_()
        after = model(prompts, 0)
    assert (after - expected).norm() < 0.3 * expected.norm() < 0.7 * (before - expected).norm()
    assert not is_int4(model.layers[0].attention.wo) and is_int4(model.layers[0].attention.wq)


def _two_ranks(rank: int, params: dict[str, Any]) -> tuple[int, Tensor, Tensor]:
    torch.set_num_threads(1)
    init_process_groups(2, CPU)
    args = ModelArgs(**params, max_batch_size=2, max_seq_len=16)
    state = {name: t.bfloat16() for name, t in oracle.shard(oracle.random_state(params, seed=3), rank, 2).items()}
    model = Transformer.from_state(args, state)
    prompts = tokens(2, 7, params)
    plain = model(prompts, 0)
    for layer in packable_layers(model)[:-1]:
        layer.quantize = "int4"
    model.pack()
    return sum(is_int4(layer) for layer in packable_layers(model)), plain, model(prompts, 0)


@needs_int4
def test_each_rank_quantizes_its_shard(params_of_64: dict[str, Any]) -> None:
    found = run_ranks(2, _two_ranks, params_of_64 | {"n_kv_heads": 4})
    for n_int4, plain, quantized in found:
        assert n_int4 == 14
        assert 0.01 < (quantized - plain).norm() / plain.norm() < 0.3
    assert torch.equal(found[0][2], found[1][2])


# What it refuses


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_other_dtypes_are_refused(dtype: torch.dtype) -> None:
    with pytest.raises(ValueError, match=r"dtype must be bfloat16 with quantize='int4', got torch.float\d+; use"):
        loading.check_int4(MemoryPlan(ModelArgs(vocab_size=64), 1, dtype), CPU)


@needs_both
def test_other_dtypes_are_refused_before_loading(
    folder: Path, tokenizer_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(loading.reading, "load_shard")
    with pytest.raises(ValueError, match="dtype must be bfloat16"):
        build(folder, tokenizer_path, "float32")


@pytest.mark.parametrize("name", ["cuda:0", "mps"])
def test_other_devices_are_refused(name: str, folder: Path) -> None:
    with pytest.raises(ValueError, match=rf"quantize='int4' must be used on a CPU, got device {name}"):
        loading.choose_quantize("int4", folder, torch.device(name))


def test_a_processor_without_int4_products_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading, "can_quantize_int4", lambda *_: False)
    with pytest.raises(ValueError, match=r"must have a processor .* int4 products.*use quantize='int8'"):
        loading.check_int4(MemoryPlan(ModelArgs(vocab_size=64), 1, torch.bfloat16), CPU)


@pytest.mark.parametrize(
    ("ranks", "refused"),
    [(1, None), (2, None), (4, r"wq\.weight of shape \(32, 128\) at model_parallel_size=4")],
)
def test_groups_and_blocks_must_not_cross_shards(
    ranks: int, refused: str | None, params_of_64: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loading, "can_quantize_int4", lambda *_: True)
    args = ModelArgs(**params_of_64 | {"n_kv_heads": 4})
    if refused is None:
        loading.check_int4(MemoryPlan(args, ranks, torch.bfloat16), CPU)
        return
    with pytest.raises(ValueError, match=refused):
        loading.check_int4(MemoryPlan(args, ranks, torch.bfloat16), CPU)


def test_sizes_that_suit() -> None:
    assert suits_int4(64, 32) and suits_int4(11008, 4096)
    assert not suits_int4(96, 32) and not suits_int4(64, 48)


@pytest.mark.skipif(not can_quantize(CPU), reason="needs a CPU with int8 products (VNNI)")
def test_an_int8_checkpoint_is_not_loaded_as_int4(folder: Path, tokenizer_path: Path, tmp_path: Path) -> None:
    write_quantized(folder, tmp_path / "int8", quiet=True)
    with pytest.raises(
        ValueError, match=r"quantize must be 'int8', or left out, .* which has int8 weights, got 'int4'"
    ):
        build(tmp_path / "int8", tokenizer_path)


def test_a_checkpoint_of_int4_weights_is_not_written(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"form must be int8, got 'int4'; another form .* while loading only"):
        write_quantized(folder, tmp_path / "int4", "int4", quiet=True)
    assert not (tmp_path / "int4").exists()


# Memory


@needs_both
def test_the_plan_is_the_memory_of_what_is_held(folder: Path, tokenizer_path: Path) -> None:
    model = build(folder, tokenizer_path).model
    *layers, output = packable_layers(model)
    others = [w for name, w in model.named_parameters() if "norm" in name or "tok_embeddings" in name]
    held = sum(part.nbytes for layer in layers for part in vars(layer.packed_form).values())
    held += output.weight.numel() + output.packed_form.scales.nbytes + sum(weight.nbytes for weight in others)
    assert MemoryPlan(model.params, 1, torch.bfloat16, quantize="int4").weights == held


def test_the_memory_command_knows_int4() -> None:
    table = memory_table(model="7B", dtype="bfloat16", quantize="int4")
    assert table.startswith("7B: bfloat16, int4, MP=1")
    (weights,) = [float(line.split()[1]) for line in table.splitlines() if line.startswith("weights")]
    assert 0.625 < weights * 2**30 / 6_738_415_616 < 0.7
