"""The answers of OpenAI's API: whole completions, and the chunks of streamed ones, as JSON objects."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Sequence
from typing import Any, Protocol

from llama.engine.output import Piece, Token, TopLogprobs
from llama.tokenizer import Tokenizer

Choice = dict[str, Any]
_LOWEST_LOGPROB = -9999.0  # stands for minus infinity and NaN, which JSON does not have


class Format(Protocol):
    """The JSON objects of an endpoint.

    Attributes:
        prefix: start of the answers' ids.
        whole_object, chunk_object: the value of the field `object`, in whole answers and in chunks.
    """

    prefix: str
    whole_object: str
    chunk_object: str

    def whole(self, index: int, pieces: Sequence[Piece]) -> Choice:
        """A choice of a whole answer."""

    def first_chunk(self, index: int) -> Choice | None:
        """The first chunk of a choice, before any piece; None if there is none."""

    def chunks(self, piece: Piece) -> list[Choice]:
        """The chunks of a piece."""


class ChatFormat:
    """The objects of `POST /v1/chat/completions`."""

    prefix = "chatcmpl"
    whole_object = "chat.completion"
    chunk_object = "chat.completion.chunk"

    def __init__(self, tokenizer: Tokenizer, *, logprobs: bool) -> None:
        self._tokenizer = tokenizer
        self._logprobs = logprobs

    def whole(self, index: int, pieces: Sequence[Piece]) -> Choice:
        message = {"role": "assistant", "content": "".join(piece.text for piece in pieces), "refusal": None}
        tokens = [token for piece in pieces for token in piece.tokens]
        return {
            "index": index,
            "message": message,
            "logprobs": self._logprobs_of(tokens),
            "finish_reason": pieces[-1].finish_reason,
        }

    def first_chunk(self, index: int) -> Choice | None:
        delta = {"role": "assistant", "content": "", "refusal": None}
        return {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}

    def chunks(self, piece: Piece) -> list[Choice]:
        chunks: list[Choice] = []
        if piece.text or piece.tokens:
            logprobs = self._logprobs_of(piece.tokens)
            delta: dict[str, Any] = {"content": piece.text}
            chunks.append({"index": piece.choice, "delta": delta, "logprobs": logprobs, "finish_reason": None})
        if piece.finish_reason:
            end = {"index": piece.choice, "delta": {}, "logprobs": None, "finish_reason": piece.finish_reason}
            chunks.append(end)
        return chunks

    def _logprobs_of(self, tokens: Sequence[Token]) -> dict[str, Any] | None:
        return {"content": [self._entry(token) for token in tokens], "refusal": None} if self._logprobs else None

    def _entry(self, token: Token) -> dict[str, Any]:
        text, raw = token.text, token.text.encode()
        if self._tokenizer.sp_model.is_byte(token.id):  # its text may be part of another token's
            text, whole = token_text(token.id, self._tokenizer)
            raw = whole or b""
        top = [self._top_entry(*likely) for likely in token.top_logprobs]
        return {"token": text, "logprob": _number(token.logprob), "bytes": list(raw), "top_logprobs": top}

    def _top_entry(self, token: int, logprob: float) -> dict[str, Any]:
        text, raw = token_text(token, self._tokenizer)
        return {"token": text, "logprob": _number(logprob), "bytes": None if raw is None else list(raw)}


class CompletionFormat:
    """The objects of `POST /v1/completions`.

    Args:
        offsets: with log-probabilities, where the tokens of each choice begin, in characters from the prompt's start.
    """

    prefix = "cmpl"
    whole_object = chunk_object = "text_completion"

    def __init__(self, tokenizer: Tokenizer, offsets: Sequence[int] | None = None) -> None:
        self._tokenizer = tokenizer
        self._offsets = None if offsets is None else list(offsets)  # of each choice's next token

    def whole(self, index: int, pieces: Sequence[Piece]) -> Choice:
        text = "".join(piece.text for piece in pieces)
        tokens = [token for piece in pieces for token in piece.tokens]
        return self._choice(index, text, tokens, pieces[-1].finish_reason)

    def first_chunk(self, index: int) -> Choice | None:
        return None

    def chunks(self, piece: Piece) -> list[Choice]:
        if not (piece.text or piece.tokens or piece.finish_reason):
            return []
        return [self._choice(piece.choice, piece.text, piece.tokens, piece.finish_reason)]

    def _choice(self, index: int, text: str, tokens: Sequence[Token], finish_reason: str | None) -> Choice:
        logprobs = None if self._offsets is None or not tokens else self._logprobs_of(index, tokens, self._offsets)
        return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": finish_reason}

    def _logprobs_of(self, index: int, tokens: Sequence[Token], next_offsets: list[int]) -> dict[str, Any]:
        offsets = []
        for token in tokens:
            offsets.append(next_offsets[index])
            next_offsets[index] += len(token.text)
        return {
            "tokens": [token.text for token in tokens],
            "token_logprobs": [None if token.logprob is None else _number(token.logprob) for token in tokens],
            "top_logprobs": [self._top(token) for token in tokens],
            "text_offset": offsets,
        }

    def _top(self, token: Token) -> dict[str, float] | None:
        """The most likely tokens, and the one that was chosen."""
        if token.logprob is None:
            return None
        likely: TopLogprobs = (*token.top_logprobs, (token.id, token.logprob))
        return {token_text(other, self._tokenizer)[0]: _number(logprob) for other, logprob in likely}


class Answer:
    """The id, time, model and fingerprint of one answer, which all of its chunks repeat."""

    def __init__(self, form: Format, model: str, fingerprint: str | None = None) -> None:
        self._form = form
        head = {"id": f"{form.prefix}-{uuid.uuid4().hex}", "created": int(time.time()), "model": model}
        self._head: dict[str, Any] = head | {"system_fingerprint": fingerprint}

    def whole(self, choices: list[Choice], usage: dict[str, Any]) -> dict[str, Any]:
        return self._head | {"object": self._form.whole_object, "choices": choices, "usage": usage}

    def chunk(self, choices: list[Choice], usage: dict[str, Any] | None, *, with_usage: bool) -> dict[str, Any]:
        chunk = self._head | {"object": self._form.chunk_object, "choices": choices}
        return chunk | {"usage": usage} if with_usage else chunk


def usage(prompts: Sequence[Sequence[int]], n_generated: int, n_cached: int | None) -> dict[str, Any]:
    """The numbers of tokens. Each prompt counts once, also with several completions.

    Args:
        n_cached: number of the prompts' tokens that the KV cache held already; None to leave it out.
    """
    n_prompt = sum(map(len, prompts))
    counts = {"prompt_tokens": n_prompt, "completion_tokens": n_generated, "total_tokens": n_prompt + n_generated}
    return counts if n_cached is None else counts | {"prompt_tokens_details": {"cached_tokens": n_cached}}


def event(value: Any) -> bytes:
    """A server-sent event."""
    return b"data: " + json.dumps(value, separators=(",", ":"), allow_nan=False).encode() + b"\n\n"


def token_text(token: int, tokenizer: Tokenizer) -> tuple[str, bytes | None]:
    """A token of the vocabulary by itself: as a text that names it, and its bytes; None for a control token."""
    sp_model = tokenizer.sp_model
    piece: str = sp_model.id_to_piece(token)
    if sp_model.is_control(token):
        return piece, None
    if sp_model.is_byte(token):
        raw = bytes([int(piece[3:5], 16)])  # a piece such as <0xE2>
        return (raw.decode(), raw) if raw.isascii() else (f"bytes:\\x{raw.hex()}", raw)
    text = " \u2047 " if sp_model.is_unknown(token) else piece.replace("\u2581", " ")
    return text, text.encode()


def _number(logprob: float | None) -> float:
    return logprob if logprob is not None and logprob > _LOWEST_LOGPROB else _LOWEST_LOGPROB
