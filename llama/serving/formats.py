"""The answers of OpenAI's API: whole completions, and the chunks of streamed ones, as JSON objects."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from llama.engine.output import Piece, Token
from llama.serving.errors import ApiError

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

    def __init__(self, tokenizer: Any, *, logprobs: bool) -> None:
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
        top = [self._spelled(*likely, token.at_start) for likely in token.top_logprobs]
        return self._spelled(token.id, token.logprob, token.at_start) | {"top_logprobs": top}

    def _spelled(self, token: int, logprob: float | None, at_start: bool) -> dict[str, Any]:
        text, raw = token_text(token, self._tokenizer, at_start=at_start)
        return {"token": text, "logprob": _number(logprob), "bytes": None if raw is None else list(raw)}


class CompletionFormat:
    """The objects of `POST /v1/completions`.

    Args:
        echo: whether texts begin with the prompt.
        prompt_logprobs: number of most likely tokens to report at each position of the prompt; None for no report.
    """

    prefix = "cmpl"
    whole_object = chunk_object = "text_completion"

    def __init__(self, tokenizer: Any, *, echo: bool = False, prompt_logprobs: int | None = None) -> None:
        self._tokenizer = tokenizer
        self._echo = echo
        self._prompt_logprobs = prompt_logprobs
        self._top_logprobs: int | None = None
        self._n_prompt: list[int] = []  # tokens of each choice's prompt
        self._offsets: list[int] = []  # of each choice's next token, in characters from the prompt's start

    def count(self, prompts: Sequence[Sequence[int]], n: int, *, with_logprobs: int | None) -> None:
        """Has log-probabilities in the answers, of so many likely tokens; None for those of the prompt alone."""
        self._top_logprobs = with_logprobs
        starts = [0 if self._echo else len(self._tokenizer.decode(prompt)) for prompt in prompts]
        self._offsets = [start for start in starts for _ in range(n)]
        self._n_prompt = [len(prompt) for prompt in prompts for _ in range(n)]

    def whole(self, index: int, pieces: Sequence[Piece]) -> Choice:
        text = "".join(piece.text for piece in pieces)
        tokens = [token for piece in pieces for token in piece.tokens]
        if self._prompt_logprobs is None:
            return self._choice(index, text, tokens, pieces[-1].finish_reason)
        prompt, tokens = tokens[: self._n_prompt[index]], tokens[self._n_prompt[index] :]
        if self._echo:
            choice = self._choice(index, text, [*prompt, *tokens], pieces[-1].finish_reason)
        else:
            text = text[sum(len(token.text) for token in prompt) :]
            choice = self._choice(index, text, tokens, pieces[-1].finish_reason)
        return choice | {"prompt_logprobs": [self._prompt_entry(token) for token in prompt]}

    def first_chunk(self, index: int) -> Choice | None:
        return None

    def chunks(self, piece: Piece) -> list[Choice]:
        if not (piece.text or piece.tokens or piece.finish_reason):
            return []
        return [self._choice(piece.choice, piece.text, piece.tokens, piece.finish_reason)]

    def _choice(self, index: int, text: str, tokens: Sequence[Token], finish_reason: str | None) -> Choice:
        logprobs = None if self._top_logprobs is None or not tokens else self._logprobs_of(index, tokens)
        return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": finish_reason}

    def _logprobs_of(self, index: int, tokens: Sequence[Token]) -> dict[str, Any]:
        offsets = []
        for token in tokens:
            offsets.append(self._offsets[index])
            self._offsets[index] += len(token.text)
        return {
            "tokens": [self._spelled(token.id, token) for token in tokens],
            "token_logprobs": [None if token.logprob is None else _number(token.logprob) for token in tokens],
            "top_logprobs": [self._top(token) for token in tokens],
            "text_offset": offsets,
        }

    def _prompt_entry(self, token: Token) -> dict[str, Any] | None:
        """The most likely tokens in the place of a prompt's token, and itself, by their ids."""
        if token.logprob is None:
            return None
        ranks = {id: rank for rank, (id, _) in enumerate(token.top_logprobs, start=1)}
        likely = dict([*token.top_logprobs[: self._prompt_logprobs], (token.id, token.logprob)])
        return {
            str(id): {
                "logprob": _number(logprob),
                "rank": ranks.get(id),
                "decoded_token": self._spelled(id, token),
            }
            for id, logprob in likely.items()
        }

    def _top(self, token: Token) -> dict[str, float] | None:
        """The most likely tokens, and the one that was chosen."""
        if token.logprob is None:
            return None
        top: dict[str, float] = {}
        for likely, logprob in token.top_logprobs[: self._top_logprobs]:
            top.setdefault(self._spelled(likely, token), _number(logprob))  # of two spelled alike, the likelier one
        return top | {self._spelled(token.id, token): _number(token.logprob)}

    def _spelled(self, token: int, place: Token) -> str:
        return token_text(token, self._tokenizer, at_start=place.at_start)[0]


@dataclass(frozen=True)
class Counts:
    """The numbers of tokens of a request. Each prompt counts once, also with several completions.

    Attributes:
        n_cached: number of the prompts' tokens that the KV cache held already; None if it is not known.
    """

    n_prompt: int
    n_generated: int
    n_cached: int | None


class Answer(Protocol):
    """The whole of a request's answer, or its server-sent events."""

    def whole(self, pieces: Sequence[Sequence[Piece]], counts: Counts) -> dict[str, Any]:
        """The whole answer, given the pieces of each choice."""

    def start(self, counts: Counts) -> list[bytes]:
        """The events before any piece."""

    def events(self, piece: Piece, counts: Counts) -> list[bytes]:
        """The events of a piece."""

    def end(self, counts: Counts) -> list[bytes]:
        """The events after all pieces."""

    def failed(self, error: ApiError) -> bytes:
        """The event of an error, which is the last one."""


class CompletionAnswer:
    """The answer of a chat or of a completion. All of its chunks have the same id, time, model and fingerprint."""

    def __init__(
        self,
        form: Format,
        n_choices: int,
        model: str,
        fingerprint: str | None,
        *,
        include_usage: bool,
        continuous_usage: bool,
    ) -> None:
        self._form = form
        self._n_choices = n_choices
        self._include_usage = include_usage
        self._continuous_usage = continuous_usage
        head = {"id": f"{form.prefix}-{uuid.uuid4().hex}", "created": int(time.time()), "model": model}
        self._head: dict[str, Any] = head | {"system_fingerprint": fingerprint}

    def whole(self, pieces: Sequence[Sequence[Piece]], counts: Counts) -> dict[str, Any]:
        choices = [self._form.whole(i, of_choice) for i, of_choice in enumerate(pieces)]
        return self._head | {"object": self._form.whole_object, "choices": choices, "usage": _usage(counts)}

    def start(self, counts: Counts) -> list[bytes]:
        first = [self._form.first_chunk(i) for i in range(self._n_choices)]
        return [self._chunk([choice], counts) for choice in first if choice]

    def events(self, piece: Piece, counts: Counts) -> list[bytes]:
        return [self._chunk([choice], counts) for choice in self._form.chunks(piece)]

    def end(self, counts: Counts) -> list[bytes]:
        return [self._chunk([], counts)] * self._include_usage + [b"data: [DONE]\n\n"]

    def failed(self, error: ApiError) -> bytes:
        return event(error.body())

    def _chunk(self, choices: list[Choice], counts: Counts) -> bytes:
        chunk = self._head | {"object": self._form.chunk_object, "choices": choices}
        if self._continuous_usage or (self._include_usage and not choices):
            chunk |= {"usage": _usage(counts)}
        elif self._include_usage:
            chunk |= {"usage": None}
        return event(chunk)


def _usage(counts: Counts) -> dict[str, Any]:
    usage: dict[str, Any] = {
        "prompt_tokens": counts.n_prompt,
        "completion_tokens": counts.n_generated,
        "total_tokens": counts.n_prompt + counts.n_generated,
    }
    return usage if counts.n_cached is None else usage | {"prompt_tokens_details": {"cached_tokens": counts.n_cached}}


def event(value: Any, name: str | None = None) -> bytes:
    """A server-sent event."""
    head = b"" if name is None else f"event: {name}\n".encode()
    return head + b"data: " + json.dumps(value, separators=(",", ":"), allow_nan=False).encode() + b"\n\n"


def token_text(token: int, tokenizer: Any, *, at_start: bool = False) -> tuple[str, bytes | None]:
    """A token of the vocabulary by itself: as a text that names it, and its bytes; None for a control token.

    Args:
        at_start: whether a text begins with it.
    """
    if not hasattr(tokenizer, "token_bytes"):  # a tokenizer of another class
        text: str = tokenizer.decode([token])
        return text, text.encode()
    raw: bytes | None = tokenizer.token_bytes(token, at_start=at_start)
    if raw is None:
        return str(tokenizer.token_piece(token)), None
    try:
        return raw.decode(), raw
    except UnicodeDecodeError:  # a part of a character
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw), raw


def _number(logprob: float | None) -> float:
    return logprob if logprob is not None and logprob > _LOWEST_LOGPROB else _LOWEST_LOGPROB
