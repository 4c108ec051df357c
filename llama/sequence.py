"""Sequences that the engine advances, the calls that they belong to, and the steps that they bring."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from llama.sampling import Sampler

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
        noise_row: which row of the sampler's noise is its own.
        max_gen_len: maximum number of new tokens; the end of the slot may come first.
        eos_id: ends the sequence.
        logprobs: whether the steps have log-probabilities.
        top_logprobs: of how many of the most likely tokens the steps have them too.
        ends: called with each new token; whether the sequence ends there.
        speculative: how tokens are drafted for it: "prompt_lookup", "draft" (by the engine's draft model) or None.
        call: the call that it belongs to, set by `Call`.
        index: its index there, likewise.
        length: number of its tokens whose keys and values are in the cache, from the first one on.
        left: number of tokens that it may still bring.
        first_step: the sampler's step at which its first token is drawn.
        next_step: that of the next token to be drawn; tokens that have not reached the host yet are drawn already.
        drafting: what `speculative.Speculator` keeps of it.
        is_over: whether it has ended.
        n_prompt: number of the prompt's tokens.
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
    left: int = field(default=0, init=False)
    first_step: int = field(default=0, init=False)
    next_step: int = field(default=0, init=False)
    drafting: Any = field(default=None, init=False, repr=False)
    is_over: bool = field(default=False, init=False)
    n_prompt: int = field(init=False)

    def __post_init__(self) -> None:
        self.n_prompt = len(self.tokens)

    @property
    def n_generated(self) -> int:
        """Number of new tokens so far."""
        return len(self.tokens) - self.n_prompt

    def record(self, step: Step) -> Step:
        """Takes a step's token; returns the step, with the reason if the sequence is over."""
        token = step.token
        assert token is not None
        self.sampler.mark_used(self.first_step + self.n_generated + 1)
        if self.left == 0 or token == self.eos_id:
            self.is_over = True
            return Step(self.index, None, None, "stop" if self.left else "length")
        self.tokens.append(token)
        self.left -= 1
        stopped = self.ends(token)
        self.is_over = stopped or self.left == 0
        return replace(step, finish_reason="stop" if stopped else "length") if self.is_over else step


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
