"""One completion: its text and tokens as they become final; and the dictionaries that calls return."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypedDict, cast

from llama.chat import UNSAFE_ERROR, ChatFormat, Message
from llama.engine.sequence import FinishReason, TokenResult
from llama.inputs import SamplingParams
from llama.tokenizer import IncrementalDetokenizer

TopLogprobs = tuple[tuple[int, float], ...]
TokenScore = tuple[float | None, TopLogprobs]  # a log-probability, None for a prompt's first token


class _WithLogprobs(TypedDict, total=False):
    tokens: list[str]
    logprobs: list[float]


class CompletionPrediction(_WithLogprobs):
    """A result of `Llama.text_completion`; with `logprobs=True` also `tokens: list[str]`, `logprobs: list[float]`."""

    generation: str
    finish_reason: FinishReason  # "stop", or "length" where the limit of tokens ended it


class ChatPrediction(_WithLogprobs):
    """A result of `Llama.chat_completion`; with `logprobs=True` also `tokens: list[str]`, `logprobs: list[float]`."""

    generation: Message
    finish_reason: FinishReason


class InfillingPrediction(_WithLogprobs):
    """A result of `Llama.text_infilling`; with `logprobs=True` also `tokens: list[str]`, `logprobs: list[float]`."""

    generation: str  # the text between prefix and suffix
    full_text: str  # prefix, generation and suffix
    finish_reason: FinishReason


class Score(TypedDict):
    """A result of `Llama.score`."""

    logprob: float  # sum of `logprobs`
    tokens: list[str]
    logprobs: list[float]


@dataclass(frozen=True)
class Token:
    """A token whose text is final.

    Attributes:
        text: the token's part of the text; a character of several tokens is attributed to the last one.
        logprob: log-probability under the raw logits; None for the first token of a prompt.
        top_logprobs: ids of the most likely tokens at this position and their log-probabilities, in descending order.
        at_start: whether the text begins here, so that SentencePiece drops the leading space of any of them.
    """

    id: int
    text: str
    logprob: float | None
    top_logprobs: TopLogprobs = ()
    at_start: bool = False


@dataclass(frozen=True)
class Piece:
    """What a result made final of a completion. With echo, an additional first piece has the prompt.

    Attributes:
        choice: index of the completion in its call or request.
        text: text that became final; may be empty.
        tokens: with logprobs, the tokens that became final; over all pieces, their texts add up to the whole text.
        n_generated: number of generated tokens, including those cut off at a stop string.
        finish_reason: why the completion ends with this piece; None if it continues.
        n_reused: with the last piece of a request's completion, the number of its prompt's tokens that the KV cache
            held already.
    """

    choice: int
    text: str
    tokens: tuple[Token, ...] = ()
    n_generated: int = 0
    finish_reason: FinishReason | None = None
    n_reused: int = 0


class Completion:
    """One completion: results go in, pieces come out, and the whole is what they add up to.

    Args:
        text: decodes the completion; its prefix is the prompt if the text continues it or echoes it.
        prompt: ids to be echoed.
        scores: for each token of the prompt; none for no log-probabilities. May be filled in until the first result.
        with_tokens: whether pieces contain tokens.

    Attributes:
        finish_reason: why generation ended.
    """

    def __init__(
        self,
        text: IncrementalDetokenizer,
        *,
        index: int = 0,
        prompt: Sequence[int] = (),
        scores: Sequence[TokenScore] = (),
        with_tokens: bool = False,
    ) -> None:
        self.finish_reason: FinishReason = "length"
        self._text = text
        self._index = index
        self._prompt = list(prompt)
        self._scores = scores
        self._with_tokens = with_tokens
        self._pushed: list[tuple[int, str, bool]] = []  # each new token, what it made final, whether it was `at_start`
        self._is_pushing = False  # stays True after a push that was interrupted
        self._results: list[TokenResult] = []  # of the pushed tokens that were added
        self._n_released = 0  # number of tokens in pieces so far; a later one may still be cut off at a stop string
        self._n_chars_ahead = 0  # number of characters in pieces so far that belong to later tokens

    @property
    def tokens(self) -> list[int]:
        """Ids, an echoed prompt's first."""
        return self._prompt + [token for token, _, _ in self._pushed[: len(self._results)]]

    @property
    def pieces(self) -> list[str]:
        """The text of each token, up to a stop string."""
        return (self._text.prefix_pieces if self._prompt else []) + self._text.pieces

    @property
    def logprobs(self) -> list[float]:
        """The log-probability of each token; empty if not asked for."""
        logprobs = [logprob or 0.0 for logprob, _ in self._scores]
        logprobs += [result.logprob for result in self._results if result.logprob is not None]
        return logprobs[: len(self.pieces)]

    def ends(self, token: int, position: int) -> bool:
        """Adds a token to the text; returns whether the completion ends with it, at a stop string.

        Args:
            position: the number of new tokens before it. A later one that was added, before Ctrl-C, is forgotten.
        """
        if self._is_pushing or len(self._pushed) != position:
            text, pushed = self._text.restarted(), self._pushed[:position]
            for earlier, _, _ in pushed:
                text.push(earlier)
            self._text, self._pushed = text, pushed
        self._is_pushing = True
        at_start = self._text.at_start
        self._pushed.append((token, self._text.push(token), at_start))
        self._is_pushing = False
        return self._text.stopped

    def echo(self) -> Piece:
        """The piece that has the prompt."""
        texts = self._text.prefix_pieces
        found = zip(self._prompt, texts, self._scores, self._text.prefix_starts, strict=True) if self._scores else ()
        tokens = tuple(Token(token, text, *score, at_start) for token, text, score, at_start in found)
        return Piece(self._index, "".join(texts), tokens)

    def add(self, result: TokenResult, n_reused: int = 0) -> list[Piece]:
        """Adds a result, after `ends` had its token; returns the pieces that it makes final, an echoed prompt's first.

        Args:
            n_reused: number of the prompt's tokens that the KV cache held already, for the last piece.
        """
        pieces = [self.echo()] if self._prompt and not self._results else []
        text, reason = "", result.finish_reason
        if result.token is not None:
            text = self._pushed[len(self._results)][1]
            self._results.append(result)
        if reason:
            text += self.finish()
            self.finish_reason = reason = "stop" if self._text.stopped else reason
        tokens = self._release(text, is_last=reason is not None) if self._with_tokens else ()
        n_generated = int(result.token is not None)
        return [*pieces, Piece(self._index, text, tokens, n_generated, reason, n_reused if reason else 0)]

    def finish(self) -> str:
        """Ends the text; returns what was held back of it. Without effect after a result with a finish reason."""
        rest = self._text.finish()
        if self._text.stopped:
            self.finish_reason = "stop"
        return rest

    def _release(self, text: str, *, is_last: bool) -> tuple[Token, ...]:
        """The tokens that become final with a text. One without text waits for the character that it is part of."""
        self._n_chars_ahead += len(text)
        first, texts, n_final, n_chars, n_chars_final = self._n_released, self._text.pieces, self._n_released, 0, 0
        for i in range(first, len(texts)):
            n_chars += len(texts[i])
            if is_last or (texts[i] and n_chars <= self._n_chars_ahead):
                n_final, n_chars_final = i + 1, n_chars
        self._n_released = n_final
        self._n_chars_ahead -= n_chars_final
        return tuple(
            Token(token, text, result.logprob, result.top_logprobs, at_start)
            for (token, _, at_start), text, result in zip(
                self._pushed[first:n_final], texts[first:n_final], self._results[first:n_final], strict=True
            )
        )


def completion_prediction(row: Completion, params: SamplingParams) -> CompletionPrediction:
    """Converts a completion to `text_completion`'s result for one prompt."""
    result = CompletionPrediction(generation="".join(row.pieces), finish_reason=row.finish_reason)
    if params.logprobs:
        result |= {"tokens": row.pieces, "logprobs": row.logprobs}
    return result


def infilling_prediction(row: Completion, params: SamplingParams, prefix: str, suffix: str) -> InfillingPrediction:
    """Converts a completion to `text_infilling`'s result for one prefix and suffix."""
    result = completion_prediction(row, params)
    return InfillingPrediction(**result, full_text=prefix + result["generation"] + suffix)


def chat_prediction(row: Completion | None, params: SamplingParams, chat_format: ChatFormat) -> ChatPrediction:
    """Converts a completion to `chat_completion`'s result for one dialog; `row` is None if the dialog was not run."""
    if row is None:
        result = CompletionPrediction(generation=UNSAFE_ERROR, finish_reason="stop")
        if params.logprobs:
            result |= {"tokens": [], "logprobs": []}
    else:
        result = completion_prediction(row, params)
    return cast(ChatPrediction, result | {"generation": chat_format.answer(result["generation"])})
