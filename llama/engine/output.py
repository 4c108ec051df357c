"""One completion: its text and tokens as they become final; and the dictionaries that calls return."""

from __future__ import annotations

from collections import deque
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
        id: the token's id.
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
        index: its index in its call or request.
        prompt: ids to be echoed.
        with_tokens: whether pieces contain tokens.

    Attributes:
        tokens: ids, an echoed prompt's first.
        logprobs: the log-probability of each token; empty if not asked for.
        finish_reason: why generation ended.
    """

    def __init__(
        self, text: IncrementalDetokenizer, *, index: int = 0, prompt: Sequence[int] = (), with_tokens: bool = False
    ) -> None:
        self.tokens = list(prompt)
        self.finish_reason: FinishReason = "length"
        self._text = text
        self._index = index
        self._n_echoed = len(self.tokens)
        self._has_echo = False
        self._with_tokens = with_tokens
        self._logprobs: list[float] = []
        self._pushed: list[tuple[int, str, bool]] = []  # each new token, what it made final, whether it was `at_start`
        self._is_pushing = False  # stays True after a push that was interrupted
        self._n_chars_final = 0
        self._held: deque[tuple[TokenResult, bool]] = deque()  # of tokens that may still be cut off at a stop string
        self._n_released = 0  # number of tokens in pieces so far
        self._n_chars_released = 0  # number of characters of these tokens

    @property
    def lacks_echo(self) -> bool:
        """Whether the piece of an echoed prompt has not been asked for yet."""
        return bool(self._n_echoed) and not self._has_echo

    @property
    def echo_pieces(self) -> list[str]:
        """The text of each token of an echoed prompt."""
        return self._text.prefix_pieces if self._n_echoed else []

    @property
    def pieces(self) -> list[str]:
        """The text of each token, up to a stop string."""
        return self.echo_pieces + self._text.pieces

    @property
    def logprobs(self) -> list[float]:
        return self._logprobs[: len(self.pieces)]

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

    def echo(self, scores: Sequence[TokenScore] = ()) -> Piece:
        """Adds the scores of the prompt; returns the piece that has it.

        Args:
            scores: for each token of the prompt; none for no log-probabilities.
        """
        self._has_echo = True
        texts = self._text.prefix_pieces
        self._logprobs = [logprob or 0.0 for logprob, _ in scores]
        found = zip(self.tokens, texts, scores, self._text.prefix_starts, strict=True) if scores else ()
        tokens = tuple(Token(token, text, *score, at_start) for token, text, score, at_start in found)
        return Piece(self._index, "".join(texts), tokens)

    def add(self, result: TokenResult) -> Piece:
        """Adds a result, after `ends` had its token; returns the piece that it makes final."""
        text = ""
        if result.token is not None:
            _, text, at_start = self._pushed[len(self.tokens) - self._n_echoed]
            self.tokens.append(result.token)
            if result.logprob is not None:
                self._logprobs.append(result.logprob)
            if self._with_tokens:
                self._held.append((result, at_start))
        reason = result.finish_reason
        if reason:
            text += self.finish()
            self.finish_reason = reason = "stop" if self._text.stopped else reason
        self._n_chars_final += len(text)
        tokens = tuple(self._release(is_last=reason is not None)) if self._with_tokens else ()
        return Piece(self._index, text, tokens, int(result.token is not None), reason)

    def finish(self) -> str:
        """Ends the text; returns what was held back of it. Without effect after a result with a finish reason."""
        rest = self._text.finish()
        if self._text.stopped:
            self.finish_reason = "stop"
        return rest

    def _release(self, *, is_last: bool) -> list[Token]:
        """Returns the tokens that became final. A token without text waits for the character that it is part of."""
        pieces, n_final, n_chars = self._text.pieces, self._n_released, self._n_chars_released
        for i in range(self._n_released, len(pieces)):
            n_chars += len(pieces[i])
            if is_last or (pieces[i] and n_chars <= self._n_chars_final):
                n_final, self._n_chars_released = i + 1, n_chars
        tokens = []
        for text in pieces[self._n_released : n_final]:
            result, at_start = self._held.popleft()
            assert result.token is not None
            tokens.append(Token(result.token, text, result.logprob, result.top_logprobs, at_start))
        self._n_released = max(self._n_released, n_final)
        return tokens


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
