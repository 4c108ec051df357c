"""The generation loop, with continuous batching.

A sequence is its tokens and `n_cached`, how many of them have their keys and values in its row of the KV cache. A pass
of the network moves `n_cached` forward. A new prompt, a chunk of a long one, a cache that somebody else overwrote, an
interrupted pass and a decode step differ only in how many tokens are not cached yet. Calls from several threads share
the batch: any thread that waits for a token runs the next pass for all of them.
"""

from __future__ import annotations

import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Generator
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

from llama.checkpoint.memory import MemoryPlan, out_of_memory
from llama.distributed.device import AdaptiveThreads, pause_workers, to_device
from llama.distributed.groups import model_parallel_size, on_any_rank
from llama.engine.lock import lock_of
from llama.engine.network_state import NetworkState, has_hooks
from llama.engine.rows import Rows
from llama.engine.runner import ModelRunner, Stepper, device_of, dtype_of
from llama.engine.sampled import NOT_FINITE, SampledTokens
from llama.engine.sequence import Call, Sequence, TokenResult
from llama.engine.speculative import Counts, Speculator
from llama.errors import NonFiniteLogitsError
from llama.model import ModelArgs


@dataclass(frozen=True)
class _Pass:
    """A pass of the network that was started.

    Attributes:
        sequences: its sequences.
        n_cached: for each, the number of its tokens in the cache after the pass; drafted tokens do not count.
        sampled: the tokens of those sequences that need no further pass for it; None if there are none.
        width: number of tokens per row of a decode pass; 0 for a prefill.
        started: when a decode pass was started, by `time.perf_counter`.
    """

    sequences: list[Sequence]
    n_cached: list[int]
    sampled: SampledTokens | None
    width: int = 0
    started: float = 0.0


class Engine:
    """Generates tokens for all sequences of a network together.

    Calls may be added and aborted at any time, from any thread; this takes effect before the next pass. The engine has
    no thread: a thread that waits for a token runs passes for all. In float32 the greedy tokens of a
    sequence do not depend on the others; in other dtypes the number of rows can affect rounding.

    Others may use the network between two passes: keys and values that they overwrite are computed again.

    Under model parallelism the engines of all ranks run the same passes, so every rank must add and abort the same
    calls between the same two passes.

    Args:
        model: a `Transformer`, or any object with `forward(tokens, start_pos)` and `params`.
        stepper: runs the decode passes of an unmodified network; None to call the network directly.
        draft: the runner of a smaller network that drafts tokens; None without a draft model.
        reuse_prefixes: whether a new sequence takes the keys and values of a prefix that the cache holds already, as
            long as the network is what it was when they were computed, without hooks.

    Attributes:
        n_reused: number of prompt tokens that were taken so.
    """

    def __init__(
        self,
        model: Any,
        stepper: Stepper | None = None,
        draft: ModelRunner | None = None,
        *,
        reuse_prefixes: bool = False,
    ) -> None:
        self.model = model
        self.stepper = stepper
        self.draft = draft
        self.reuse_prefixes = reuse_prefixes
        self.n_reused = 0
        self._waiting: deque[Sequence] = deque()  # any thread appends, which is atomic
        weights = model.parameters() if hasattr(model, "parameters") else ()
        self._threads = AdaptiveThreads(weights) if device_of(model).type == "cpu" else nullcontext()
        self._lock = lock_of(model)  # guards all attributes below
        self._is_in_step = False  # stays True after a step that was interrupted
        self._rows = Rows(ModelRunner(model))
        self._state: NetworkState | None = None  # of the network, with `reuse_prefixes`
        self._batch: list[Sequence] = []  # the sequences of the pass that is run now
        self._in_flight: _Pass | None = None  # started before the previous one's tokens were on the host
        self._has_just_prefilled = False

    @cached_property
    def _speculator(self) -> Speculator:
        return Speculator(device_of(self.model), self.draft)

    @property
    def _runner(self) -> ModelRunner:
        return self._rows.runner

    @property
    def draft_counts(self) -> Counts:
        """Statistics of speculative decoding."""
        return self._speculator.counts

    @property
    def n_running(self) -> int:
        """Number of sequences that have a row of the cache."""
        return len(self._rows.running)

    @property
    def n_waiting(self) -> int:
        """Number of sequences that wait for a row."""
        return len(self._waiting)

    @property
    def is_idle(self) -> bool:
        """Whether no sequence is running or waiting."""
        return not (self._rows.running or self._waiting)

    def add(self, call: Call) -> None:
        """Appends the call's sequences to the waiting queue."""
        for sequence in call.sequences:
            sequence.max_gen_len = min(sequence.max_gen_len, self.model.params.max_seq_len - sequence.n_prompt)
        self._waiting.extend(call.sequences)

    def run(self, call: Call, *, whole: bool = False) -> Generator[TokenResult, None, None]:
        """Adds a call, and yields its results. Those of different sequences are interleaved.

        Closing the iterator early aborts the call.

        Args:
            whole: yields the first result when the call has ended. Then several threads' calls take less time: a thread
                runs passes for all of them until its own call has ended, in place of a thread per pass.

        Raises:
            Exception: the error of a pass whose batch had one of the call's sequences.
        """
        results = self._run(call, whole=whole)
        call.reader = weakref.ref(results)
        return results

    def _run(self, call: Call, *, whole: bool) -> Generator[TokenResult, None, None]:
        try:
            self.add(call)
            while not call.is_finished or call.results:
                self._run_passes(call, until=lambda: call.is_finished or (bool(call.results) and not whole))
                while call.results:
                    yield call.results.popleft()
            if call.error is not None:
                raise call.error
        finally:
            self.abort(call)
            pause_workers()  # the next call may come from another thread

    def _run_passes(self, call: Call, *, until: Callable[[], bool]) -> None:
        """Runs passes until the condition holds, in this thread or in another one that does so for its own call."""
        call.thread = threading.get_ident()
        while self._lock.acquire(unless=until):
            try:
                self.step()
                while not (until() or self._lock.is_wanted):
                    self.step()
            finally:
                self._lock.release()

    def abort(self, call: Call) -> None:
        """Ends the sequences of a call. Their rows are free before the next pass."""
        if not call.is_finished:
            call.abort()
        self._lock.wake()
        if self._lock.try_acquire():  # otherwise the thread that holds the lock removes the sequences
            try:
                self.step(with_pass=False)
            finally:
                self._lock.release()

    def advance(self) -> None:
        """Acquires the network's lock, and runs a `step`."""
        with self._lock:
            self.step()

    @torch.inference_mode()
    def step(self, *, with_pass: bool = True) -> None:
        """Removes sequences that have ended, admits waiting ones, runs one pass, and records its tokens.

        The caller must hold the network's lock. An error in a pass ends the calls in its batch, and is raised to their
        callers. After an interruption, such as Ctrl-C, the next step computes the cache again.

        Args:
            with_pass: False to remove sequences only.
        """
        self._batch = []
        if self._is_in_step:
            self._lose_cache()
        self._is_in_step = True
        try:
            self._apply_changes()
            if with_pass:
                if self._runner.has_lost_cache():
                    self._rows.lose()
                    self._in_flight = None
                self._admit()
            if with_pass and self._rows.running:
                with self._threads:
                    started = self._in_flight or self._start_pass()
                    ahead = self._may_look_ahead(started)
                    self._in_flight = self._decode(started.sequences, after=started) if ahead else None
                    self._record(started)
                self._remove_finished()
        except Exception as error:
            self._fail(error)
        self._is_in_step = False
        self._lock.wake()

    def _lose_cache(self) -> None:
        """Has the caches computed again, and the pass in flight."""
        self._in_flight = None
        self._lock.last_writer = None
        if self.draft is not None:
            lock_of(self.draft.model).last_writer = None
        self._rows.lose()

    def _may_look_ahead(self, started: _Pass) -> bool:
        """Whether the next pass decodes the same rows whatever the tokens of this one are, which it need not know.

        None waits for a row, and none reaches its last token now. Drafts and processors need to know the tokens.
        """
        running = self._rows.running
        return (
            self._runner.looks_ahead
            and not self._waiting
            and started.sampled is not None
            and started.sampled.sequences == running
            and all(s.n_remaining > 1 and not (s.is_finished or s.speculative or s.process) for s in running)
        )

    def _record(self, started: _Pass) -> None:
        """Adds the tokens of a pass to its sequences. This alone moves `n_cached` forward, after the tokens."""
        results = started.sampled.on_host() if started.sampled else {}
        if started.width and any(sequence.speculative for sequence in started.sequences):
            seconds = time.perf_counter() - started.started
            self._speculator.costs.observe(len(started.sequences) * started.width, seconds)
        for sequence, n_cached in zip(started.sequences, started.n_cached, strict=True):
            mine = results.get(sequence, [])
            if sequence.is_finished:
                continue
            if not sequence.not_finite and any(result.token == NOT_FINITE for result in mine):
                where = f"after token {len(sequence.tokens)} of sequence {sequence.index}"
                sequence.not_finite = NonFiniteLogitsError(where)
            if sequence.not_finite:
                self._start_over(sequence)
                continue
            if started.width and sequence.speculative:
                self._speculator.observe(sequence, len(mine) - 1)
            for result in mine:
                if not sequence.is_finished:
                    sequence.record(result)
            # Accepted drafts are cached too, as the newest token is.
            sequence.n_cached = min(n_cached + max(0, len(mine) - 1), len(sequence.tokens))

    def _start_over(self, sequence: Sequence) -> None:
        """Has a sequence whose logits are not finite computed again in a cleared row; ends its call the second time.

        An earlier pass may have left NaN in the row: attention to NaN gives NaN, even where it is masked.
        """
        self._runner.clear_row(self._rows.running.index(sequence))
        self._in_flight = None
        sequence.n_cached = 0
        if sequence.n_reused:
            self._rows.forget()
            sequence.n_reused = 0
        if sequence.has_started_over or self._runner.one_position:  # where all rows go on together
            sequence.call.abort(sequence.not_finite)  # the other calls go on
        sequence.has_started_over, sequence.not_finite = True, None

    def _start_pass(self) -> _Pass:
        """Decides what the next pass holds, and starts it."""
        runner, running = self._runner, self._rows.running
        if runner.one_position:  # sequences keep their rows until all have ended
            n_behind = [sequence.n_behind for sequence in running if not sequence.is_finished]
            return self._prefill(list(range(len(running))), max(n_behind)) if n_behind else _Pass([], [], None)
        if self._state is not None:
            self._state.is_same(thorough=False)  # notices a hook that is gone when the next sequence starts
        level = running[: self._rows.n_level]
        behind = [row for row, sequence in enumerate(running) if not sequence.is_level]
        # The sequences of one call begin to decode together, as the rows of a batch do.
        call = running[behind[0]].call if behind else None
        others_decode = any(sequence.n_generated > 1 or sequence.call is not call for sequence in level)
        if not behind or (others_decode and self._has_just_prefilled):
            return self._decode(level)
        observed = running[behind[0]].on_logits is not None  # such passes are smaller, so others get their own
        behind = [row for row in behind if (running[row].on_logits is not None) == observed]
        lengths = [running[row].n_behind for row in behind]
        group, width = runner.next_group(lengths, in_chunks=others_decode, all_logits=observed)
        return self._prefill([behind[i] for i in group], width)

    def _prefill(self, rows: list[int], width: int) -> _Pass:
        """Computes up to `width` tokens of each of these rows."""
        self._batch = sequences = [self._rows.running[row] for row in rows]
        starts = [sequence.n_cached for sequence in sequences]
        if self._runner.one_position:  # those that have ended go on with the others
            starts = [max(starts)] * len(rows)
        tokens = [s.tokens[start : start + width] for s, start in zip(sequences, starts, strict=True)]
        observed = [i for i, sequence in enumerate(sequences) if sequence.on_logits and not sequence.is_finished]
        logits = self._runner.prefill(tokens, rows, starts, all_logits=bool(observed))
        self._has_just_prefilled = True
        for i in observed:
            sequences[i].show(starts[i], logits[i, : len(tokens[i])])
        if observed:
            logits = torch.stack([row[len(part) - 1] for row, part in zip(logits, tokens, strict=True)])
        ends = [start + len(part) for start, part in zip(starts, tokens, strict=True)]
        complete = [i for i, s in enumerate(sequences) if ends[i] == len(s.tokens) and not s.is_finished]
        if not complete:
            return _Pass(sequences, ends, None)
        if len(complete) < len(sequences):
            logits = logits[to_device(complete, logits.device)]
        return _Pass(sequences, ends, SampledTokens.sample(logits.unsqueeze(1), [sequences[i] for i in complete]))

    def _decode(self, sequences: list[Sequence], *, after: _Pass | None = None) -> _Pass:
        """Computes the newest token of the sequences in the first rows, and drafted tokens after it.

        Args:
            after: a pass of the same sequences whose tokens are not recorded yet; they are then the newest.
        """
        self._batch = sequences = list(sequences)
        started = time.perf_counter()
        drafts: list[list[int]] = []
        if after is not None and after.sampled is not None:
            starts, tokens = after.n_cached, after.sampled.chosen.clamp(min=0).unsqueeze(1)
        else:
            starts, drafts = [sequence.n_cached for sequence in sequences], [[] for _ in sequences]
            if any(sequence.speculative for sequence in sequences):
                drafts, started = self._speculator.propose(sequences), time.perf_counter()
            tokens = self._runner.pad([(s.tokens[-1], *draft) for s, draft in zip(sequences, drafts, strict=True)])
        logits = self._runner.decode(tokens, starts)
        self._has_just_prefilled = False
        sampled = SampledTokens.sample(logits, sequences, drafts, ahead=int(after is not None))
        return _Pass(sequences, [start + 1 for start in starts], sampled, tokens.size(1), started)

    def _admit(self) -> None:
        """Gives rows to waiting sequences."""
        if not self._waiting or not self._is_runner_current():
            return
        runner, rows, waiting = self._runner, self._rows, list(self._waiting)
        if runner.one_position:  # only sequences of one call and length run together
            first = waiting[0]
            waiting = [s for s in waiting if s.call is first.call and len(s.tokens) == len(first.tokens)]
        reuse = self.reuse_prefixes and not runner.one_position and self._may_reuse()
        for sequence in waiting[: runner.max_batch_size - len(rows.running)]:
            if reuse and not sequence.on_logits and rows.must_wait(sequence.tokens):
                return
            if sequence not in rows.running:  # it is where an interruption came before the next line
                rows.add(sequence, reuse=reuse and not sequence.on_logits)
            self._waiting.remove(sequence)
            self.n_reused += sequence.n_reused

    def _is_runner_current(self) -> bool:
        """Whether sequences can start now: False if the network has changed, until no sequence is running.

        If none is running, a new runner is made where hooks were added to the network, or modules replaced.
        """
        running = self._rows.running
        if len(running) == self._runner.max_batch_size:
            return False
        steps = self.stepper is not None and self.stepper.serves(self.model)
        runner = ModelRunner(self.model, self.stepper if steps else None)
        is_same = runner.key == self._runner.key
        if running:
            return is_same and not runner.one_position
        if not is_same:
            self._rows = Rows(runner)
        return True

    def _may_reuse(self) -> bool:
        """Whether new sequences may take prefixes from the cache. Forgets them if the network has changed on a rank."""
        if self._state is None:
            self._state = NetworkState(self.model)
        flags = [not self._state.is_same(thorough=True), has_hooks(self.model.modules())]
        has_changed, hooked = on_any_rank(flags, self._runner.device)
        if has_changed:
            self._rows.forget()
            self._state = NetworkState(self.model)
        return not hooked

    def _apply_changes(self) -> None:
        """Removes sequences that have ended, were aborted, or have nobody to receive their tokens."""
        waiting = list(self._waiting)
        for call in {sequence.call for sequence in (*waiting, *self._rows.running)}:
            if call.is_abandoned:
                call.abort()
        for sequence in waiting:
            if sequence.is_finished:
                sequence.sampler.end_row(sequence.noise_row)
                self._waiting.remove(sequence)
        self._remove_finished()

    def _remove_finished(self) -> None:
        """Removes sequences that have ended, and moves running ones into the gaps."""
        finished = [sequence.is_finished for sequence in self._rows.running]
        if not any(finished) or ((self._in_flight or self._runner.one_position) and not all(finished)):
            return  # rows must not change while a pass is in flight
        self._in_flight = None
        keep = self._state is not None and self._state.is_same(thorough=True)
        self._rows.remove_finished(keep=keep)

    def _fail(self, error: Exception) -> None:
        """Ends the calls in the pass that failed; or of all running sequences, or of the first one that waits."""
        if isinstance(error, torch.OutOfMemoryError):
            plan = MemoryPlan(ModelArgs.of(self.model.params), model_parallel_size(), dtype_of(self.model))
            error = out_of_memory(error, plan, str(device_of(self.model)))
        for sequence in self._batch or self._rows.running or list(self._waiting)[:1]:
            if not sequence.is_finished:
                sequence.call.abort(error)
        self._lose_cache()
        self._rows.remove_finished(keep=False)


def engine_of(
    model: Any, stepper: Stepper | None = None, draft: ModelRunner | None = None, *, reuse_prefixes: bool = False
) -> Engine:
    """Returns the engine that all users of a network share, or a new one for other arguments.

    The engine exists as long as one of its users refers to it.
    """
    engines = lock_of(model).engines
    wanted = stepper, draft, reuse_prefixes

    def find() -> Engine | None:
        alive: list[Engine] = [engine for reference in list(engines) if (engine := reference()) is not None]
        return next((e for e in alive if (e.stepper, e.draft, e.reuse_prefixes) == wanted), None)

    if (engine := find()) is None:
        new = Engine(model, stepper, draft, reuse_prefixes=reuse_prefixes)
        engines.append(weakref.ref(new, engines.remove))
        engine = find()  # another thread may have been faster
        assert engine is not None
    return engine
