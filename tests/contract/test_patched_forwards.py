"""Forwards that are patched, overridden or compiled count, and so do patched functions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import llama.generation
from llama import Transformer
from llama.model import Attention, FeedForward, RMSNorm, TransformerBlock
from tests.contract.test_meta_interface import OwnAttention
from tests.support import oracle
from tests.support.builds import MAX_SEQ_LEN, Built, Equal, output_cases, patched, scaled, skip_rounded


def test_a_patched_forward_of_any_module_counts(built: Built) -> None:
    skip_rounded(built)
    for name, (by, equal) in output_cases().items():
        module = built.model.get_submodule(name)
        module.forward = patched(module.forward, by)
        built.assert_computes(equal(built.original))
        del module.forward
    built.assert_unedited()


def meta_attention_forward(self: Any, x: Tensor, start_pos: int, freqs_cis: Tensor, mask: Tensor | None) -> Tensor:
    return -OwnAttention.forward(self, x, start_pos, freqs_cis, mask)


def meta_block_forward(self: Any, x: Tensor, start_pos: int, freqs_cis: Tensor, mask: Tensor | None) -> Tensor:
    assert isinstance(start_pos, int)
    h = x + -self.attention.forward(self.attention_norm(x), start_pos, freqs_cis, mask)
    return h + self.feed_forward.forward(self.ffn_norm(h))


def meta_model_forward(self: Any, tokens: Tensor, start_pos: int) -> Tensor:
    h = self.tok_embeddings(tokens)
    freqs_cis = self.freqs_cis.to(h.device)[start_pos : start_pos + tokens.size(1)]
    mask = None
    if tokens.size(1) > 1:
        mask = torch.full((1, 1, tokens.size(1), tokens.size(1)), float("-inf"))
        mask = torch.triu(mask, diagonal=start_pos + 1).type_as(h)
    for layer in self.layers:
        h = layer(h, start_pos, freqs_cis, mask)
    return -self.output(self.norm(h)).float()


CLASS_PATCHES: dict[str, tuple[type[nn.Module], Callable[..., Any], Equal]] = {
    "Attention": (Attention, meta_attention_forward, lambda s: scaled(s, _each("attention.wo"), -1.0)),
    "TransformerBlock": (TransformerBlock, meta_block_forward, lambda s: scaled(s, _each("attention.wo"), -1.0)),
    "Transformer": (Transformer, meta_model_forward, lambda s: scaled(s, "output", -1.0)),
    "FeedForward": (
        FeedForward,
        lambda self, x: -self.w2(F.silu(self.w1(x)) * self.w3(x)),
        lambda s: scaled(s, _each("feed_forward.w2"), -1.0),
    ),
    "RMSNorm": (
        RMSNorm,
        lambda self, x: -self.weight * (x.float() * torch.rsqrt(x.float().square().mean(-1, True) + 1e-8)).type_as(x),
        lambda s: {name: -w if "norm" in name else w for name, w in s.items()},
    ),
}


def _each(name: str) -> str:
    return f"layers.0.{name} layers.1.{name}"


@pytest.mark.parametrize("name", CLASS_PATCHES)
def test_a_forward_patched_in_its_class_counts(built: Built, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    cls, forward, equal = CLASS_PATCHES[name]
    monkeypatch.setattr(cls, "forward", forward)
    built.assert_computes(equal(built.original))
    monkeypatch.undo()
    built.assert_unedited()


@pytest.mark.parametrize("name", CLASS_PATCHES)
def test_a_forward_overridden_in_a_subclass_counts(built: Built, name: str) -> None:
    cls, forward, equal = CLASS_PATCHES[name]
    subclass = type(f"My{name}", (cls,), {"forward": forward})
    for module in built.model.modules():
        if type(module) is cls:
            module.__class__ = subclass
    built.assert_computes(equal(built.original))


@pytest.mark.parametrize("how", ["model.compile()", "torch.compile(model)", "model.forward", "a layer"])
def test_a_compiled_network_counts(make: Callable[[str], Built], how: str) -> None:
    """By a backend that counts; each shape is compiled, which takes long."""
    built, calls = make("captured steps" if how == "model.forward" else "bfloat16, four rows"), []

    def counting(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        return lambda *args: calls.append(1) or graph(*args)

    model, options = built.model, {"backend": counting, "dynamic": True}
    model.layers = model.layers[:1]
    model.layers[0].attention.wo.weight.neg_()
    weights = built.weights()
    torch._dynamo.reset()
    if how == "model.compile()":
        model.compile(**options)
    elif how == "torch.compile(model)":
        built.model = torch.compile(model, **options)
    elif how == "model.forward":
        model.forward = torch.compile(model.forward, **options)
    else:
        model.layers[0].attention.wv.compile(**options)
    prompt = [[5, 17, 9]]
    tokens, logprobs = built.llama.generate(prompt, 2, temperature=0, logprobs=True)
    torch._dynamo.reset()
    logits = oracle.logits(weights, built.params | {"n_layers": 1}, torch.tensor([[*prompt[0], *tokens[0]]]))
    expected = logits[0, 2:4].log_softmax(-1)[range(2), tokens[0]]
    torch.testing.assert_close(torch.tensor(logprobs[0]), expected, rtol=0, atol=built.tolerance)
    assert len(calls) >= 2, "the compiled code did not run in each pass"


def test_custom_rotations_count(built: Built) -> None:
    built.model.freqs_cis = llama.model.precompute_freqs_cis(8, 2 * MAX_SEQ_LEN, theta=10.0)
    built.params = built.params | {"rope_theta": 10.0}
    got, theta_10 = built._logprobs(), built._expected(built.original)
    torch.testing.assert_close(got, theta_10, rtol=0, atol=built.tolerance)
    built.params = built.params | {"rope_theta": 10000.0}
    assert (got - built._expected(built.original)).abs().max() > built.tolerance


def test_an_attribute_of_a_module_counts(built: Built) -> None:
    built.model.norm.eps = 15 * built.original["norm.weight"].square().mean().item()
    got, unedited = built._logprobs(), built._expected(built.original)
    for place in (slice(1), slice(1, None)):
        assert (got[:, place] - unedited[:, place]).abs().max() > 2 * built.tolerance


def test_a_patched_function_of_the_network_counts(built: Built, monkeypatch: pytest.MonkeyPatch) -> None:
    """As code does that records attention patterns, or changes them."""
    attend = llama.model.attend
    monkeypatch.setattr(llama.model, "attend", lambda *args, **kwargs: -attend(*args, **kwargs))
    built.assert_computes(scaled(built.original, _each("attention.wo"), -1.0))


# ---- sampling


def test_a_replaced_sample_top_p_is_called(built: Built, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[tuple[int, ...], float]] = []

    def always_seven(probs: Tensor, p: float) -> Tensor:
        seen.append((tuple(probs.shape), p))
        torch.testing.assert_close(probs.sum(-1), torch.ones(len(probs)))
        return torch.full((len(probs), 1), 7)

    monkeypatch.setattr(llama.generation, "sample_top_p", always_seven)
    tokens, _ = built.llama.generate([[5, 6]], 3, temperature=0.7, top_p=0.8)
    assert tokens == [[7, 7, 7]]
    assert seen[:3] == [((1, 512), 0.8)] * 3
    assert built.llama.generate([[5, 6]], 3, temperature=0)[0] != [[7, 7, 7]], "greedy decoding draws nothing"
