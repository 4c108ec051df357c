"""The description of the server's API in OpenAPI's format, made of the tables and models that check the bodies.

It tells which bodies are refused: what is not in a schema is a 4xx. What only several fields together decide, such as
the order of roles or a context that is too small, no schema says.
"""

from __future__ import annotations

from typing import Any

from llama import __version__
from llama.serving.endpoints import CHAT_URL, COMPLETIONS_URL, RESPONSES_URL
from llama.serving.fields import ANY
from llama.serving.protocol import Body, ChatBody, CompletionBody, DetokenizeBody, TokenizeBody
from llama.serving.responses import ResponsesBody

_ERROR = {
    "type": "object",
    "required": ["error"],
    "properties": {"error": {"type": "object", "required": ["message", "type", "param", "code"]}},
}
_ANSWERS = {
    "200": {"description": "The answer; server-sent events with stream=true."},
    "default": {
        "description": "An error in OpenAI's form.",
        "content": {"application/json": {"schema": _ERROR}},
    },
}
_GETS = ("/", "/health", "/ping", "/version", "/metrics", "/tokenizer_info", "/v1/models")
_BODIES: dict[str, type[Body]] = {
    CHAT_URL: ChatBody,
    COMPLETIONS_URL: CompletionBody,
    RESPONSES_URL: ResponsesBody,
    "/tokenize": TokenizeBody,
    "/detokenize": DetokenizeBody,
}


def describe(*, ignores_unknown: bool) -> dict[str, Any]:
    """The OpenAPI document.

    Args:
        ignores_unknown: whether fields that nobody knows are left out of bodies, instead of refused.
    """
    paths: dict[str, Any] = {path: {"get": {"responses": _ANSWERS}} for path in _GETS}
    paths["/ping"]["post"] = {"responses": _ANSWERS}
    for path, kind in _BODIES.items():
        schema = _schema(kind) | {"additionalProperties": ignores_unknown}
        body = {"required": True, "content": {"application/json": {"schema": schema}}}
        paths[path] = {"post": {"requestBody": body, "responses": _ANSWERS}}
    return {"openapi": "3.1.0", "info": {"title": "llama", "version": __version__}, "paths": paths}


def _schema(kind: type[Body]) -> dict[str, Any]:
    """The schema of a body: its model's, with the fields without effect, and null wherever a field may be left out."""
    schema = kind.model_json_schema()
    required = schema.get("required", ())
    properties = {name: {} if values is ANY else {"enum": [*values, None]} for name, values in kind.neutral.items()}
    for name, own in schema["properties"].items():
        properties[name] = own if name in required else {"anyOf": [own, {"type": "null"}]}
    return schema | {"properties": properties}
