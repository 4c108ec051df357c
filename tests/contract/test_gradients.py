"""Gradients and training are the oracle's, before and after generation."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.support import oracle
from tests.support.builds import PROMPTS, Built, LoRA


def train(model: Any, tokens: Tensor, steps: int) -> list[float]:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(tokens[:, :-1], 0).flatten(0, 1), tokens[:, 1:].flatten())
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def test_three_steps_of_sgd_are_the_oracles(built: Built) -> None:
    tokens = torch.randint(512, (built.build.max_batch_size, 12), generator=torch.Generator().manual_seed(1))
    assert not any(weight.requires_grad for weight in built.model.parameters())
    assert not built.model(tokens, 0).requires_grad
    built.model.requires_grad_()
    # A file's dtype may differ from the computation's: the oracle starts at the weights as they are.
    state = {name: w.detach().clone().float().requires_grad_() for name, w in built.model.state_dict().items()}
    losses = train(built.model, tokens, 3)
    optimizer, expected = torch.optim.SGD(state.values(), lr=0.5), []
    for _ in range(3):
        optimizer.zero_grad()
        logits = oracle.logits(state, built.params, tokens[:, :-1])
        loss = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
        loss.backward()
        optimizer.step()
        expected.append(loss.item())
    assert expected[2] < expected[0] - 0.3
    assert losses == pytest.approx(expected, abs=built.tolerance)
    for name, weight in built.model.named_parameters():
        start, end = built.original[name], state[name].detach()
        change, theirs = weight.detach().float() - start, end - start
        if built.build.dtype == "float32":
            torch.testing.assert_close(change, theirs, rtol=1e-3, atol=1e-5, msg=name)
        else:
            assert F.cosine_similarity(change.flatten(), theirs.flatten(), dim=0) > 0.9, name
    built.model.requires_grad_(False)
    built.assert_computes(built.weights())


def test_gradients_flow_to_inputs_alone(built: Built) -> None:
    """Attribution: the gradient of a logit with respect to a hidden state, with frozen weights."""
    hidden: list[Tensor] = []

    def leaf(_: nn.Module, args: Any, out: Tensor) -> Tensor:
        hidden.append(out.detach().requires_grad_())
        return hidden[0]

    handle = built.model.tok_embeddings.register_forward_hook(leaf)
    tokens = torch.tensor([[5, 17, 9, 300, 4]])
    built.model(tokens, 0)[0, -1, 7].backward()
    handle.remove()
    embedded = built.original["tok_embeddings.weight"].clone().requires_grad_()
    oracle.logits(built.original | {"tok_embeddings.weight": embedded}, built.params, tokens)[0, -1, 7].backward()
    got, expected = hidden[0].grad[0].float(), embedded.grad[tokens[0]]
    assert F.cosine_similarity(got.flatten(), expected.flatten(), dim=0) > (
        0.9999 if built.dtype == torch.float32 else 0.98
    )


def test_training_only_an_adapter_leaves_the_base_alone(built: Built) -> None:
    adapter = LoRA(built.model.layers[0].attention.wq)
    built.model.layers[0].attention.wq = adapter
    tokens = torch.randint(512, (1, 12), generator=torch.Generator().manual_seed(1))
    before = adapter.a.detach().clone()
    optimizer = torch.optim.SGD([weight for weight in built.model.parameters() if weight.requires_grad], lr=0.5)
    F.cross_entropy(built.model(tokens[:, :-1], 0)[0], tokens[0, 1:]).backward()
    optimizer.step()
    assert not torch.equal(adapter.a, before)
    weight = "layers.0.attention.wq.weight"
    expected = {name.replace(".base", ""): w for name, w in built.weights().items() if not name.endswith((".a", ".b"))}
    for name, w in expected.items():
        assert torch.equal(w, built.original[name]), name
    built.assert_computes(expected | {weight: expected[weight] + adapter.delta()})


def test_generation_after_training_and_training_after_generation(built: Built) -> None:
    """No tensor that generation made in inference mode is in the way."""
    built.model.requires_grad_()
    tokens = torch.tensor([[5, 17, 9, 300, 4]])
    for _ in range(2):
        train(built.model, tokens, 1)
        built.llama.generate(PROMPTS, 2)
    model = copy.deepcopy(built.model)
    model.to(torch.float64)
    with torch.inference_mode():
        model(tokens, 0)
    train(model, tokens, 1)
