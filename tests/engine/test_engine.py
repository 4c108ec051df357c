"""The loop of steps: whatever the schedule, each prompt gets what it would get alone, and no pass is wasted."""

from __future__ import annotations

import itertools
import random
from collections import Counter
from collections.abc import Iterator
from collections.abc import Sequence as Listed
from typing import Any

import pytest
import torch
from torch import Tensor

from llama import ModelArgs, Transformer
from llama.engine.calls import Completer
from llama.engine.cuda_graphs import MAX_WIDTH, StaticStepper
from llama.engine.engine import Engine, engine_of
from llama.engine.sampling import Sampler
from llama.engine.sequence import Call, Sequence, TokenResult
from tests.support import oracle
from tests.support.networks import MAX_SEQ_LEN, PARAMS, ForwardOnly, patched
from tests.support.networks import make_network as make
from tests.support.steps import decode

NO_EOS = -1


@pytest.fixture(scope="module")
def state() -> oracle.State:
    return oracle.random_state(PARAMS, seed=3)


def sampler(temperature: float, n_rows: int, seed: int = 0) -> Sampler:
    return Sampler(temperature, 0.95, n_rows, torch.Generator().manual_seed(seed))


def score(engine: Engine, texts: list[list[int]]) -> list[list[float]]:
    return Completer(engine, None, None).score(texts)


def drain(steps: Iterator[TokenResult], n_prompts: int) -> list[list[TokenResult]]:
    """The steps of each prompt, checked to end with the one step that has a reason."""
    by_prompt: list[list[TokenResult]] = [[] for _ in range(n_prompts)]
    for step in steps:
        by_prompt[step.sequence].append(step)
    for mine in by_prompt:
        assert [step.finish_reason is not None for step in mine] == [False] * (len(mine) - 1) + [True]
        assert all(step.token is not None for step in mine[:-1])
    return by_prompt


def run(
    model: Transformer,
    prompts: Listed[Listed[int]],
    max_gen_len: int,
    *,
    temperature: float = 0.0,
    eos_id: int = NO_EOS,
    n_rows: int | None = None,
    **options: Any,
) -> list[list[TokenResult]]:
    n_rows = n_rows or min(len(prompts), model.params.max_batch_size)
    draws = sampler(temperature, n_rows)
    steps = decode(model, prompts, draws, rows=range(n_rows), max_gen_len=max_gen_len, eos_id=eos_id, **options)
    return drain(steps, len(prompts))


def tokens_of(steps: Listed[TokenResult]) -> list[int]:
    return [step.token for step in steps if step.token is not None]


def random_prompts(rng: random.Random, n: int, longest: int = MAX_SEQ_LEN) -> list[list[int]]:
    return [[rng.randrange(PARAMS["vocab_size"]) for _ in range(rng.randint(1, longest))] for _ in range(n)]


def check_greedy(state: oracle.State, prompt: list[int], answer: list[int]) -> Tensor:
    """Each token is the oracle's likeliest, given what precedes it; returns the oracle's logits behind the answer."""
    logits = oracle.logits(state, PARAMS, torch.tensor([prompt + answer]))[0]
    before = logits[len(prompt) - 1 : -1]
    assert torch.all(before.gather(1, torch.tensor(answer).view(-1, 1)).squeeze(1) > before.amax(1) - 1e-4)
    return logits[-1]


@pytest.mark.parametrize("seed", range(8))
def test_random_schedules_give_what_the_oracle_gives_one_at_a_time(state: oracle.State, seed: int) -> None:
    """Any lengths, more prompts than rows, rows that end at EOS at any moment, EOS inside prompts too."""
    rng = random.Random(seed)
    prompts = [*random_prompts(rng, rng.randint(1, 14)), [5] * MAX_SEQ_LEN, [7] * (MAX_SEQ_LEN - 1)]
    rng.shuffle(prompts)
    max_gen_len, model = rng.randint(1, MAX_SEQ_LEN), make(rng.randint(1, 5))
    room = [min(max_gen_len, MAX_SEQ_LEN - len(prompt)) for prompt in prompts]

    endless = [tokens_of(steps) for steps in run(model, prompts, max_gen_len)]
    assert [len(answer) for answer in endless] == room
    for prompt, answer in zip(prompts, endless, strict=True):
        check_greedy(state, prompt, answer)

    seen_in = Counter(token for answer in endless for token in set(answer))
    eos_id = seen_in.most_common(1)[0][0]
    prompts[0][0] = eos_id  # one that was there before ends nothing
    for prompt, steps, limit in zip(prompts, run(model, prompts, max_gen_len, eos_id=eos_id), room, strict=True):
        answer = tokens_of(steps)
        logits = check_greedy(state, prompt, answer)
        assert eos_id not in answer
        if steps[-1].finish_reason == "length":
            assert len(answer) == limit
        else:
            assert len(answer) < limit and logits[eos_id] > logits.max() - 1e-4
    assert max(seen_in.values()) > 1 or len(prompts) < 5  # EOS did occur


def test_the_caller_can_end_a_prompt() -> None:
    """`ends` sees each token that a prompt brings, once and in order; the others go on."""
    prompts, model = [[4, 9], [8], [1, 2, 3]], make(2)
    free = [tokens_of(steps) for steps in run(model, prompts, max_gen_len=8)]
    asked: list[tuple[int, int]] = []

    def ends(prompt: int, token: int) -> bool:
        asked.append((prompt, token))
        return prompt == 0 and sum(p == 0 for p, _ in asked) == 3

    steps = run(model, prompts, max_gen_len=8, ends=ends)
    assert [tokens_of(mine) for mine in steps] == [free[0][:3], *free[1:]]
    assert [mine[-1].finish_reason for mine in steps] == ["stop", "length", "length"]
    for i, mine in enumerate(steps):
        assert [token for prompt, token in asked if prompt == i] == tokens_of(mine)


class _Passes:
    """The shapes (bsz, seqlen) that go into the network, and the number of positions that are projected."""

    def __init__(self, model: Transformer) -> None:
        self.shapes: list[tuple[int, int]] = []
        self.projected: list[int] = []
        model.tok_embeddings.register_forward_pre_hook(self._note_tokens)
        model.output.register_forward_pre_hook(self._note_hidden)

    def _note_tokens(self, module: torch.nn.Module, args: tuple[Tensor]) -> None:
        self.shapes.append((args[0].shape[0], args[0].shape[1]))

    def _note_hidden(self, module: torch.nn.Module, args: tuple[Tensor]) -> None:
        self.projected.append(args[0].shape[:-1].numel())


def test_a_free_row_is_refilled_while_the_others_go_on() -> None:
    """One long answer and, beside it, eight short ones one after the other: no step more than the long one needs."""
    model = make(2)
    passes = _Passes(model)
    short = [[i] * (MAX_SEQ_LEN - 2) for i in range(8)]  # room for 2 tokens: a prefill and a step each
    steps = run(model, [[1], *short], max_gen_len=17)
    assert [len(tokens_of(mine)) for mine in steps] == [17] + [2] * 8
    single = [shape for shape in passes.shapes if shape[1] == 1]
    assert len(single) == 16  # the long prompt's own tokens after its first one
    assert sum(bsz for bsz, _ in single) == 16 + 8
    assert sum(bsz for bsz, seqlen in passes.shapes if seqlen > 1) == 9  # each prompt is prefilled once


def test_running_sequences_get_a_step_between_the_chunks_of_long_prompts(monkeypatch: pytest.MonkeyPatch) -> None:
    """No pass between two of their steps has more positions than a chunk and the rest that is too small for another."""
    monkeypatch.setattr("llama.engine.runner.PASS_COST", {"cpu": 2})
    monkeypatch.setattr("llama.engine.runner._CHUNK_IN_PASS_COSTS", 4)  # chunks of 8
    model = make(4, max_seq_len=64)
    passes = _Passes(model)
    engine = Engine(model)
    running = Call([Sequence([1, 2], sampler(0, 1), 0, 40, frozenset())])
    engine.add(running)
    engine.advance()
    engine.add(
        Call(Sequence([3 + i] * length, sampler(0, 1), 0, 2, frozenset()) for i, length in enumerate((50, 7, 60)))
    )
    while not engine.is_idle:
        engine.advance()
    long_passes = [bsz * seqlen for bsz, seqlen in passes.shapes[1:] if seqlen > 1]
    assert sum(long_passes) == 50 + 7 + 60
    assert max(long_passes) <= 8 + MAX_WIDTH
    kinds = ["prefill" if seqlen > 1 else "step" for _, seqlen in passes.shapes]
    assert not any(pair == ("prefill", "prefill") for pair in itertools.pairwise(kinds))


def test_a_batch_is_prefilled_in_one_pass_and_steps_carry_no_ended_row() -> None:
    model = make(4)
    passes = _Passes(model)
    answers = [tokens_of(steps) for steps in run(model, [[1] * 9, [2] * 18, [3] * 4, [4] * 17], max_gen_len=5)]
    (prefilled, _), *steps = passes.shapes
    assert prefilled == 4
    assert sum(bsz * seqlen for bsz, seqlen in steps) == sum(len(answer) - 1 for answer in answers)
    assert passes.projected == [bsz for bsz, _ in passes.shapes]  # of a prompt's positions, the last alone


def test_a_rows_draws_depend_on_its_noise_alone() -> None:
    """Whatever prompts stand beside it, of whatever lengths, and wherever they end."""
    model, mine = make(3), [1, 2, 3]
    expected = tokens_of(run(model, [[5], mine, [6]], 8, temperature=1.5)[1])
    for left, right in (([9] * 15, [4]), ([7], [8] * MAX_SEQ_LEN), ([7] * (MAX_SEQ_LEN - 1), [8] * 18)):
        assert tokens_of(run(model, [left, mine, right], 8, temperature=1.5)[1]) == expected
    others = [tokens_of(run(model, prompts, 8, temperature=1.5)[0]) for prompts in ([mine, [5], [6]], [mine])]
    assert expected not in others


def test_rows_with_the_same_prompt_draw_independently() -> None:
    answers = [tokens_of(steps) for steps in run(make(4), [[1, 2]] * 9, 10, temperature=1.5)]
    assert len({tuple(answer) for answer in answers}) == 9


def test_prompts_prefilled_in_several_groups_keep_their_rows(
    monkeypatch: pytest.MonkeyPatch, state: oracle.State
) -> None:
    monkeypatch.setattr(ModelArgs, "prefill_tokens", property(lambda self: self.max_seq_len))
    model, prompts = make(5), random_prompts(random.Random(4), 11)
    passes = _Passes(model)
    for prompt, steps in zip(prompts, run(model, prompts, 5), strict=True):
        check_greedy(state, prompt, tokens_of(steps))
    assert all(bsz * seqlen <= MAX_SEQ_LEN for bsz, seqlen in passes.shapes)


@pytest.mark.parametrize("kind", ["only forward", "patched"])
@pytest.mark.parametrize("seed", range(4))
def test_a_network_that_takes_one_position_gives_what_the_oracle_gives(
    state: oracle.State, seed: int, kind: str
) -> None:
    """Any lengths, more prompts than rows, rows that end at EOS; each prompt's answer is that of the plain network."""
    rng = random.Random(seed)
    max_batch_size, max_gen_len = rng.randint(1, 4), rng.randint(1, MAX_SEQ_LEN)
    prompts = [*random_prompts(rng, 7, 4), [5] * MAX_SEQ_LEN, [6] * MAX_SEQ_LEN]
    rng.shuffle(prompts)
    model: Any = ForwardOnly(state, max_batch_size) if kind == "only forward" else patched(make(max_batch_size))
    plain = make(max_batch_size)
    endless = run(model, prompts, max_gen_len, logprobs=True)
    for prompt, steps in zip(prompts, endless, strict=True):
        answer = tokens_of(steps)
        check_greedy(state, prompt, answer)
        scores = oracle_scores(state, prompt + answer)[len(prompt) :]
        assert [step.logprob for step in steps if step.token is not None] == pytest.approx(scores, abs=1e-4)
    eos_id = Counter(token for steps in endless for token in set(tokens_of(steps))).most_common(1)[0][0]
    for mine, theirs in zip(
        run(model, prompts, max_gen_len, eos_id=eos_id), run(plain, prompts, max_gen_len, eos_id=eos_id), strict=True
    ):
        assert tokens_of(mine) == tokens_of(theirs)
        assert mine[-1].finish_reason == theirs[-1].finish_reason


def test_a_network_that_takes_one_position_draws_from_its_rows_noise(state: oracle.State) -> None:
    prompts = [[1, 2], [3, 4], [5, 6]]
    expected = run(make(3), prompts, 8, temperature=1.5)
    assert run(ForwardOnly(state, 3), prompts, 8, temperature=1.5) == expected  # type: ignore[arg-type]


def _disturb_by_a_call(model: Any) -> None:
    getattr(model, "forward")(torch.zeros((1, 7), dtype=torch.int64), 0)  # noqa: B009


def _disturb_by_decoding(model: Any) -> None:
    n_rows = model.params.max_batch_size
    prompts = [[9, 8, 7]] * n_rows
    list(decode(model, prompts, sampler(0, n_rows), rows=range(n_rows), max_gen_len=4, eos_id=NO_EOS))


def _disturb_by_scoring(model: Any) -> None:
    score(engine_of(model), [[11] * MAX_SEQ_LEN])


DISTURBANCES = {"call": _disturb_by_a_call, "decode": _disturb_by_decoding, "score": _disturb_by_scoring}


@pytest.mark.parametrize("kind", ["plain", "static", "patched", "only forward"])
@pytest.mark.parametrize("disturbance", DISTURBANCES)
@pytest.mark.parametrize("seed", range(2))
def test_what_others_overwrote_in_the_cache_is_computed_again(
    state: oracle.State, seed: int, disturbance: str, kind: str
) -> None:
    """Between any two steps, with rows of any lengths, prompts that wait, and rows that move into gaps."""
    if (disturbance, kind) == ("call", "only forward"):
        pytest.skip("nothing tells of a direct call of a network that has no modules")
    rng = random.Random(seed)
    max_batch_size, prompts = rng.randint(1, 4), random_prompts(rng, 7)
    model: Any = ForwardOnly(state, max_batch_size) if kind == "only forward" else make(max_batch_size)
    if kind == "patched":
        patched(model)
    stepper = StaticStepper(model, graphs=False) if kind == "static" else None
    n_rows = min(len(prompts), max_batch_size)
    draws = sampler(0.0, n_rows)
    options: dict[str, Any] = {"max_gen_len": 6, "eos_id": NO_EOS, "stepper": stepper, "logprobs": True}

    def disturbed() -> Iterator[TokenResult]:
        for step in decode(model, prompts, draws, rows=range(n_rows), **options):
            yield step
            if rng.random() < 0.5:
                DISTURBANCES[disturbance](model)

    for prompt, steps in zip(prompts, drain(disturbed(), len(prompts)), strict=True):
        answer = tokens_of(steps)
        check_greedy(state, prompt, answer)
        expected = oracle_scores(state, prompt + answer)[len(prompt) :]
        assert [step.logprob for step in steps if step.token is not None] == pytest.approx(expected, abs=1e-4)


def oracle_scores(state: oracle.State, text: Listed[int]) -> list[float]:
    logprobs = oracle.logits(state, PARAMS, torch.tensor([text]))[0].log_softmax(-1)
    return [0.0, *(logprobs[i - 1, token].item() for i, token in enumerate(text) if i)]


def test_scores_equal_the_oracles_for_any_number_of_texts(state: oracle.State) -> None:
    texts = [*random_prompts(random.Random(2), 9), [3], [4] * MAX_SEQ_LEN]
    for model in (make(4), ForwardOnly(state, 2)):
        for text, got in zip(texts, score(engine_of(model), texts), strict=True):
            assert got == pytest.approx(oracle_scores(state, text), abs=1e-4)
            assert got[0] == 0.0


def test_scores_of_a_long_text_have_no_seams(state: oracle.State) -> None:
    """Long texts are projected onto the vocabulary in parts, to bound the logits held at a time."""
    model, rng = make(2, max_seq_len=1100), random.Random(0)
    passes = _Passes(model)
    texts = [[rng.randrange(60) for _ in range(n)] for n in (1100, 513)]
    for text, got in zip(texts, score(engine_of(model), texts), strict=True):
        assert got == pytest.approx(oracle_scores(state, text), abs=2e-4)
    assert max(passes.projected) < 1024
