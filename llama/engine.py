"""The one loop that generates: sequences wait for slots of the KV cache, and each step adds a token to those that run.

The running sequences have the first slots of the cache, without gaps: where one ends, the last moves into its place,
and a waiting one is prefilled behind it while the others stand. This is continuous batching. Calls from several threads
share the batch: whichever thread waits for a token takes the next step for all of them.
"""

from __future__ import annotations

import threading
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from itertools import takewhile
from typing import Any, Literal

import torch
from torch import Tensor

from llama.model import takes_cache_positions
from llama.runner import ModelRunner, lock_of
from llama.runtime import broadcast_from_first, model_parallel_size, to_device, to_host
from llama.sampling import Sampler
from llama.stepping import Stepper

_engines_lock = threading.Lock()

FinishReason = Literal["stop", "length"]


@dataclass(frozen=True)
class Step:
    """What one step brought to one sequence.

    Attributes:
        sequence: its index in the call.
        token: the new token; None if the sequence ended without one (at EOS, or with no room for a token).
        logprob: log-probability of the token under the raw logits; only if asked for.
        finish_reason: why this is the sequence's last step; None if it is not.
        top_logprobs: the most likely tokens at this position and their log-probabilities; as many as asked for.
    """

    sequence: int
    token: int | None
    logprob: float | None
    finish_reason: FinishReason | None
    top_logprobs: tuple[tuple[int, float], ...] = ()


def _never(token: int) -> bool:
    return False


@dataclass(eq=False)
class Sequence:
    """A prompt and its completion. Its index in the engine's list of running sequences is its slot in the cache.

    Attributes:
        tokens: ids of the prompt, then of the completion so far.
        sampler: draws its tokens; sequences that share one start together.
        lane: which of the sampler's random numbers are its own.
        max_gen_len: maximum number of new tokens; the end of the slot may come first.
        eos_id: ends the sequence.
        logprobs: whether the steps have log-probabilities.
        top_logprobs: of how many of the most likely tokens the steps have them too.
        ends: called with each new token; whether the sequence ends there.
        call: the call that it belongs to, set by `Call`.
        index: its index there, likewise.
        length: number of its tokens whose keys and values are in the cache, from the first one on.
        left: number of tokens that it may still bring.
        is_over: whether it has ended.
        n_prompt: number of the prompt's tokens.
    """

    tokens: list[int]
    sampler: Sampler
    lane: int
    max_gen_len: int
    eos_id: int
    logprobs: bool = False
    top_logprobs: int = 0
    ends: Callable[[int], bool] = _never
    call: Call = field(init=False, repr=False)
    index: int = field(init=False)
    length: int = field(default=0, init=False)
    left: int = field(default=0, init=False)
    is_over: bool = field(default=False, init=False)
    n_prompt: int = field(init=False)

    def __post_init__(self) -> None:
        self.n_prompt = len(self.tokens)


class Call:
    """The sequences that a caller waits for.

    Attributes:
        sequences: the call's.
        steps: those that the caller has not taken yet, in order.
        error: what ended the sequences; raised in the caller's thread.
    """

    def __init__(self, sequences: Iterable[Sequence]) -> None:
        self.sequences = list(sequences)
        self.steps: deque[Step] = deque()
        self.error: BaseException | None = None
        self._n_running = len(self.sequences)
        for index, sequence in enumerate(self.sequences):
            sequence.call, sequence.index = self, index

    @property
    def is_over(self) -> bool:
        """Whether no more steps come."""
        return self._n_running == 0 or self.error is not None

    def append(self, step: Step) -> None:
        self._n_running -= step.finish_reason is not None
        self.steps.append(step)

    def abort(self, error: BaseException | None = None) -> None:
        """Ends all of its sequences. The engine removes them before its next step."""
        self.error = self.error or error
        self._n_running = 0
        for sequence in self.sequences:
            sequence.is_over = True


@dataclass(frozen=True)
class _Tokens:
    """The tokens that a step chose. Their values may still be on their way to the host.

    Attributes:
        sequences: those of the step, in the order of their slots.
        chosen: (bsz,) int64 on the device, the same on all ranks of a model-parallel group.
        values: waits for the tokens, and returns them; under model parallelism followed by 1 if the first rank
            announces changes.
        announces: whether it does so, without model parallelism.
        logprobs: likewise their log-probabilities; None if no sequence asked for them.
        top: likewise, for each row, the most likely tokens and their log-probabilities.
    """

    sequences: list[Sequence]
    chosen: Tensor
    values: Callable[[], list[int]]
    announces: bool
    logprobs: Callable[[], list[float]] | None
    top: tuple[Callable[[], list[list[int]]], Callable[[], list[list[float]]]] | None

    @classmethod
    def choose(cls, logits: Tensor, sequences: list[Sequence], announces: bool) -> _Tokens:
        """Samples from logits (bsz, vocab)."""
        chosen = _sample(logits, sequences)
        values = to_host(chosen) if model_parallel_size() == 1 else None
        if values is None:  # one message has both: followers learn of changes with the tokens that they get anyway
            message = broadcast_from_first(torch.cat((chosen, to_device([int(announces)], chosen.device))))
            chosen, values, announces = message[:-1], to_host(message), False
        n_top = max(sequence.top_logprobs for sequence in sequences)
        logprobs = top = None
        if any(sequence.logprobs for sequence in sequences):
            logprobs = to_host(logprobs_of(logits, chosen))
        if n_top:
            likely = logits.log_softmax(-1).topk(min(n_top, logits.size(-1)))
            top = to_host(likely.indices), to_host(likely.values)
        return cls(list(sequences), chosen, values, announces, logprobs, top)

    def on_host(self) -> tuple[list[tuple[Sequence, Step]], bool]:
        """The steps of those sequences that are not over, without reasons to finish; whether changes were announced."""
        tokens = self.values()
        announced = self.announces or any(tokens[len(self.sequences) :])
        logprobs = self.logprobs() if self.logprobs else None
        top = [list(zip(*row, strict=True)) for row in zip(*(f() for f in self.top), strict=True)] if self.top else None
        steps = []
        for row, sequence in enumerate(self.sequences):
            if not sequence.is_over:
                logprob = logprobs[row] if logprobs and sequence.logprobs else None
                likely = tuple(top[row][: sequence.top_logprobs]) if top else ()
                steps.append((sequence, Step(sequence.index, tokens[row], logprob, None, likely)))
        return steps, announced

    def give_back(self) -> None:
        """Undoes the draws of samplers that have no running sequence any more."""
        running = {id(sequence.sampler) for sequence in self.sequences if not sequence.is_over}
        for sampler in {id(sequence.sampler): sequence.sampler for sequence in self.sequences}.values():
            if id(sampler) not in running:
                sampler.step_back()


class Engine:
    """Advances all sequences of a network together.

    Sequences are added and aborted at any time, from any thread; they take effect before the next step. Whoever waits
    for a step takes it for all: there is no thread of its own. What a sequence brings does not depend on the others,
    but for the rounding that another number of rows may cause outside of float32.

    Between two steps others may use the network: keys and values that they overwrote are computed anew.

    Under model parallelism every rank's engine takes the same steps: each has to get the same calls between the same
    two steps. Where only the first rank knows of them, as in a server, it announces changes with the tokens of a step.

    Args:
        model: a `Transformer`, or any object with `forward(tokens, start_pos)` and `params`.
        stepper: takes the decode steps of an unmodified network; None for plain calls.

    Attributes:
        announces: asked at each step whether changes follow; the first rank's answer counts.
        changes_follow: whether the first rank announced changes with the newest step.
    """

    def __init__(self, model: Any, stepper: Stepper | None = None) -> None:
        self.model = model
        self.stepper = stepper
        self.announces: Callable[[], bool] = lambda: False
        self.changes_follow = False
        self._arrived: deque[Sequence] = deque()  # from any thread; its methods are atomic
        self._lock = lock_of(model)  # its lock guards all that follows
        self._waiting: deque[Sequence] = deque()
        self._running: list[Sequence] = []
        self._runner: ModelRunner | None = None
        self._in_flight: _Tokens | None = None  # a step that started before the tokens ahead of it were on the host
        self._kind: object = None  # of the network, when the runner was made
        self._has_just_prefilled = False

    @property
    def n_running(self) -> int:
        """Number of sequences that have a slot."""
        return len(self._running)

    @property
    def n_waiting(self) -> int:
        """Number of sequences that wait for a slot."""
        return len(self._arrived) + len(self._waiting)

    @property
    def is_idle(self) -> bool:
        """Whether no sequence runs or waits."""
        return not (self._running or self._waiting or self._arrived)

    def add(self, call: Call) -> None:
        """Has the call's sequences wait for slots, in their order, behind those that wait already."""
        self._arrived.extend(call.sequences)

    def run(self, call: Call) -> Iterator[Step]:
        """Adds a call, and yields its steps: those of each sequence in order, those of different ones interleaved.

        Closing the iterator early aborts the call.
        """
        self.add(call)
        try:
            while (step := self.next_step(call)) is not None:
                yield step
        finally:
            self.abort(call)

    def next_step(self, call: Call) -> Step | None:
        """Waits for the call's next step, which this thread or another one takes; returns None once it is over.

        Raises:
            Exception: what a pass of the network with one of the call's sequences raised.
        """
        while not call.steps:
            if call.error is not None:
                raise call.error
            if call.is_over:
                return None
            with self._lock:
                if not call.steps and not call.is_over:
                    self.step()
        return call.steps.popleft()

    def abort(self, call: Call) -> None:
        """Ends the sequences of a call; their slots are free from the next step on."""
        if not call.is_over:
            call.abort()
        if self._lock.try_enter():  # else whoever holds it removes them
            try:
                with torch.inference_mode():
                    self._take_changes()
            finally:
                self._lock.__exit__()

    def advance(self) -> None:
        """`step`, with the network's lock held."""
        with self._lock:
            self.step()

    @torch.inference_mode()
    def step(self) -> None:
        """Takes a step for all running sequences, or prefills waiting ones. The caller holds the network's lock.

        An error of a pass ends the sequences that took part in it, and is their callers'.
        """
        try:
            self._take_changes()
            self._advance()
        except Exception as error:
            self._fail(error)
        except BaseException:  # Ctrl-C: those of other callers go on
            self._interrupt()
            raise

    def _advance(self) -> None:
        tokens = self._in_flight or self._prefill() or self._decode()
        self._in_flight = None
        if tokens is None:
            return
        runner = self._runner
        assert runner is not None
        may_go_ahead = runner.looks_ahead and not self._waiting and len(tokens.sequences) == len(self._running)
        if may_go_ahead and all(s.left > 1 and not s.is_over for s in self._running):
            logits = self._pass(tokens.chosen)
            self._in_flight = _Tokens.choose(logits, self._running, self.announces())
        steps, self.changes_follow = tokens.on_host()
        for sequence, step in steps:
            sequence.call.append(_record(sequence, step))
        if self._in_flight:
            self._in_flight.give_back()
            if all(sequence.is_over for sequence in self._running):
                self._in_flight = None
        if not self._in_flight:
            self._compact()

    def _prefill(self) -> _Tokens | None:
        """Takes waiting sequences into free slots, behind the running ones, and chooses their first tokens.

        Running sequences get a step between two prefills, each of which is one pass of the network for them.
        """
        if self._running and self._has_just_prefilled:
            return None
        new = self._admit()
        if not new:
            return None
        runner = self._runner
        assert runner is not None
        self._restore()
        first = len(self._running)
        for sequence in new:
            sequence.left = min(sequence.max_gen_len, runner.max_seq_len - len(sequence.tokens))
        self._running += new
        logits = runner.prefill([sequence.tokens for sequence in new], range(first, len(self._running)))
        for sequence in new:
            sequence.length = len(sequence.tokens)
        self._has_just_prefilled = True
        return _Tokens.choose(logits, new, self.announces())

    def _admit(self) -> list[Sequence]:
        """Removes from the waiting sequences those that get a slot now."""
        if not self._waiting:
            return []
        runner = self._runner_for_new()
        if runner is None:
            return []
        n_free = runner.max_batch_size - len(self._running)
        if runner.one_position:
            return self._take_of_one_length(n_free)
        starting: list[Sequence] = []
        while self._waiting and len(starting) < n_free:
            n_together = min(self._n_starting_with_next(), runner.max_batch_size)
            if len(starting) + n_together > n_free or (starting and n_together > 1):
                break
            starting += [self._waiting.popleft() for _ in range(n_together)]
            if n_together > 1:
                return starting
        if self._running and starting:  # one pass now, the rest after a step of the running ones
            kept = set(runner.groups([len(sequence.tokens) for sequence in starting])[0])
            kept = kept if 0 in kept else {0}  # the first in line is never left behind
            rest = [sequence for i, sequence in enumerate(starting) if i not in kept]
            self._waiting.extendleft(reversed(rest))
            starting = [sequence for i, sequence in enumerate(starting) if i in kept]
        return starting

    def _runner_for_new(self) -> ModelRunner | None:
        """The runner with which waiting sequences can join the running ones now; None if they have to wait for these.

        Without running ones a new runner is made, which takes the network as it is now: hooks may have been added, or
        modules replaced.
        """
        steps = self.stepper is not None and self.stepper.serves(self.model)
        kind = (takes_cache_positions(self.model), steps)
        if not self._running:
            self._runner, self._kind = ModelRunner(self.model, self.stepper if steps else None), kind
        runner = self._runner
        assert runner is not None
        return None if self._running and (runner.one_position or kind != self._kind) else runner

    def _n_starting_with_next(self) -> int:
        """Number of sequences that must start together with the first waiting one: they share random numbers."""
        first = self._waiting[0]
        if first.sampler.is_greedy:
            return 1
        return len(list(takewhile(lambda sequence: sequence.sampler is first.sampler, self._waiting)))

    def _take_of_one_length(self, n_free: int) -> list[Sequence]:
        """The waiting sequences of the first one's call and length, for a network that takes one position for all."""
        first = self._waiting[0]
        taken = [s for s in self._waiting if s.call is first.call and len(s.tokens) == len(first.tokens)][:n_free]
        ids = {id(sequence) for sequence in taken}
        self._waiting = deque(sequence for sequence in self._waiting if id(sequence) not in ids)
        return taken

    def _decode(self) -> _Tokens | None:
        if not self._running:
            return None
        self._has_just_prefilled = False
        newest = [sequence.tokens[-1] for sequence in self._running]
        assert self._runner is not None
        logits = self._pass(to_device(newest, self._runner.device))
        return _Tokens.choose(logits, self._running, self.announces())

    def _pass(self, newest: Tensor) -> Tensor:
        """Feeds each running sequence's newest token (bsz,); returns the logits (bsz, vocab) of the next ones."""
        assert self._runner is not None
        self._restore()
        lengths = [sequence.length for sequence in self._running]
        for sequence in self._running:
            sequence.length += 1
        return self._runner.step(newest, lengths)

    def _restore(self) -> None:
        """Computes the running sequences' keys and values anew if another use of the network overwrote them."""
        assert self._runner is not None
        if self._running and self._runner.has_lost_cache():
            cached = [sequence.tokens[: sequence.length] for sequence in self._running]
            self._runner.prefill(cached, range(len(self._running)))

    def _compact(self) -> None:
        """Removes the sequences that are over, and moves running ones from the end into the gaps.

        Where the network takes one position for all, they stay until all are over.
        """
        running, runner = self._running, self._runner
        if runner is None or (runner.one_position and not all(sequence.is_over for sequence in running)):
            return
        for slot in reversed(range(len(running))):
            if running[slot].is_over:
                last = running.pop()
                if slot < len(running):
                    running[slot] = last
                    runner.move_row(len(running), slot, last.length)

    def _take_changes(self) -> None:
        """Has the sequences that arrived wait, and removes those that were aborted."""
        while self._arrived:
            self._waiting.append(self._arrived.popleft())
        if any(sequence.is_over for sequence in self._waiting):
            self._waiting = deque(sequence for sequence in self._waiting if not sequence.is_over)
        if self._in_flight:
            self._in_flight.give_back()
            if not all(sequence.is_over for sequence in self._running):
                return  # the step that is in flight still needs its slots as they are
            self._in_flight = None
        if any(sequence.is_over for sequence in self._running):
            self._compact()

    def _fail(self, error: Exception) -> None:
        """Ends the calls of all sequences that have a slot; where none has, that of the first one waiting."""
        for sequence in self._running or list(self._waiting)[:1]:
            if not sequence.is_over:
                sequence.call.abort(error)
        self._drop_in_flight()
        self._running.clear()

    def _interrupt(self) -> None:
        """Brings the sequences to where they stood before the step, without what it may have left in the cache."""
        self._drop_in_flight()
        going_on = [sequence for sequence in self._running if not sequence.is_over]
        self._running = [sequence for sequence in going_on if len(sequence.tokens) > sequence.n_prompt]
        self._waiting.extendleft(s for s in reversed(going_on) if len(s.tokens) == s.n_prompt)
        for sequence in self._running:
            sequence.length = len(sequence.tokens) - 1
        self._lock.last_writer = None

    def _drop_in_flight(self) -> None:
        if self._in_flight:
            for sampler in {id(s.sampler): s.sampler for s in self._in_flight.sequences}.values():
                sampler.step_back()
        self._in_flight = None


def engine_of(model: Any, stepper: Stepper | None = None) -> Engine:
    """The engine that all users of a network with this stepper share; it lives as long as one of them keeps it."""
    use = lock_of(model)
    with _engines_lock:
        engine: Engine | None = use.engine() if use.engine else None
        if engine is None or engine.stepper is not stepper:
            engine = Engine(model, stepper)
            use.engine = weakref.ref(engine)
        return engine


def _sample(logits: Tensor, sequences: list[Sequence]) -> Tensor:
    """The next tokens (bsz,) int64, each drawn by its sequence's sampler."""
    greedy = [sequence.sampler.is_greedy for sequence in sequences]
    if all(greedy):
        return logits.argmax(-1)
    by_sampler: dict[int, list[int]] = {}
    for slot, sequence in enumerate(sequences):
        by_sampler.setdefault(0 if greedy[slot] else id(sequence.sampler), []).append(slot)
    chosen = torch.empty(len(sequences), dtype=torch.int64, device=logits.device)
    for slots in by_sampler.values():
        lanes = to_device([sequences[slot].lane for slot in slots], logits.device)
        if len(by_sampler) == 1:
            return sequences[0].sampler(logits, lanes)
        index = to_device(slots, logits.device)
        chosen[index] = sequences[slots[0]].sampler(logits[index], lanes)
    return chosen


def _record(sequence: Sequence, step: Step) -> Step:
    """Adds a step's token to its sequence; returns the step with the reason if the sequence is over."""
    token = step.token
    assert token is not None
    if sequence.left == 0 or token == sequence.eos_id:
        sequence.is_over = True
        return Step(sequence.index, None, None, "stop" if sequence.left else "length")
    sequence.tokens.append(token)
    sequence.left -= 1
    stopped = sequence.ends(token)
    sequence.is_over = stopped or sequence.left == 0
    return replace(step, finish_reason="stop" if stopped else "length") if sequence.is_over else step


def logprobs_of(logits: Tensor, tokens: Tensor) -> Tensor:
    """log softmax(logits)[token]: (..., vocab) and (...) -> (...)."""
    return logits.log_softmax(-1).gather(-1, tokens.unsqueeze(-1)).squeeze(-1)
