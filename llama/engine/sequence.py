"""The engine's data: sequences, the calls that they belong to, and the results of their tokens."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from torch import Tensor

from llama.engine.sampling import Sampler

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


def _never(token: int) -> bool:
    return False


@dataclass(eq=False)
class Sequence:
    """A prompt and its completion. Its index in the engine's list of running sequences is its row of the KV cache.

    Attributes:
        tokens: ids of the prompt and the completion so far.
        sampler: samples the tokens; several sequences may share one.
        noise_row: the row of the sampler's noise that belongs to this sequence.
        max_gen_len: maximum number of new tokens; the engine lowers it to what a row of the cache has room for.
        stop_ids: the tokens that end the sequence, such as EOS.
        logprobs: whether to compute the log-probability of each new token.
        top_logprobs: number of most likely tokens to report with each token, with their log-probabilities.
        ends: called with each new token; returns whether the sequence ends with it, as at a stop string.
        n_words: number of leading ids that are tokens; the network may have more, which are never sampled. None: all.
        speculative: how to draft tokens: "prompt_lookup", "draft" (by the engine's draft model), or None.
        process: what changes the logits before they are sampled from, see `processors.Process`; None for nothing. Such
            a sequence gets no drafts.
        call: the call that the sequence belongs to; set by `Call`.
        index: index of the sequence in its call; set by `Call`.
        n_cached: number of leading tokens whose keys and values are in the sequence's row of the cache.
        n_reused: number of these that were computed for another sequence.
        draft_state: what `speculative.Speculator` remembers about the sequence.
        is_finished: whether the sequence has ended.
        n_prompt: number of tokens in the prompt.
    """

    tokens: list[int]
    sampler: Sampler
    noise_row: int
    max_gen_len: int
    stop_ids: frozenset[int]
    logprobs: bool = False
    top_logprobs: int = 0
    ends: Callable[[int], bool] = _never
    n_words: int | None = None
    speculative: str | None = None
    process: Callable[[list[int], Tensor], Tensor] | None = None
    call: Call = field(init=False, repr=False)
    index: int = field(init=False)
    n_cached: int = field(default=0, init=False)
    n_reused: int = field(default=0, init=False)
    draft_state: Any = field(default=None, init=False, repr=False)
    is_finished: bool = field(default=False, init=False)
    n_prompt: int = field(init=False)

    def __post_init__(self) -> None:
        self.n_prompt = len(self.tokens)
        self.sampler.add_row(self.noise_row)

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
        """Whether a decode pass, which feeds the newest token, is all that the next token needs."""
        return self.n_behind <= 1 and self.n_cached > 0

    def record(self, result: TokenResult) -> TokenResult:
        """Adds the token of a result; returns the result, with its finish reason set if the sequence ends."""
        token = result.token
        assert token is not None
        has_room = self.n_remaining > 0
        self.sampler.mark_used(self.noise_row, self.n_generated + 1)
        if not has_room or token in self.stop_ids:
            result = TokenResult(self.index, None, None, "stop" if has_room else "length")
        else:
            self.tokens.append(token)
            if self.ends(token):
                result = replace(result, finish_reason="stop")
            elif self.n_remaining == 0:
                result = replace(result, finish_reason="length")
        self.is_finished = result.finish_reason is not None
        if self.is_finished:
            self.sampler.end_row(self.noise_row)
        return result


class Call:
    """The sequences that one caller waits for.

    Attributes:
        sequences: the call's sequences.
        results: results that the caller has not received yet, oldest first.
        error: the error that ended the sequences, to be raised in the caller's thread; None if there is none.
    """

    def __init__(self, sequences: Iterable[Sequence]) -> None:
        self.sequences = list(sequences)
        self.results: deque[TokenResult] = deque()
        self.error: BaseException | None = None
        self._n_running = len(self.sequences)
        for index, sequence in enumerate(self.sequences):
            sequence.call, sequence.index = self, index

    @property
    def is_finished(self) -> bool:
        """Whether there will be no more results."""
        return self._n_running == 0 or self.error is not None

    def append(self, result: TokenResult) -> None:
        """Adds a result for the caller to receive."""
        self._n_running -= result.finish_reason is not None
        self.results.append(result)

    def abort(self, error: BaseException | None = None) -> None:
        """Ends all sequences of the call; the engine removes them before its next pass."""
        self.error = self.error or error
        self._n_running = 0
        for sequence in self.sequences:
            sequence.is_finished = True
