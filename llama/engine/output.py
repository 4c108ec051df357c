"""What `text_completion`, `chat_completion` and scoring return."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TypedDict

from llama.chat import UNSAFE_ERROR, Message
from llama.engine.sequence import FinishReason
from llama.inputs import SamplingParams


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
    logprob: float  # sum of `logprobs`
    tokens: list[str]
    logprobs: list[float]


@dataclass
class Completion:
    """The result for one prompt; with echo, its lists start with the prompt's tokens.

    Attributes:
        tokens: ids.
        pieces: the text of each token.
        logprobs: the log-probability of each token; empty if not asked for.
        finish_reason: why generation ended.
    """

    tokens: list[int] = field(default_factory=list)
    pieces: list[str] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    finish_reason: FinishReason = "length"


def completion_prediction(row: Completion, params: SamplingParams) -> CompletionPrediction:
    """Converts a completion to `text_completion`'s result for one prompt."""
    result = CompletionPrediction(generation="".join(row.pieces), finish_reason=row.finish_reason)
    if params.logprobs:
        result |= {"tokens": row.pieces, "logprobs": row.logprobs}
    return result


def chat_prediction(row: Completion | None, params: SamplingParams) -> ChatPrediction:
    """Converts a completion to `chat_completion`'s result for one dialog; `row` is None if the dialog was not run."""
    text = UNSAFE_ERROR if row is None else "".join(row.pieces)
    answer = Message(role="assistant", content=text)
    result = ChatPrediction(generation=answer, finish_reason="stop" if row is None else row.finish_reason)
    if params.logprobs:
        result |= {"tokens": [] if row is None else row.pieces, "logprobs": [] if row is None else row.logprobs}
    return result
