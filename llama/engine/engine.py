"""The generation loop, with continuous batching.

Sequences wait for slots of the KV cache, are prefilled, and then get a token at each step (or several, with speculative
decoding). Running sequences occupy the first slots of the cache without gaps: when one ends, the last one moves into
its slot, and a waiting sequence can start in the slot after the others. Calls from several threads share the batch:
any thread that waits for a token runs the next step for all of them.
"""

from __future__ import annotations

import threading
import weakref
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import takewhile
from typing import Any

import torch
from torch import Tensor

from llama.distributed.device import pause_workers, to_device
from llama.engine.cuda_graphs import Stepper
from llama.engine.lock import lock_of
from llama.engine.prefill import PrefillPass
from llama.engine.runner import ModelRunner
from llama.engine.sampled import ChosenTokens, by_sampler
from llama.engine.sequence import Call, Sequence, Step
from llama.engine.speculative import Counts, Speculator, pad
from llama.model import takes_cache_positions

_engines_lock = threading.Lock()


@dataclass
class _Prefill:
    """A prefill in progress.

    Attributes:
        sequences: the sequences that start together, in the slots after the running ones.
        slot: slot of the first of them.
        passes: the passes that have not run yet.
        logits: (vocab,) after the last token of each prompt that is complete, by index of its sequence.
    """

    sequences: list[Sequence]
    slot: int
    passes: deque[PrefillPass]
    logits: dict[int, Tensor] = field(default_factory=dict)

    @property
    def slots(self) -> range:
        return range(self.slot, self.slot + len(self.sequences))


class Engine:
    """Generates tokens for all sequences of a network together.

    Calls may be added and aborted at any time, from any thread; this takes effect before the next step. The engine has
    no thread of its own: a thread that waits for a step runs it for all. In float32 the tokens of a sequence do not
    depend on the other sequences; in other dtypes the number of rows can affect rounding.

    Others may use the network between two steps: keys and values that they overwrite are computed again.

    Under model parallelism the engines of all ranks run the same steps, so every rank must add and abort the same calls
    between the same two steps. Where only the first rank knows of the changes, as in a server, it announces them to the
    other ranks together with the tokens of a step.

    Args:
        model: a `Transformer`, or any object with `forward(tokens, start_pos)` and `params`.
        stepper: runs the decode steps of an unmodified network; None to call the network directly.
        draft: the runner of a smaller network that drafts tokens; None without a draft model.

    Attributes:
        announces: called at each step; returns whether this rank announces changes. The first rank's value counts.
        changes_follow: whether the first rank announced changes with the latest step.
    """

    def __init__(self, model: Any, stepper: Stepper | None = None, draft: ModelRunner | None = None) -> None:
        self.model = model
        self.stepper = stepper
        self.draft = draft
        self.announces: Callable[[], bool] = lambda: False
        self.changes_follow = False
        self._arrived: deque[Sequence] = deque()  # from any thread; its methods are atomic
        self._lock = lock_of(model)  # guards all attributes below
        self._waiting: deque[Sequence] = deque()
        self._running: list[Sequence] = []
        self._runner: ModelRunner | None = None
        self._in_flight: ChosenTokens | None = None  # a step started before the previous one's tokens were on the host
        self._kind: object = None  # how the network can be run, as found when `_runner` was made
        self._prefilling: _Prefill | None = None
        self._has_just_prefilled = False
        self._speculator: Speculator | None = None  # made when it is first needed

    @property
    def draft_counts(self) -> Counts:
        """Statistics of speculative decoding."""
        return self._speculator.counts if self._speculator else Counts()

    @property
    def n_running(self) -> int:
        """Number of sequences that have a slot."""
        return len(self._running) + (len(self._prefilling.sequences) if self._prefilling else 0)

    @property
    def n_waiting(self) -> int:
        """Number of sequences that wait for a slot."""
        return len(self._arrived) + len(self._waiting)

    @property
    def is_idle(self) -> bool:
        """Whether no sequence is running or waiting."""
        return not (self._running or self._prefilling or self._waiting or self._arrived)

    def add(self, call: Call) -> None:
        """Appends the call's sequences to the waiting queue."""
        self._arrived.extend(call.sequences)

    def run(self, call: Call, *, whole: bool = False) -> Iterator[Step]:
        """Adds a call, and yields its steps. Steps of different sequences are interleaved.

        Closing the iterator early aborts the call.

        Args:
            whole: yields the first step when the call has ended. Then several threads' calls take less time: a thread
                runs steps for all of them until its own call has ended, in place of a thread per step.
        """
        self.add(call)
        try:
            if whole:
                self._finish(call)
            while (step := self.next_step(call)) is not None:
                yield step
        finally:
            self.abort(call)
            pause_workers()  # the next call may come from another thread

    def next_step(self, call: Call) -> Step | None:
        """Returns the call's next step, running steps in this thread if necessary; None when the call has ended.

        Raises:
            Exception: the error of a pass whose batch had one of the call's sequences.
        """
        while not call.steps:
            if call.error is not None:
                raise call.error
            if call.is_finished:
                return None
            if self._lock.acquire(unless=lambda: bool(call.steps) or call.is_finished):
                try:
                    self.step()
                finally:
                    if any(sequence.call is not call for sequence in self._running):
                        pause_workers()  # the next step may be another thread's
                    self._lock.release()
        return call.steps.popleft()

    def _finish(self, call: Call) -> None:
        """Runs steps until the call has ended, in this thread or in another one that does so for its own call."""
        while self._lock.acquire(unless=lambda: call.is_finished):
            try:
                self.step()
                while not (call.is_finished or self._lock.is_wanted):
                    self.step()
            finally:
                self._lock.release()

    def abort(self, call: Call) -> None:
        """Ends the sequences of a call. Their slots are free before the next step."""
        if not call.is_finished:
            call.abort()
        self._lock.wake()
        if self._lock.try_acquire():  # otherwise the thread that holds the lock removes the sequences
            try:
                with torch.inference_mode():
                    self._apply_changes()
            finally:
                self._lock.release()

    def advance(self) -> None:
        """Acquires the network's lock, and runs a `step`."""
        with self._lock:
            self.step()

    @torch.inference_mode()
    def step(self) -> None:
        """Runs a prefill's pass, if sequences wait, and unless that completes the prefill, a decode step.

        The caller must hold the network's lock. An error in a pass of the network ends the calls in its batch, and is
        raised to their callers.
        """
        try:
            self._apply_changes()
            self._advance()
        except Exception as error:
            self._fail(error)
        except BaseException:  # such as Ctrl-C: sequences of other callers continue
            self._interrupt()
            raise
        finally:
            self._lock.wake()

    def _advance(self) -> None:
        """Records the tokens of the step in flight, else of a prefill that completes, else of a decode step."""
        tokens = self._in_flight or self._prefill() or self._decode()
        self._in_flight = None
        if tokens is None:
            return
        runner = self._runner
        assert runner is not None
        # The next step may start before these tokens are known if it will have the same rows, whatever they are: none
        # waits for a slot, and none reaches its last token now. Drafts need to know the tokens.
        may_look_ahead = runner.looks_ahead and not (self._waiting or self._prefilling)
        all_continue = all(s.n_remaining > 1 and not s.is_finished and not s.speculative for s in self._running)
        if may_look_ahead and all_continue and len(tokens.sequences) == len(self._running):
            newest = tokens.chosen.unsqueeze(1)
            self._in_flight = ChosenTokens.choose(self._pass(newest), self._running, self.announces())
        results, self.changes_follow = tokens.on_host()
        for (sequence, steps), draft in zip(results, tokens.drafts, strict=True):
            if not sequence.is_finished:
                self._record(sequence, steps, len(draft))
        for sampler, sequences in by_sampler(tokens.sequences):
            if running := [sequence.next_step for sequence in sequences if not sequence.is_finished]:
                sampler.release(min(running) - 1)  # a step that is interrupted runs again
            else:
                sampler.rewind()
        if self._in_flight and all(sequence.is_finished for sequence in self._running):
            self._in_flight = None
        if not self._in_flight:
            self._compact()

    def _record(self, sequence: Sequence, steps: list[Step], n_drafted: int) -> None:
        """Adds to a sequence the tokens of a pass: accepted drafted ones, and one more."""
        n_accepted = len(steps) - 1  # `_pass` has counted the newest token already
        sequence.length += n_accepted
        sequence.next_step += n_accepted
        if self._speculator and sequence.draft_state:
            self._speculator.observe(sequence, n_drafted, n_accepted)
        for step in steps:
            if not sequence.is_finished:
                sequence.call.append(sequence.record(step))

    def _prefill(self) -> ChosenTokens | None:
        """Prefills waiting sequences in the slots after the running ones; returns their first tokens when complete.

        Returns None while the prefill is incomplete or none is needed. Between two passes of a prefill, running
        sequences get a step.
        """
        if self._running and self._has_just_prefilled:
            return None
        prefill = self._prefilling = self._prefilling or self._start_prefill()
        runner = self._runner
        if prefill is None or runner is None:
            return None
        self._move_prefill(prefill)
        self._restore()
        prompts = [sequence.tokens for sequence in prefill.sequences]
        if runner.one_position:
            prefill.logits = dict(enumerate(runner.prefill(prompts, prefill.slots)))
        while prefill.passes:
            one_pass = prefill.passes.popleft()
            prefill.logits |= runner.prefill_pass(one_pass, prompts, prefill.slots)
            for i in one_pass.places:
                prefill.sequences[i].length = min(one_pass.end, len(prompts[i]))
            self._has_just_prefilled = True
            if self._running and prefill.passes:
                return None
        self._prefilling = None
        self._has_just_prefilled = True
        for sequence in prefill.sequences:
            sequence.length = len(sequence.tokens)
        self._running += prefill.sequences
        logits = torch.stack([prefill.logits[i] for i in range(len(prompts))])
        return ChosenTokens.choose(logits.unsqueeze(1), prefill.sequences, self.announces())

    def _start_prefill(self) -> _Prefill | None:
        """Admits waiting sequences, and plans their prefill; None if no sequence can be admitted."""
        new = self._admit()
        runner = self._runner
        if not new or runner is None:
            return None
        for sequence in new:
            sequence.n_remaining = min(sequence.max_gen_len, runner.max_seq_len - len(sequence.tokens))
            sequence.first_step = sequence.next_step = sequence.sampler.used
            sequence.length = 0
        lengths = [len(sequence.tokens) for sequence in new]
        passes = [] if runner.one_position else runner.plan_prefill(lengths, in_chunks=bool(self._running))
        return _Prefill(new, len(self._running), deque(passes))

    def _move_prefill(self, prefill: _Prefill) -> None:
        """Moves a prefill's part of the cache to the slots after the running sequences, if some of these have ended."""
        slot = len(self._running)
        if slot != prefill.slot:
            assert self._runner is not None
            for i, sequence in enumerate(prefill.sequences):
                self._runner.move_row(prefill.slot + i, slot + i, sequence.length)
            prefill.slot = slot

    def _admit(self) -> list[Sequence]:
        """Removes and returns the waiting sequences that get a slot now."""
        if not self._waiting:
            return []
        runner = self._runner_for_new()
        if runner is None:
            return []
        n_free = runner.max_batch_size - len(self._running)
        if runner.one_position:
            return self._admit_of_one_length(n_free)
        starting: list[Sequence] = []
        while self._waiting and len(starting) < n_free:
            # Sequences that draw from one random stream start in one prefill, as the rows of a batch do.
            n_together = min(self._n_starting_with_next(), runner.max_batch_size)
            if len(starting) + n_together > n_free or (starting and n_together > 1):
                break
            starting += [self._waiting.popleft() for _ in range(n_together)]
            if n_together > 1:
                return starting
        return starting

    def _runner_for_new(self) -> ModelRunner | None:
        """The runner for sequences that start now; None if they must wait until no sequence is running.

        A new runner is made if no sequence is running, because hooks may have been added to the network, or modules
        replaced.
        """
        steps = self.stepper is not None and self.stepper.serves(self.model)
        kind = (takes_cache_positions(self.model), steps)
        if not self._running:
            self._runner, self._kind = ModelRunner(self.model, self.stepper if steps else None), kind
        runner = self._runner
        assert runner is not None
        return None if self._running and (runner.one_position or kind != self._kind) else runner

    def _n_starting_with_next(self) -> int:
        """Number of sequences that must start together with the first waiting one because they share a sampler."""
        first = self._waiting[0]
        if first.sampler.is_greedy:
            return 1
        return len(list(takewhile(lambda sequence: sequence.sampler is first.sampler, self._waiting)))

    def _admit_of_one_length(self, n_free: int) -> list[Sequence]:
        """Removes and returns waiting sequences of one call and length, for a network that needs equal positions."""
        first = self._waiting[0]
        admitted = [s for s in self._waiting if s.call is first.call and len(s.tokens) == len(first.tokens)][:n_free]
        ids = {id(sequence) for sequence in admitted}
        self._waiting = deque(sequence for sequence in self._waiting if id(sequence) not in ids)
        return admitted

    def _decode(self) -> ChosenTokens | None:
        """Runs a decode step, which may have drafted tokens, for all running sequences."""
        if not self._running:
            return None
        self._has_just_prefilled = False
        drafts = self._drafts()
        width = 1 + max(map(len, drafts))
        newest = [(sequence.tokens[-1], *draft) for sequence, draft in zip(self._running, drafts, strict=True)]
        assert self._runner is not None
        tokens = to_device(pad(newest, width), self._runner.device).view(len(newest), width)
        return ChosenTokens.choose(self._pass(tokens), self._running, self.announces(), drafts)

    def _drafts(self) -> list[list[int]]:
        """Drafts tokens for each running sequence; empty lists where nothing is drafted."""
        runner = self._runner
        assert runner is not None
        if runner.one_position or not any(sequence.speculative for sequence in self._running):
            return [[] for _ in self._running]
        if self._speculator is None:
            self._speculator = Speculator(self.model, self.draft)
        room = runner.max_seq_len - 1 - max(sequence.length for sequence in self._running)
        return self._speculator.propose(self._running, room)

    def _pass(self, tokens: Tensor) -> Tensor:
        """Feeds tokens (bsz, width), each running sequence's newest and its drafted ones; returns the logits."""
        assert self._runner is not None
        self._restore()
        lengths = [sequence.length for sequence in self._running]
        for sequence in self._running:
            sequence.length += 1
        return self._runner.step(tokens, lengths)

    def _restore(self) -> None:
        """Computes the sequences' keys and values again if another use of the network has overwritten them."""
        assert self._runner is not None
        started = [*self._running, *(self._prefilling.sequences if self._prefilling else ())]
        if started and self._runner.has_lost_cache():
            cached = [(slot, s.tokens[: s.length]) for slot, s in enumerate(started) if s.length]
            if cached:
                self._runner.prefill([tokens for _, tokens in cached], [slot for slot, _ in cached])

    def _compact(self) -> None:
        """Removes sequences that have ended, and moves running ones from the end into the gaps.

        In a network that needs equal positions, sequences keep their slots until all have ended.
        """
        running, runner = self._running, self._runner
        if runner is None or (runner.one_position and not all(sequence.is_finished for sequence in running)):
            return
        for slot in reversed(range(len(running))):
            if running[slot].is_finished:
                last = running.pop()
                if slot < len(running):
                    running[slot] = last
                    runner.move_row(len(running), slot, last.length)
                    if self._speculator:
                        self._speculator.move_row(len(running), slot)

    def _apply_changes(self) -> None:
        """Moves sequences that have arrived to the waiting queue, and removes aborted ones."""
        while self._arrived:
            self._waiting.append(self._arrived.popleft())
        if any(sequence.is_finished for sequence in self._waiting):
            self._waiting = deque(sequence for sequence in self._waiting if not sequence.is_finished)
        if self._in_flight:
            self._in_flight.rewind()
            if not all(sequence.is_finished for sequence in self._running):
                return  # slots must not change while a step is in flight
            self._in_flight = None
        if self._prefilling and all(sequence.is_finished for sequence in self._prefilling.sequences):
            self._prefilling = None
        if any(sequence.is_finished for sequence in self._running):
            self._compact()

    def _fail(self, error: Exception) -> None:
        """Ends the calls of all sequences that have a slot, or, if none has, the call of the first one waiting."""
        started = [*self._running, *(self._prefilling.sequences if self._prefilling else ())]
        for sequence in started or list(self._waiting)[:1]:
            if not sequence.is_finished:
                sequence.call.abort(error)
        self._drop_in_flight()
        self._running.clear()
        self._prefilling = None

    def _interrupt(self) -> None:
        """Returns sequences to their state before the interrupted step. The cache is computed again in the next one."""
        self._drop_in_flight()
        started = [*self._running, *(self._prefilling.sequences if self._prefilling else ())]
        unfinished = [sequence for sequence in started if not sequence.is_finished]
        self._prefilling = None
        self._running = [sequence for sequence in unfinished if len(sequence.tokens) > sequence.n_prompt]
        self._waiting.extendleft(s for s in reversed(unfinished) if len(s.tokens) == s.n_prompt)
        for sequence in self._running:
            sequence.length = len(sequence.tokens) - 1
        self._lock.last_writer = None

    def _drop_in_flight(self) -> None:
        """Discards the step in flight; its tokens will be sampled again."""
        self._in_flight = None
        for sequence in self._running:
            sequence.next_step = sequence.first_step + sequence.n_generated


def engine_of(model: Any, stepper: Stepper | None = None, draft: ModelRunner | None = None) -> Engine:
    """Returns the engine that all users of a network share, or a new one for a different stepper or draft.

    The engine exists as long as one of its users refers to it.
    """
    lock = lock_of(model)
    with _engines_lock:
        engine: Engine | None = lock.engine() if lock.engine else None
        if engine is None or engine.stepper is not stepper or engine.draft is not draft:
            engine = Engine(model, stepper, draft)
            lock.engine = weakref.ref(engine)
        return engine
