"""What a call asks for and what it gives back."""

from __future__ import annotations

import math
import numbers
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from operator import index
from typing import Any, TypedDict

from llama.chat import UNSAFE_ERROR, Message
from llama.decoding import FinishReason
from llama.tokenizer import PromptError


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
    """What a call asks for, besides its prompts; checked when made. Numbers of numpy and torch are taken.

    Raises:
        PromptError: a value is not what it must be; the message gives both.
    """

    temperature: float
    top_p: float
    max_gen_len: int
    logprobs: bool = False
    echo: bool = False
    stop: Sequence[str] = ()
    seed: int | None = None

    def __post_init__(self) -> None:
        temperature, top_p = _number(self.temperature), _number(self.top_p)
        if temperature is None or not 0 <= temperature < math.inf:
            raise PromptError(f"temperature must be 0 (greedy) or a number above, got {self.temperature!r:.80}")
        if top_p is None or not 0 <= top_p <= 1:
            raise PromptError(f"top_p must be a number from 0 to 1, got {self.top_p!r:.80}")
        max_gen_len = _integer(self.max_gen_len)
        if max_gen_len is None or max_gen_len < 0:
            raise PromptError(f"max_gen_len must be an integer of 0 or above, got {self.max_gen_len!r:.80}")
        seed = None if self.seed is None else check_seed(self.seed)
        checked = {"temperature": temperature, "top_p": top_p, "max_gen_len": max_gen_len, "seed": seed}
        for name, value in (checked | {"stop": _check_stop(self.stop)}).items():
            object.__setattr__(self, name, value)


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


def _check_stop(stop: Any) -> tuple[str, ...]:
    texts = tuple(stop) if isinstance(stop, Iterable) and not isinstance(stop, (str, bytes)) else (None,)
    if not all(isinstance(text, str) and text for text in texts):
        raise PromptError(f"stop must be a list of strings that are not empty, got {stop!r:.80}")
    return texts


def check_seed(seed: object) -> int:
    """The seed as an int; raises PromptError unless a random generator takes it."""
    value = _integer(seed)
    if value is None or not -(2**63) <= value < 2**64:
        raise PromptError(f"seed must be an integer of 64 bits, or None, got {seed!r:.80}")
    return value


def _number(value: Any) -> float | None:
    """A number of Python's, numpy's or torch's as a float; None for anything else, and for one that is too large."""
    if isinstance(value, (bool, str, bytes)) or not (isinstance(value, numbers.Real) or hasattr(value, "item")):
        return None
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError, RuntimeError):
        return None


def _integer(value: Any) -> int | None:
    """An integer of Python's, numpy's or torch's as an int; None for anything else."""
    try:
        return None if isinstance(value, bool) else index(value)
    except (TypeError, ValueError, RuntimeError):
        return None
