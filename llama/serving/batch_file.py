"""OpenAI's batch file format: from a line of requests to its work, and from completions to a line of results.

The bodies of requests and results are those of the server, see `llama.serving`.
https://platform.openai.com/docs/api-reference/batch
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from llama.engine.output import Piece
from llama.errors import quote
from llama.serving.endpoints import CHAT_URL, COMPLETIONS_URL, Request, read_request
from llama.serving.errors import ApiError
from llama.serving.formats import Counts
from llama.serving.jobs import Planner

MAX_CHOICES = 4096  # of a request, over all of its prompts
_LINE_FIELDS = ("custom_id", "method", "url", "body")


@dataclass(frozen=True)
class Line:
    """A line of the input.

    Attributes:
        number: from 1.
        digest: identifies the line's content; for a line that is not a JSON object, its number too.
        custom_id: None for a line that is not a JSON object.
        fields: the JSON object; None for a line that is not one.
        error: why it is not one.
    """

    number: int
    digest: str
    custom_id: str | None
    fields: Mapping[str, Any] | None
    error: str | None = None


def read_line(number: int, raw: bytes) -> Line:
    """Reads a line of the input.

    Raises:
        ValueError: the line is a JSON object without a `custom_id`.
    """
    raw = raw.strip()
    try:
        fields, error = json.loads(raw), None
        if not isinstance(fields, dict):
            error = f"a line must be a JSON object, got {quote(fields)}"
    except (ValueError, RecursionError) as problem:  # UnicodeDecodeError too
        error = f"a line must be a JSON object, got {quote(raw.decode(errors='replace'))} ({problem})"
    if error is not None:
        return Line(number, _digest(f"{number}:".encode() + raw), None, None, error)
    custom_id = fields.get("custom_id")
    if not isinstance(custom_id, str) or not custom_id:
        got = quote(custom_id) if "custom_id" in fields else "none"
        raise ValueError(f"line {number} must have a custom_id, a string of its own, got {got}")
    return Line(number, _digest(raw), custom_id, fields)


def _digest(raw: bytes) -> str:
    return hashlib.sha256(raw).hexdigest()[:24]


@dataclass(frozen=True)
class Reader:
    """Checks the requests of lines.

    Args:
        planner: of the network.
        model: name of the checkpoint, which requests may give as `model`.
        seed: requests without a `seed` get one derived from this and their `custom_id`, so that their results depend
            neither on the other requests nor on when they run.
    """

    planner: Planner
    model: str
    seed: int

    def __call__(self, line: Line) -> Request:
        """The request of a line.

        Raises:
            ApiError: a field is wrong, missing, or not supported.
        """
        if line.fields is None:
            raise ApiError(line.error or "", code="invalid_json")
        for name in line.fields:
            if name not in _LINE_FIELDS:
                raise ApiError(
                    f"a line must have no fields but {', '.join(_LINE_FIELDS)}, got {quote(name)}", param=name
                )
        if line.fields.get("method") != "POST":
            raise ApiError(f"method must be 'POST', got {quote(line.fields.get('method'))}", param="method")
        url, body = line.fields.get("url"), line.fields.get("body")
        if url not in (CHAT_URL, COMPLETIONS_URL):
            raise ApiError(
                f"url must be {CHAT_URL} or {COMPLETIONS_URL}, got {quote(url)}", param="url", code="invalid_url"
            )
        if not isinstance(body, dict):
            raise ApiError(f"body must be a JSON object, got {quote(body)}", param="body")
        if body.get("seed") is None:
            body = body | {"seed": self._seed_of(str(line.custom_id))}
        request = read_request(url, body, self.planner, self.model)
        if request.body.stream:
            raise ApiError("stream must be false or left out in a batch file, got true", param="stream")
        return request

    def _seed_of(self, custom_id: str) -> int:
        digest = hashlib.sha256(f"{self.seed}:{custom_id}".encode(errors="replace")).digest()
        return int.from_bytes(digest[:7], "big")


def result(line: Line, request: Request, pieces: Sequence[Piece], model: str, fingerprint: str) -> bytes:
    """The line of results of a completed request.

    Args:
        pieces: one for each choice, with all that it got.
    """
    n_generated = sum(piece.n_generated for piece in pieces)
    counts = Counts(sum(map(len, request.job.prompts)), n_generated, None)
    body = request.answer(model, fingerprint).whole([[piece] for piece in pieces], counts)
    body |= {"id": f"{request.form.prefix}-{line.digest}"}
    return _line_of(line, 200, body, None)


def error_result(line: Line, error: ApiError) -> bytes:
    """The line of results of a request that was refused. The error is in both places where clients look for it."""
    body = error.body()
    fields = {name: body["error"][name] for name in ("message", "param", "code")}
    return _line_of(line, error.status, body, fields | {"line": line.number})


def _line_of(line: Line, status: int, body: dict[str, Any], error: dict[str, Any] | None) -> bytes:
    response = {"status_code": status, "request_id": f"req_{line.digest}", "body": body}
    whole = {"id": result_id(line), "custom_id": line.custom_id, "response": response, "error": error}
    return json.dumps(whole).encode() + b"\n"


def result_id(line: Line) -> str:
    """The `id` of a request's result, which identifies the request's content."""
    return f"batch_req_{line.digest}"
