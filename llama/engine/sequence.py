"""The engine's data: sequences, the calls that they belong to, and the results of their tokens."""

from __future__ import annotations

import inspect
import os
import sys
from collections import deque
from collections.abc import Callable, Generator, Iterable
from dataclasses import dataclass, field, replace
from functools import partial
from operator import methodcaller
from typing import Any, Literal
from weakref import ReferenceType

from torch import Tensor

from llama.engine.sampling import Sampler
from llama.errors import NonFiniteLogitsError

FinishReason = Literal["stop", "length"]


@dataclass(frozen=True)
class TokenResult:
    """A token that was chosen for a sequence.

    Attributes:
        sequence: index of the sequence in its call.
        token: the new token; None if the sequence ended without one (at EOS, or because it had no room for a token).
        logprob: log-probability of the token under the raw logits; None if not asked for.
        finish_reason: why the sequence ends with this token; None if it continues.
        top_logprobs: the most likely tokens at this position, with their log-probabilities, in descending order.
    """

    sequence: int
    token: int | None
    logprob: float | None
    finish_reason: FinishReason | None
    top_logprobs: tuple[tuple[int, float], ...] = ()


def _do_together(actions: Iterable[Callable[[], object]]) -> None:
    """Calls built-in functions, all or none of them: Ctrl-C cannot come between, as no line of Python runs there."""
    deque(map(methodcaller("__call__"), actions), maxlen=0)


@dataclass(eq=False)
class Sequence:
    """A prompt and its completion. Its index in the engine's list of running sequences is its row of the KV cache.

    Attributes:
        tokens: ids of the prompt and the completion so far.
        sampler: samples the tokens; several sequences may share one.
        noise_row: the row of the sampler's noise that belongs to this sequence.
        max_gen_len: maximum number of new tokens; the engine lowers it to what a row of the cache has room for.
        stop_ids: the tokens that end the sequence, such as EOS.
        top_logprobs: number of most likely tokens to report with each token, with their log-probabilities.
        ends: called with each new token and its position among them, from 0; returns whether the sequence ends with
            it, as at a stop string. Called again for a position whose token was not recorded, after Ctrl-C.
        n_words: number of leading ids that are tokens; the network may have more, which are never sampled. None: all.
        speculative: how to draft tokens: "prompt_lookup", "draft" (by the engine's draft model), or None.
        on_logits: called in each pass over the prompt, with a position and the logits (n, vocab) float32 after the n
            tokens from there on; None if nobody needs them. Positions may come again, after a lost cache, and generated
            ones may follow. Such a prompt is computed whole, some hundred positions per pass where that is possible.
        process: what changes the logits before they are sampled from, see `processors.Process`; None for nothing. Such
            a sequence gets no drafts.
        call, index: the call that the sequence belongs to, and its index in it; set by `Call`.
        n_cached: number of leading tokens whose keys and values are in the sequence's row of the cache.
        n_reused: number of these that were computed for another sequence.
        draft_state: what `speculative.Speculator` remembers about the sequence.
        not_finite: the error of logits that a pass computed and nobody has dealt with; None if there are none.
        has_started_over: whether the sequence was computed again for such logits.
        finish_reason: why the sequence has ended; None if it has not, or was aborted.
    """

    tokens: list[int]
    sampler: Sampler
    noise_row: int
    max_gen_len: int
    stop_ids: frozenset[int]
    logprobs: bool = False
    top_logprobs: int = 0
    ends: Callable[[int, int], bool] = lambda token, position: False
    n_words: int | None = None
    speculative: str | None = None
    on_logits: Callable[[int, Tensor], None] | None = None
    process: Callable[[list[int], Tensor], Tensor] | None = None
    call: Call = field(init=False, repr=False)
    index: int = field(init=False)
    n_cached: int = field(default=0, init=False)
    n_reused: int = field(default=0, init=False)
    draft_state: Any = field(default=None, init=False, repr=False)
    not_finite: NonFiniteLogitsError | None = field(default=None, init=False, repr=False)
    has_started_over: bool = field(default=False, init=False)
    finish_reason: FinishReason | None = field(default=None, init=False)
    n_prompt: int = field(init=False)

    def __post_init__(self) -> None:
        self.n_prompt = len(self.tokens)
        self.sampler.add_row(self.noise_row)

    @property
    def is_finished(self) -> bool:
        """Whether the sequence has ended or was aborted."""
        return self.finish_reason is not None or self.call.is_aborted

    @property
    def n_generated(self) -> int:
        """Number of new tokens so far; the index of the next token's noise in the sampler's stream."""
        return len(self.tokens) - self.n_prompt

    @property
    def n_remaining(self) -> int:
        """Maximum number of further tokens."""
        return self.max_gen_len - self.n_generated

    @property
    def n_behind(self) -> int:
        """Number of tokens that a pass has to compute before the next one can be sampled."""
        return len(self.tokens) - self.n_cached

    @property
    def is_level(self) -> bool:
        """Whether a decode pass, which feeds the newest token, is all that is needed next."""
        is_shown = self.on_logits is None or self.n_cached >= self.n_prompt
        return self.n_behind <= 1 and self.n_cached > 0 and is_shown

    def show(self, position: int, logits: Tensor) -> None:
        """Calls `on_logits`, whose error ends the call alone."""
        assert self.on_logits is not None
        try:
            self.on_logits(position, logits)
        except NonFiniteLogitsError as error:
            self.not_finite = error
        except Exception as error:
            self.call.abort(error)

    def record(self, result: TokenResult) -> None:
        """Adds the token of a result, and has the call's reader receive the result, with its finish reason."""
        token, position = result.token, self.n_generated
        assert token is not None
        reason: FinishReason | None = None
        actions: list[Callable[[], object]] = []
        if self.n_remaining <= 0 or token in self.stop_ids:
            reason = "length" if self.n_remaining <= 0 else "stop"
            result = TokenResult(self.index, None, None, reason)
        else:
            if self.ends(token, position):
                reason = "stop"
            elif self.n_remaining == 1:
                reason = "length"
            if reason:
                result = replace(result, finish_reason=reason)
            actions.append(partial(self.tokens.append, token))
        if reason:
            actions += [partial(setattr, self, "finish_reason", reason), partial(self.call.ended.append, self)]
        _do_together([*actions, partial(self.call.results.append, result)])
        self.sampler.mark_used(self.noise_row, position + 1)
        if reason:
            self.sampler.end_row(self.noise_row)


class Call:
    """The sequences that one caller waits for.

    Attributes:
        ended: the sequences that have ended.
        results: results that the caller has not received yet, oldest first.
        error: the error that ended the sequences, to be raised in the caller's thread; None if there is none.
        reader: the iterator over the results, as a weak reference; None if they are taken from `results` directly.
        thread: identifier of the thread that waits for the results; None before one does.
    """

    def __init__(self, sequences: Iterable[Sequence]) -> None:
        self.sequences = list(sequences)
        self.ended: list[Sequence] = []
        self.results: deque[TokenResult] = deque()
        self.error: BaseException | None = None
        self.reader: ReferenceType[Generator[TokenResult, None, None]] | None = None
        self.thread: int | None = None
        self._process = os.getpid()
        self._is_aborted = False
        for index, sequence in enumerate(self.sequences):
            sequence.call, sequence.index = self, index

    @property
    def is_aborted(self) -> bool:
        return self._is_aborted or self.error is not None

    @property
    def is_finished(self) -> bool:
        """Whether there will be no more results."""
        return len(self.ended) == len(self.sequences) or self.is_aborted

    @property
    def is_abandoned(self) -> bool:
        """Whether nobody can receive results any more, as the iterator over them has ended or is gone.

        That is so even if Ctrl-C kept it from aborting the call, and in a forked process if another thread ran it.
        """
        if self.reader is None:
            return False
        reader = self.reader()
        state = inspect.getgeneratorstate(reader) if reader is not None else inspect.GEN_CLOSED
        if state == inspect.GEN_RUNNING:
            return self._process != os.getpid() and self.thread not in sys._current_frames()
        return state == inspect.GEN_CLOSED

    def abort(self, error: BaseException | None = None) -> None:
        """Ends all sequences of the call; the engine removes them before its next pass."""
        self.error = self.error or error
        self._is_aborted = True
