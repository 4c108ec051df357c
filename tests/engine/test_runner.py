"""Passes of a network: prompts into rows of the cache, steps, and who wrote to the cache last."""

from __future__ import annotations

import gc
import itertools
import random
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from llama import Transformer
from llama.engine.cuda_graphs import StaticStepper
from llama.engine.lock import lock_of
from llama.engine.runner import ModelRunner, device_of, dtype_of, prefill_groups
from llama.model import CachePositions
from tests.support import oracle
from tests.support.networks import MAX_SEQ_LEN, PARAMS, ForwardOnly, make_network, patched

MAX_BATCH_SIZE = 4


@pytest.fixture(scope="module")
def state() -> oracle.State:
    return oracle.random_state(PARAMS, seed=3)


@pytest.fixture
def model() -> Transformer:
    return make_network(MAX_BATCH_SIZE)


def next_logits(state: oracle.State, text: list[int]) -> Tensor:
    return oracle.logits(state, PARAMS, torch.tensor([text]))[0, -1]


def close(got: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(got, expected, atol=1e-4, rtol=0)


def random_prompts(rng: random.Random, n: int, longest: int = MAX_SEQ_LEN) -> list[list[int]]:
    return [[rng.randrange(PARAMS["vocab_size"]) for _ in range(rng.randint(1, longest))] for _ in range(n)]


# Passes


@torch.inference_mode()
@pytest.mark.parametrize("seed", range(4))
def test_rows_catch_up_from_wherever_they_stand(model: Transformer, state: oracle.State, seed: int) -> None:
    """One pass adds any number of tokens to each of some rows, up to the end of the cache, in any order."""
    rng = random.Random(seed)
    runner = ModelRunner(model)
    texts = random_prompts(rng, MAX_BATCH_SIZE, MAX_SEQ_LEN)
    texts[rng.randrange(MAX_BATCH_SIZE)] = [7] * MAX_SEQ_LEN
    first = [rng.randrange(len(text)) for text in texts]
    begun = [row for row in range(MAX_BATCH_SIZE) if first[row]]
    if begun:
        runner.prefill([texts[row][: first[row]] for row in begun], begun)
    rows = rng.sample(range(MAX_BATCH_SIZE), MAX_BATCH_SIZE)
    logits = runner.prefill([texts[row][first[row] :] for row in rows], rows, [first[row] for row in rows])
    for row, mine in zip(rows, logits, strict=True):
        close(mine, next_logits(state, texts[row]))


@torch.inference_mode()
@pytest.mark.parametrize(("move", "order"), [("copy_row", [2, 1, 2, 3]), ("swap_rows", [2, 1, 0, 3])])
def test_a_row_that_is_moved_goes_on_in_its_new_place(
    model: Transformer, state: oracle.State, move: str, order: list[int]
) -> None:
    runner = ModelRunner(model)
    texts = [[7 * i * n % 60 for i in range(n)] for n in (5, 3, 9, 4)]
    runner.prefill(texts, list(range(MAX_BATCH_SIZE)))
    getattr(runner, move)(2, 0, len(texts[2]))
    assert not runner.has_lost_cache()
    moved = [texts[row] for row in order]
    logits = runner.decode(torch.tensor([[5], [6], [7], [8]]), list(map(len, moved)))[:, 0]
    for text, token, mine in zip(moved, (5, 6, 7, 8), logits, strict=True):
        close(mine, next_logits(state, [*text, token]))


@torch.inference_mode()
def test_a_network_of_anothers_code_gets_metas_calls(model: Transformer, state: oracle.State) -> None:
    """An int `start_pos` for all rows, whatever has to be done for it."""
    for network in (patched(model), ForwardOnly(state, MAX_BATCH_SIZE)):
        runner = ModelRunner(network, StaticStepper(model, graphs=False))
        assert runner.one_position and not runner.looks_ahead
        texts = [[1, 2, 3], [4, 5, 6]]
        for row, logits in enumerate(runner.prefill(texts, [0, 1])):
            close(logits, next_logits(state, texts[row]))
        for row, logits in enumerate(runner.decode(torch.tensor([[7], [8]]), [3, 3])[:, 0]):
            close(logits, next_logits(state, [*texts[row], 7 + row]))


def test_logits_of_another_dtype_are_taken_as_float32(model: Transformer) -> None:
    model.register_forward_hook(lambda module, args, out: out.bfloat16())
    runner = ModelRunner(model)
    assert runner.prefill([[1, 2]], [0]).dtype == torch.float32
    assert runner.decode(torch.tensor([[3]]), [2]).dtype == torch.float32


def test_device_and_dtype_come_from_the_parameters_or_the_cpu(model: Transformer, state: oracle.State) -> None:
    assert (device_of(model), dtype_of(model)) == (torch.device("cpu"), torch.float32)
    assert dtype_of(model.bfloat16()) == torch.bfloat16
    assert device_of(nn.Linear(2, 2, device="meta")) == torch.device("meta")
    assert (device_of(ForwardOnly(state, MAX_BATCH_SIZE)), dtype_of(ForwardOnly(state, MAX_BATCH_SIZE))) == (
        torch.device("cpu"),
        torch.float32,
    )


# Who wrote to the cache


def _assign_a_cache(model: Transformer) -> None:
    model.layers[0].attention.cache_k = model.layers[0].attention.cache_k.clone()


WRITES: dict[str, Callable[[Any], Any]] = {
    "a direct call": lambda model: model(torch.tensor([[1]]), 0),
    "a call with rows at places of their own": lambda model: Transformer.forward(
        model, torch.tensor([[1]]), CachePositions(torch.tensor([0]), kv_len=1)
    ),
    "another runner": lambda model: ModelRunner(model).prefill([[1]], [0]),
    "a write to the cache": lambda model: model.layers[0].attention.cache_k[0].zero_(),
    "a cache assigned": _assign_a_cache,
    "the cache in another dtype": lambda model: model.bfloat16().float(),
}
READS: dict[str, Callable[[Any], Any]] = {
    "a look at the cache": lambda model: model.layers[0].attention.cache_k.sum(),
    "the state dict": lambda model: model.state_dict(),
    "a runner that does nothing": ModelRunner,
}


@pytest.mark.parametrize("inference", [False, True], ids=["", "inference_mode"])
@pytest.mark.parametrize("is_patched", [False, True], ids=["unmodified", "patched"])
@pytest.mark.parametrize("use", [*WRITES, *READS])
def test_a_lost_cache_is_noticed(use: str, is_patched: bool, inference: bool, model: Transformer) -> None:
    if is_patched:
        patched(model)
    with torch.inference_mode(inference):
        runner = ModelRunner(model)
        assert runner.has_lost_cache()
        runner.prefill([[1, 2, 3]], [0])
        assert not runner.has_lost_cache()
        runner.decode(torch.tensor([[4]]), [3])
        assert not runner.has_lost_cache()
        (WRITES | READS)[use](model)
        assert runner.has_lost_cache() == (use in WRITES)
        runner.prefill([[1, 2, 3, 4]], [0])
        assert not runner.has_lost_cache()


def test_a_network_without_modules_is_watched_through_its_runners(state: oracle.State) -> None:
    model = ForwardOnly(state, MAX_BATCH_SIZE)
    first, second = ModelRunner(model), ModelRunner(model)
    for one, other in ((first, second), (second, first)):
        one.prefill([[1, 2]], [0])
        assert not one.has_lost_cache() and other.has_lost_cache()


def test_rows_of_a_lost_cache_are_not_moved(model: Transformer) -> None:
    """Another runner's keys are there by now."""
    mine, other = ModelRunner(model), ModelRunner(model)
    mine.prefill([[1, 2], [3, 4]], [0, 1])
    other.prefill([[5, 6], [7, 8]], [0, 1])
    keys = [layer.attention.cache.keys.clone() for layer in model.layers]
    mine.copy_row(1, 0, 2)
    mine.swap_rows(1, 0, 2)
    assert all(torch.equal(layer.attention.cache.keys, k) for layer, k in zip(model.layers, keys, strict=True))
    assert mine.has_lost_cache() and not other.has_lost_cache()


def test_a_used_network_can_be_freed() -> None:
    """Once nobody holds it; what its users share does not hold it either."""
    network = make_network(1)
    with lock_of(network):
        ModelRunner(network).prefill([[1, 2]], [0])
    gone = weakref.ref(network)
    del network
    gc.collect()
    assert gone() is None


# Groups of a prefill


@pytest.mark.parametrize("seed", range(20))
def test_no_other_cut_of_the_sorted_prompts_costs_less(seed: int) -> None:
    rng = random.Random(seed)
    lengths = [rng.randint(1, 100) for _ in range(rng.randint(1, 9))]
    most, pass_cost = rng.randint(100, 400), rng.randint(0, 100)

    def cost(groups: list[list[int]]) -> int:
        return sum(len(group) * max(group) + pass_cost for group in groups)

    ordered = sorted(lengths, reverse=True)
    possible = []
    for cuts in itertools.product((False, True), repeat=len(ordered) - 1):
        groups = [[ordered[0]]]
        for length, cut in zip(ordered[1:], cuts, strict=True):
            groups.append([length]) if cut else groups[-1].append(length)
        if all(len(group) * max(group) <= most for group in groups):
            possible.append(groups)
    places = prefill_groups(lengths, most, pass_cost)
    assert sorted(place for group in places for place in group) == list(range(len(lengths)))
    found = [[lengths[place] for place in group] for group in places]
    assert all(len(group) * max(group) <= most for group in found)
    assert cost(found) == min(map(cost, possible))
