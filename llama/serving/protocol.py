"""The bodies of requests in OpenAI's API, checked field by field: of the server, and of batch files.

A field that is not supported is an error that names it, unless its value asks for what happens anyway.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, Literal, NoReturn, TypeVar

from llama.errors import printable, quote
from llama.serving.errors import ApiError

try:
    from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator
except ImportError as error:
    raise ImportError(
        "requests in OpenAI's format need pydantic, of the extras [serve] and [batch]; install it with: "
        'pip install -e ".[batch]"'
    ) from error

MAX_CHOICES = 128  # per prompt
MAX_STOPS = 4
MAX_TOP_LOGPROBS = 20  # of a chat completion; of a completion 5
_ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}
# Values of unsupported fields that have no effect; clients send them by default.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "frequency_penalty": (0,),
    "function_call": ("none",),
    "functions": ([],),
    "logit_bias": ({},),
    "modalities": (["text"],),
    "presence_penalty": (0,),
    "response_format": ({"type": "text"},),
    "service_tier": ("auto", "default"),
    "store": (False,),
    "suffix": ("",),
    "tool_choice": ("none",),
    "tools": ([],),
}
# Likewise in messages: clients that send an answer back unchanged send these.
_NEUTRAL_IN_MESSAGE: dict[str, tuple[Any, ...]] = {"annotations": ([],), "tool_calls": ([],)}


class StreamOptions(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    include_usage: bool = False
    include_obfuscation: Literal[False] = False


class _Body(BaseModel):
    """The fields that both endpoints have. null stands for a field's default."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)

    model: str | None = None
    temperature: float = Field(default=1.0, ge=0, le=2)
    top_p: float = Field(default=1.0, ge=0, le=1)
    n: int = Field(default=1, ge=1, le=MAX_CHOICES)
    seed: int | None = Field(default=None, ge=-(2**63), le=2**63 - 1)
    stop: list[str] = []
    stream: bool = False
    stream_options: StreamOptions | None = None
    user: str = ""  # a label without effect, like the next one
    metadata: dict[str, str] = {}

    @field_validator("stop", mode="before")
    @classmethod
    def _check_stop(cls, stop: Any) -> Any:
        stops = [stop] if isinstance(stop, str) else stop
        if not isinstance(stops, list) or len(stops) > MAX_STOPS or not all(isinstance(s, str) and s for s in stops):
            raise ValueError(
                f"must be a string or a list of at most {MAX_STOPS}, none of them empty, got {quote(stop)}"
            )
        return stops

    @model_validator(mode="after")
    def _check_stream_options(self) -> _Body:
        if self.stream_options is not None and not self.stream:
            raise ApiError("stream_options must only be given with stream=true", param="stream_options")
        return self


class CompletionBody(_Body):
    """The body of `POST /v1/completions`."""

    prompt: list[str | list[int]]
    max_tokens: int | None = Field(default=None, ge=0)
    logprobs: int | None = Field(default=None, ge=0, le=5)
    echo: bool = False

    @field_validator("prompt", mode="before")
    @classmethod
    def _check_prompt(cls, prompt: Any) -> Any:
        if isinstance(prompt, str):
            return [prompt]
        if isinstance(prompt, list) and prompt:
            if all(isinstance(text, str) for text in prompt):
                return prompt
            if _are_ids(prompt):
                return [prompt]
            if all(isinstance(ids, list) and ids and _are_ids(ids) for ids in prompt):
                return prompt
        raise ValueError(
            f"must be a string, a list of strings, token ids or a list of lists of these, got {quote(prompt)}"
        )


class ChatBody(_Body):
    """The body of `POST /v1/chat/completions`."""

    messages: list[dict[str, str]]
    max_tokens: int | None = Field(default=None, ge=1)
    max_completion_tokens: int | None = Field(default=None, ge=1)
    logprobs: bool = False
    top_logprobs: int = Field(default=0, ge=0, le=MAX_TOP_LOGPROBS)

    @field_validator("messages", mode="before")
    @classmethod
    def _check_messages(cls, messages: Any) -> list[dict[str, str]]:
        if not isinstance(messages, list) or not messages:
            raise ApiError(f"messages must be a list of at least one message, got {quote(messages)}", param="messages")
        return [_message(message, f"messages[{i}]") for i, message in enumerate(messages)]

    @model_validator(mode="after")
    def _check_together(self) -> ChatBody:
        if self.top_logprobs and not self.logprobs:
            raise ApiError("top_logprobs must only be given with logprobs=true", param="top_logprobs")
        if self.max_tokens is not None and self.max_completion_tokens is not None:
            raise ApiError(
                "max_tokens, the old name of max_completion_tokens, must not be given with it", param="max_tokens"
            )
        return self


Body = TypeVar("Body", ChatBody, CompletionBody)


def parse_json(raw: bytes) -> Any:
    """The value of a body.

    Raises:
        ApiError: it is not JSON.
    """
    try:
        return json.loads(raw.decode(), parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        reason = "it is nested too deeply" if isinstance(error, RecursionError) else printable(error)
        raise ApiError(f"the body must be JSON in UTF-8: {reason}", code="invalid_json") from error


def check_body(values: Any, kind: type[Body]) -> Body:
    """The checked body of a request.

    Args:
        values: as JSON has it.

    Raises:
        ApiError: a field is wrong; the error names the first one.
    """
    if not isinstance(values, dict):
        raise ApiError(f"the body must be a JSON object, got {quote(values)}")
    values = {name: value for name, value in values.items() if value is not None}
    for name, value in list(values.items()):
        if name not in kind.model_fields and _is_neutral(name, value, _NEUTRAL):
            del values[name]
    if "best_of" in values and values["best_of"] == values.get("n", 1):
        del values["best_of"]
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        _raise_first(error)


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


def _are_ids(values: list[Any]) -> bool:
    return all(type(value) is int for value in values)


def _is_neutral(name: str, value: Any, table: Mapping[str, tuple[Any, ...]]) -> bool:
    return any(
        value == neutral and isinstance(value, bool) == isinstance(neutral, bool) for neutral in table.get(name, ())
    )


def _message(message: Any, name: str) -> dict[str, str]:
    """A message with its content as one text."""
    if not isinstance(message, dict):
        raise ApiError(f"{name} must be an object with role and content, got {quote(message)}", param=name)
    for field, value in message.items():
        if (
            field not in ("role", "content")
            and value is not None
            and not _is_neutral(field, value, _NEUTRAL_IN_MESSAGE)
        ):
            field_name = f"{name}.{printable(field)}"
            raise ApiError(f"{field_name} is not supported; leave it out", param=field_name)
    role = message.get("role")
    if not isinstance(role, str) or role not in _ROLES:
        raise ApiError(f"{name}.role must be one of {', '.join(_ROLES)}, got {quote(role)}", param=f"{name}.role")
    return {"role": _ROLES[role], "content": _content(message.get("content"), f"{name}.content")}


def _content(content: Any, name: str) -> str:
    """The text of a content, which is a string or a list of parts."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list) or not content:
        raise ApiError(f"{name} must be a string or a list of parts of type text, got {quote(content)}", param=name)
    texts = []
    for i, part in enumerate(content):
        is_text = isinstance(part, dict) and part.keys() == {"type", "text"} and part["type"] == "text"
        if not is_text or not isinstance(part["text"], str):
            expected = '{"type": "text", "text": "..."}'
            raise ApiError(f"{name}[{i}] must be {expected}, got {quote(part)}", param=f"{name}[{i}]")
        texts.append(part["text"])
    return "".join(texts)


def _raise_first(error: ValidationError) -> NoReturn:
    """Raises an `ApiError` of the first of pydantic's errors, in the words of this library."""
    first = error.errors(include_url=False)[0]
    name = printable(".".join(map(str, first["loc"])))
    if first["type"] == "extra_forbidden":
        message = f"{name} is not supported; leave it out"
    elif first["type"] == "missing":
        message = f"{name} must be given"
    elif first["type"] == "value_error":
        message = f"{name} {first['ctx']['error']}"
    else:
        message = f"{name} {first['msg'].replace('Input should be', 'must be')}, got {quote(first['input'])}"
    raise ApiError(message, param=name) from None
