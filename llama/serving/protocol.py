"""The bodies of requests in OpenAI's API, checked field by field: of the server, and of batch files.

A field is supported, and then a row of a class here, or has a row in one of the tables, or is unknown. null is a field
left out. The OpenAPI document is made of the same rows.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, NoReturn, TypeAlias, TypeVar, cast

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, WithJsonSchema, model_validator

from llama.errors import printable, quote
from llama.serving.errors import ApiError

MAX_CHOICES = 128  # per prompt
MAX_STOPS = 64
MAX_TOP_LOGPROBS = 20  # of a chat completion; of a completion 5
ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}
ANY = None
Table: TypeAlias = Mapping[str, tuple[Any, ...] | None]
# The values that are taken because they ask for what happens anyway, and ANY for labels and hints, which cannot change
# the text. Other values are errors, which name fields in this order.
NEUTRAL: Table = {
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
    "cache_prompt": ANY,
    "metadata": ANY,
    "parallel_tool_calls": ANY,
    "prompt_cache_key": ANY,
    "prompt_cache_retention": ANY,
    "reasoning_effort": ANY,
    "request_id": ANY,
    "safety_identifier": ANY,
    "store": ANY,
    "user": ANY,
    "verbosity": ANY,
}
# Clients that send an answer back unchanged send these in messages and their parts.
MESSAGE_NEUTRAL: Table = {
    "tool_calls": ([],),
    "annotations": ([],),
    "reasoning_content": ("",),
    "reasoning": ("",),
    "refusal": ("",),
    "type": ("message",),
    **dict.fromkeys(("name", "id", "status", "phase"), ANY),
}
PARTS = ("text", "input_text", "output_text")  # types of these, in chats and in responses
PART_NEUTRAL: Table = {"annotations": ([],), "logprobs": ([],), "cache_control": ANY, "id": ANY}


@dataclass
class Unknown:
    """What becomes of fields that no table has."""

    ignore: bool = False  # whether they are left out, instead of refused
    ignored: list[str] = field(default_factory=list)  # names of those left out
    refused: list[str] = field(default_factory=list)  # names of those that are errors, and of unsupported fields

    def select(
        self, values: Mapping[str, Any], supported: Collection[str], neutral: Table, *, prefix: str = ""
    ) -> dict[str, Any]:
        """The supported fields of an object; notes what else it has. `prefix` goes before names in errors."""
        known = [name for name in values if name in supported or name in neutral]
        self.refused += [
            prefix + name
            for name, allowed in neutral.items()
            if name in values and name not in supported and not _is_neutral(values[name], allowed)
        ]
        unknown = [prefix + printable(name) for name in values if name not in known and values[name] is not None]
        (self.ignored if self.ignore else self.refused).extend(unknown)
        return {name: values[name] for name in known if name in supported and values[name] is not None}

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


def _is_neutral(value: Any, allowed: tuple[Any, ...] | None) -> bool:
    if isinstance(value, dict):
        value = {name: inner for name, inner in value.items() if inner is not None}
    is_null = value is None or allowed is ANY
    return is_null or any(value == v and isinstance(value, bool) == isinstance(v, bool) for v in allowed or ())


def check_messages(messages: Any, unknown: Unknown, name: str) -> list[dict[str, str]]:
    """The messages of a dialog, each with its content as one text. `name` is theirs in errors."""
    if not isinstance(messages, list) or not messages:
        raise ApiError(f"{name} must be a list of at least one message, got {quote(messages)}", param=name)
    return [_message(message, f"{name}[{i}]", unknown) for i, message in enumerate(messages)]


def _message(message: Any, name: str, unknown: Unknown) -> dict[str, str]:
    if not isinstance(message, dict):
        raise ApiError(f"{name} must be an object with role and content, got {quote(message)}", param=name)
    if message.get("type") not in (None, "message"):  # such as a tool's result, which has no role
        raise ApiError(f"{name}.type must be 'message', got {quote(message['type'])}", param=f"{name}.type")
    role = message.get("role")
    if not isinstance(role, str) or role not in ROLES:
        raise ApiError(f"{name}.role must be one of {', '.join(ROLES)}, got {quote(role)}", param=f"{name}.role")
    fields = unknown.select(message, ("role", "content"), MESSAGE_NEUTRAL, prefix=f"{name}.")
    if f"{name}.tool_calls" in unknown.refused:  # which is why such a message has no content
        unknown.check()
    return {"role": ROLES[role], "content": _text_of(fields.get("content"), f"{name}.content", unknown)}


def _text_of(content: Any, name: str, unknown: Unknown) -> str:
    """The text of a content, which is a string or a list of parts."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list) or not content:
        message = f"{name} must be a string or a list of parts of type text, got {quote(content)}"
        raise ApiError(message, param=name)
    texts = []
    for i, part in enumerate(content):
        if not isinstance(part, dict) or part.get("type") not in PARTS or not isinstance(part.get("text"), str):
            message = f'{name}[{i}] must be {{"type": "text", "text": "..."}}, got {quote(part)}'
            raise ApiError(message, param=f"{name}[{i}]")
        unknown.select(part, ("type", "text"), PART_NEUTRAL, prefix=f"{name}[{i}].")
        texts.append(part["text"])
    return "".join(texts)


def _as_bias(bias: Any) -> Any:
    """JSON has ids as strings."""
    if not isinstance(bias, dict) or not all(str(token).isdecimal() for token in bias):
        raise ValueError(f"must be an object of numbers by token id, got {quote(bias)}")
    return {int(token): amount for token, amount in bias.items()}


_PART = {"type": {"enum": list(PARTS)}, "text": {"type": "string"}}
_PARTS = {"type": "array", "items": {"type": "object", "required": list(_PART), "properties": _PART}, "minItems": 1}
_MESSAGE = {"role": {"enum": list(ROLES)}, "content": {"anyOf": [{"type": "string"}, _PARTS]}}
_ITEM = {"type": "object", "required": list(_MESSAGE), "properties": _MESSAGE}
MESSAGES = {"type": "array", "items": _ITEM, "minItems": 1}
STREAM_OPTIONS = ("include_usage", "continuous_usage_stats", "include_obfuscation")  # a hint; nothing is padded
_FLAGS = {name: {"type": ["boolean", "null"]} for name in STREAM_OPTIONS}
_STREAM_OPTIONS = {"type": "object", "properties": _FLAGS, "additionalProperties": False}
_BIAS = {"type": "object", "propertyNames": {"pattern": "^[0-9]+$"}, "additionalProperties": {"type": "number"}}
Bias = Annotated[dict[int, float], BeforeValidator(_as_bias), WithJsonSchema(_BIAS)]
Messages = Annotated[list[dict[str, str]], WithJsonSchema(MESSAGES)]
Word = Annotated[str, Field(min_length=1)]
Words = Annotated[list[Word], Field(max_length=MAX_STOPS, fail_fast=True)]  # an error per item would take seconds
Ids = Annotated[list[int], Field(min_length=1, fail_fast=True)]
Texts = Annotated[list[str], Field(min_length=1, fail_fast=True)]
IdLists = Annotated[list[Ids], Field(min_length=1, fail_fast=True)]


class Body(BaseModel):
    """The fields that all endpoints have.

    Attributes:
        neutral: the fields without effect: see `NEUTRAL`.
    """

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)
    neutral: ClassVar[Table] = NEUTRAL

    model: str | None = None


class SamplingBody(Body):
    """The fields that completions and chats have."""

    temperature: float = Field(default=1.0, ge=0, le=2)
    top_p: float = Field(default=1.0, ge=0, le=1)
    n: int = Field(default=1, ge=1, le=MAX_CHOICES)
    seed: int | None = Field(default=None, ge=-(2**63), le=2**63 - 1)
    stop: Word | Words = Field(default=[], description=f"a string or a list of at most {MAX_STOPS}, none of them empty")
    top_k: int = Field(default=0, ge=-1)
    min_p: float = Field(default=0.0, ge=0, le=1)
    typical_p: float = Field(default=1.0, gt=0, le=1)
    repetition_penalty: float = Field(default=1.0, ge=0.01, le=100)  # beyond, logits overflow
    presence_penalty: float = Field(default=0.0, ge=-2, le=2)
    frequency_penalty: float = Field(default=0.0, ge=-2, le=2)
    logit_bias: Bias = {}
    min_tokens: int = Field(default=0, ge=0)
    ignore_eos: bool = False
    stop_token_ids: Annotated[list[int], Field(fail_fast=True)] = []
    response_format: dict[str, Any] | None = None
    structured_outputs: dict[str, Any] | None = None
    stream: bool = False
    stream_options: Annotated[dict[str, bool] | None, WithJsonSchema(_STREAM_OPTIONS)] = None

    @model_validator(mode="after")
    def _check_stream_options(self) -> SamplingBody:
        if self.stream_options is not None and not self.stream:
            raise ApiError("stream_options must only be given with stream=true", param="stream_options")
        return self


class CompletionBody(SamplingBody):
    """The body of `POST /v1/completions`."""

    prompt: str | Texts | Ids | IdLists = Field(
        description="a string, a list of strings, token ids or a list of lists of these"
    )
    max_tokens: int | None = Field(default=None, ge=0)
    logprobs: int | None = Field(default=None, ge=0, le=5)
    prompt_logprobs: int | None = Field(default=None, ge=0, le=MAX_TOP_LOGPROBS)
    echo: bool = False
    suffix: str | None = None

    @property
    def prompts(self) -> list[str | list[int]]:
        """The prompts, one or several."""
        is_one = isinstance(self.prompt, str) or isinstance(self.prompt[0], int)
        return cast(list[str | list[int]], [self.prompt] if is_one else self.prompt)

    @model_validator(mode="after")
    def _check_together(self) -> CompletionBody:
        if self.prompt_logprobs is not None and self.stream:
            raise ApiError("prompt_logprobs must only be given without stream", param="prompt_logprobs")
        if self.suffix and (self.echo or self.prompt_logprobs is not None):
            raise ApiError("suffix must only be given without echo and prompt_logprobs", param="suffix")
        if self.suffix and not all(isinstance(prompt, str) for prompt in self.prompts):
            raise ApiError("suffix must only be given with prompts that are strings", param="suffix")
        return self


class ChatBody(SamplingBody):
    """The body of `POST /v1/chat/completions`."""

    messages: Messages
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


class TokenizeBody(Body):
    """The body of `POST /tokenize`: a text, or messages."""

    prompt: str | None = None
    messages: Messages | None = None
    add_special_tokens: bool = True
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    return_token_strs: bool = False

    @model_validator(mode="after")
    def _check_together(self) -> TokenizeBody:
        if (self.prompt is None) == (self.messages is None):
            raise ApiError("either prompt, a text, or messages must be given, and not both", param="prompt")
        return self


class DetokenizeBody(Body):
    """The body of `POST /detokenize`."""

    tokens: list[int]


AnyBody = TypeVar("AnyBody", bound=Body)


def parse_json(raw: bytes) -> Any:
    """The value of a body; raises ApiError if it is not JSON."""
    try:
        return json.loads(raw.decode(), parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        reason = "it is nested too deeply" if isinstance(error, RecursionError) else printable(error)
        raise ApiError(f"the body must be JSON in UTF-8: {reason}", code="invalid_json") from error


def check_body(values: Any, kind: type[AnyBody], unknown: Unknown | None = None) -> AnyBody:
    """The checked body of a request.

    Args:
        values: as JSON has it.
        unknown: gets the fields that no table has; by default they are refused.

    Raises:
        ApiError: a field is wrong; the error names the first one, and all that are not supported.
    """
    if not isinstance(values, dict):
        raise ApiError(f"the body must be a JSON object, got {quote(values)}")
    unknown = unknown or Unknown()
    neutral = {**kind.neutral, "best_of": (values.get("n") or 1,)}
    fields = unknown.select(values, kind.model_fields, neutral)
    if isinstance(options := fields.get("stream_options"), dict):
        fields["stream_options"] = unknown.select(options, STREAM_OPTIONS, {}, prefix="stream_options.")
    if "messages" in fields:
        fields["messages"] = check_messages(fields["messages"], unknown, "messages")
    unknown.check()
    try:
        return kind.model_validate(fields)
    except ValidationError as error:
        _raise_first(error, kind, fields)


def check_model(name: str | None, expected: str) -> None:
    """Raises ApiError for a model of another name."""
    if name is not None and name != expected:
        raise ApiError(
            f"model must be {quote(expected)}, got {quote(name)}", status=404, param="model", code="model_not_found"
        )


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


def _raise_first(error: ValidationError, kind: type[Body], fields: dict[str, Any]) -> NoReturn:
    """Raises an `ApiError` of the first of pydantic's errors, in the words of this library."""
    first = error.errors(include_url=False)[0]
    field = str(first["loc"][0])
    name = printable(".".join(map(str, first["loc"])))
    if first["type"] == "missing":
        message = f"{name} must be given"
    elif form := kind.model_fields[field].description:  # of a field that has several
        name, message = field, f"{field} must be {form}, got {quote(fields[field])}"
    elif first["type"] == "value_error":
        message = f"{name} {first['ctx']['error']}"
    else:
        message = f"{name} {first['msg'].replace('Input should be', 'must be')}, got {quote(first['input'])}"
    raise ApiError(message, param=name) from None
