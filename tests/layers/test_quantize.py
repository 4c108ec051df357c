"""Weights quantized while loading, to int8: close to the exact network, and never behind an edited weight."""

from __future__ import annotations

import math
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
from llama.layers.kernels import QuantizedWeight, can_quantize
from llama.layers.linear import ColumnParallelLinear, own, packable_layers, sharded
from llama.tools import perplexity
from llama.tools.memory import memory_table
from tests.checkpoint.test_memory import peak_of_generate
from tests.support import oracle
from tests.support.edits import COPIES, EDITS, UNPACKABLE
from tests.support.ranks import run_ranks

CPU = torch.device("cpu")
IN, OUT = 64, 128
MAX_SEQ_LEN = 64
EXACT = 1e-5  # the largest relative error of a product with the weight itself, from rounding alone
PRODUCT = 1e-4, 0.02  # the smallest and largest relative error of a product with the quantized weight
LOGITS = 1e-3, 0.05  # the same of a network's logits
pytestmark = pytest.mark.skipif(not can_quantize(CPU), reason="needs a CPU with int8 products (VNNI)")


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def error(got: Tensor, expected: Tensor) -> float:
    """The relative one, 0 where both are zeros."""
    return float((got.double() - expected.double()).norm() / expected.double().norm().clamp_min(1e-30))


# A layer


@pytest.fixture(scope="module", autouse=True)
def groups() -> None:
    """fairscale's layers need a model-parallel group."""
    init_process_groups(1, CPU)


def make(*, requires_grad: bool = False) -> ColumnParallelLinear:
    layer = sharded(ColumnParallelLinear, IN, OUT, bias=False, gather_output=False)
    layer.weight = nn.Parameter(normal(OUT, IN), requires_grad)
    layer.quantize = "int8"
    layer.pack(torch.float32)
    return layer


def is_quantized(layer: ColumnParallelLinear) -> bool:
    return isinstance(getattr(layer, "packed_form", None), QuantizedWeight)


def assert_computes(layer: nn.Module, weight: Tensor, *, exactly: bool) -> None:
    """The product with that weight: exactly by a layer that has stepped aside, or with the quantized weight."""
    low, high = (0.0, EXACT) if exactly else PRODUCT
    for n_rows in (1, 3, 20):
        x = normal(n_rows, IN, seed=1)
        with torch.no_grad():
            assert low <= error(layer(x), x.double() @ weight.detach().double().T) <= high


@pytest.mark.parametrize("edit", EDITS)
def test_an_edit_of_a_quantized_weight_counts_and_packing_quantizes_it_again(edit: str) -> None:
    layer = make()
    assert is_quantized(layer)
    assert_computes(layer, layer.weight, exactly=False)
    with torch.no_grad():
        EDITS[edit](layer)
        assert_computes(layer, layer.weight, exactly=True)
        assert layer._packed is None
        own(layer)
        layer.pack(torch.float32)
        assert is_quantized(layer) == (edit not in UNPACKABLE)
        if is_quantized(layer) and layer.weight.std() > 0.01 and "dtype" not in edit:
            assert_computes(layer, layer.weight, exactly=layer.weight.unique().numel() == 1)


def test_a_weight_that_requires_gradients_is_not_quantized() -> None:
    layer = make(requires_grad=True)
    assert layer._packed is None
    assert_computes(layer, layer.weight, exactly=True)


def test_gradients_of_inputs_match_the_weight_itself() -> None:
    layer = make()
    x, upstream = (normal(3, n, seed=1) for n in (IN, OUT))
    layer(x.requires_grad_()).backward(upstream)
    torch.testing.assert_close(x.grad, upstream @ layer.weight)
    assert_computes(layer, layer.weight, exactly=False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_products_have_the_inputs_dtype(dtype: torch.dtype) -> None:
    assert make()(normal(3, IN).to(dtype)).dtype == dtype


def test_copies_go_without_the_quantized_form_and_can_make_it_again() -> None:
    layer = make()
    for copied in (make_copy(layer) for make_copy in COPIES.values()):
        assert_computes(copied, layer.weight, exactly=True)
        copied.pack(torch.float32)
        assert_computes(copied, layer.weight, exactly=False)
    assert is_quantized(layer)


def test_a_bias_is_added_to_the_int8_product() -> None:
    layer = ColumnParallelLinear(IN, OUT, bias=True)
    layer.load_state_dict({"weight": normal(OUT, IN), "bias": normal(OUT, seed=2)})
    layer.requires_grad_(False)
    layer.quantize = "int8"
    layer.pack(torch.float32)
    torch.testing.assert_close(layer(normal(3, IN)), make()(normal(3, IN)) + normal(OUT, seed=2))


def test_the_default_device_and_dtype_make_no_difference() -> None:
    x, layer = normal(9, IN), make()
    expected = layer(x)
    torch.set_default_dtype(torch.float64)
    try:
        with torch.device("meta"):
            assert can_quantize(CPU)
            layer.pack(torch.float32)
            out = layer(x)
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(out, expected)


# A build


@pytest.fixture(scope="module")
def wide(params: dict[str, Any]) -> dict[str, Any]:
    return params | {"dim": 128, "n_layers": 2, "n_heads": 4, "n_kv_heads": 4, "multiple_of": 256}


@pytest.fixture(scope="module")
def wide_state(wide: dict[str, Any]) -> oracle.State:
    return oracle.random_state(wide, seed=5)


@pytest.fixture(scope="module")
def folder(write_checkpoint: Callable[..., Path], wide: dict[str, Any], wide_state: oracle.State) -> Path:
    return write_checkpoint(wide, wide_state)


def build(folder: Path, tokenizer_path: Path, dtype: str | None = None, max_batch_size: int = 4) -> Llama:
    sizes = {"max_seq_len": MAX_SEQ_LEN, "max_batch_size": max_batch_size}
    return Llama.build(folder, tokenizer_path, **sizes, device="cpu", dtype=dtype, quantize="int8")


@pytest.fixture(params=["float32", None], ids=str)
def model(request: pytest.FixtureRequest, folder: Path, tokenizer_path: Path) -> Any:
    return build(folder, tokenizer_path, request.param).model


def tokens(n_rows: int, seqlen: int, params: dict[str, Any]) -> Tensor:
    return torch.randint(params["vocab_size"], (n_rows, seqlen), generator=torch.Generator().manual_seed(0))


def test_logits_are_close_to_the_exact_ones(model: Any, wide: dict[str, Any], wide_state: oracle.State) -> None:
    layers = packable_layers(model)
    assert all(map(is_quantized, layers)) and len(layers) >= 15 and model.output in layers
    prompts = tokens(4, 20, wide)
    expected = oracle.logits(wide_state, wide, prompts)
    low, high = LOGITS
    with torch.inference_mode():
        assert low < error(model(prompts, 0), expected) < high
        assert low < error(model(prompts[:, -1:], 19)[:, 0], expected[:, -1]) < high


def test_the_weights_are_the_files_and_nothing_else_is_quantized(model: Any, folder: Path) -> None:
    stored, state = read_shard(folder / "consolidated.00.pth"), model.state_dict()
    assert state.keys() == stored.keys()
    dtype = model.norm.weight.dtype
    for name, weight in state.items():
        plain = "norm" in name or "tok_embeddings" in name
        assert torch.equal(weight, stored[name].to(dtype) if plain else stored[name]), name
    assert model.layers[0].attention.cache_k.dtype == dtype


def test_a_row_has_the_same_logits_whatever_the_batch(folder: Path, tokenizer_path: Path, wide: dict[str, Any]) -> None:
    """In float32 to rounding of the attention; the products themselves are the same to the last bit."""
    quantized = build(folder, tokenizer_path, "float32")
    prompts = [row[: 3 + 5 * i].tolist() for i, row in enumerate(tokens(4, 30, wide))]
    together = quantized.generate(prompts, 12, temperature=0, logprobs=True)
    for i, prompt in enumerate(prompts):
        ids, logprobs = quantized.generate([prompt], 12, temperature=0, logprobs=True)
        assert ids[0] == together[0][i]
        torch.testing.assert_close(torch.tensor(logprobs[0]), torch.tensor(together[1][i]), atol=0.01, rtol=0.01)


def test_one_row_is_quantized_too(folder: Path, tokenizer_path: Path) -> None:
    alone = build(folder, tokenizer_path, max_batch_size=1)
    assert all(map(is_quantized, packable_layers(alone.model)))


def test_hooks_run_and_replaced_modules_and_edits_count(
    model: Any, wide: dict[str, Any], wide_state: oracle.State
) -> None:
    prompts, calls = tokens(2, 9, wide), []
    for layer in packable_layers(model):
        layer.register_forward_hook(lambda module, *_: calls.append(module))
    with torch.inference_mode():
        before = model(prompts, 0)
        assert len(calls) == len(packable_layers(model)) and {*calls} == {*packable_layers(model)}
        for block in model.layers:
            block.attention.wo.weight.zero_()
        model.layers[1].feed_forward.w2 = nn.Identity()
        model.layers[1].feed_forward.w2.forward = lambda x: x[..., : wide["dim"]] * 0
        after = model(prompts, 0)
    zeroed = ("layers.1.feed_forward.w2.weight", *(f"layers.{i}.attention.wo.weight" for i in range(2)))
    edited = {name: w * 0 if name in zeroed else w for name, w in wide_state.items()}
    expected = oracle.logits(edited, wide, prompts)
    assert error(after, expected) < LOGITS[1] < error(before, expected)
    edited_layer, other = model.layers[0].attention.wo, model.layers[0].attention.wq
    assert not is_quantized(edited_layer) and is_quantized(other)
    model.pack()
    assert is_quantized(edited_layer)


def _two_ranks(rank: int, params: dict[str, Any]) -> tuple[int, Tensor, Tensor]:
    """The number of quantized layers, and the logits of plain and quantized ones."""
    torch.set_num_threads(1)
    init_process_groups(2, CPU)
    args = ModelArgs(**params, max_batch_size=2, max_seq_len=16)
    model = Transformer.from_state(args, oracle.shard(oracle.random_state(params, seed=3), rank, 2))
    prompts = tokens(2, 7, params)
    plain = model(prompts, 0)
    for layer in packable_layers(model)[:-1]:
        layer.quantize = "int8"
    model.pack()
    return sum(map(is_quantized, packable_layers(model))), plain, model(prompts, 0)


def test_each_rank_quantizes_its_shard(wide: dict[str, Any]) -> None:
    found = run_ranks(2, _two_ranks, wide)
    for n_quantized, plain, quantized in found:
        assert n_quantized == 14
        assert LOGITS[0] < error(quantized, plain) < LOGITS[1]
    assert torch.equal(found[0][2], found[1][2])


# What it refuses


@pytest.mark.parametrize("name", ["cuda:0", "mps"])
def test_other_devices_are_refused_with_the_reason(name: str, folder: Path) -> None:
    assert loading.choose_quantize(None, folder, torch.device(name)) is None
    if name == "mps":
        with pytest.raises(ValueError, match="quantize='int8' must be used on a CPU or CUDA, got device mps; leave"):
            loading.choose_quantize("int8", folder, torch.device(name))


def test_a_processor_without_the_products_is_refused_before_loading(
    folder: Path, tokenizer_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(loading.reading, "load_shard")
    monkeypatch.setattr(loading, "can_quantize", lambda device: False)
    with pytest.raises(ValueError, match=r"must have a processor .*int8 products in oneDNN.*leave it out"):
        build(folder, tokenizer_path)


# Memory and tools


def test_the_plan_is_the_memory_of_what_is_held(model: Any) -> None:
    held = sum(w.nbytes for name, w in model.named_parameters() if "norm" in name or "tok_embeddings" in name)
    for layer in packable_layers(model):  # whose numbers take as many bytes as there are weights
        held += layer.weight.numel() + layer.packed_form.scales.nbytes
    dtype = model.norm.weight.dtype
    assert MemoryPlan(model.params, 1, dtype, quantize="int8").weights == held


@pytest.mark.parametrize("parts", [2, 4])
def test_the_plan_of_a_rank_is_its_share(params: dict[str, Any], parts: int) -> None:
    """The norms, and the scales of wo and w2, are on all ranks."""
    args = ModelArgs(**params, max_batch_size=4, max_seq_len=32)
    whole, part = (MemoryPlan(args, n, torch.bfloat16, quantize="int8") for n in (1, parts))
    shared = 2 * (2 * args.n_layers + 1) * args.dim + 4 * 2 * args.n_layers * args.dim
    assert (part.weights - shared) * parts == whole.weights - shared
    assert part.kv_cache * parts == whole.kv_cache


def test_a_prefill_stays_within_the_plan(checkpoint: Path, tokenizer_path: Path) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        llama = build(checkpoint, tokenizer_path, str(dtype).removeprefix("torch."))
        assert peak_of_generate(llama) <= MemoryPlan(llama.model.params, 1, dtype, quantize="int8").activations


def test_what_fits_quantized_only_is_refused_unquantized(params: dict[str, Any]) -> None:
    args = ModelArgs(**params, max_batch_size=1, max_seq_len=8)
    needed = MemoryPlan(args, 1, torch.bfloat16, quantize="int8").total
    assert needed < MemoryPlan(args, 1, torch.bfloat16).total
    MemoryPlan(args, 1, torch.bfloat16, quantize="int8").check(needed, "cpu")
    with pytest.raises(MemoryError, match="bfloat16, MP=1"):
        MemoryPlan(args, 1, torch.bfloat16).check(needed, "cpu")
    with pytest.raises(MemoryError, match="bfloat16, quantize=int8, MP=1"):
        MemoryPlan(args, 1, torch.bfloat16, quantize="int8").check(needed - 1, "cpu")


def test_the_memory_command_knows_quantization() -> None:
    table = memory_table(model="7B", dtype="bfloat16", quantize="int8")
    assert table.startswith("7B: bfloat16, int8, MP=1")
    (weights,) = [float(line.split()[1]) for line in table.splitlines() if line.startswith("weights")]
    assert 1 < weights * 2**30 / 6_738_415_616 < 1.05
    with pytest.raises(ValueError, match="quantize must be None or 'int8', got 'int4'"):
        memory_table(model="7B", quantize="int4")


def test_the_perplexity_command_quantizes(
    checkpoint: Path, tokenizer_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = tmp_path / "text"
    text.write_text("The quick brown fox jumps over the lazy dog. " * 4)

    def value(**options: str) -> float:
        perplexity.main(str(text), str(checkpoint), str(tokenizer_path), max_seq_len=32, dtype="float32", **options)
        return float(capsys.readouterr().out.split()[1])

    exact, quantized = value(), value(quantize="int8")
    assert exact != quantized and math.isclose(exact, quantized, rel_tol=0.1)
