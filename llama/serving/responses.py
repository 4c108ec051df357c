"""OpenAI's Responses API: stateless, of texts alone. A request becomes a chat; its answer has another form.

https://platform.openai.com/docs/api-reference/responses
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Sequence
from typing import Annotated, Any

from pydantic import Field, WithJsonSchema

from llama.engine.output import Piece
from llama.serving import protocol
from llama.serving.errors import ApiError
from llama.serving.formats import Counts, event
from llama.serving.jobs import Job, Planner
from llama.serving.protocol import ANY, Body, ChatBody, Table, Unknown, check_body, check_messages

NEUTRAL: Table = {
    **protocol.NEUTRAL,
    "previous_response_id": (),
    "conversation": (),
    "prompt": (),
    "background": (False,),
    "include": ([], ["reasoning.encrypted_content"]),  # there is no reasoning
    "truncation": ("disabled",),
    "top_logprobs": (0,),
    "reasoning": ANY,
    "max_tool_calls": ANY,
    "stream_options": ANY,
}
_INPUT = {"anyOf": [{"type": "string"}, protocol.MESSAGES]}


class ResponsesBody(Body):
    """The body of `POST /v1/responses`."""

    neutral = NEUTRAL

    input: Annotated[str | list[dict[str, Any]], WithJsonSchema(_INPUT)]
    instructions: str | None = None
    text: dict[str, Any] = Field(default={})
    max_output_tokens: int | None = Field(default=None, ge=1)
    temperature: float = Field(default=1.0, ge=0, le=2)
    top_p: float = Field(default=1.0, ge=0, le=1)
    stream: bool = False


def as_chat(body: ResponsesBody, unknown: Unknown) -> ChatBody:
    """The chat that a body asks for; raises ApiError if its input or its text's format is wrong."""
    items = [{"role": "user", "content": body.input}] if isinstance(body.input, str) else body.input
    messages = check_messages(items, unknown, "input")
    if body.instructions is not None:
        messages.insert(0, {"role": "system", "content": body.instructions})
    form = unknown.select(body.text, ("format",), {"verbosity": ANY}, prefix="text.").get("format")
    unknown.check()
    values = {
        "messages": messages,
        "temperature": body.temperature,
        "top_p": body.top_p,
        "max_completion_tokens": body.max_output_tokens,
        "response_format": _response_format(form),
    }
    return check_body(values, ChatBody)


def _response_format(form: Any) -> Any:
    """The format of an answer's text as a chat's body has it, in which a schema stands one level deeper."""
    if not isinstance(form, dict) or form.get("type") != "json_schema":
        return form
    return {"type": "json_schema", "json_schema": {name: value for name, value in form.items() if name != "type"}}


class ResponseAnswer:
    """The answer of `POST /v1/responses`."""

    def __init__(self, body: ResponsesBody, job: Job, planner: Planner) -> None:
        self.counts = Counts(sum(map(len, job.prompts)))
        self._n_events = 0
        self._text = ""
        self._finish_reason: str | None = None
        self._item_id = f"msg_{uuid.uuid4().hex}"
        self._head: dict[str, Any] = {
            "id": f"resp_{uuid.uuid4().hex}",
            "object": "response",
            "created_at": int(time.time()),
            "model": planner.model_name,
            "background": False,
            "error": None,
            "incomplete_details": None,
            "instructions": body.instructions,
            "max_output_tokens": body.max_output_tokens,
            "metadata": {},
            "parallel_tool_calls": True,
            "previous_response_id": None,
            "reasoning": {"effort": None, "summary": None},
            "store": False,
            "temperature": body.temperature,
            "text": {"format": {"type": "text"}} | body.text,
            "tool_choice": "auto",
            "tools": [],
            "top_p": body.top_p,
            "truncation": "disabled",
            "usage": None,
        }

    def whole(self, pieces: Sequence[Piece]) -> dict[str, Any]:
        self._add(pieces[0])
        return self._complete()

    def start(self) -> list[bytes]:
        response = self._head | {"status": "in_progress", "output": []}
        return [
            self._event("response.created", response=response),
            self._event("response.in_progress", response=response),
            self._event("response.output_item.added", output_index=0, item=self._item("in_progress", [])),
            self._event("response.content_part.added", **self._place(), part=_part("")),
        ]

    def events(self, piece: Piece) -> list[bytes]:
        self._add(piece)
        if not piece.text:
            return []
        return [self._event("response.output_text.delta", **self._place(), delta=piece.text, logprobs=[])]

    def end(self) -> list[bytes]:
        text, response = self._text, self._complete()
        return [
            self._event("response.output_text.done", **self._place(), text=text, logprobs=[]),
            self._event("response.content_part.done", **self._place(), part=_part(text)),
            self._event("response.output_item.done", output_index=0, item=response["output"][0]),
            self._event(f"response.{response['status']}", response=response),
        ]

    def failed(self, error: ApiError) -> bytes:
        reason = {"code": error.code or "server_error", "message": str(error)}
        return self._event("response.failed", response=self._head | {"status": "failed", "output": [], "error": reason})

    def _add(self, piece: Piece) -> None:
        self._text += piece.text
        self._finish_reason = piece.finish_reason

    def _complete(self) -> dict[str, Any]:
        counts, is_cut = self.counts, self._finish_reason == "length"
        status = "incomplete" if is_cut else "completed"
        return self._head | {
            "status": status,
            "incomplete_details": {"reason": "max_output_tokens"} if is_cut else None,
            "output": [self._item(status, [_part(self._text)])],
            "usage": {
                "input_tokens": counts.n_prompt,
                "input_tokens_details": {"cached_tokens": counts.n_cached},
                "output_tokens": counts.n_generated,
                "output_tokens_details": {"reasoning_tokens": 0},
                "total_tokens": counts.n_prompt + counts.n_generated,
            },
        }

    def _item(self, status: str, content: list[dict[str, Any]]) -> dict[str, Any]:
        return {"type": "message", "id": self._item_id, "status": status, "role": "assistant", "content": content}

    def _place(self) -> dict[str, Any]:
        return {"item_id": self._item_id, "output_index": 0, "content_index": 0}

    def _event(self, kind: str, **fields: Any) -> bytes:
        self._n_events += 1
        return event({"type": kind, "sequence_number": self._n_events - 1, **fields}, kind)


def _part(text: str) -> dict[str, Any]:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}
