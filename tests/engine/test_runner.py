"""Passes of a network: prompts into rows of the cache, steps, and who wrote to the cache last."""

from __future__ import annotations

import gc
import itertools
import random
import weakref
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from llama import ModelArgs, Transformer
from llama.distributed.groups import init_process_groups
from llama.engine.cuda_graphs import StaticStepper
from llama.engine.lock import lock_of
from llama.engine.runner import ModelRunner, device_of, dtype_of, prefill_groups
from llama.model import CachePositions
from tests.support import oracle
from tests.support.networks import MAX_SEQ_LEN, PARAMS, make_network

MAX_BATCH_SIZE = 4


@pytest.fixture(scope="module")
def state() -> oracle.State:
    return oracle.random_state(PARAMS, seed=3)


@pytest.fixture
def model() -> Transformer:
    return make_network(MAX_BATCH_SIZE)


class ForwardOnly:
    """All that Meta's own loop asks of a network: `params`, and `forward` with an int start_pos."""

    def __init__(self, state: oracle.State) -> None:
        self.params = SimpleNamespace(**PARAMS, max_batch_size=MAX_BATCH_SIZE, max_seq_len=MAX_SEQ_LEN)
        self._state = state
        self._seen = torch.zeros((MAX_BATCH_SIZE, MAX_SEQ_LEN), dtype=torch.int64)

    def forward(self, tokens: Tensor, start_pos: int) -> Tensor:
        assert type(start_pos) is int
        bsz, end = tokens.size(0), start_pos + tokens.size(1)
        self._seen[:bsz, start_pos:end] = tokens
        return oracle.logits(self._state, PARAMS, self._seen[:bsz, :end])[:, start_pos:]


def patched(model: Transformer) -> Transformer:
    """The network with a `forward` of its own, which takes an int start_pos."""
    forward = model.forward
    model.forward = lambda tokens, start_pos: forward(tokens, int(start_pos))  # type: ignore[method-assign]
    return model


def next_logits(state: oracle.State, text: list[int]) -> Tensor:
    return oracle.logits(state, PARAMS, torch.tensor([text]))[0, -1]


def close(got: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(got, expected, atol=1e-4, rtol=0)


def random_prompts(rng: random.Random, n: int, longest: int = MAX_SEQ_LEN) -> list[list[int]]:
    return [[rng.randrange(PARAMS["vocab_size"]) for _ in range(rng.randint(1, longest))] for _ in range(n)]


# Passes


@pytest.mark.parametrize("prefill_tokens", [MAX_SEQ_LEN, 1024])
@pytest.mark.parametrize("seed", range(5))
@torch.inference_mode()
def test_prompts_go_into_the_rows_named_and_steps_go_on_from_there(
    seed: int, prefill_tokens: int, model: Transformer, state: oracle.State, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In one pass or several, in any order; a prefill leaves the other rows as they are."""
    monkeypatch.setattr(ModelArgs, "prefill_tokens", property(lambda _: prefill_tokens))
    rng = random.Random(seed)
    runner = ModelRunner(model)
    texts = random_prompts(rng, MAX_BATCH_SIZE, MAX_SEQ_LEN - 3)
    rows = rng.sample(range(MAX_BATCH_SIZE), MAX_BATCH_SIZE)
    for part in (rows[:1], rows[1:]):
        logits = runner.prefill([texts[row] for row in part], part)
        assert logits.shape == (len(part), 60) and logits.dtype == torch.float32
        for row, mine in zip(part, logits, strict=True):
            close(mine, next_logits(state, texts[row]))
    for n_rows in (4, 3, 1):
        tokens = [rng.randrange(60) for _ in range(n_rows)]
        logits = runner.decode(torch.tensor(tokens).unsqueeze(1), [len(text) for text in texts[:n_rows]])[:, 0]
        assert logits.shape == (n_rows, 60)
        for text, token, mine in zip(texts, tokens, logits, strict=False):
            text.append(token)
            close(mine, next_logits(state, text))


@torch.inference_mode()
def test_a_copied_row_goes_on_in_its_new_place(model: Transformer, state: oracle.State) -> None:
    runner = ModelRunner(model)
    texts = random_prompts(random.Random(0), 3, 8)
    runner.prefill(texts, [0, 1, 2])
    keys = [layer.attention.cache.keys for layer in model.layers]
    kept = [k[0, :, len(texts[2]) :].clone() for k in keys], [k[1:].clone() for k in keys]
    runner.copy_row(2, 0, len(texts[2]))
    assert not runner.has_lost_cache()
    for k, after, others in zip(keys, *kept, strict=True):
        assert torch.equal(k[0, :, len(texts[2]) :], after) and torch.equal(k[1:], others)
    logits = runner.decode(torch.tensor([[5], [6]]), [len(texts[2]), len(texts[1])])[:, 0]
    close(logits[0], next_logits(state, [*texts[2], 5]))
    close(logits[1], next_logits(state, [*texts[1], 6]))


@torch.inference_mode()
def test_swapped_rows_go_on_in_their_new_places(model: Transformer, state: oracle.State) -> None:
    runner = ModelRunner(model)
    texts = random_prompts(random.Random(1), 3, 8)
    runner.prefill(texts, [0, 1, 2])
    runner.swap_rows(0, 2, max(map(len, texts)))
    logits = runner.decode(torch.tensor([[5], [6], [7]]), [len(texts[row]) for row in (2, 1, 0)])[:, 0]
    for mine, text, token in zip(logits, texts[::-1], (5, 6, 7), strict=True):
        close(mine, next_logits(state, [*text, token]))


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
def test_a_network_of_anothers_code_gets_metas_calls(model: Transformer, state: oracle.State) -> None:
    """An int `start_pos` for all rows, whatever has to be done for it."""
    for network in (patched(model), ForwardOnly(state)):
        runner = ModelRunner(network, StaticStepper(model, graphs=False))
        assert runner.one_position and not runner.looks_ahead
        assert (runner.max_batch_size, runner.max_seq_len) == (MAX_BATCH_SIZE, MAX_SEQ_LEN)
        texts = [[1, 2, 3], [4, 5, 6]]
        for row, logits in enumerate(runner.prefill(texts, [0, 1])):
            close(logits, next_logits(state, texts[row]))
        for row, logits in enumerate(runner.decode(torch.tensor([[7], [8]]), [3, 3])[:, 0]):
            close(logits, next_logits(state, [*texts[row], 7 + row]))


def test_the_stepper_takes_the_steps_of_an_unmodified_network(model: Transformer) -> None:
    runner = ModelRunner(model, StaticStepper(model, graphs=False))
    assert runner.looks_ahead and not runner.one_position
    assert not ModelRunner(model).looks_ahead


def test_logits_of_another_dtype_are_taken_as_float32(model: Transformer) -> None:
    model.register_forward_hook(lambda module, args, out: out.bfloat16())
    runner = ModelRunner(model)
    assert runner.prefill([[1, 2]], [0]).dtype == torch.float32
    assert runner.decode(torch.tensor([[3]]), [2]).dtype == torch.float32


def test_device_and_dtype_come_from_the_parameters_or_the_cpu(model: Transformer, state: oracle.State) -> None:
    assert (device_of(model), dtype_of(model)) == (torch.device("cpu"), torch.float32)
    assert dtype_of(model.bfloat16()) == torch.bfloat16
    assert device_of(nn.Linear(2, 2, device="meta")) == torch.device("meta")
    assert (device_of(ForwardOnly(state)), dtype_of(ForwardOnly(state))) == (torch.device("cpu"), torch.float32)


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
    model = ForwardOnly(state)
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


def test_a_used_network_can_be_freed(state: oracle.State) -> None:
    """Once nobody holds it; what its users share does not hold it either."""
    init_process_groups(1, torch.device("cpu"))
    args = ModelArgs(**PARAMS, max_batch_size=1, max_seq_len=4)
    network = Transformer.from_state(args, dict(state))
    with lock_of(network):
        ModelRunner(network).prefill([[1, 2]], [0])
    gone = weakref.ref(network)
    del network
    gc.collect()
    assert gone() is None


# Groups of a prefill


@pytest.mark.parametrize("seed", range(40))
def test_prefill_groups_bound_a_pass_and_cover_every_prompt_once(seed: int) -> None:
    rng = random.Random(seed)
    longest = rng.randint(1, 100)
    lengths = [rng.randint(1, longest) for _ in range(rng.randint(1, 30))]
    most, pass_cost = rng.randint(longest, 5 * longest), rng.randint(0, 100)
    groups = prefill_groups(lengths, most, pass_cost)
    assert sorted(i for group in groups for i in group) == list(range(len(lengths)))
    assert all(len(group) * max(lengths[i] for i in group) <= most for group in groups)
    assert len(prefill_groups(lengths, len(lengths) * longest, pass_cost=10**9)) == 1


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
    found = [[lengths[i] for i in group] for group in prefill_groups(lengths, most, pass_cost)]
    assert cost(found) == min(map(cost, possible))
