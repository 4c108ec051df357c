"""The bodies of requests in OpenAI's API, checked field by field: of the server, and of batch files.

A field is supported (it has a row in `CompletionBody` or `ChatBody`), a label without effect (`LABELS`), or not
supported (`NEUTRAL`), which is an error unless its value asks for what happens anyway. null is a field left out.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, NoReturn, TypeVar

from llama.errors import missing_extra, printable, quote
from llama.serving.errors import ApiError

try:
    from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator
except ImportError as error:
    raise missing_extra("batch", error) from error

MAX_CHOICES = 128  # per prompt
MAX_STOPS = 64
MAX_TOP_LOGPROBS = 20  # of a chat completion; of a completion 5
ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}
# Fields that are not supported, in the order in which errors name them, and values that ask for what happens anyway.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "modalities": (["text"],),
    "length_penalty": (1,),
    "bad_words": ([],),
    "include_stop_str_in_output": (False,),
    "skip_special_tokens": (True,),
    "spaces_between_special_tokens": (True, False),
    "use_beam_search": (False,),
    "best_of": (1,),  # and the value of n
    "suffix": ("",),
    "echo": (False,),
    "prompt_logprobs": (),
    "chat_template_kwargs": ({},),
    "priority": (0,),
    "service_tier": ("auto", "default"),
    "return_tokens_as_token_ids": (False,),
    "return_token_ids": (False,),
}
# Labels and hints, which cannot change the text.
LABELS = frozenset(
    (
        "cache_prompt",
        "metadata",
        "parallel_tool_calls",
        "prompt_cache_key",
        "prompt_cache_retention",
        "reasoning_effort",
        "request_id",
        "safety_identifier",
        "store",
        "user",
        "verbosity",
    )
)
# Likewise in messages: clients that send an answer back unchanged send these.
MESSAGE_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "tool_calls": ([],),
    "annotations": ([],),
    "reasoning_content": ("",),
    "reasoning": ("",),
    "refusal": ("",),
}
MESSAGE_LABELS = frozenset(("name", "id"))
PART_NEUTRAL: dict[str, tuple[Any, ...]] = {"annotations": ([],), "logprobs": ([],)}
PART_LABELS = frozenset(("cache_control", "id"))


@dataclass
class Unknown:
    """What becomes of fields that no table has.

    Attributes:
        ignore: whether they are left out, instead of refused.
        ignored: names of those left out.
        refused: names of those that are errors, and of unsupported fields.
    """

    ignore: bool = False
    ignored: list[str] = field(default_factory=list)
    refused: list[str] = field(default_factory=list)

    def select(
        self,
        values: Mapping[str, Any],
        supported: Collection[str],
        neutral: Mapping[str, tuple[Any, ...]],
        labels: Collection[str] = (),
        *,
        prefix: str = "",
    ) -> dict[str, Any]:
        """The supported fields of an object; notes what else it has. `prefix` is that of the names in errors."""
        selected, wrong, unknown = {}, set(), []
        for name, value in values.items():
            if name in supported:
                selected[name] = value
            elif name in neutral:
                if not _is_neutral(value, neutral[name]):
                    wrong.add(name)
            elif name not in labels and value is not None:
                unknown.append(f"{prefix}{printable(name)}")
        self.refused += [f"{prefix}{name}" for name in neutral if name in wrong]
        (self.ignored if self.ignore else self.refused).extend(unknown)
        return {name: value for name, value in selected.items() if value is not None}

    def check(self) -> None:
        """Raises ApiError if there are fields to refuse; it names them."""
        if self.refused:
            names, several = self.refused, len(self.refused) > 1
            more = f" and {len(names) - 8} more" if len(names) > 8 else ""
            raise ApiError(
                f"{', '.join(names[:8])}{more} {'are' if several else 'is'} not supported; leave "
                f"{'them' if several else 'it'} out",
                param=names[0],
                code="unsupported_parameter",
            )


SAMPLING_FIELDS = (
    "top_k",
    "min_p",
    "typical_p",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
    "logit_bias",
    "min_tokens",
    "ignore_eos",
    "stop_token_ids",
    "response_format",
    "structured_outputs",
)


class StreamOptions(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    include_usage: bool = False
    continuous_usage_stats: bool = False
    include_obfuscation: bool = False  # a hint; nothing is padded


class Body(BaseModel):
    """The fields that both endpoints have."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)

    model: str | None = None
    temperature: float = Field(default=1.0, ge=0, le=2)
    top_p: float = Field(default=1.0, ge=0, le=1)
    n: int = Field(default=1, ge=1, le=MAX_CHOICES)
    seed: int | None = Field(default=None, ge=-(2**63), le=2**63 - 1)
    stop: list[str] = []
    top_k: int = Field(default=0, ge=-1)
    min_p: float = Field(default=0.0, ge=0, le=1)
    typical_p: float = Field(default=1.0, gt=0, le=1)
    repetition_penalty: float = Field(default=1.0, ge=0.01, le=100)  # beyond, logits overflow
    presence_penalty: float = Field(default=0.0, ge=-2, le=2)
    frequency_penalty: float = Field(default=0.0, ge=-2, le=2)
    logit_bias: dict[int, float] = {}
    min_tokens: int = Field(default=0, ge=0)
    ignore_eos: bool = False
    stop_token_ids: list[int] = []
    response_format: dict[str, Any] | None = None
    structured_outputs: dict[str, Any] | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None

    @field_validator("stop", mode="before")
    @classmethod
    def _check_stop(cls, stop: Any) -> Any:
        stops = [stop] if isinstance(stop, str) else stop
        if not isinstance(stops, list) or len(stops) > MAX_STOPS or not all(isinstance(s, str) and s for s in stops):
            raise ValueError(
                f"must be a string or a list of at most {MAX_STOPS}, none of them empty, got {quote(stop)}"
            )
        return stops

    @field_validator("logit_bias", mode="before")
    @classmethod
    def _check_logit_bias(cls, bias: Any) -> Any:
        """JSON has ids as strings."""
        if not isinstance(bias, dict) or not all(str(token).isdecimal() for token in bias):
            raise ValueError(f"must be an object of numbers by token id, got {quote(bias)}")
        return {int(token): amount for token, amount in bias.items()}

    def options(self) -> dict[str, Any]:
        """The sampling parameters that have the names of the library's: see `SamplingOptions`."""
        return {name: getattr(self, name) for name in SAMPLING_FIELDS}

    @model_validator(mode="after")
    def _check_stream_options(self) -> Body:
        if self.stream_options is not None and not self.stream:
            raise ApiError("stream_options must only be given with stream=true", param="stream_options")
        return self


class CompletionBody(Body):
    """The body of `POST /v1/completions`."""

    prompt: list[str | list[int]]
    max_tokens: int | None = Field(default=None, ge=0)
    logprobs: int | None = Field(default=None, ge=0, le=5)
    prompt_logprobs: int | None = Field(default=None, ge=0, le=MAX_TOP_LOGPROBS)
    echo: bool = False
    suffix: str | None = None

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

    @model_validator(mode="after")
    def _check_prompt_logprobs(self) -> CompletionBody:
        if self.prompt_logprobs is not None and self.stream:
            raise ApiError("prompt_logprobs must only be given without stream", param="prompt_logprobs")
        return self

    @model_validator(mode="after")
    def _check_suffix(self) -> CompletionBody:
        if self.suffix and (self.echo or self.prompt_logprobs is not None):
            raise ApiError("suffix must only be given without echo and prompt_logprobs", param="suffix")
        if self.suffix and not all(isinstance(prompt, str) for prompt in self.prompt):
            raise ApiError("suffix must only be given with prompts that are strings", param="suffix")
        return self


class ChatBody(Body):
    """The body of `POST /v1/chat/completions`."""

    messages: list[dict[str, str]]
    max_tokens: int | None = Field(default=None, ge=1)
    max_completion_tokens: int | None = Field(default=None, ge=1)
    logprobs: bool = False
    top_logprobs: int = Field(default=0, ge=0, le=MAX_TOP_LOGPROBS)
    add_generation_prompt: bool | None = None
    continue_final_message: bool = False

    @model_validator(mode="after")
    def _check_together(self) -> ChatBody:
        if self.top_logprobs and not self.logprobs:
            raise ApiError("top_logprobs must only be given with logprobs=true", param="top_logprobs")
        if None not in (limits := {self.max_tokens, self.max_completion_tokens}) and len(limits) > 1:
            raise ApiError(
                "max_tokens, the old name of max_completion_tokens, must not be given with another value",
                param="max_tokens",
            )
        if self.continue_final_message and self.add_generation_prompt:
            raise ApiError(
                "continue_final_message and add_generation_prompt must not both be true", param="continue_final_message"
            )
        return self


class TokenizeBody(BaseModel):
    """The body of `POST /tokenize`: a text, or messages."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    model: str | None = None
    prompt: str | None = None
    messages: list[dict[str, str]] | None = None
    add_special_tokens: bool = True
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    return_token_strs: bool = False

    @model_validator(mode="after")
    def _check_together(self) -> TokenizeBody:
        if (self.prompt is None) == (self.messages is None):
            raise ApiError("either prompt, a text, or messages must be given, and not both", param="prompt")
        return self


class DetokenizeBody(BaseModel):
    """The body of `POST /detokenize`."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    model: str | None = None
    tokens: list[int]


AnyBody = TypeVar("AnyBody", bound=BaseModel)


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


def check_body(
    values: Any,
    kind: type[AnyBody],
    unknown: Unknown | None = None,
    *,
    neutral: Mapping[str, tuple[Any, ...]] = MappingProxyType({}),
    labels: Collection[str] = (),
) -> AnyBody:
    """The checked body of a request.

    Args:
        values: as JSON has it.
        unknown: gets the fields that no table has; by default they are refused.
        neutral, labels: fields of this kind of body besides those of the tables.

    Raises:
        ApiError: a field is wrong; the error names the first one, and all that are not supported.
    """
    if not isinstance(values, dict):
        raise ApiError(f"the body must be a JSON object, got {quote(values)}")
    unknown = unknown or Unknown()
    neutral = {**NEUTRAL, "best_of": (values.get("n") or 1,), **neutral}
    fields = unknown.select(values, kind.model_fields, neutral, (*LABELS, *labels))
    if isinstance(options := fields.get("stream_options"), dict):
        fields["stream_options"] = unknown.select(options, StreamOptions.model_fields, {}, prefix="stream_options.")
    if "messages" in fields:
        fields["messages"] = check_messages(fields["messages"], unknown)
    unknown.check()
    try:
        return kind.model_validate(fields)
    except ValidationError as error:
        _raise_first(error)


def check_messages(
    messages: Any, unknown: Unknown, name: str = "messages", kinds: Collection[str] = ("text",)
) -> list[dict[str, str]]:
    """The messages of a dialog, each with its content as one text.

    Args:
        name: of the messages in errors.
        kinds: types that parts of a content may have.
    """
    if not isinstance(messages, list) or not messages:
        raise ApiError(f"{name} must be a list of at least one message, got {quote(messages)}", param=name)
    return [_message(message, f"{name}[{i}]", unknown, kinds) for i, message in enumerate(messages)]


def _message(message: Any, name: str, unknown: Unknown, kinds: Collection[str]) -> dict[str, str]:
    if not isinstance(message, dict):
        raise ApiError(f"{name} must be an object with role and content, got {quote(message)}", param=name)
    role = message.get("role")
    if not isinstance(role, str) or role not in ROLES:
        raise ApiError(f"{name}.role must be one of {', '.join(ROLES)}, got {quote(role)}", param=f"{name}.role")
    fields = unknown.select(message, ("role", "content"), MESSAGE_NEUTRAL, MESSAGE_LABELS, prefix=f"{name}.")
    if f"{name}.tool_calls" in unknown.refused:  # which is why such a message has no content
        unknown.check()
    return {"role": ROLES[role], "content": _text_of(fields.get("content"), f"{name}.content", unknown, kinds)}


def _text_of(content: Any, name: str, unknown: Unknown, kinds: Collection[str]) -> str:
    """The text of a content, which is a string or a list of parts of one of the given types."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list) or not content:
        raise ApiError(
            f"{name} must be a string or a list of parts of type {' or '.join(kinds)}, got {quote(content)}", param=name
        )
    texts = []
    for i, part in enumerate(content):
        if not isinstance(part, dict) or part.get("type") not in kinds or not isinstance(part.get("text"), str):
            expected = f'{{"type": "{next(iter(kinds))}", "text": "..."}}'
            raise ApiError(f"{name}[{i}] must be {expected}, got {quote(part)}", param=f"{name}[{i}]")
        unknown.select(part, ("type", "text"), PART_NEUTRAL, PART_LABELS, prefix=f"{name}[{i}].")
        texts.append(part["text"])
    return "".join(texts)


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


def _are_ids(values: list[Any]) -> bool:
    return all(type(value) is int for value in values)


def _is_neutral(value: Any, neutral: tuple[Any, ...]) -> bool:
    if isinstance(value, dict):
        value = {name: inner for name, inner in value.items() if inner is not None}
    return value is None or any(value == v and isinstance(value, bool) == isinstance(v, bool) for v in neutral)


def _raise_first(error: ValidationError) -> NoReturn:
    """Raises an `ApiError` of the first of pydantic's errors, in the words of this library."""
    first = error.errors(include_url=False)[0]
    name = printable(".".join(map(str, first["loc"])))
    if first["type"] == "missing":
        message = f"{name} must be given"
    elif first["type"] == "value_error":
        message = f"{name} {first['ctx']['error']}"
    else:
        message = f"{name} {first['msg'].replace('Input should be', 'must be')}, got {quote(first['input'])}"
    raise ApiError(message, param=name) from None
