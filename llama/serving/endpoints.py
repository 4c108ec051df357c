"""The endpoints of the server and of batch files: what a body asks for, and the form of its answer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

from llama.chat import Message
from llama.errors import quote
from llama.serving.errors import ApiError
from llama.serving.formats import ChatFormat, CompletionAnswer, CompletionFormat, Format, token_text
from llama.serving.jobs import Job, Planner
from llama.serving.protocol import (
    ChatBody,
    CompletionBody,
    DetokenizeBody,
    StreamOptions,
    TokenizeBody,
    Unknown,
    check_body,
)

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

    def answer(self, model_name: str, fingerprint: str | None) -> CompletionAnswer:
        options = self.body.stream_options or StreamOptions()
        return CompletionAnswer(
            self.form,
            self.job.n_choices,
            model_name,
            fingerprint,
            include_usage=options.include_usage,
            continuous_usage=options.continuous_usage_stats,
        )


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
    form = CompletionFormat(planner.tokenizer, echo=text.echo, prompt_logprobs=text.prompt_logprobs)
    job = planner.completion(text)
    if text.logprobs is not None or text.prompt_logprobs is not None:
        form.count(job.prompts, text.n, with_logprobs=text.logprobs)
    return Request(text, job, form)


def tokenize(values: Any, planner: Planner, model_name: str) -> dict[str, Any]:
    """The answer to `POST /tokenize`: the ids of a text, or those that a chat's answer would follow.

    Raises:
        ApiError: a field is wrong, or the text is too long.
    """
    planner.check_size({"messages": values.get("messages")} if isinstance(values, dict) else None)
    body = check_body(values, TokenizeBody)
    check_model(body.model, model_name)
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


def detokenize(values: Any, planner: Planner, model_name: str) -> dict[str, Any]:
    """The answer to `POST /detokenize`: the text of ids. Control pieces have none."""
    planner.check_size(values)
    body = check_body(values, DetokenizeBody)
    check_model(body.model, model_name)
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


def check_model(name: str | None, expected: str) -> None:
    """Raises ApiError for a model of another name."""
    if name is not None and name != expected:
        raise ApiError(
            f"model must be {quote(expected)}, got {quote(name)}", status=404, param="model", code="model_not_found"
        )
