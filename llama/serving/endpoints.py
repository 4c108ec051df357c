"""The two endpoints of the server and of batch files: what a body asks for, and the form of its answer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from llama.errors import quote
from llama.serving.errors import ApiError
from llama.serving.formats import ChatFormat, CompletionFormat, Format
from llama.serving.jobs import Job, Planner
from llama.serving.protocol import ChatBody, CompletionBody, Unknown, check_body

CHAT_URL, COMPLETIONS_URL = "/v1/chat/completions", "/v1/completions"


@dataclass(frozen=True)
class Request:
    """A checked body.

    Attributes:
        job: its work.
        form: the form of its answer.
    """

    body: ChatBody | CompletionBody
    job: Job
    form: Format


def read_request(url: str, values: Any, planner: Planner, model_name: str, unknown: Unknown | None = None) -> Request:
    """Checks a body.

    Args:
        url: `CHAT_URL` or `COMPLETIONS_URL`.
        values: the body, as JSON has it.
        model_name: the name of the network, which the body may leave out.
        unknown: as in `check_body`.

    Raises:
        ApiError: a field is wrong or not supported.
    """
    planner.check_size(values)
    if url == CHAT_URL:
        chat = check_body(values, ChatBody, unknown)
        check_model(chat.model, model_name)
        return Request(chat, planner.chat(chat), ChatFormat(planner.tokenizer, logprobs=chat.logprobs))
    text = check_body(values, CompletionBody, unknown)
    check_model(text.model, model_name)
    job = planner.completion(text)
    if text.logprobs is None:
        return Request(text, job, CompletionFormat(planner.tokenizer))
    prompts = [prompt if isinstance(prompt, str) else planner.tokenizer.decode(prompt) for prompt in text.prompt]
    offsets = [0 if text.echo else len(prompt) for prompt in prompts for _ in range(text.n)]
    return Request(text, job, CompletionFormat(planner.tokenizer, offsets))


def check_model(name: str | None, expected: str) -> None:
    """Raises ApiError for a model of another name."""
    if name is not None and name != expected:
        raise ApiError(
            f"model must be {quote(expected)}, got {quote(name)}", status=404, param="model", code="model_not_found"
        )
