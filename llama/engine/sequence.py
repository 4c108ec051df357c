"""The engine's data: sequences, the calls that they belong to, and the results of their steps."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from llama.engine.sampling import Sampler

FinishReason = Literal["stop", "length"]


@dataclass(frozen=True)
class Step:
    """The result of one step for one sequence.

    Attributes:
        sequence: index of the sequence in its call.
        token: the new token; None if the sequence ended without one (at EOS, or because it had no room for a token).
        logprob: log-probability of the token under the raw logits; None if not asked for.
        finish_reason: why the sequence ends with this step; None if it continues.
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
    """A prompt and its completion. Its index in the engine's list of running sequences is its slot in the cache.

    Attributes:
        tokens: ids of the prompt and the completion so far.
        sampler: samples the tokens; sequences that share a sampler start together.
        noise_row: the row of the sampler's noise that belongs to this sequence.
        max_gen_len: maximum number of new tokens; the sequence also ends when its slot is full.
        eos_id: the token that ends the sequence.
        logprobs: whether to compute the log-probability of each new token.
        top_logprobs: number of most likely tokens to report at each step, with their log-probabilities.
        ends: called with each new token; returns whether the sequence ends with it, as at a stop string.
        speculative: how to draft tokens: "prompt_lookup", "draft" (by the engine's draft model), or None.
        call: the call that the sequence belongs to; set by `Call`.
        index: index of the sequence in its call; set by `Call`.
        length: number of leading tokens whose keys and values are in the cache.
        n_remaining: maximum number of further tokens.
        first_step: the sampler's step for the first new token.
        next_step: the sampler's step for the next token to sample. Tokens still on their way to the host count as
            sampled.
        draft_state: what `speculative.Speculator` remembers about the sequence.
        is_finished: whether the sequence has ended.
        n_prompt: number of tokens in the prompt.
    """

    tokens: list[int]
    sampler: Sampler
    noise_row: int
    max_gen_len: int
    eos_id: int
    logprobs: bool = False
    top_logprobs: int = 0
    ends: Callable[[int], bool] = _never
    speculative: str | None = None
    call: Call = field(init=False, repr=False)
    index: int = field(init=False)
    length: int = field(default=0, init=False)
    n_remaining: int = field(default=0, init=False)
    first_step: int = field(default=0, init=False)
    next_step: int = field(default=0, init=False)
    draft_state: Any = field(default=None, init=False, repr=False)
    is_finished: bool = field(default=False, init=False)
    n_prompt: int = field(init=False)

    def __post_init__(self) -> None:
        self.n_prompt = len(self.tokens)

    @property
    def n_generated(self) -> int:
        """Number of new tokens so far."""
        return len(self.tokens) - self.n_prompt

    def record(self, step: Step) -> Step:
        """Adds the token of a step; returns the step, with its finish reason set if the sequence ends."""
        token = step.token
        assert token is not None
        self.sampler.mark_used(self.first_step + self.n_generated + 1)
        if self.n_remaining == 0 or token == self.eos_id:
            self.is_finished = True
            return Step(self.index, None, None, "stop" if self.n_remaining else "length")
        self.tokens.append(token)
        self.n_remaining -= 1
        stopped = self.ends(token)
        self.is_finished = stopped or self.n_remaining == 0
        return replace(step, finish_reason="stop" if stopped else "length") if self.is_finished else step


class Call:
    """The sequences that one caller waits for.

    Attributes:
        sequences: the call's sequences.
        steps: steps that the caller has not received yet, oldest first.
        error: the error that ended the sequences, to be raised in the caller's thread; None if there is none.
    """

    def __init__(self, sequences: Iterable[Sequence]) -> None:
        self.sequences = list(sequences)
        self.steps: deque[Step] = deque()
        self.error: BaseException | None = None
        self._n_running = len(self.sequences)
        for index, sequence in enumerate(self.sequences):
            sequence.call, sequence.index = self, index

    @property
    def is_finished(self) -> bool:
        """Whether there will be no more steps."""
        return self._n_running == 0 or self.error is not None

    def append(self, step: Step) -> None:
        """Adds a step for the caller to receive."""
        self._n_running -= step.finish_reason is not None
        self.steps.append(step)

    def abort(self, error: BaseException | None = None) -> None:
        """Ends all sequences of the call; the engine removes them before its next step."""
        self.error = self.error or error
        self._n_running = 0
        for sequence in self.sequences:
            sequence.is_finished = True
