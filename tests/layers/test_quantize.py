"""A build with int8 products: close to the exact network, the same for any batch, and never behind an edited weight."""

from __future__ import annotations

import copy
import io
import logging
import math
import pickle
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
from tests.layers.test_linear import EDITS
from tests.support import oracle
from tests.support.ranks import run_ranks

CPU = torch.device("cpu")
IN, OUT = 64, 48
MAX_SEQ_LEN = 64
pytestmark = pytest.mark.skipif(not can_quantize(CPU), reason="needs a CPU with int8 products (VNNI)")


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


# A layer


@pytest.fixture(scope="module", autouse=True)
def groups() -> None:
    """fairscale's layers need a model-parallel group."""
    init_process_groups(1, CPU)


def make(dtype: torch.dtype = torch.float32, *, requires_grad: bool = False) -> ColumnParallelLinear:
    layer = sharded(ColumnParallelLinear, IN, OUT, bias=False, gather_output=False)
    layer.weight = nn.Parameter(normal(OUT, IN).to(dtype), requires_grad)
    layer.quantize = "int8"
    layer.pack(dtype)
    return layer


def is_quantized(layer: ColumnParallelLinear) -> bool:
    return isinstance(getattr(layer, "packed_form", None), QuantizedWeight)


def assert_computes(layer: nn.Module, weight: Tensor, *, exactly: bool) -> None:
    """The product with that weight: exactly by a layer that has stepped aside, or rounded to int8."""
    for n_rows in (1, 3, 20):
        x = normal(n_rows, IN, seed=1)
        with torch.no_grad():
            got = layer(x).double()
        expected = x.double() @ weight.detach().double().T
        assert (got - expected).norm() <= (1e-5 if exactly else 0.02) * expected.norm()
        assert exactly or (got - expected).norm() > 1e-4 * expected.norm()


def test_a_quantized_layer_computes_by_int8_in_the_dtype_of_its_inputs() -> None:
    layer = make()
    assert is_quantized(layer)
    assert_computes(layer, layer.weight, exactly=False)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        assert layer(normal(3, IN).to(dtype)).dtype == dtype
    assert torch.equal(layer.weight, normal(OUT, IN)) and layer.state_dict().keys() == {"weight"}


@pytest.mark.parametrize("edit", EDITS)
def test_an_edit_of_a_quantized_weight_counts_and_packing_quantizes_it_again(edit: str) -> None:
    layer = make()
    with torch.no_grad():
        EDITS[edit](layer)
        assert_computes(layer, layer.weight, exactly=True)
        assert layer._packed is None
        own(layer)
        layer.pack(torch.float32)
        again = edit not in ("a parametrization", "pruning", "swap_tensors")
        assert is_quantized(layer) == again
        if again and layer.weight.std() > 0.01 and "dtype" not in edit:
            assert_computes(layer, layer.weight, exactly=layer.weight.unique().numel() == 1)


def test_a_weight_that_requires_gradients_is_not_quantized() -> None:
    layer = make(requires_grad=True)
    assert layer._packed is None
    assert_computes(layer, layer.weight, exactly=True)


def test_gradients_of_inputs_match_the_weight_itself() -> None:
    layer = make()
    x, upstream = normal(3, IN, seed=1).requires_grad_(), normal(3, OUT, seed=2)
    layer(x).backward(upstream)
    torch.testing.assert_close(x.grad, upstream @ layer.weight)
    assert_computes(layer, layer.weight, exactly=False)


@pytest.mark.parametrize("kind", ["deepcopy", "pickle", "torch.save"])
def test_copies_go_without_the_int8_form_and_can_make_it_again(kind: str) -> None:
    layer = make()
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    copied = {
        "deepcopy": lambda: copy.deepcopy(layer),
        "pickle": lambda: pickle.loads(pickle.dumps(layer)),
        "torch.save": lambda: torch.load(file, weights_only=False),
    }[kind]()
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
    expected = make()(normal(3, IN))
    device, dtype = torch.get_default_device(), torch.get_default_dtype()
    x, weight = normal(3, IN), normal(OUT, IN)
    layer = sharded(ColumnParallelLinear, IN, OUT, bias=False, gather_output=False)
    layer.weight = nn.Parameter(weight, requires_grad=False)
    layer.quantize = "int8"
    torch.set_default_device("meta")
    torch.set_default_dtype(torch.float64)
    try:
        assert can_quantize(CPU)
        layer.pack(torch.float32)
        out = layer(x)
    finally:
        torch.set_default_device(device)
        torch.set_default_dtype(dtype)
    assert torch.equal(out, expected)


# A build


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def quantized(request: pytest.FixtureRequest, checkpoint: Path, tokenizer_path: Path) -> Llama:
    return build(checkpoint, tokenizer_path, request.param)


def build(checkpoint: Path, tokenizer_path: Path, dtype: str | None = None, max_batch_size: int = 4) -> Llama:
    return Llama.build(
        checkpoint, tokenizer_path, MAX_SEQ_LEN, max_batch_size, device="cpu", dtype=dtype, quantize="int8"
    )


def tokens(n_rows: int, seqlen: int, params: dict[str, Any]) -> Tensor:
    return torch.randint(params["vocab_size"], (n_rows, seqlen), generator=torch.Generator().manual_seed(0))


def test_logits_are_close_to_the_exact_ones(quantized: Llama, params: dict[str, Any], state: oracle.State) -> None:
    prompts = tokens(4, 20, params)
    expected = oracle.logits(state, params, prompts)
    with torch.inference_mode():
        got = quantized.model(prompts, 0)
        step = quantized.model(prompts[:, -1:], 19)[:, 0]
    assert all(is_quantized(layer) for layer in packable_layers(quantized.model))
    for logits, exact in ((got, expected), (step, expected[:, -1])):
        assert 1e-3 < (logits - exact).norm() / exact.norm() < 0.05


def test_the_weights_are_the_files_and_nothing_else_is_quantized(quantized: Llama, checkpoint: Path) -> None:
    stored = read_shard(checkpoint / "consolidated.00.pth")
    state = quantized.model.state_dict()
    assert state.keys() == stored.keys()
    dtype = quantized.model.norm.weight.dtype
    for name, weight in state.items():
        plain = "norm" in name or "tok_embeddings" in name
        assert torch.equal(weight, stored[name].to(dtype) if plain else stored[name]), name
    attention = quantized.model.layers[0].attention
    assert attention.cache_k.dtype == attention.cache_v.dtype == dtype


def test_a_row_has_the_same_logits_whatever_the_batch(quantized: Llama, params: dict[str, Any]) -> None:
    """In float32 to rounding of the attention; the products themselves are the same to the last bit."""
    if quantized.model.norm.weight.dtype != torch.float32:
        pytest.skip("attention in bfloat16 rounds by the number of rows")
    prompts = [row[: 3 + 5 * i].tolist() for i, row in enumerate(tokens(4, 30, params))]
    together = quantized.generate(prompts, 12, temperature=0, logprobs=True)
    for i, prompt in enumerate(prompts):
        ids, logprobs = quantized.generate([prompt], 12, temperature=0, logprobs=True)
        assert ids[0] == together[0][i]
        torch.testing.assert_close(torch.tensor(logprobs[0]), torch.tensor(together[1][i]), atol=0.01, rtol=0.01)


def test_one_row_is_quantized_too(checkpoint: Path, tokenizer_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="llama"):
        alone = build(checkpoint, tokenizer_path, max_batch_size=1)
    assert all(is_quantized(layer) for layer in packable_layers(alone.model))
    assert alone.model.norm.weight.dtype == torch.bfloat16
    assert any("quantizing" in record.message for record in caplog.records)


def test_hooks_run_and_replaced_modules_and_edits_count(
    checkpoint: Path, tokenizer_path: Path, params: dict[str, Any], state: oracle.State
) -> None:
    model = build(checkpoint, tokenizer_path, "float32").model
    prompts = tokens(2, 9, params)
    calls: list[nn.Module] = []
    for layer in packable_layers(model):
        layer.register_forward_hook(lambda module, *_: calls.append(module))
    with torch.inference_mode():
        before = model(prompts, 0)
        assert calls == [layer for layer in calls if is_quantized(layer)] and len(calls) == len(packable_layers(model))
        model.layers[0].attention.wo.weight.zero_()
        model.layers[1].feed_forward.w2 = nn.Identity()
        model.layers[1].feed_forward.w2.forward = lambda x: x[..., : params["dim"]] * 0  # type: ignore[method-assign]
        after = model(prompts, 0)
    edited = {
        name: w * 0 if name in ("layers.0.attention.wo.weight", "layers.1.feed_forward.w2.weight") else w
        for name, w in state.items()
    }
    expected = oracle.logits(edited, params, prompts)
    assert (after - expected).norm() / expected.norm() < 0.05 < (before - expected).norm() / expected.norm()
    assert not is_quantized(model.layers[0].attention.wo)
    model.pack()
    assert is_quantized(model.layers[0].attention.wo)
    with torch.inference_mode():
        assert (model(prompts, 0) - expected).norm() / expected.norm() < 0.05


def test_a_pass_of_training_differentiates_through_the_weights_themselves(
    checkpoint: Path, tokenizer_path: Path, params: dict[str, Any], state: oracle.State
) -> None:
    model = build(checkpoint, tokenizer_path, "float32").model
    prompts = tokens(2, 9, params)
    model.requires_grad_()
    out = model(prompts, 0)
    torch.testing.assert_close(out, oracle.logits(state, params, prompts), atol=1e-3, rtol=1e-3)
    out.square().mean().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def _two_ranks(rank: int, params: dict[str, Any]) -> tuple[list[tuple[int, ...]], Tensor, Tensor]:
    """The shapes of quantized shards, and the logits of plain and quantized layers."""
    torch.set_num_threads(1)
    init_process_groups(2, CPU)
    args = ModelArgs(**params, max_batch_size=2, max_seq_len=16)
    model = Transformer.from_state(args, oracle.shard(oracle.random_state(params, seed=3), rank, 2))
    prompts = tokens(2, 7, params)
    plain = model(prompts, 0)
    for layer in packable_layers(model):
        layer.quantize = "int8"
    model.pack()
    return (
        [tuple(layer.weight.shape) for layer in packable_layers(model) if is_quantized(layer)],
        plain,
        model(prompts, 0),
    )


def test_each_rank_quantizes_its_shard(params: dict[str, Any]) -> None:
    found = run_ranks(2, _two_ranks, params)
    for shapes, plain, quantized in found:
        assert len(shapes) == 7 * params["n_layers"] + 1
        assert 1e-3 < (quantized - plain).norm() / plain.norm() < 0.05
    assert torch.equal(found[0][2], found[1][2])


# What it refuses


@pytest.mark.parametrize("quantize", ["int3", "", True, 8])
def test_another_quantization_is_refused_before_loading(quantize: Any, checkpoint: Path, tokenizer_path: Path) -> None:
    with pytest.raises(ValueError, match=r"quantize must be None, 'int8' or 'int4', got"):
        Llama.build(checkpoint, tokenizer_path, 8, 1, device="cpu", quantize=quantize)


@pytest.mark.parametrize("name", ["cuda:0", "mps"])
def test_other_devices_are_refused_with_the_reason(name: str, checkpoint: Path) -> None:
    assert loading.choose_quantize(None, checkpoint, torch.device(name)) is None
    with pytest.raises(ValueError, match=rf"must be used on a CPU, got device {name}; leave it out, or use"):
        loading.choose_quantize("int8", checkpoint, torch.device(name))


def test_a_processor_without_int8_products_is_refused_before_loading(
    checkpoint: Path, tokenizer_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(*_: Any) -> None:
        raise AssertionError("loaded")

    monkeypatch.setattr(loading, "can_quantize", lambda device: False)
    monkeypatch.setattr(loading.reading, "load_shard", load)
    with pytest.raises(ValueError, match=r"must have a processor .*int8 products in oneDNN.*leave it out"):
        build(checkpoint, tokenizer_path)


# Memory and tools


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_plan_is_the_memory_of_what_is_held(checkpoint: Path, tokenizer_path: Path, dtype: torch.dtype) -> None:
    model = build(checkpoint, tokenizer_path, str(dtype).removeprefix("torch.")).model
    layers = packable_layers(model)
    others = [w for name, w in model.named_parameters() if "norm" in name or "tok_embeddings" in name]
    held = sum(layer.weight.numel() + layer.packed_form.scales.nbytes for layer in layers)
    held += sum(weight.nbytes for weight in others)
    assert MemoryPlan(model.params, 1, dtype, quantize="int8").weights == held


@pytest.mark.parametrize("parts", [1, 2, 4])
def test_the_plan_of_a_rank_is_its_share(params: dict[str, Any], parts: int) -> None:
    """The norms, and the scales of wo and w2, are on all ranks."""
    args = ModelArgs(**params, max_batch_size=4, max_seq_len=32)
    whole, part = (MemoryPlan(args, n, torch.bfloat16, quantize="int8") for n in (1, parts))
    shared = 2 * (2 * args.n_layers + 1) * args.dim + 4 * 2 * args.n_layers * args.dim
    assert (part.weights - shared) * parts == whole.weights - shared
    assert part.kv_cache * parts == whole.kv_cache


def test_a_prefill_stays_within_the_plan(checkpoint: Path, tokenizer_path: Path) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        built = build(checkpoint, tokenizer_path, str(dtype).removeprefix("torch."))
        assert peak_of_generate(built) <= MemoryPlan(built.model.params, 1, dtype, quantize="int8").activations


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
    parameters = 6_738_415_616
    assert 1.0 * parameters / 2**30 < weights < 1.05 * parameters / 2**30
    with pytest.raises(ValueError, match="quantize must be None, 'int8' or 'int4', got 'int3'"):
        memory_table(model="7B", quantize="int3")


def test_the_perplexity_command_quantizes(
    checkpoint: Path, tokenizer_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = tmp_path / "text"
    text.write_text("The quick brown fox jumps over the lazy dog. " * 4)

    def value(**options: Callable[..., Any] | str) -> float:
        perplexity.main(str(text), str(checkpoint), str(tokenizer_path), max_seq_len=32, dtype="float32", **options)
        return float(capsys.readouterr().out.split()[1])

    exact, quantized = value(), value(quantize="int8")
    assert exact != quantized and math.isclose(exact, quantized, rel_tol=0.1)
