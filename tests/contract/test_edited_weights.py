"""Every way to edit a weight counts, and shows in the state dict; copies are independent."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn.utils import prune

from llama.layers.linear import packable_layers
from tests.support import oracle
from tests.support.builds import BUILDS, Built, packs, scaled
from tests.support.edits import COPIES, NEGATIONS, negate_by_a_parametrization

EDITED = (
    "tok_embeddings",
    "layers.0.attention.wq",
    "layers.0.attention.wo",
    "layers.1.attention_norm",
    "layers.1.feed_forward.w2",
    "output",
)


@pytest.mark.parametrize("first", range(0, len(NEGATIONS), len(EDITED)))
def test_an_edited_weight_counts_and_is_in_the_state_dict(built: Built, first: int) -> None:
    """Each weight in another way; test_linear.py has more of them, and each alone."""
    edits = [*NEGATIONS.values()][first : first + len(EDITED)]
    for name, edit in zip(EDITED, edits, strict=False):
        edit(built.model.get_submodule(name))
    expected = scaled(built.original, " ".join(EDITED[: len(edits)]), -1.0)
    torch.testing.assert_close(built.weights(), expected, rtol=0, atol=0)
    built.assert_computes(expected)
    torch.testing.assert_close(built.weights(), expected, rtol=0, atol=0)


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


def test_load_state_dict_of_the_whole_network_counts(built: Built) -> None:
    """It said "All keys matched" and changed nothing."""
    other = oracle.random_state(built.params, seed=5)
    assert str(built.model.load_state_dict(other)) == "<All keys matched successfully>"
    built.assert_computes(built.weights())
    for name, w in built.weights().items():
        torch.testing.assert_close(w, other[name], rtol=0.01, atol=1e-3)


def test_a_pruned_weight_counts(built: Built) -> None:
    """Pruning makes the weight a product that a pre-hook computes."""
    module, mask = built.model.layers[0].feed_forward.w3, torch.ones(96, 32)
    mask[::2] = 0
    assert module.weight.shape == mask.shape
    prune.custom_from_mask(module, "weight", mask)
    name = "layers.0.feed_forward.w3.weight"
    built.assert_computes(built.original | {name: built.original[name] * mask})


def test_a_parametrized_weight_counts(built: Built) -> None:
    negate_by_a_parametrization(built.model.layers[0].attention.wv)
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
    for casts in ((dtype,), (torch.float64, dtype)):
        for cast in casts:
            built.model.to(device="cpu", dtype=cast)
        built.assert_unedited()


@pytest.mark.parametrize("way", COPIES)
def test_a_copy_has_earlier_edits_and_is_independent(built: Built, way: str) -> None:
    original = built.model
    original.layers[1].feed_forward.w2.weight.data.neg_()
    edited = scaled(built.original, "layers.1.feed_forward.w2", -1.0)
    expected = scaled(edited, "layers.0.attention.wv output", -1.0)
    copied = COPIES[way](original)
    for name in ("output", "layers.0.attention.wv"):
        copied.get_submodule(name).weight.neg_()
    built.assert_computes(edited)
    built.model = copied
    built.assert_computes(expected)
    for layer in original.layers:
        layer.attention.wv.weight.zero_()
    built.assert_computes(expected)


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
