"""The one loop that generates: sequences wait for slots of the KV cache, and each step adds a token to those that run.

The running sequences have the first slots of the cache, without gaps: where one ends, the last moves into its place,
and a waiting one is prefilled behind it while the others stand. This is continuous batching. Calls from several threads
share the batch: whichever thread waits for a token takes the next step for all of them.
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

from llama.chosen import ChosenTokens, by_sampler
from llama.model import takes_cache_positions
from llama.prefill import PrefillPass
from llama.runner import ModelRunner, lock_of
from llama.runtime import to_device
from llama.sequence import Call, Sequence, Step
from llama.speculative import Counts, Speculator, pad
from llama.stepping import Stepper

_engines_lock = threading.Lock()


@dataclass
class _Prefill:
    """Sequences whose prompts are on their way into the cache, a pass at a time.

    Attributes:
        sequences: those that start together; they have the slots behind the running ones.
        slot: that of the first one.
        passes: those that are still to be taken.
        logits: (vocab,) after each prompt that is in the cache, by its place.
    """

    sequences: list[Sequence]
    slot: int
    passes: deque[PrefillPass]
    logits: dict[int, Tensor] = field(default_factory=dict)

    @property
    def slots(self) -> range:
        return range(self.slot, self.slot + len(self.sequences))


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
        draft: the runner of a smaller network that drafts tokens; None without one.

    Attributes:
        announces: asked at each step whether changes follow; the first rank's answer counts.
        changes_follow: whether the first rank announced changes with the newest step.
    """

    def __init__(self, model: Any, stepper: Stepper | None = None, draft: ModelRunner | None = None) -> None:
        self.model = model
        self.stepper = stepper
        self.draft = draft
        self.announces: Callable[[], bool] = lambda: False
        self.changes_follow = False
        self._arrived: deque[Sequence] = deque()  # from any thread; its methods are atomic
        self._lock = lock_of(model)  # its lock guards all that follows
        self._waiting: deque[Sequence] = deque()
        self._running: list[Sequence] = []
        self._runner: ModelRunner | None = None
        self._in_flight: ChosenTokens | None = None  # a step that started before the last one's tokens were on the host
        self._kind: object = None  # of the network, when the runner was made
        self._prefilling: _Prefill | None = None
        self._has_just_prefilled = False
        self._speculator: Speculator | None = None  # made when it is first needed

    @property
    def draft_counts(self) -> Counts:
        """How many tokens were drafted and accepted so far."""
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
        """Whether no sequence runs or waits."""
        return not (self._running or self._prefilling or self._waiting or self._arrived)

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
        may_go_ahead = runner.looks_ahead and not (self._waiting or self._prefilling)
        all_go_on = all(s.left > 1 and not s.is_over and not s.speculative for s in self._running)
        if may_go_ahead and all_go_on and len(tokens.sequences) == len(self._running):
            newest = tokens.chosen.unsqueeze(1)
            self._in_flight = ChosenTokens.choose(self._pass(newest), self._running, self.announces())
        found, self.changes_follow = tokens.on_host()
        for (sequence, steps), draft in zip(found, tokens.drafts, strict=True):
            if not sequence.is_over:
                self._take(sequence, steps, len(draft))
        for sampler, sequences in by_sampler(tokens.sequences):
            if running := [sequence.next_step for sequence in sequences if not sequence.is_over]:
                sampler.release(min(running) - 1)  # a step that is interrupted is taken again
            else:
                sampler.rewind()
        if self._in_flight and all(sequence.is_over for sequence in self._running):
            self._in_flight = None
        if not self._in_flight:
            self._compact()

    def _take(self, sequence: Sequence, steps: list[Step], n_drafted: int) -> None:
        """Gives a sequence the tokens that a pass brought: one, and the accepted drafted ones."""
        n_accepted = len(steps) - 1
        sequence.length += n_accepted
        sequence.next_step += n_accepted
        if self._speculator and sequence.drafting:
            self._speculator.observe(sequence, n_drafted, n_accepted)
        for step in steps:
            if not sequence.is_over:
                sequence.call.append(sequence.record(step))

    def _prefill(self) -> ChosenTokens | None:
        """Takes waiting sequences into free slots, behind the running ones, and chooses their first tokens.

        Running sequences get a step between two passes of a prefill.
        """
        if self._running and self._has_just_prefilled:
            return None
        prefill = self._prefilling = self._prefilling or self._start_prefill()
        runner = self._runner
        if prefill is None or runner is None:
            return None
        self._follow(prefill)
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
        """Admits waiting sequences, and plans the passes of their prefill."""
        new = self._admit()
        runner = self._runner
        if not new or runner is None:
            return None
        for sequence in new:
            sequence.left = min(sequence.max_gen_len, runner.max_seq_len - len(sequence.tokens))
            sequence.first_step = sequence.next_step = sequence.sampler.used
            sequence.length = 0
        lengths = [len(sequence.tokens) for sequence in new]
        passes = [] if runner.one_position else runner.plan_prefill(lengths, in_chunks=bool(self._running))
        return _Prefill(new, len(self._running), deque(passes))

    def _follow(self, prefill: _Prefill) -> None:
        """Moves what is in the cache of a prefill behind the sequences that still run."""
        slot = len(self._running)
        if slot != prefill.slot:
            assert self._runner is not None
            for i, sequence in enumerate(prefill.sequences):
                self._runner.move_row(prefill.slot + i, slot + i, sequence.length)
            prefill.slot = slot

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

    def _decode(self) -> ChosenTokens | None:
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
        """The drafted tokens for each running sequence."""
        runner = self._runner
        assert runner is not None
        if runner.one_position or not any(sequence.speculative for sequence in self._running):
            return [[] for _ in self._running]
        if self._speculator is None:
            self._speculator = Speculator(self.model, self.draft)
        room = runner.max_seq_len - 1 - max(sequence.length for sequence in self._running)
        return self._speculator.propose(self._running, room)

    def _pass(self, tokens: Tensor) -> Tensor:
        """Feeds tokens (bsz, width) to the running sequences, the first of each its newest one; returns the logits."""
        assert self._runner is not None
        self._restore()
        lengths = [sequence.length for sequence in self._running]
        for sequence in self._running:
            sequence.length += 1
        return self._runner.step(tokens, lengths)

    def _restore(self) -> None:
        """Computes the sequences' keys and values anew if another use of the network overwrote them."""
        assert self._runner is not None
        started = [*self._running, *(self._prefilling.sequences if self._prefilling else ())]
        if started and self._runner.has_lost_cache():
            cached = [(slot, s.tokens[: s.length]) for slot, s in enumerate(started) if s.length]
            if cached:
                self._runner.prefill([tokens for _, tokens in cached], [slot for slot, _ in cached])

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
                    if self._speculator:
                        self._speculator.move_row(len(running), slot)

    def _take_changes(self) -> None:
        """Has the sequences that arrived wait, and removes those that were aborted."""
        while self._arrived:
            self._waiting.append(self._arrived.popleft())
        if any(sequence.is_over for sequence in self._waiting):
            self._waiting = deque(sequence for sequence in self._waiting if not sequence.is_over)
        if self._in_flight:
            self._in_flight.rewind()
            if not all(sequence.is_over for sequence in self._running):
                return  # the step that is in flight still needs its slots as they are
            self._in_flight = None
        if self._prefilling and all(sequence.is_over for sequence in self._prefilling.sequences):
            self._prefilling = None
        if any(sequence.is_over for sequence in self._running):
            self._compact()

    def _fail(self, error: Exception) -> None:
        """Ends the calls of all sequences that have a slot; where none has, that of the first one waiting."""
        started = [*self._running, *(self._prefilling.sequences if self._prefilling else ())]
        for sequence in started or list(self._waiting)[:1]:
            if not sequence.is_over:
                sequence.call.abort(error)
        self._drop_in_flight()
        self._running.clear()
        self._prefilling = None

    def _interrupt(self) -> None:
        """Brings the sequences to where they stood before the step, without what it may have left in the cache."""
        self._drop_in_flight()
        started = [*self._running, *(self._prefilling.sequences if self._prefilling else ())]
        going_on = [sequence for sequence in started if not sequence.is_over]
        self._prefilling = None
        self._running = [sequence for sequence in going_on if len(sequence.tokens) > sequence.n_prompt]
        self._waiting.extendleft(s for s in reversed(going_on) if len(s.tokens) == s.n_prompt)
        for sequence in self._running:
            sequence.length = len(sequence.tokens) - 1
        self._lock.last_writer = None

    def _drop_in_flight(self) -> None:
        self._in_flight = None
        for sequence in self._running:
            sequence.next_step = sequence.first_step + sequence.n_generated


def engine_of(model: Any, stepper: Stepper | None = None, draft: ModelRunner | None = None) -> Engine:
    """The engine that all users of a network with this stepper and draft share; it lives while one of them keeps it."""
    use = lock_of(model)
    with _engines_lock:
        engine: Engine | None = use.engine() if use.engine else None
        if engine is None or engine.stepper is not stepper or engine.draft is not draft:
            engine = Engine(model, stepper, draft)
            use.engine = weakref.ref(engine)
        return engine
