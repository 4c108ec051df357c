"""OpenAI's batch file format: a line of requests to a checked prompt, and a completion to a line of results.

https://platform.openai.com/docs/api-reference/batch
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from llama.chat import UNSAFE_ERROR
from llama.inputs import SamplingParams, check_prompts, encode_checked_dialog, encode_text
from llama.quoting import quote
from llama.tokenizer import PromptError, Tokenizer

CHAT_URL, COMPLETIONS_URL = "/v1/chat/completions", "/v1/completions"
_COMPLETIONS_MAX_TOKENS = 16  # OpenAI's default for /v1/completions
_LINE_FIELDS = ("custom_id", "method", "url", "body")
_SAMPLING_FIELDS = ("model", "max_tokens", "temperature", "top_p", "seed", "stop", "user", "metadata")
_FIELDS = {
    CHAT_URL: ("messages", "max_completion_tokens", *_SAMPLING_FIELDS),
    COMPLETIONS_URL: ("prompt", *_SAMPLING_FIELDS),
}
# Fields that are taken with these values alone, which change nothing; null is one for each.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "best_of": (1,),
    "echo": (False,),
    "frequency_penalty": (0,),
    "logit_bias": ({},),
    "logprobs": (False,),
    "n": (1,),
    "presence_penalty": (0,),
    "response_format": ({"type": "text"},),
    "stream": (False,),
    "suffix": ("",),
    "tool_choice": ("none",),
    "tools": ([],),
}


class RequestError(Exception):
    """A request that becomes an error line.

    Attributes:
        code: OpenAI's name of the kind of error.
        param: the field that is wrong; None for the whole line.
        status: of HTTP.
    """

    def __init__(self, message: str, param: str | None, code: str = "invalid_value", status: int = 400) -> None:
        super().__init__(message)
        self.code = code
        self.param = param
        self.status = status


@dataclass(frozen=True)
class Completion:
    """What the model wrote for a request.

    Attributes:
        n_tokens: number of new tokens.
        finish_reason: "stop" or "length".
    """

    text: str
    n_tokens: int
    finish_reason: str


@dataclass(frozen=True)
class Line:
    """A line of the input.

    Attributes:
        number: from 1.
        digest: identifies the line's content; of a line without a `custom_id`, its number too.
        custom_id: None for a line that is no JSON object.
        fields: of the JSON object; None for a line that is none.
        error: why it is none.
    """

    number: int
    digest: str
    custom_id: str | None
    fields: Mapping[str, Any] | None
    error: str | None = None


def read_line(number: int, raw: bytes) -> Line:
    """Reads a line of the input.

    Raises:
        ValueError: it is a JSON object without a `custom_id`.
    """
    raw = raw.strip()
    try:
        fields, error = json.loads(raw), None
        if not isinstance(fields, dict):
            error = f"a line must be a JSON object, got {quote(fields)}"
    except (ValueError, RecursionError) as problem:  # UnicodeDecodeError too
        error = f"a line must be a JSON object, got {quote(raw.decode(errors='replace'))} ({problem})"
    if error is not None:
        return Line(number, _digest(f"{number}:".encode() + raw), None, None, error)
    custom_id = fields.get("custom_id")
    if not isinstance(custom_id, str) or not custom_id:
        got = quote(custom_id) if "custom_id" in fields else "none"
        raise ValueError(f"line {number} must have a custom_id, a string of its own, got {got}")
    return Line(number, _digest(raw), custom_id, fields)


def _digest(raw: bytes) -> str:
    return hashlib.sha256(raw).hexdigest()[:24]


@dataclass(frozen=True)
class Reader:
    """Turns lines into prompts and sampling parameters.

    Args:
        model: name of the checkpoint, which requests may give as `model`.
        seed: requests without a `seed` get one derived from this and their `custom_id`, so that their results depend
            neither on the other requests nor on when they run.
    """

    tokenizer: Tokenizer
    vocab_size: int
    max_seq_len: int
    model: str
    seed: int

    def __call__(self, line: Line) -> tuple[list[int], SamplingParams]:
        """The prompt's ids, and how to complete it.

        Raises:
            RequestError: a field is wrong, missing, or not supported.
        """
        if line.fields is None:
            raise RequestError(line.error or "", None, "invalid_json")
        for name in line.fields:
            if name not in _LINE_FIELDS:
                raise RequestError(f"a line may have the fields {', '.join(_LINE_FIELDS)}, got {quote(name)}", name)
        if line.fields.get("method") != "POST":
            raise RequestError(f"method must be 'POST', got {quote(line.fields.get('method'))}", "method")
        url, body = line.fields.get("url"), line.fields.get("body")
        if url not in (CHAT_URL, COMPLETIONS_URL):
            raise RequestError(f"url must be {CHAT_URL} or {COMPLETIONS_URL}, got {quote(url)}", "url", "invalid_url")
        if not isinstance(body, dict):
            raise RequestError(f"body must be a JSON object, got {quote(body)}", "body")
        given = {name: value for name, value in body.items() if value is not None}
        _check_fields(given, url)
        self._check_model(given.get("model", self.model))
        prompt = self._chat_prompt(given) if url == CHAT_URL else self._prompt(given)
        return prompt, self._params(given, url, str(line.custom_id))

    def _check_model(self, name: object) -> None:
        if name != self.model:
            raise RequestError(
                f"model must be {self.model!r}, got {quote(name)}; --model gives the checkpoint another name",
                "model",
                "model_not_found",
                404,
            )

    def _chat_prompt(self, body: Mapping[str, Any]) -> list[int]:
        messages = body.get("messages")
        if not isinstance(messages, list):
            raise RequestError(f"messages must be a list of messages, got {quote(messages)}", "messages")
        dialog: Any = [_message(message, f"messages[{i}]") for i, message in enumerate(messages)]
        with _named("messages"):
            prompt = encode_checked_dialog(dialog, "messages", self.tokenizer, self.max_seq_len - 1)
        if prompt is None:
            raise RequestError(UNSAFE_ERROR, "messages")
        return prompt

    def _prompt(self, body: Mapping[str, Any]) -> list[int]:
        prompt = body.get("prompt")
        if isinstance(prompt, list) and len(prompt) == 1 and not isinstance(prompt[0], int):
            prompt = prompt[0]  # a list of one prompt
        room = self.max_seq_len - 1  # for one token at least
        with _named("prompt"):
            if isinstance(prompt, str):
                return encode_text(prompt, "prompt", self.tokenizer, room)
            if isinstance(prompt, list) and all(type(token) is int for token in prompt):
                return check_prompts([prompt], self.vocab_size, room)[0]
        raise RequestError(f"prompt must be one string or one list of token ids, got {quote(prompt)}", "prompt")

    def _params(self, body: Mapping[str, Any], url: str, custom_id: str) -> SamplingParams:
        stop, seed = body.get("stop", ()), body.get("seed")
        if not isinstance(stop, (str, list, tuple)):
            raise RequestError(f"stop must be a string or a list of strings, got {quote(stop)}", "stop")
        if seed is None:
            digest = hashlib.sha256(f"{self.seed}:{custom_id}".encode(errors="replace")).digest()
            seed = int.from_bytes(digest[:7], "big")
        with _named(None):
            return SamplingParams(
                temperature=body.get("temperature", 1),
                top_p=body.get("top_p", 1),
                max_gen_len=self._max_tokens(body, url),
                stop=[stop] if isinstance(stop, str) else stop,
                seed=seed,
            )

    def _max_tokens(self, body: Mapping[str, Any], url: str) -> int:
        names = [name for name in ("max_tokens", "max_completion_tokens") if name in body]
        if not names:
            return self.max_seq_len if url == CHAT_URL else _COMPLETIONS_MAX_TOKENS
        if len(names) == 2:
            raise RequestError(f"{' and '.join(names)} must not both be given", names[1])
        value = body[names[0]]
        if type(value) is not int or value < 1:
            raise RequestError(f"{names[0]} must be an integer of 1 or above, got {quote(value)}", names[0])
        return value


@contextmanager
def _named(param: str | None) -> Iterator[None]:
    """Turns a PromptError into a RequestError about a field; with None, about the one that its message begins with."""
    try:
        yield
    except PromptError as error:
        message = str(error).replace("prompt_tokens[0]", "prompt")
        code = "context_length_exceeded" if "max_seq_len=" in message else "invalid_value"
        message = message.replace("max_seq_len=", "max_seq_len - 1 = ")
        raise RequestError(message, param or message.split()[0], code) from error


def _check_fields(body: Mapping[str, Any], url: str) -> None:
    """Raises RequestError for a field that is not supported, or not with its value."""
    for name, value in body.items():
        if name in _FIELDS[url]:
            continue
        if name not in _NEUTRAL:
            raise RequestError(f"{quote(name)} is not supported", name, "unsupported_parameter")
        if not any(value == neutral and type(value) in (type(neutral), float) for neutral in _NEUTRAL[name]):
            only = " or ".join(json.dumps(neutral) for neutral in _NEUTRAL[name])
            message = f"{name} is not supported; it must be absent or {only}, got {quote(value)}"
            raise RequestError(message, name, "unsupported_parameter")


def _message(message: object, name: str) -> object:
    """A message with its content as one string; others are left for the dialog's own check."""
    if not isinstance(message, dict):
        return message
    given = {key: value for key, value in message.items() if value is not None}
    for key in given:
        if key not in ("role", "content"):
            raise RequestError(f"{name}.{key} is not supported", f"{name}.{key}", "unsupported_parameter")
    content = given.get("content")
    if isinstance(content, list):
        parts = [part for part in content if isinstance(part, dict) and part.get("type") == "text"]
        if len(content) != 1 or len(parts) != 1 or set(parts[0]) != {"type", "text"}:
            raise RequestError(f"{name}.content must be a string or one part of text", f"{name}.content")
        given["content"] = parts[0]["text"]
    return given


def result(line: Line, prompt: list[int], completion: Completion, model: str, fingerprint: str) -> bytes:
    """The line of results of a completed request."""
    assert line.fields is not None
    chat = line.fields["url"] == CHAT_URL
    if chat:
        choice: dict[str, Any] = {"index": 0, "message": {"role": "assistant", "content": completion.text}}
    else:
        choice = {"index": 0, "text": completion.text}
    body = {
        "id": f"{'chatcmpl' if chat else 'cmpl'}-{line.digest}",
        "object": "chat.completion" if chat else "text_completion",
        "created": int(time.time()),
        "model": model,
        "system_fingerprint": fingerprint,
        "choices": [choice | {"logprobs": None, "finish_reason": completion.finish_reason}],
        "usage": {
            "prompt_tokens": len(prompt),
            "completion_tokens": completion.n_tokens,
            "total_tokens": len(prompt) + completion.n_tokens,
        },
    }
    return _line_of(line, 200, body, None)


def error_result(line: Line, error: RequestError) -> bytes:
    """The line of results of a request that was not run. The error stands in both places where readers look for it."""
    fields = {"message": str(error), "param": error.param, "code": error.code}
    body = {"error": fields | {"type": "invalid_request_error"}}
    return _line_of(line, error.status, body, fields | {"line": line.number})


def _line_of(line: Line, status: int, body: dict[str, Any], error: dict[str, Any] | None) -> bytes:
    response = {"status_code": status, "request_id": f"req_{line.digest}", "body": body}
    whole = {"id": result_id(line), "custom_id": line.custom_id, "response": response, "error": error}
    return json.dumps(whole).encode() + b"\n"


def result_id(line: Line) -> str:
    """The `id` of a request's result, which identifies the request's content."""
    return f"batch_req_{line.digest}"
