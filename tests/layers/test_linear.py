"""The sharded layers: fairscale's products and gradients in every form; no packed form outlives its weight."""

from __future__ import annotations

import copy
import io
import logging
import pickle
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from fairscale.nn.model_parallel import layers as fairscale_layers
from torch import Tensor, nn
from torch.autograd import forward_ad

from llama import ModelArgs, Transformer
from llama.distributed.groups import init_process_groups
from llama.layers import linear as layers
from llama.layers.kernels import Kernels, can_pack
from llama.layers.linear import (
    ColumnParallelLinear,
    EmptyOnMeta,
    PackedParameter,
    RowParallelLinear,
    own,
    pack_layers,
    packable_layers,
    sharded,
)
from tests.support import oracle
from tests.support.edits import COPIES, EDITS, UNPACKABLE
from tests.support.ranks import run_ranks

CPU = torch.device("cpu")
IN, OUT = 64, 48
PADDING = Kernels(pads_one=True, pads_few=True)
needs_packing = pytest.mark.skipif(not can_pack(CPU, torch.bfloat16), reason="needs a CPU with bfloat16 in oneDNN")


@pytest.fixture(scope="module", autouse=True)
def groups() -> None:
    """fairscale's layers need a model-parallel group."""
    init_process_groups(1, CPU)


FAIRSCALES = (fairscale_layers.ColumnParallelLinear, fairscale_layers.RowParallelLinear)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def make(dtype: torch.dtype = torch.bfloat16, *, requires_grad: bool = False) -> ColumnParallelLinear:
    layer = sharded(ColumnParallelLinear, IN, OUT, bias=False, gather_output=False)
    layer.weight = nn.Parameter(normal(OUT, IN).to(dtype), requires_grad)
    return layer


def make_packed(dtype: torch.dtype = torch.bfloat16) -> ColumnParallelLinear:
    layer = make(dtype)
    layer.pack(torch.bfloat16)
    return layer


def exact(x: Tensor, weight: Tensor) -> Tensor:
    """The product of bfloat16 operands, as float64 has it."""
    return x.double() @ weight.detach().bfloat16().double().T


def assert_computes(layer: nn.Module, weight: Tensor) -> None:
    for n_rows in (1, 3):
        x = normal(n_rows, IN, seed=1).bfloat16()
        with torch.no_grad():
            got = layer(x)
        assert got.dtype == torch.bfloat16
        torch.testing.assert_close(got.double(), exact(x, weight), atol=0.05, rtol=0.01)


# Products


@needs_packing
@pytest.mark.parametrize("kernels", [Kernels(), PADDING], ids=str)
@pytest.mark.parametrize("packs", [False, True], ids=["plain", "packed"])
@pytest.mark.parametrize(
    "shape", [(64,), (1, 64), (2, 64), (3, 1, 64), (5, 64), (3, 11, 64), (130, 64), (0, 64), (3, 0, 64)], ids=str
)
def test_every_form_gives_the_product_in_the_inputs_shape(
    shape: tuple[int, ...], packs: bool, kernels: Kernels
) -> None:
    layer = make_packed() if packs else make()
    layer.kernels = kernels
    x = normal(*shape, seed=1).bfloat16()
    out = layer(x)
    assert out.dtype == torch.bfloat16 and out.shape == (*shape[:-1], OUT)
    torch.testing.assert_close(out.double(), exact(x, layer.weight), atol=0.05, rtol=0.01)
    assert (layer._packed is not None) == packs


@needs_packing
def test_inputs_need_not_be_contiguous() -> None:
    layer = make_packed()
    for x in (normal(IN, 9).bfloat16().T, normal(9, 2 * IN).bfloat16()[:, ::2], normal(1, IN).bfloat16().expand(7, -1)):
        torch.testing.assert_close(layer(x).double(), exact(x, layer.weight), atol=0.05, rtol=0.01)


@needs_packing
@pytest.mark.parametrize("shape", [(1, IN - 1), (9, IN + 1)], ids=str)
def test_inputs_of_another_size_get_torchs_own_error(shape: tuple[int, int]) -> None:
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        make_packed()(torch.ones(shape, dtype=torch.bfloat16))


@pytest.mark.parametrize("file_dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("packs", [False, pytest.param(True, marks=needs_packing)], ids=["plain", "packed"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_outputs_have_the_inputs_dtype_whatever_the_weights(
    dtype: torch.dtype, packs: bool, file_dtype: torch.dtype
) -> None:
    layer = make_packed(file_dtype) if packs else make(file_dtype)
    x = normal(4, IN, seed=1).to(dtype)
    out = layer(x)
    assert out.dtype == dtype and layer.weight.dtype == file_dtype
    torch.testing.assert_close(out.double(), exact(x.bfloat16(), layer.weight), atol=0.3, rtol=0.03)


@needs_packing
def test_packing_leaves_the_weight_as_it_is_and_scratch_memory_makes_no_difference() -> None:
    layer, weight = make(torch.float32), normal(OUT, IN)
    scratch = torch.full((OUT * IN + 7,), torch.nan, dtype=torch.bfloat16)
    layer.pack(torch.bfloat16, scratch)
    x = normal(5, IN, seed=1).bfloat16()
    assert torch.equal(layer(x), make_packed(torch.float32)(x))
    scratch.fill_(torch.nan)
    assert layer(x).isfinite().all()
    assert torch.equal(layer.weight, weight) and layer.state_dict().keys() == {"weight"}


def _on_two_ranks(rank: int) -> list[tuple[str, Tensor, Tensor]]:
    """Outputs and gradients of ours and fairscale's layers, of all kinds, with the same shards."""
    init_process_groups(2, CPU)
    found = []
    for packs in [False, True] if can_pack(CPU, torch.bfloat16) else [False]:
        dtype = torch.bfloat16 if packs else torch.float32
        for kind, flag in (("Column", True), ("Column", False), ("Row", True), ("Row", False)):
            pair = []
            for module in (layers, fairscale_layers):
                option = {"gather_output" if kind == "Column" else "input_is_parallel": flag}
                layer = getattr(module, f"{kind}ParallelLinear")(IN, OUT, bias=True, **option)
                shard = normal(*layer.weight.shape, seed=rank) / 8
                layer.load_state_dict({"weight": shard, "bias": normal(*layer.bias.shape, seed=2)})
                layer.to(dtype)
                if packs:
                    layer.requires_grad_(False)
                if packs and module is layers:
                    layer.pack(dtype)
                width = layer.weight.shape[1] if kind == "Row" and flag else IN
                # What all ranks hold whole is the same on all of them.
                x = normal(3, width, seed=rank + 5 if width != IN else 5).to(dtype).requires_grad_(not packs)
                out = layer(x)
                tensors = [out.detach()]
                if not packs:
                    out.square().sum().backward()
                    tensors += [x.grad, layer.weight.grad, layer.bias.grad]
                pair.append(tensors)
            name = f"{kind} {flag} {dtype}"
            found += [(name, ours, theirs) for ours, theirs in zip(*pair, strict=True)]
    return found


def test_outputs_and_gradients_on_two_ranks_match_fairscales_layers() -> None:
    for found in run_ranks(2, _on_two_ranks):
        assert len(found) >= 16
        for name, ours, theirs in found:
            tolerance = 1e-5 if ours.dtype == torch.float32 else 0.03
            torch.testing.assert_close(
                ours, theirs, atol=tolerance, rtol=tolerance, msg=lambda m, name=name: f"{name}: {m}"
            )


# Changes of the weight


@needs_packing
@pytest.mark.parametrize("file_dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("edit", EDITS)
def test_an_edit_of_the_weight_counts_and_it_can_be_packed_again(edit: str, file_dtype: torch.dtype) -> None:
    if "numpy" in edit and file_dtype == torch.bfloat16:
        pytest.skip("numpy has no bfloat16")
    if edit == "SGD, fused" and file_dtype == torch.bfloat16:
        pytest.skip("this step of torch leaves bfloat16 as it is on a CPU")
    layer = make_packed(file_dtype)
    before = layer.weight.detach().clone()
    with torch.no_grad():
        EDITS[edit](layer)
    assert (layer.weight - before).abs().max() > 0.4
    with torch.no_grad():
        assert_computes(layer, layer.weight)
        assert layer._packed is None
        own(layer)
        layer.pack(torch.bfloat16)
        assert_computes(layer, layer.weight)
        assert (layer._packed is not None) == (edit not in UNPACKABLE)
        if layer._packed:
            layer.weight.detach().mul_(0.5)
            assert_computes(layer, layer.weight)
            assert layer._packed is None


@needs_packing
def test_looking_at_a_weight_keeps_the_packed_form() -> None:
    layer = make_packed()
    weight = layer.weight
    layer.requires_grad_(False)
    layer.to(torch.bfloat16).to("cpu").eval()
    layer.zero_grad()
    for _ in (weight.shape, weight.sum(), weight.detach(), weight[3], weight.tolist(), repr(weight), weight.float()):
        assert_computes(layer, weight)
    layer.state_dict()
    torch.save(layer.state_dict(), io.BytesIO())
    copy.deepcopy(layer)
    pickle.dumps(layer)
    assert layer.weight is weight and isinstance(weight, PackedParameter) and layer._packed is not None


@needs_packing
def test_a_weight_of_another_packed_layer_counts() -> None:
    layer, other = make_packed(), make()
    other.weight.neg_()
    other.pack(torch.bfloat16)
    layer.weight.copy_(normal(OUT, IN))  # as many versions as the other's
    layer.pack(torch.bfloat16)
    layer.weight, other.weight = other.weight, layer.weight
    assert_computes(layer, -normal(OUT, IN))
    assert_computes(other, normal(OUT, IN))


@needs_packing
def test_memory_that_other_processes_may_write_to_has_no_packed_form() -> None:
    layer = make_packed()
    layer.share_memory()
    assert_computes(layer, layer.weight)
    assert layer._packed is None


@needs_packing
def test_dropping_the_packed_form_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    layer = make_packed()
    layer.weight.mul_(-1)
    with caplog.at_level(logging.INFO, logger="llama.layers.linear"):
        for _ in range(3):
            assert_computes(layer, layer.weight)
    (record,) = caplog.records
    assert "computes unpacked" in record.message


@needs_packing
@pytest.mark.parametrize("way", COPIES)
def test_copies_of_a_packed_layer_are_independent(way: str) -> None:
    layer = make_packed()
    copied = COPIES[way](layer)
    assert type(copied) is ColumnParallelLinear and copied.weight is not layer.weight
    assert type(copied.weight) is nn.Parameter and not copied.weight.requires_grad
    assert_computes(copied, layer.weight)
    copied.weight.data.mul_(-1)
    assert_computes(copied, -layer.weight)
    assert layer._packed is not None
    copied.pack(torch.bfloat16)
    assert_computes(copied, -layer.weight)
    assert_computes(layer, layer.weight)


@needs_packing
def test_a_weight_that_two_layers_share_stays_shared_in_a_copy() -> None:
    pair = nn.ModuleList([make_packed(), make()])
    pair[1].weight = pair[0].weight
    copied = copy.deepcopy(pair)
    assert copied[0].weight is copied[1].weight is not pair[0].weight


# Gradients


@pytest.mark.parametrize("what", ["weight", "input", "both"])
@pytest.mark.parametrize("build", ["float32", "bfloat16", pytest.param("packed", marks=needs_packing)])
def test_gradients_flow_through_a_layer(build: str, what: str) -> None:
    dtype = torch.float32 if build == "float32" else torch.bfloat16
    layer = make_packed() if build == "packed" else make(dtype)
    layer.requires_grad_(what != "input")
    for n_rows in (1, 6):
        layer.zero_grad()
        x = normal(n_rows, IN, seed=1).to(dtype).requires_grad_(what != "weight")
        upstream = normal(n_rows, OUT, seed=2).to(dtype)
        layer(x).backward(upstream)
        tolerance = 1e-4 if dtype == torch.float32 else 0.1
        if what != "weight":
            assert x.grad is not None
            expected = (upstream.double() @ layer.weight.double()).float()
            torch.testing.assert_close(x.grad.float(), expected, atol=tolerance, rtol=0.02)
        if what != "input":
            expected = (upstream.double().T @ x.double()).float()
            torch.testing.assert_close(layer.weight.grad.float(), expected, atol=tolerance, rtol=0.02)
        elif build == "packed":  # as in LoRA: passes without gradients use the packed form
            assert layer._packed is not None


@needs_packing
def test_forward_mode_derivatives_flow_through_a_packed_layer() -> None:
    layer = make_packed()
    x, tangent = normal(3, IN).bfloat16(), normal(3, IN, seed=1).bfloat16()
    expected = F.linear(tangent, layer.weight)
    assert torch.equal(torch.func.jvp(layer, (x,), (tangent,))[1], expected)
    with forward_ad.dual_level():
        dual = forward_ad.unpack_dual(layer(forward_ad.make_dual(x, tangent)))
    assert dual.tangent is not None and torch.equal(dual.tangent, expected)


# A whole network


def networks(params: dict[str, Any]) -> tuple[Transformer, Transformer]:
    """The same bfloat16 weights, plain and packed."""
    args = ModelArgs(**params, max_batch_size=4, max_seq_len=64)
    state = {name: tensor.bfloat16() for name, tensor in oracle.random_state(params, seed=3).items()}
    plain, packed = (Transformer.from_state(args, dict(state)) for _ in range(2))
    packed.pack()
    assert all(layer._packed for layer in packable_layers(packed))
    return plain, packed


@needs_packing
def test_a_layer_without_its_packed_form_is_of_fairscales_exact_class(params: dict[str, Any]) -> None:
    _, model = networks(params)
    layers, tokens = packable_layers(model), torch.tensor([[1, 2, 3]])
    assert not any(type(layer) in FAIRSCALES for layer in layers)
    before = model(tokens, 0)
    with torch.no_grad():
        for edited in (layers[0], layers[-2], layers[-1]):
            edited.weight *= -1
    changed = model(tokens, 0)
    assert [type(layer) in FAIRSCALES for layer in layers] == [layer in (*layers[-2:], layers[0]) for layer in layers]
    model.pack()
    torch.testing.assert_close(model(tokens, 0), changed, rtol=0, atol=0.05 * changed.std().item())
    assert not torch.equal(changed, before) and not any(type(layer) in FAIRSCALES for layer in layers)


def test_new_tensors_go_to_the_meta_device() -> None:
    with EmptyOnMeta():
        made = [sharded(ColumnParallelLinear, 4, 6).weight, sharded(RowParallelLinear, 4, 6).weight]
        assert all(tensor.is_meta for tensor in (torch.empty(3), *made))
    assert not torch.empty(3).is_meta


@pytest.fixture
def three_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


@needs_packing
@pytest.mark.usefixtures("three_threads")
@pytest.mark.parametrize("file_dtype", [torch.float32, torch.bfloat16], ids=str)
def test_layers_that_are_packed_side_by_side_are_packed_as_one_by_one(file_dtype: torch.dtype) -> None:
    made = []
    for seed in range(9):
        layer = sharded(ColumnParallelLinear, IN, OUT * (seed % 3 + 1), bias=False, gather_output=False)
        layer.weight = nn.Parameter(normal(OUT * (seed % 3 + 1), IN, seed=seed).to(file_dtype), False)
        made.append(layer)
    x = normal(3, IN, seed=1).bfloat16()
    expected = []
    for layer in made:
        layer.pack(torch.bfloat16)
        expected.append(layer(x))
        layer._packed = None
    released: list[int] = []
    with torch.inference_mode():
        pack_layers(made, torch.bfloat16, lambda weight: released.append(weight.data_ptr()))
    assert sorted(released) == sorted(layer.weight.data_ptr() for layer in made)
    for layer, out in zip(made, expected, strict=True):
        assert layer._packed is not None and torch.equal(layer(x), out)


@pytest.mark.usefixtures("three_threads")
def test_packing_leaves_the_number_of_threads_as_it_was_also_after_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []

    def pack(weight: Tensor) -> Tensor:
        seen.append(torch.get_num_threads())
        raise ZeroDivisionError

    monkeypatch.setattr(layers, "pack_weight", pack)
    with pytest.raises(ZeroDivisionError):
        pack_layers([make() for _ in range(50)], torch.bfloat16)
    assert set(seen) == {1} and len(seen) < 50
    with ThreadPoolExecutor(1) as pool:
        assert torch.get_num_threads() == pool.submit(torch.get_num_threads).result() == 3
