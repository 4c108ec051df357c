"""Every way to edit a weight counts, and shows in the state dict; copies are independent."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune

from llama.layers.linear import packable_layers
from tests.support import oracle
from tests.support.builds import (
    BUILDS,
    N_NEW,
    PROMPTS,
    Built,
    LoRA,
    packs,
    scaled,
)

EDITED = (
    "tok_embeddings",
    "layers.0.attention.wq",
    "layers.0.attention.wo",
    "layers.1.attention_norm",
    "layers.1.feed_forward.w2",
    "output",
)


def _negate_data(module: nn.Module) -> None:
    module.weight.data.neg_()


def _assign_data(module: nn.Module) -> None:
    module.weight.data = -module.weight.data


def _negate_in_inference_mode(module: nn.Module) -> None:
    with torch.inference_mode():
        module.weight.neg_()


def _negate_rows(module: nn.Module) -> None:
    for row in range(len(module.weight)):
        module.weight[row] *= -1


def _negate_detached(module: nn.Module) -> None:
    module.weight.detach().view(-1).neg_()


def _assign_parameter(module: nn.Module) -> None:
    module.weight = nn.Parameter(-module.weight.detach())


def _register_parameter(module: nn.Module) -> None:
    weight = -module.weight
    del module.weight
    module.register_parameter("weight", nn.Parameter(weight))


def _load_state_dict(module: nn.Module) -> None:
    module.load_state_dict({"weight": -module.weight})


def _load_state_dict_by_assignment(module: nn.Module) -> None:
    module.load_state_dict({"weight": -module.weight}, assign=True)


def _negate_a_state_dict(module: nn.Module) -> None:
    module.state_dict()["weight"].neg_()


def _negate_by_dlpack(module: nn.Module) -> None:
    torch.from_dlpack(module.weight).neg_()


def _copy_into_the_storage(module: nn.Module) -> None:
    storage = module.weight.untyped_storage()
    torch.empty(0, dtype=module.weight.dtype).set_(storage, 0, module.weight.shape).neg_()


def _set_from_a_vector(module: nn.Module) -> None:
    torch.nn.utils.vector_to_parameters(-module.weight.detach().flatten(), [module.weight])


def _swap_tensors(module: nn.Module) -> None:
    torch.utils.swap_tensors(module.weight, nn.Parameter(-module.weight.detach(), requires_grad=False))


def _foreach(module: nn.Module) -> None:
    torch._foreach_neg_([module.weight])


def _parametrize(module: nn.Module) -> None:
    class Negated(nn.Module):
        def forward(self, weight: Tensor) -> Tensor:
            return -weight

    parametrize.register_parametrization(module, "weight", Negated(), unsafe=True)
    parametrize.remove_parametrizations(module, "weight")


def _step_of_an_optimizer(module: nn.Module) -> None:
    module.weight.requires_grad_()
    module.weight.grad = 2 * module.weight.detach()
    torch.optim.SGD([module.weight], lr=1.0).step()
    module.weight.requires_grad_(False)


EDITS: dict[str, Callable[[nn.Module], object]] = {
    "in place": lambda module: module.weight.neg_(),
    "in inference mode": _negate_in_inference_mode,
    "row by row": _negate_rows,
    "detached": _negate_detached,
    "through data": _negate_data,
    "data assigned": _assign_data,
    "a Parameter assigned": _assign_parameter,
    "a Parameter registered": _register_parameter,
    "load_state_dict": _load_state_dict,
    "load_state_dict(assign=True)": _load_state_dict_by_assignment,
    "the tensors of state_dict()": _negate_a_state_dict,
    "dlpack": _negate_by_dlpack,
    "the storage": _copy_into_the_storage,
    "vector_to_parameters": _set_from_a_vector,
    "swap_tensors": _swap_tensors,
    "foreach": _foreach,
    "a parametrization, removed": _parametrize,
    "an optimizer's step": _step_of_an_optimizer,
}


@pytest.mark.parametrize("edit", EDITS)
@pytest.mark.parametrize(
    "name", ["bfloat16, four rows", "bfloat16, one packed row", "bfloat16 from a float16 file", "captured steps"]
)
def test_an_edited_weight_counts_and_is_in_the_state_dict(make: Callable[[str], Built], name: str, edit: str) -> None:
    built = make(name)
    for name in EDITED:
        EDITS[edit](built.model.get_submodule(name))
    expected = scaled(built.original, " ".join(EDITED), -1.0)
    torch.testing.assert_close(built.weights(), expected, rtol=0, atol=0)
    built.assert_computes(expected)
    torch.testing.assert_close(built.weights(), expected, rtol=0, atol=0)


def test_a_weight_edited_through_numpy_counts(make: Callable[[str], Built]) -> None:
    for name in ("float32", "bfloat16, four rows", "captured steps"):
        built = make(name)
        weights = [built.model.get_submodule(name).weight for name in EDITED]
        for weight in weights:
            if weight.dtype == torch.float32:  # numpy has no bfloat16
                weight.numpy()[:] *= -1
            else:
                weight.neg_()
        built.assert_computes(scaled(built.original, " ".join(EDITED), -1.0))


def test_data_that_was_handed_out_before_may_be_edited_later(built: Built) -> None:
    data = [built.model.get_submodule(name).weight.data for name in EDITED]
    built.assert_unedited()
    for each in data:
        each.neg_()
    built.assert_computes(scaled(built.original, " ".join(EDITED), -1.0))


def test_a_second_edit_counts_as_the_first_did(built: Built) -> None:
    weight = built.model.layers[0].attention.wo.weight
    for factor in (-1.0, 3.0):
        weight.mul_(factor)
        built.assert_computes(built.weights())
    weight.data.div_(-3.0)
    torch.testing.assert_close(built.weights(), built.original, rtol=0.02, atol=1e-3)
    built.assert_unedited()


def test_packing_again_after_an_edit_counts(built: Built) -> None:
    if built.build.dtype != "bfloat16" or not packs():
        pytest.skip("only bfloat16 is packed, on a CPU whose oneDNN takes it")
    for name in EDITED:
        built.model.get_submodule(name).weight.data.neg_()
    built.model.pack()
    expected = scaled(built.original, " ".join(EDITED), -1.0)
    built.assert_computes(expected)
    torch.testing.assert_close(built.weights(), expected, rtol=0, atol=0)
    assert all(layer.packed_form is not None for layer in packable_layers(built.model))
    built.model.output.weight.neg_()
    built.assert_computes(scaled(expected, "output", -1.0))


def test_zeroing_the_weights_of_every_layer_changes_everything(built: Built) -> None:
    """This went unnoticed on the default build of a CPU."""
    for layer in built.model.layers:
        layer.attention.wo.weight.zero_()
        layer.feed_forward.w2.weight.zero_()
    built.assert_computes(scaled(built.original, "layers.0 layers.1", 0.0))
    built.model.output.weight.zero_()
    _, logprobs = built.llama.generate(PROMPTS, N_NEW, temperature=0, logprobs=True)
    uniform = torch.full((len(PROMPTS), N_NEW), 1 / 512).log()
    torch.testing.assert_close(torch.tensor(logprobs), uniform)


def test_load_state_dict_of_the_whole_network_counts(built: Built) -> None:
    """It said "All keys matched" and changed nothing."""
    other = oracle.random_state(built.params, seed=5)
    assert str(built.model.load_state_dict(other)) == "<All keys matched successfully>"
    built.assert_computes(built.weights())
    for name, w in built.weights().items():
        torch.testing.assert_close(w, other[name], rtol=0.01, atol=1e-3)


def test_a_lora_delta_added_and_taken_away_counts(built: Built) -> None:
    expected = dict(built.original)
    deltas = {}
    for name in ("layers.0.attention.wq", "layers.1.attention.wv"):
        deltas[name] = LoRA(built.model.get_submodule(name)).delta()
        built.model.get_submodule(name).weight += deltas[name]
        expected[f"{name}.weight"] = expected[f"{name}.weight"] + deltas[name]
    built.assert_computes(expected)
    for name, delta in deltas.items():
        built.model.get_submodule(name).weight.data -= delta
    built.assert_unedited()


def test_a_pruned_weight_counts(built: Built) -> None:
    """Pruning makes the weight a product that a pre-hook computes."""
    module, mask = built.model.layers[0].feed_forward.w3, torch.ones(96, 32)
    mask[::2] = 0
    assert module.weight.shape == mask.shape
    prune.custom_from_mask(module, "weight", mask)
    name = "layers.0.feed_forward.w3.weight"
    built.assert_computes(built.original | {name: built.original[name] * mask})


def test_a_parametrized_weight_counts(built: Built) -> None:
    class Negated(nn.Module):
        def forward(self, weight: Tensor) -> Tensor:
            return -weight

    parametrize.register_parametrization(built.model.layers[0].attention.wv, "weight", Negated())
    built.assert_computes(scaled(built.original, "layers.0.attention.wv", -1.0))


def test_weights_put_in_for_one_call_count_in_it(built: Built) -> None:
    """`torch.func.functional_call` leaves the module's own weights as they are."""
    tokens = torch.tensor([[5, 6, 7, 8]])
    name = "layers.0.attention.wv.weight"
    with torch.no_grad():
        logits = torch.func.functional_call(built.model, {name: -built.model.state_dict()[name]}, (tokens, 0))
    expected = oracle.logits(built.original | {name: -built.original[name]}, built.params, tokens)
    torch.testing.assert_close(logits, expected, rtol=0, atol=built.tolerance)
    assert (expected - oracle.logits(built.original, built.params, tokens)).abs().max() > 4 * built.tolerance
    built.assert_unedited()


@pytest.mark.parametrize("cast", ["float", "bfloat16", "half", "double"])
def test_a_network_cast_to_another_dtype_computes_in_it(built: Built, cast: str) -> None:
    getattr(built.model, cast)()
    dtype = getattr(torch, cast)
    assert {weight.dtype for weight in built.model.state_dict().values()} == {dtype}
    built.original = built.weights()  # float32 files hold more than a bfloat16 network computes with
    built.assert_unedited()
    built.model.layers[0].attention.wv.weight.neg_()
    built.assert_computes(built.weights())


def test_a_network_cast_there_and_back_computes_the_same(built: Built) -> None:
    dtype = built.dtype
    built.model.to(torch.float64).to(dtype)
    built.assert_unedited()


def test_to_the_dtype_that_it_has_changes_nothing(built: Built) -> None:
    built.model.to(device="cpu", dtype=built.dtype)
    built.assert_unedited()


def _through_a_file(model: nn.Module) -> Any:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES: dict[str, Callable[[Any], Any]] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "torch.save": _through_a_file,
}


@pytest.mark.parametrize("way", COPIES)
def test_a_copy_computes_the_same_and_is_independent(built: Built, way: str) -> None:
    original, expected = built.model, scaled(built.original, "layers.0.attention.wv output", -1.0)
    copied = COPIES[way](original)
    assert torch.equal(copied.state_dict()["output.weight"], original.state_dict()["output.weight"])
    for name in ("output", "layers.0.attention.wv"):
        copied.get_submodule(name).weight.neg_()
    built.assert_unedited()
    built.model = copied
    built.assert_computes(expected)
    for layer in original.layers:
        layer.attention.wv.weight.zero_()
    built.assert_computes(expected)


@pytest.mark.parametrize("way", COPIES)
def test_a_copy_of_an_edited_network_has_the_edit(built: Built, way: str) -> None:
    for name in EDITED:
        built.model.get_submodule(name).weight.data.neg_()
    built.model = COPIES[way](built.model)
    built.assert_computes(scaled(built.original, " ".join(EDITED), -1.0))


def test_a_whole_llama_can_be_copied(built: Built) -> None:
    if built.llama.stepper is not None:
        pytest.skip("graphs belong to one network")
    built.llama = copy.deepcopy(built.llama)
    built.llama.tokenizer.eos_id = -1
    built.assert_unedited()


def test_edited_memory_never_reverts_to_the_file(built: Built) -> None:
    """Pages of a mapped file were given back to the kernel under edited weights: the file's values came back."""
    built.model.output.weight.neg_()
    built.model.layers[0].attention.wv.weight.data.neg_()
    expected = scaled(built.original, "output layers.0.attention.wv", -1.0)
    for _ in range(2):
        built.assert_computes(expected)
        torch.testing.assert_close(built.weights(), expected, rtol=0, atol=0)
        if built.build.dtype == "bfloat16" and packs():
            built.model.pack()


def test_an_edit_before_anything_was_computed_counts(built: Built, make: Callable[[str], Built]) -> None:
    fresh = make(next(name for name, build in BUILDS.items() if build is built.build))
    fresh.model.output.weight.data.neg_()
    fresh.model.pack() if packs() and built.build.dtype == "bfloat16" else None
    fresh.assert_computes(scaled(built.original, "output", -1.0))


def test_layers_take_the_working_dtype_whatever_the_file_had(built: Built) -> None:
    """The logit lens: what each block's output would say if it were the last."""
    hidden: list[Tensor] = []
    handle = built.model.layers[0].register_forward_hook(lambda _, args, h: hidden.append(h))
    tokens = torch.tensor([[5, 17, 9, 300]])
    built.model(tokens, 0)
    handle.remove()
    seen = built.model.output(built.model.norm(hidden[0]))
    assert seen.dtype == hidden[0].dtype == built.dtype
    expected = oracle.logits(built.original, built.params | {"n_layers": 1}, tokens)
    torch.testing.assert_close(seen.float(), expected, rtol=0, atol=built.tolerance)
    assert (expected - oracle.logits(built.original, built.params, tokens)).abs().max() > 4 * built.tolerance
    for layer in packable_layers(built.model):
        x = torch.randn((2, 3, layer.weight.size(1)), dtype=built.dtype)
        torch.testing.assert_close(layer(x).float(), x.float() @ layer.weight.float().T, rtol=0.02, atol=0.05)
