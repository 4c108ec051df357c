"""The endpoints of the server and of batch files: what a body asks for, the form of its answer, and their description.

The description, in OpenAPI's format, tells which bodies are refused: what is not in a schema is a 4xx. No schema says
what only several fields together decide, such as the order of roles or a context that is too small.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

from llama import __version__
from llama.chat import Message
from llama.errors import PromptError
from llama.serving import protocol
from llama.serving.errors import ApiError
from llama.serving.formats import ChatAnswer, CompletionAnswer, TextAnswer, token_text
from llama.serving.jobs import Job, Planner
from llama.serving.responses import ResponseAnswer, ResponsesBody, as_chat

CHAT_URL, COMPLETIONS_URL, RESPONSES_URL = "/v1/chat/completions", "/v1/completions", "/v1/responses"
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
_BODIES: dict[str, type[protocol.Body]] = {
    CHAT_URL: protocol.ChatBody,
    COMPLETIONS_URL: protocol.CompletionBody,
    RESPONSES_URL: ResponsesBody,
    "/tokenize": protocol.TokenizeBody,
    "/detokenize": protocol.DetokenizeBody,
}


@dataclass(frozen=True)
class Request:
    """What a checked body asks for."""

    job: Job
    answer: CompletionAnswer | ResponseAnswer
    is_stream: bool


@contextmanager
def _errors_of_clients() -> Iterator[None]:
    """Turns the errors of the library's checks into those that clients get."""
    try:
        yield
    except (PromptError, ImportError) as error:
        raise ApiError.of(error) from error


def _checked(
    values: Any, kind: type[protocol.AnyBody], planner: Planner, unknown: protocol.Unknown | None = None
) -> protocol.AnyBody:
    planner.check_size(values)
    body = protocol.check_body(values, kind, unknown)
    protocol.check_model(body.model, planner.model_name)
    return body


@_errors_of_clients()
def read_request(url: str, values: Any, planner: Planner, unknown: protocol.Unknown | None = None) -> Request:
    """What a body asks for at one of the URLs above; arguments and errors are those of `check_body`."""
    unknown = unknown or protocol.Unknown()
    if url == RESPONSES_URL:
        asked = _checked(values, ResponsesBody, planner, unknown)
        job = planner.chat(as_chat(asked, unknown))
        return Request(job, ResponseAnswer(asked, job, planner), asked.stream)
    if url == CHAT_URL:
        chat = _checked(values, protocol.ChatBody, planner, unknown)
        job = planner.chat(chat)
        return Request(job, ChatAnswer(chat, job, planner), chat.stream)
    text = _checked(values, protocol.CompletionBody, planner, unknown)
    job = planner.completion(text)
    return Request(job, TextAnswer(text, job, planner), text.stream)


@_errors_of_clients()
def tokenize(values: Any, planner: Planner) -> dict[str, Any]:
    """The answer to `POST /tokenize`: the ids of a text, or those that a chat's answer would follow."""
    body = _checked(values, protocol.TokenizeBody, planner)
    tokenizer = planner.tokenizer
    if body.messages is not None:
        ids = planner.dialog(cast(list[Message], body.messages), continues=body.continue_final_message)
    else:
        ids = planner.text(body.prompt or "", "prompt")
        if not body.add_special_tokens:
            ids = list(tokenizer.encode(body.prompt or "", bos=False, eos=False))
        for control in (tokenizer.bos_id, tokenizer.eos_id):  # by which clients look up these ids
            if body.prompt == token_text(control, tokenizer)[0]:
                ids = [control]
    texts = [token_text(token, tokenizer)[0] for token in ids] if body.return_token_strs else None
    return {"count": len(ids), "max_model_len": planner.max_seq_len, "tokens": ids, "token_strs": texts}


@_errors_of_clients()
def detokenize(values: Any, planner: Planner) -> dict[str, Any]:
    """The answer to `POST /detokenize`: the text of ids. Control pieces have none."""
    body = _checked(values, protocol.DetokenizeBody, planner)
    return {"prompt": planner.tokenizer.decode(planner.checked(body.tokens, "tokens"))}


def tokenizer_info(planner: Planner) -> dict[str, Any]:
    """The answer to `GET /tokenizer_info`."""
    tokenizer = planner.tokenizer
    ids = {"bos_token": tokenizer.bos_id, "eos_token": tokenizer.eos_id}
    names: dict[str, Any] = {name: token_text(token, tokenizer)[0] for name, token in ids.items()}
    if (sp_model := getattr(tokenizer, "sp_model", None)) is not None:
        names |= {"unk_token": sp_model.id_to_piece(sp_model.unk_id()), "tokenizer_class": "LlamaTokenizer"}
    adds_bos = getattr(tokenizer, "adds_bos", True)
    return names | {"add_bos_token": adds_bos, "model_max_length": planner.max_seq_len}


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


def _schema(kind: type[protocol.Body]) -> dict[str, Any]:
    """The schema of a body: its model's, with the fields without effect, and null wherever a field may be left out."""
    schema = kind.model_json_schema()
    required = schema.get("required", ())
    properties = {
        name: {} if values is protocol.ANY else {"enum": [*values, None]} for name, values in kind.neutral.items()
    }
    for name, own in schema["properties"].items():
        properties[name] = own if name in required else {"anyOf": [own, {"type": "null"}]}
    return schema | {"properties": properties}
