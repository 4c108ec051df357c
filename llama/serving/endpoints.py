"""The endpoints of the server and of batch files: what a body asks for, and the form of its answer."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

from llama.chat import Message
from llama.errors import PromptError
from llama.serving.errors import ApiError
from llama.serving.fields import Unknown
from llama.serving.formats import ChatAnswer, CompletionAnswer, TextAnswer, token_text
from llama.serving.jobs import Job, Planner
from llama.serving.protocol import (
    AnyBody,
    ChatBody,
    CompletionBody,
    DetokenizeBody,
    TokenizeBody,
    check_body,
    check_model,
)
from llama.serving.responses import ResponseAnswer, ResponsesBody, as_chat

CHAT_URL, COMPLETIONS_URL, RESPONSES_URL = "/v1/chat/completions", "/v1/completions", "/v1/responses"


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
    except PromptError as error:
        raise ApiError.of(error) from error
    except ImportError as error:  # an extra is not installed
        raise ApiError(str(error), status=501, code="unsupported_parameter") from error


def _checked(values: Any, kind: type[AnyBody], planner: Planner, unknown: Unknown | None = None) -> AnyBody:
    planner.check_size(values)
    body = check_body(values, kind, unknown)
    check_model(body.model, planner.model_name)
    return body


@_errors_of_clients()
def read_request(url: str, values: Any, planner: Planner, unknown: Unknown | None = None) -> Request:
    """What a body, as JSON has it, asks for at one of the URLs above; `unknown` as in `check_body`.

    Raises:
        ApiError: a field is wrong or not supported.
    """
    unknown = unknown or Unknown()
    if url == RESPONSES_URL:
        asked = _checked(values, ResponsesBody, planner, unknown)
        return Request(planner.chat(as_chat(asked, unknown)), ResponseAnswer(asked, planner.model_name), asked.stream)
    if url == CHAT_URL:
        chat = _checked(values, ChatBody, planner, unknown)
        job = planner.chat(chat)
        return Request(job, ChatAnswer(chat, job, planner), chat.stream)
    text = _checked(values, CompletionBody, planner, unknown)
    job = planner.completion(text)
    return Request(job, TextAnswer(text, job, planner), text.stream)


@_errors_of_clients()
def tokenize(values: Any, planner: Planner) -> dict[str, Any]:
    """The answer to `POST /tokenize`: the ids of a text, or those that a chat's answer would follow."""
    body = _checked(values, TokenizeBody, planner)
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
    body = _checked(values, DetokenizeBody, planner)
    planner.check_ids(body.tokens, "tokens")
    return {"prompt": planner.tokenizer.decode(body.tokens)}


def tokenizer_info(planner: Planner) -> dict[str, Any]:
    """The answer to `GET /tokenizer_info`."""
    tokenizer = planner.tokenizer
    ids = {"bos_token": tokenizer.bos_id, "eos_token": tokenizer.eos_id}
    names: dict[str, Any] = {name: token_text(token, tokenizer)[0] for name, token in ids.items()}
    if (sp_model := getattr(tokenizer, "sp_model", None)) is not None:
        names |= {"unk_token": sp_model.id_to_piece(sp_model.unk_id()), "tokenizer_class": "LlamaTokenizer"}
    adds_bos = getattr(tokenizer, "adds_bos", True)
    return names | {"add_bos_token": adds_bos, "model_max_length": planner.max_seq_len}
