"""The answers of OpenAI's API: whole completions, and the chunks of streamed ones, as JSON objects."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from llama.engine.output import Piece, Token
from llama.serving.errors import ApiError
from llama.serving.jobs import Job, Planner
from llama.serving.protocol import ChatBody, CompletionBody

Choice = dict[str, Any]
_LOWEST_LOGPROB = -9999.0  # stands for minus infinity and NaN, which JSON does not have


@dataclass
class Counts:
    """The numbers of tokens of a request. Each prompt counts once, also with several completions."""

    n_prompt: int
    n_generated: int = 0
    n_cached: int = 0  # of the prompts' tokens, that the KV cache held already


class CompletionAnswer:
    """The answer of a chat or of a completion. All of its chunks have the same id, time, model and fingerprint.

    Attributes:
        counts: of the tokens so far, kept by who runs the job.
    """

    prefix: ClassVar[str]  # of ids
    whole_object: ClassVar[str]
    chunk_object: ClassVar[str]

    def __init__(self, body: ChatBody | CompletionBody, job: Job, planner: Planner) -> None:
        self.counts = Counts(sum(map(len, job.prompts)))
        self._body = body
        self._tokenizer = planner.tokenizer
        self._n_choices = job.n_choices
        self._options = body.stream_options or {}
        head = {"id": f"{self.prefix}-{uuid.uuid4().hex}", "created": int(time.time())}
        self._head = {**head, "model": planner.model_name, "system_fingerprint": planner.fingerprint}

    def whole(self, pieces: Sequence[Piece]) -> dict[str, Any]:
        """The whole answer, given all of each choice as one piece."""
        choices = [self._choice(piece) for piece in pieces]
        return self._head | {"object": self.whole_object, "choices": choices, "usage": self._usage()}

    def start(self) -> list[bytes]:
        """The events before any piece."""
        return []

    def events(self, piece: Piece) -> list[bytes]:
        """The events of a piece."""
        return [self._event([choice]) for choice in self._chunks(piece)]

    def end(self) -> list[bytes]:
        """The events after all pieces."""
        usage = [self._event([])] if self._options.get("include_usage") else []
        return [*usage, b"data: [DONE]\n\n"]

    def failed(self, error: ApiError) -> bytes:
        """The event of an error, which is the last one."""
        return event(error.body())

    def _event(self, choices: list[Choice]) -> bytes:
        chunk = self._head | {"object": self.chunk_object, "choices": choices}
        has_usage = self._options.get("include_usage")
        if self._options.get("continuous_usage_stats") or (has_usage and not choices):
            chunk |= {"usage": self._usage()}
        elif has_usage:
            chunk |= {"usage": None}
        return event(chunk)

    def _usage(self) -> dict[str, Any]:
        counts = self.counts
        return {
            "prompt_tokens": counts.n_prompt,
            "completion_tokens": counts.n_generated,
            "total_tokens": counts.n_prompt + counts.n_generated,
            "prompt_tokens_details": {"cached_tokens": counts.n_cached},
        }

    def _choice(self, piece: Piece) -> Choice:
        """A choice of a whole answer."""
        raise NotImplementedError

    def _chunks(self, piece: Piece) -> list[Choice]:
        """A piece as choices of chunks."""
        raise NotImplementedError


class ChatAnswer(CompletionAnswer):
    """The answer of `POST /v1/chat/completions`."""

    prefix, whole_object, chunk_object = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def start(self) -> list[bytes]:
        delta = {"role": "assistant", "content": "", "refusal": None}
        return [self._event([_delta(i, delta)]) for i in range(self._n_choices)]

    def _choice(self, piece: Piece) -> Choice:
        message = {"role": "assistant", "content": piece.text, "refusal": None}
        choice = {"index": piece.choice, "message": message, "logprobs": self._logprobs_of(piece)}
        return choice | {"finish_reason": piece.finish_reason}

    def _chunks(self, piece: Piece) -> list[Choice]:
        chunks = []
        if piece.text or piece.tokens:
            chunks.append(_delta(piece.choice, {"content": piece.text}, self._logprobs_of(piece)))
        if piece.finish_reason:
            chunks.append(_delta(piece.choice, {}, finish_reason=piece.finish_reason))
        return chunks

    def _logprobs_of(self, piece: Piece) -> dict[str, Any] | None:
        entries = [self._entry(token) for token in piece.tokens]
        return {"content": entries, "refusal": None} if self._body.logprobs else None

    def _entry(self, token: Token) -> dict[str, Any]:
        top = [self._spelled(*likely, token.at_start) for likely in token.top_logprobs]
        return self._spelled(token.id, token.logprob, token.at_start) | {"top_logprobs": top}

    def _spelled(self, token: int, logprob: float | None, at_start: bool) -> dict[str, Any]:
        text, raw = token_text(token, self._tokenizer, at_start=at_start)
        return {"token": text, "logprob": _number(logprob), "bytes": None if raw is None else list(raw)}


def _delta(
    index: int, delta: dict[str, Any], logprobs: dict[str, Any] | None = None, finish_reason: str | None = None
) -> Choice:
    return {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish_reason}


class TextAnswer(CompletionAnswer):
    """The answer of `POST /v1/completions`."""

    prefix = "cmpl"
    whole_object = chunk_object = "text_completion"
    _body: CompletionBody

    def __init__(self, body: CompletionBody, job: Job, planner: Planner) -> None:
        super().__init__(body, job, planner)
        self._n_prompt = [len(prompt) for prompt in job.prompts for _ in range(job.n)]  # tokens, by choice
        self._offsets = [0] * job.n_choices  # of each choice's next token, in characters from the prompt's start
        if body.logprobs is not None and not body.echo:
            starts = [len(self._tokenizer.decode(prompt)) for prompt in job.prompts]
            self._offsets = [start for start in starts for _ in range(job.n)]

    def _choice(self, piece: Piece) -> Choice:
        if self._body.prompt_logprobs is None:
            return self._choice_of(piece)
        prompt, tokens = piece.tokens[: self._n_prompt[piece.choice]], piece.tokens[self._n_prompt[piece.choice] :]
        if not self._body.echo:
            piece = replace(piece, text=piece.text[sum(len(token.text) for token in prompt) :], tokens=tokens)
        return self._choice_of(piece) | {"prompt_logprobs": [self._prompt_entry(token) for token in prompt]}

    def _chunks(self, piece: Piece) -> list[Choice]:
        return [self._choice_of(piece)] if piece.text or piece.tokens or piece.finish_reason else []

    def _choice_of(self, piece: Piece) -> Choice:
        has_logprobs = self._body.logprobs is not None and piece.tokens
        logprobs = self._logprobs_of(piece.choice, piece.tokens) if has_logprobs else None
        return {"index": piece.choice, "text": piece.text, "logprobs": logprobs, "finish_reason": piece.finish_reason}

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
        likely = dict([*token.top_logprobs[: self._body.prompt_logprobs], (token.id, token.logprob)])
        return {
            str(id): {"logprob": _number(logprob), "rank": ranks.get(id), "decoded_token": self._spelled(id, token)}
            for id, logprob in likely.items()
        }

    def _top(self, token: Token) -> dict[str, float] | None:
        """The most likely tokens, and the one that was chosen."""
        if token.logprob is None:
            return None
        top: dict[str, float] = {}
        for likely, logprob in token.top_logprobs[: self._body.logprobs]:
            top.setdefault(self._spelled(likely, token), _number(logprob))  # of two spelled alike, the likelier one
        return top | {self._spelled(token.id, token): _number(token.logprob)}

    def _spelled(self, token: int, place: Token) -> str:
        return token_text(token, self._tokenizer, at_start=place.at_start)[0]


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
