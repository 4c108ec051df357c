"""Whatever happens between two passes, and whatever is reused, each sequence gets what it gets alone."""

from __future__ import annotations

import random
from itertools import islice
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from torch import Tensor, nn

from llama import ModelArgs, Transformer
from llama.engine.cuda_graphs import StaticStepper
from llama.engine.engine import Engine
from llama.engine.runner import ModelRunner
from llama.engine.sampling import Sampler
from llama.engine.sequence import Call, Sequence
from tests.support.networks import PARAMS, make_network
from tests.support.steps import greedy

MAX_SEQ_LEN = 64
# Prompts begin with one of these, so that they have prefixes in common.
STEMS = [[random.Random(i).randrange(60) for _ in range(40)] for i in range(3)]


def network(max_batch_size: int) -> Transformer:
    return make_network(max_batch_size, MAX_SEQ_LEN)


def rotate(module: nn.Module, args: Any, output: Tensor) -> Tensor:
    """A hook whose effect the norms after it do not undo."""
    return output.roll(1, -1)


class Interrupt:
    """Raises KeyboardInterrupt once, before or after the next pass of any runner."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.at: str | None = None
        for name in ("prefill", "decode", "copy_row"):
            monkeypatch.setattr(ModelRunner, name, self._wrapped(getattr(ModelRunner, name)))

    def _wrapped(self, function: Any) -> Any:
        def wrapper(*args: Any, **options: Any) -> Any:
            self._raise("before")
            result = function(*args, **options)
            self._raise("after")
            return result

        return wrapper

    def _raise(self, place: str) -> None:
        if self.at == place:
            self.at = None
            raise KeyboardInterrupt


class Schedules(RuleBasedStateMachine):
    """Sequences come and go, others use the network, hooks are added and removed, passes are interrupted."""

    def __init__(self) -> None:
        super().__init__()
        self.monkeypatch = pytest.MonkeyPatch()
        self.interrupt = Interrupt(self.monkeypatch)
        self.calls: list[tuple[Call, bool]] = []  # with whether the network has the hook
        self.mixed: set[Call] = set()  # ran while the network changed
        self.handle: Any = None

    @initialize(n_rows=st.integers(1, 4), reuse=st.booleans(), static=st.booleans(), chunked=st.booleans())
    def start(self, n_rows: int, reuse: bool, static: bool, chunked: bool) -> None:
        if chunked:
            self.monkeypatch.setattr("llama.engine.runner.PASS_COST", {"cpu": 1})  # chunks of 16 tokens
        self.model, self.alone = network(n_rows), network(1)
        stepper = StaticStepper(self.model, graphs=False) if static else None
        self.engine = Engine(self.model, stepper, reuse_prefixes=reuse)

    @rule(
        stems=st.lists(st.tuples(st.integers(0, 2), st.integers(1, 40), st.integers(0, 12)), min_size=1, max_size=3),
        max_gen_len=st.integers(1, 20),
        temperature=st.sampled_from([0.0, 0.0, 1.5]),
    )
    def add(self, stems: list[tuple[int, int, int]], max_gen_len: int, temperature: float) -> None:
        """Prompts of one call, which share a sampler."""
        sampler = Sampler(temperature, 0.95, len(stems), torch.Generator().manual_seed(len(self.calls)))
        prompts = [STEMS[stem][:n] + [7 * i % 60 for i in range(more)] for stem, n, more in stems]
        call = Call(Sequence(list(p), sampler, i, max_gen_len, frozenset()) for i, p in enumerate(prompts))
        self.calls.append((call, self.handle is not None))
        self.engine.add(call)

    @rule(n=st.integers(1, 8))
    def steps(self, n: int) -> None:
        for _ in range(n):
            self.engine.advance()

    @rule(place=st.sampled_from(["before", "after"]))
    def interrupted_step(self, place: str) -> None:
        self.interrupt.at = place
        try:
            self.engine.advance()
        except KeyboardInterrupt:
            pass
        finally:
            self.interrupt.at = None

    @precondition(lambda self: self.calls)
    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        self.engine.abort(data.draw(st.sampled_from(self.calls))[0])

    @precondition(lambda self: self.calls)
    @rule(n=st.integers(1, 3))
    def close_a_stream(self, n: int) -> None:
        """Another caller takes a few tokens, and leaves."""
        stream = self.engine.run(Call([greedy(STEMS[0][:20], 8)]))
        list(islice(stream, n))
        stream.close()  # type: ignore[attr-defined]

    @rule()
    def foreign_pass(self) -> None:
        with torch.no_grad():
            self.model(torch.tensor([[1, 2, 3]]), 0)

    @rule()
    def toggle_hook(self) -> None:
        self.mixed |= {call for call, _ in self.calls if not call.is_finished}
        if self.handle:
            self.handle.remove()
            self.handle = None
        else:
            self.handle = self.model.layers[0].attention.register_forward_hook(rotate)

    @invariant()
    def rows_are_few(self) -> None:
        if hasattr(self, "engine"):
            assert self.engine.n_running <= self.model.params.max_batch_size

    def teardown(self) -> None:
        try:
            if hasattr(self, "engine"):
                for _ in range(2000):
                    if self.engine.is_idle:
                        break
                    self.engine.advance()
                assert self.engine.is_idle
                for call, hooked in self.calls:
                    if call not in self.mixed:
                        for sequence in call.sequences:
                            self._check(call, sequence, hooked=hooked)
        finally:
            self.monkeypatch.undo()

    def _check(self, call: Call, sequence: Sequence, *, hooked: bool) -> None:
        """Each token is the one that the network, run without a cache over all before it, gives."""
        answer = sequence.tokens[sequence.n_prompt :]
        received = [r.token for r in call.results if r.sequence == sequence.index and r.token is not None]
        assert received == answer
        handle = self.alone.layers[0].attention.register_forward_hook(rotate) if hooked else None
        with torch.no_grad():
            logits = self.alone(torch.tensor([sequence.tokens[:-1] or [0]]), 0)[0, sequence.n_prompt - 1 :]
        if handle:
            handle.remove()
        sampler = sequence.sampler
        if not answer:
            return
        if sampler.is_greedy:
            chosen = logits.gather(1, torch.tensor(answer).view(-1, 1)).squeeze(1)
            assert torch.all(chosen > logits.amax(1) - 1e-3)
        else:
            again = Sampler(sampler.temperature, sampler.top_p, sampler.n_rows, self._generator(call))
            expected = [int(again(row[None], [sequence.noise_row], [i])) for i, row in enumerate(logits)]
            # Near-ties may change places where rounding differs, as in a pass of other rows: at most one in this many.
            assert expected[: len(answer)] == answer or sum(a != b for a, b in zip(expected, answer, strict=True)) == 1

    def _generator(self, call: Call) -> torch.Generator:
        number = next(i for i, (other, _) in enumerate(self.calls) if other is call)
        return torch.Generator().manual_seed(number)


TestSchedules = Schedules.TestCase
TestSchedules.settings = settings(
    max_examples=25, stateful_step_count=25, deadline=None, suppress_health_check=list(HealthCheck)
)


def run(engine: Engine, prompt: list[int], n: int = 6) -> Sequence:
    list(engine.run(Call([sequence := greedy(prompt, n)])))
    return sequence


@pytest.fixture
def positions(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of positions of each prefill pass."""
    counts: list[int] = []
    prefill = ModelRunner.prefill

    def counted(self: ModelRunner, tokens: Any, *args: Any, **options: Any) -> Tensor:
        counts.append(sum(map(len, tokens)))
        return prefill(self, tokens, *args, **options)

    monkeypatch.setattr(ModelRunner, "prefill", counted)
    return counts


def test_the_next_turn_of_a_chat_computes_only_what_is_new(positions: list[int]) -> None:
    engine = Engine(network(2), reuse_prefixes=True)
    first = run(engine, STEMS[0])
    turn = [*first.tokens, 5, 6, 7]
    second = run(engine, turn)
    assert positions == [len(STEMS[0]), 1 + 3]  # the newest token of the first answer has no keys yet
    assert second.n_reused == len(first.tokens) - 1
    assert second.tokens == run(Engine(network(2)), turn).tokens


def test_requests_with_one_system_prompt_compute_it_once(positions: list[int]) -> None:
    engine = Engine(network(4), reuse_prefixes=True)
    prompts = [STEMS[1] + [i, i + 1] for i in range(7)]
    call = Call(greedy(prompt, 4) for prompt in prompts)
    list(engine.run(call))
    assert sum(positions) == len(STEMS[1]) + 2 * 7
    assert engine.n_reused == 6 * len(STEMS[1])
    for sequence in call.sequences:
        assert sequence.tokens == run(Engine(network(1)), sequence.tokens[: sequence.n_prompt], 4).tokens


def test_the_least_recently_used_prefix_is_dropped_first() -> None:
    engine = Engine(network(2), reuse_prefixes=True)
    run(engine, STEMS[0])
    run(engine, STEMS[1])
    run(engine, STEMS[0])
    run(engine, STEMS[2])
    assert run(engine, STEMS[0]).n_reused > 0
    assert run(engine, STEMS[1]).n_reused == 0


CHANGES = {
    "a hook": lambda model: model.norm.register_forward_hook(lambda *args: None),
    "a weight": lambda model: model.layers[0].feed_forward.w1.weight.mul_(1.5),
    "a loaded weight": lambda model: model.load_state_dict(model.state_dict()),
    "a replaced module": lambda model: setattr(model.layers[1], "ffn_norm", nn.LayerNorm(PARAMS["dim"])),
    "a replaced attribute": lambda model: setattr(model.layers[1].ffn_norm, "eps", 0.1),
    "the cache": lambda model: model(torch.tensor([[1]]), 0),
}


@pytest.mark.parametrize("change", CHANGES)
def test_nothing_is_reused_after_a_change(change: str) -> None:
    model = network(2)
    engine = Engine(model, reuse_prefixes=True)
    run(engine, STEMS[0])
    with torch.no_grad():
        CHANGES[change](model)
        changed = run(engine, STEMS[0])
        assert changed.n_reused == 0
        assert changed.tokens == run(Engine(model), STEMS[0]).tokens


def test_what_was_computed_under_a_hook_is_not_reused_without_it() -> None:
    """Not even where it came and went during a sequence."""
    model = network(1)
    engine = Engine(model, reuse_prefixes=True)
    expected = run(engine, STEMS[0]).tokens
    results = engine.run(Call([greedy(STEMS[0], 6)]))
    next(results)
    handle = model.layers[0].attention.register_forward_hook(rotate)
    next(results)
    handle.remove()
    list(results)
    after = run(engine, STEMS[0])
    assert (after.n_reused, after.tokens) == (0, expected)


def test_nothing_is_reused_unless_asked_for() -> None:
    engine = Engine(network(2))
    run(engine, STEMS[0])
    assert run(engine, STEMS[0]).n_reused == 0


def test_a_prompt_longer_than_a_pass_is_computed_in_parts(
    positions: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = run(Engine(network(1)), STEMS[0]).tokens
    monkeypatch.setattr(ModelArgs, "prefill_tokens", property(lambda self: 16))
    positions.clear()
    assert run(Engine(network(1)), STEMS[0]).tokens == expected
    assert positions == [16, 16, 8]
