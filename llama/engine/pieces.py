"""The pieces of one completion of a request: its text as it becomes final, and its tokens."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from llama.engine.sequence import FinishReason, TokenResult
from llama.tokenizer import IncrementalDetokenizer

TopLogprobs = tuple[tuple[int, float], ...]
Scores = list[tuple[float | None, TopLogprobs]]


@dataclass(frozen=True)
class Token:
    """A token whose text is final.

    Attributes:
        id: the token's id.
        text: the token's part of the text; a character of several tokens is attributed to the last one.
        logprob: log-probability under the raw logits; None for the first token of a prompt.
        top_logprobs: ids of the most likely tokens at this position and their log-probabilities, in descending order.
    """

    id: int
    text: str
    logprob: float | None
    top_logprobs: TopLogprobs = ()


@dataclass(frozen=True)
class Piece:
    """The result of one step for one choice of a request. With echo, an additional first piece has the prompt.

    Attributes:
        choice: index of the choice: see `Service.submit`.
        text: text that became final with this step; may be empty.
        tokens: with logprobs, the tokens that became final; over all pieces, their texts add up to the whole text.
        n_generated: number of tokens that the step generated, including tokens cut off at a stop string.
        finish_reason: why the choice ends with this piece; None if it continues.
    """

    choice: int
    text: str
    tokens: tuple[Token, ...] = ()
    n_generated: int = 0
    finish_reason: FinishReason | None = None


class Choice:
    """One completion of a request: its text and, with logprobs, its tokens.

    Args:
        index: index among the request's choices.
        text: the completion's detokenizer.
        logprobs: whether pieces contain tokens.
    """

    def __init__(self, index: int, text: IncrementalDetokenizer, *, logprobs: bool) -> None:
        self._index = index
        self._text = text
        self._logprobs = logprobs
        self._final_texts: deque[str] = deque()  # of each new token, what it made final
        self._n_chars_final = 0
        self._held_steps: deque[TokenResult] = deque()  # of tokens that may still be cut off at a stop string
        self._n_released = 0  # number of tokens in pieces so far
        self._n_chars_released = 0  # number of characters of these tokens

    def ends(self, token: int) -> bool:
        """Adds a token; returns whether the completion ends with it, at a stop string."""
        self._final_texts.append(self._text.push(token))
        return self._text.stopped

    def echo(self, prompt: Sequence[int], scores: Scores) -> Piece:
        """Returns the piece that has the prompt."""
        texts = self._text.prefix_pieces
        tokens = (
            [Token(*token) for token in zip(prompt, texts, *zip(*scores, strict=True), strict=True)] if scores else []
        )
        return Piece(self._index, "".join(texts), tuple(tokens))

    def piece(self, step: TokenResult) -> Piece:
        """Returns the piece of a step."""
        text = ""
        if step.token is not None:
            text = self._final_texts.popleft()
            if self._logprobs:
                self._held_steps.append(step)
        if step.finish_reason:
            text += self._text.finish()
        self._n_chars_final += len(text)
        tokens = tuple(self._release(is_last=step.finish_reason is not None)) if self._logprobs else ()
        stopped = step.finish_reason and self._text.stopped
        return Piece(self._index, text, tokens, int(step.token is not None), "stop" if stopped else step.finish_reason)

    def _release(self, *, is_last: bool) -> list[Token]:
        """Returns the tokens that became final. A token without text waits for the character that it is part of."""
        pieces, n_final, n_chars = self._text.pieces, self._n_released, self._n_chars_released
        for i in range(self._n_released, len(pieces)):
            n_chars += len(pieces[i])
            if is_last or (pieces[i] and n_chars <= self._n_chars_final):
                n_final, self._n_chars_released = i + 1, n_chars
        tokens = []
        for text in pieces[self._n_released : n_final]:
            step = self._held_steps.popleft()
            assert step.token is not None
            tokens.append(Token(step.token, text, step.logprob, step.top_logprobs))
        self._n_released = max(self._n_released, n_final)
        return tokens
