"""The description of the server's API in OpenAPI's format, made of the tables and models that check the bodies.

It tells which bodies are refused: what is not in a schema is a 4xx. What only several fields together decide, such as
the order of roles or a context that is too small, no schema says.
"""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel

from llama import __version__
from llama.serving import protocol, responses
from llama.serving.endpoints import CHAT_URL, COMPLETIONS_URL

_TEXT = {"type": "string"}
_IDS = {"type": "array", "items": {"type": "integer"}}
_ERROR = {
    "type": "object",
    "required": ["error"],
    "properties": {"error": {"type": "object", "required": ["message", "type", "param", "code"]}},
}
_GETS = ("/", "/health", "/ping", "/version", "/metrics", "/tokenizer_info", "/v1/models")


def describe(*, ignores_unknown: bool) -> dict[str, Any]:
    """The OpenAPI document.

    Args:
        ignores_unknown: whether fields that nobody knows are left out of bodies, instead of refused.
    """
    bodies: dict[str, tuple[type[BaseModel], dict[str, Any], frozenset[str]]] = {
        CHAT_URL: (protocol.ChatBody, {}, frozenset()),
        COMPLETIONS_URL: (protocol.CompletionBody, {}, frozenset()),
        responses.RESPONSES_URL: (responses.ResponsesBody, responses.NEUTRAL, responses.LABELS),
        "/tokenize": (protocol.TokenizeBody, {}, frozenset()),
        "/detokenize": (protocol.DetokenizeBody, {}, frozenset()),
    }
    paths: dict[str, Any] = {path: {"get": {"responses": _answers()}} for path in _GETS}
    paths["/ping"]["post"] = {"responses": _answers()}
    for path, (kind, neutral, labels) in bodies.items():
        schema = _body(kind, protocol.NEUTRAL | neutral, protocol.LABELS | labels)
        schema["additionalProperties"] = ignores_unknown
        body = {"required": True, "content": {"application/json": {"schema": schema}}}
        paths[path] = {"post": {"requestBody": body, "responses": _answers()}}
    return {"openapi": "3.1.0", "info": {"title": "llama", "version": __version__}, "paths": paths}


def _answers() -> dict[str, Any]:
    error = {"description": "An error in OpenAI's form.", "content": {"application/json": {"schema": _ERROR}}}
    return {"200": {"description": "The answer; server-sent events with stream=true."}, "default": error}


def _body(kind: type[BaseModel], neutral: dict[str, Any], labels: frozenset[str]) -> dict[str, Any]:
    """The schema of a body: its model's, with what is read before the model sees it."""
    schema = kind.model_json_schema()
    definitions = schema.pop("$defs", {})
    required = schema.get("required", ())
    properties: dict[str, Any] = {name: {} for name in labels}
    properties |= {name: {"enum": [*values, None]} for name, values in neutral.items()}
    for name, of_field in schema["properties"].items():
        own = _READ_BEFORE.get((kind.__name__, name)) or _READ_BEFORE.get(("", name)) or of_field
        if reference := next((part["$ref"] for part in own.get("anyOf", ()) if "$ref" in part), None):
            own = definitions[reference.rpartition("/")[2]]
            own["properties"] = {key: _or_null(value) for key, value in own["properties"].items()}
        properties[name] = own if name in required else _or_null(own)
    return schema | {"properties": properties}


def _or_null(schema: dict[str, Any]) -> dict[str, Any]:
    return {"anyOf": [schema, {"type": "null"}]}


def _messages(*kinds: str) -> dict[str, Any]:
    """The schema of messages with parts of the given types."""
    part = {
        "type": "object",
        "required": ["type", "text"],
        "properties": {"type": {"enum": list(kinds)}, "text": _TEXT},
    }
    message = {
        "type": "object",
        "required": ["role", "content"],
        "properties": {
            "role": {"enum": list(protocol.ROLES)},
            "content": {"anyOf": [_TEXT, {"type": "array", "minItems": 1, "items": part}]},
        },
    }
    return {"type": "array", "minItems": 1, "items": message}


# Fields whose model has them as they are after a first reading, by the name of the body, or "" for all.
_READ_BEFORE: dict[tuple[str, str], dict[str, Any]] = {
    ("", "messages"): _messages("text"),
    ("", "stop"): {
        "anyOf": [
            _TEXT | {"minLength": 1},
            {"type": "array", "maxItems": protocol.MAX_STOPS, "items": _TEXT | {"minLength": 1}},
        ]
    },
    ("", "logit_bias"): {
        "type": "object",
        "propertyNames": {"pattern": "^[0-9]+$"},
        "additionalProperties": {"type": "number"},
    },
    ("CompletionBody", "prompt"): {
        "anyOf": [
            _TEXT,
            {"type": "array", "minItems": 1, "items": _TEXT},
            _IDS | {"minItems": 1},
            {"type": "array", "minItems": 1, "items": _IDS | {"minItems": 1}},
        ]
    },
    ("ResponsesBody", "input"): {"anyOf": [_TEXT, _messages("input_text", "output_text", "text")]},
}
