"""The static step: the plain one's logits and tokens, from buffers that stay where they are, one step ahead."""

from __future__ import annotations

import copy
import logging
import random
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from llama import Llama, ModelArgs, Transformer
from llama.distributed.groups import init_process_groups
from llama.engine import cuda_graphs as stepping
from llama.engine.cuda_graphs import StaticStepper, choose_stepper
from llama.engine.runner import Stepper
from llama.engine.sampling import Sampler
from llama.engine.sequence import TokenResult
from tests.support import oracle
from tests.support.cuda_graph import RecordedStepper
from tests.support.networks import MAX_SEQ_LEN, PARAMS, make_network
from tests.support.ranks import run_ranks
from tests.support.steps import decode


@pytest.fixture(autouse=True)
def _small_buckets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stepping, "KV_BUCKET", 8)


STEPPERS: dict[str, Callable[[Transformer], Stepper]] = {
    "static": lambda model: StaticStepper(model, graphs=False),
    "replayed": RecordedStepper,
}


def run(
    model: Transformer, stepper: Stepper, prompts: Sequence[Sequence[int]], max_gen_len: int, **options: Any
) -> tuple[list[list[TokenResult]], Tensor]:
    """The steps of each prompt, and where the random stream stands afterwards."""
    rows = range(min(len(prompts), model.params.max_batch_size))
    sampler = Sampler(options.pop("temperature"), 0.95, len(rows), torch.Generator().manual_seed(1))
    by_prompt: list[list[TokenResult]] = [[] for _ in prompts]
    for step in decode(model, prompts, sampler, rows=rows, max_gen_len=max_gen_len, stepper=stepper, **options):
        by_prompt[step.sequence].append(step)
    return by_prompt, sampler.generator.get_state()


@pytest.mark.parametrize("kind", STEPPERS)
@pytest.mark.parametrize("seed", range(8))
def test_tokens_match_the_plain_step(kind: str, seed: int) -> None:
    """Any lengths, rows that end at any moment, more prompts than rows; and the stream is left at the same place."""
    rng = random.Random(seed)
    model = make_network(rng.randint(1, 5))
    stepper = STEPPERS[kind](model)
    for temperature in (0.0, 0.9):
        prompts = [[rng.randrange(60) for _ in range(rng.randint(1, MAX_SEQ_LEN))] for _ in range(rng.randint(1, 9))]
        max_gen_len, logprobs = rng.randint(1, MAX_SEQ_LEN), rng.random() < 0.5
        free_run, _ = run(model, None, prompts, max_gen_len, temperature=temperature, eos_id=-1)
        tokens = [step.token for steps in free_run for step in steps if step.token is not None] or [0]
        options: dict[str, Any] = {"temperature": temperature, "eos_id": rng.choice(tokens), "logprobs": logprobs}
        expected, plain_stream = run(model, None, prompts, max_gen_len, **options)
        got, stream = run(model, stepper, prompts, max_gen_len, **options)
        for mine, theirs in zip(got, expected, strict=True):
            assert [(s.token, s.finish_reason) for s in mine] == [(s.token, s.finish_reason) for s in theirs]
            for a, b in zip(mine, theirs, strict=True):
                assert a.logprob == (None if b.logprob is None else pytest.approx(b.logprob, abs=1e-5))
        assert torch.equal(stream, plain_stream)


def test_sizes_are_padded_so_that_few_graphs_serve() -> None:
    """Rows to powers of two, as far as the cache goes; the prefix to buckets, into the spare positions at its end."""
    model = make_network(6)
    stepper = RecordedStepper(model)
    run(model, stepper, [[1]] * 6, 19, temperature=0.0, eos_id=-1)
    run(model, stepper, [[1]] * 5, 12, temperature=0.0, eos_id=-1)
    run(model, stepper, [[1, 2], [3]], 5, temperature=0.0, eos_id=-1)
    assert len(stepper.captured) == len(set(stepper.captured)) <= 4
    assert {n_rows for n_rows, _, _ in stepper.captured} <= {1, 2, 4, 6}  # the cache has six


def test_a_capture_that_fails_is_said_once_and_makes_no_difference(caplog: pytest.LogCaptureFixture) -> None:
    class Failing(RecordedStepper):
        def _capture(self, step: Callable[[], Tensor]) -> Callable[[], Tensor]:
            raise RuntimeError("operation not permitted when stream is capturing")

    model, prompts = make_network(2), [[1, 2, 3], [4]]
    expected, _ = run(model, None, prompts, 15, temperature=0.0, eos_id=-1)
    with caplog.at_level(logging.WARNING):
        got, _ = run(model, Failing(model), prompts, 15, temperature=0.0, eos_id=-1)
    assert got == expected
    (record,) = caplog.records
    assert "CUDA graphs are disabled" in record.message and "not permitted" in record.message


def test_a_step_is_in_flight_while_the_one_before_is_recorded() -> None:
    """That is what keeps a GPU busy. The first token comes from the prefill, the last has no step behind it."""
    model = make_network(2)
    taken: list[int] = []

    class Counting(StaticStepper):
        def __call__(self, tokens: Tensor, lengths: Sequence[int]) -> Tensor:
            taken.append(lengths[0])
            return super().__call__(tokens, lengths)

    sampler = Sampler(0.0, 1.0, 1, torch.Generator())
    stepper = Counting(model, graphs=False)
    steps = decode(model, [[1, 2]], sampler, rows=[0], max_gen_len=4, eos_id=-1, stepper=stepper)
    assert [len(taken) for _ in steps] == [1, 2, 3, 3]


def test_leaving_early_gives_back_what_the_step_ahead_drew() -> None:
    model = make_network(1)

    def stream_after(stepper: Stepper) -> Tensor:
        sampler = Sampler(1.0, 1.0, 1, torch.Generator().manual_seed(5))
        steps = decode(model, [[1, 2]], sampler, rows=[0], max_gen_len=9, eos_id=-1, stepper=stepper)
        for _ in range(3):
            next(steps)
        steps.close()  # type: ignore[attr-defined]
        return sampler.generator.get_state()

    assert torch.equal(stream_after(StaticStepper(model, graphs=False)), stream_after(None))


def test_texts_and_streams_are_the_same_one_step_ahead(llama: Llama) -> None:
    """Stop strings and all, through the public calls."""
    ahead = Llama(llama.model, llama.tokenizer)
    ahead.stepper = StaticStepper(llama.model, graphs=False)
    prompts = ["The quick brown fox", "Llamas", "the"]
    for temperature in (0.0, 1.0):
        options: dict[str, Any] = {"temperature": temperature, "max_gen_len": 24, "seed": 3}
        expected = llama.text_completion(prompts, **options)
        assert ahead.text_completion(prompts, **options) == expected
        stop = [text["generation"][4:6] for text in expected if len(text["generation"]) > 6]
        assert ahead.text_completion(prompts, **options, stop=stop) == llama.text_completion(
            prompts, **options, stop=stop
        )
        pieces = list(llama.stream_text_completion(prompts[0], **options))
        assert list(ahead.stream_text_completion(prompts[0], **options)) == pieces


def _two_ranks(rank: int) -> list[tuple[list[list[TokenResult]], Tensor]]:
    init_process_groups(2, torch.device("cpu"))
    args = ModelArgs(**PARAMS, max_batch_size=3, max_seq_len=MAX_SEQ_LEN)
    model = Transformer.from_state(args, oracle.shard(oracle.random_state(PARAMS, seed=1), rank, 2))
    steppers = (None, StaticStepper(model, graphs=False))
    return [run(model, s, [[1, 2], [3], [4, 5, 6]], 9, temperature=0.8, eos_id=7) for s in steppers]


def test_two_ranks_step_ahead_together() -> None:
    for (expected, plain_stream), (got, stream) in run_ranks(2, _two_ranks):
        assert got == expected
        assert torch.equal(stream, plain_stream)


def test_a_cpu_takes_plain_steps(llama: Llama) -> None:
    assert choose_stepper(llama.model, cuda_graphs=True) is None


def cache_of(model: Transformer) -> Any:
    return model.layers[0].attention


# With whether the graphs are still true.
CHANGES: dict[str, tuple[Callable[[Any], object], bool]] = {
    "nothing": (lambda model: None, True),
    "an edit in place": (lambda model: model.output.weight.mul_(2), True),
    "a pass": (lambda model: model(torch.tensor([[1]]), 0), True),
    "weights loaded in place": (lambda model: model.load_state_dict(model.state_dict()), True),
    "weights assigned": (lambda model: model.load_state_dict(copy.deepcopy(model.state_dict()), assign=True), False),
    "a module replaced": (lambda model: setattr(model.layers[1].feed_forward, "w2", nn.Linear(1, 1)), False),
    "a weight's memory": (lambda model: setattr(model.output.weight, "data", model.output.weight.data.clone()), False),
    "a Parameter assigned": (lambda model: setattr(model.norm, "weight", copy.deepcopy(model.norm.weight)), False),
    "a cache assigned": (lambda model: setattr(cache_of(model), "cache_k", cache_of(model).cache_k.clone()), True),
    "a cache in other memory": (lambda model: setattr(cache_of(model).cache, "keys", torch.zeros(1)), False),
    "another dtype": (lambda model: model.bfloat16(), False),
}


@pytest.mark.parametrize("change", CHANGES)
def test_graphs_are_dropped_where_they_would_no_longer_be_true(change: str) -> None:
    edit, stays = CHANGES[change]
    model = make_network(1)
    stepper = RecordedStepper(model)
    for _ in range(2):
        assert stepper.serves(model)
        run(model, stepper, [[1, 2]], 4, temperature=0.0, eos_id=-1)
        assert len(stepper.captured) == 1
    edit(model)
    assert stepper.serves(model)
    assert bool(stepper._steps) == stays


def test_hooks_rule_graphs_out_as_long_as_they_are_there() -> None:
    model = make_network(1)
    graphs, eager = RecordedStepper(model), StaticStepper(model, graphs=False)
    for register in (
        model.register_forward_hook,
        model.layers[1].attention.wq.register_forward_hook,
        nn.modules.module.register_module_forward_pre_hook,
    ):
        handle = register(lambda *_: None)
        try:
            assert not graphs.serves(model) and eager.serves(model)
        finally:
            handle.remove()
        assert graphs.serves(model)


def test_a_stepper_serves_its_own_network_alone() -> None:
    model, other = make_network(1), make_network(1)
    for stepper in (RecordedStepper(model), StaticStepper(model, graphs=False)):
        assert stepper.serves(model) and not stepper.serves(other)
