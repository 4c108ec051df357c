"""What a call asks for and what it gives back.

Knows nothing of how it comes about.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TypedDict

from llama.chat import UNSAFE_ERROR, Message
from llama.decoding import FinishReason


class CompletionPrediction(TypedDict, total=False):
    generation: str
    finish_reason: FinishReason
    tokens: list[str]  # with logprobs
    logprobs: list[float]  # with logprobs


class ChatPrediction(TypedDict, total=False):
    generation: Message
    finish_reason: FinishReason
    tokens: list[str]  # with logprobs
    logprobs: list[float]  # with logprobs


class Score(TypedDict):
    logprob: float  # the sum of logprobs
    tokens: list[str]
    logprobs: list[float]


@dataclass(frozen=True)
class Request:
    """What a call asks for, besides its prompts; checked when made."""

    temperature: float
    top_p: float
    max_gen_len: int
    logprobs: bool = False
    echo: bool = False
    stop: Sequence[str] = ()
    seed: int | None = None

    def __post_init__(self) -> None:
        if not (is_number(self.temperature) and 0 <= self.temperature < math.inf):
            raise ValueError(f"temperature is {self.temperature!r}; it takes 0 (the likeliest token) or a number above")
        if not (is_number(self.top_p) and 0 < self.top_p <= 1):
            raise ValueError(f"top_p is {self.top_p!r}; it takes a number above 0, up to 1")
        if not is_count(self.max_gen_len):
            raise ValueError(f"max_gen_len is {self.max_gen_len!r}; it takes a whole number above zero")
        if (
            not isinstance(self.stop, Sequence)
            or isinstance(self.stop, str)
            or not all(isinstance(stop, str) and stop for stop in self.stop)
        ):
            raise ValueError(f"stop is {self.stop!r}; it takes a list of strings that are not empty")
        if self.seed is not None:
            check_seed(self.seed)


@dataclass
class Completion:
    """What came of one prompt: ids, their texts, and log-probabilities if asked for; under echo the prompt's too."""

    tokens: list[int] = field(default_factory=list)
    pieces: list[str] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    finish_reason: FinishReason = "length"


def completion_prediction(row: Completion, request: Request) -> CompletionPrediction:
    """`text_completion`'s result for one prompt."""
    result = CompletionPrediction(generation="".join(row.pieces), finish_reason=row.finish_reason)
    if request.logprobs:
        result |= {"tokens": row.pieces, "logprobs": row.logprobs}
    return result


def chat_prediction(row: Completion | None, request: Request) -> ChatPrediction:
    """`chat_completion`'s result for one dialog; None stands for one that was not run."""
    text = UNSAFE_ERROR if row is None else "".join(row.pieces)
    answer = Message(role="assistant", content=text)
    result = ChatPrediction(generation=answer, finish_reason="stop" if row is None else row.finish_reason)
    if request.logprobs:
        result |= {"tokens": [] if row is None else row.pieces, "logprobs": [] if row is None else row.logprobs}
    return result


def check_seed(seed: object) -> None:
    """Raises ValueError unless a random generator takes it."""
    if not isinstance(seed, int) or isinstance(seed, bool) or not -(2**63) <= seed < 2**64:
        raise ValueError(f"seed is {seed!r}; it takes a whole number, or None; of 64 bits")


def is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def is_count(value: object) -> bool:
    """Whether it is a whole number above zero."""
    return isinstance(value, int) and not isinstance(value, bool) and value > 0
