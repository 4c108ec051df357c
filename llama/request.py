"""The parameters of a call, checked, and the results that it returns."""

from __future__ import annotations

import math
import numbers
from collections.abc import Sequence
from dataclasses import dataclass, field
from operator import index
from typing import Any, TypedDict

from llama.chat import UNSAFE_ERROR, Message
from llama.engine import FinishReason
from llama.quoting import quote
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
    """The parameters of a call, besides its prompts; checked when made. Numbers may be those of numpy and torch.

    Raises:
        PromptError: a value is of the wrong type or out of range; the message names it and says what it must be.
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
            raise PromptError(f"temperature must be 0 (greedy) or a finite number above, got {quote(self.temperature)}")
        if top_p is None or not 0 <= top_p <= 1:
            raise PromptError(f"top_p must be a number from 0 to 1, got {quote(self.top_p)}")
        max_gen_len = _integer(self.max_gen_len)
        if max_gen_len is None or max_gen_len < 0:
            raise PromptError(f"max_gen_len must be an integer of 0 or above, got {quote(self.max_gen_len)}")
        seed = None if self.seed is None else check_seed(self.seed)
        checked = {"temperature": temperature, "top_p": top_p, "max_gen_len": max_gen_len, "seed": seed}
        flags = {name: _check_flag(getattr(self, name), name) for name in ("logprobs", "echo")}
        for name, value in (checked | flags | {"stop": _check_stop(self.stop)}).items():
            object.__setattr__(self, name, value)


@dataclass
class Completion:
    """The result for one prompt: ids, their texts, and log-probabilities if asked for; with echo the prompt's too."""

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
    """`chat_completion`'s result for one dialog; `row` is None for a dialog that was not run."""
    text = UNSAFE_ERROR if row is None else "".join(row.pieces)
    answer = Message(role="assistant", content=text)
    result = ChatPrediction(generation=answer, finish_reason="stop" if row is None else row.finish_reason)
    if request.logprobs:
        result |= {"tokens": [] if row is None else row.pieces, "logprobs": [] if row is None else row.logprobs}
    return result


def _check_stop(stop: Any) -> tuple[str, ...]:
    try:
        texts = (None,) if isinstance(stop, (str, bytes)) else tuple(stop)
    except (TypeError, RuntimeError):  # not iterable, such as an array without dimensions
        texts = (None,)
    if not all(isinstance(text, str) and text for text in texts):
        raise PromptError(f"stop must be a list of strings that are not empty, got {quote(stop)}")
    return texts


def _check_flag(value: Any, name: str) -> bool:
    try:
        return bool(value)
    except (TypeError, ValueError, RuntimeError) as error:  # such as an array of several values
        raise PromptError(f"{name} must be True or False, got {quote(value)}") from error


def check_seed(seed: object) -> int:
    """The seed as an int; raises PromptError if it is not an integer that a torch.Generator takes."""
    value = _integer(seed)
    if value is None or not -(2**63) <= value < 2**64:
        raise PromptError(f"seed must be None or an integer from -2**63 to 2**64 - 1, got {quote(seed)}")
    return value


def _number(value: Any) -> float | None:
    """A number of Python's, numpy's or torch's as a float; None for anything else, and for one that is too large."""
    try:
        value = value.item() if hasattr(value, "item") else value
        return float(value) if isinstance(value, numbers.Real) and not isinstance(value, bool) else None
    except (TypeError, ValueError, OverflowError, RuntimeError):
        return None


def _integer(value: Any) -> int | None:
    """An integer of Python's, numpy's or torch's as an int; None for anything else."""
    try:
        return None if isinstance(value, bool) else index(value)
    except (TypeError, ValueError, RuntimeError):
        return None
