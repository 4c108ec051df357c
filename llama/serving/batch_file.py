"""Completes files of requests in OpenAI's batch format, with all replicas of the network.

The bodies of requests and results are as in the server, see `llama.serving`.
https://platform.openai.com/docs/api-reference/batch
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from llama.distributed import groups
from llama.engine.output import Piece
from llama.errors import NonFiniteLogitsError, quote
from llama.generation import Llama
from llama.serving.endpoints import CHAT_URL, COMPLETIONS_URL, Request, read_request
from llama.serving.errors import ApiError
from llama.serving.formats import CompletionAnswer, Counts
from llama.serving.jobs import Job, Planner, as_completed

MAX_CHOICES = 4096  # of a request, over all of its prompts
_LINE_FIELDS = ("custom_id", "method", "url", "body")
_ROUND = 8  # requests per row of the cache and replica that are handed out at a time


@dataclass(frozen=True)
class Line:
    """A line of the input."""

    number: int  # from 1
    digest: str  # of the line's content; for a line that is not a JSON object, of its number too
    custom_id: str | None  # None for a line that is not a JSON object
    fields: Mapping[str, Any] | None  # the JSON object
    error: str | None = None  # why the line is not one

    @property
    def result_id(self) -> str:
        """The `id` of the request's result."""
        return f"batch_req_{self.digest}"


def read_line(number: int, raw: bytes) -> Line:
    """Reads a line of the input; raises ValueError for a JSON object without a `custom_id`."""
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


def read_requests(path: Path) -> Iterator[Line]:
    """The lines of a file of requests; empty ones are skipped. Raises ValueError for one without a `custom_id`."""
    with open(path, "rb") as file:
        for number, raw in enumerate(file, start=1):
            raw = raw.removeprefix(b"\xef\xbb\xbf") if number == 1 else raw
            if raw.strip():
                try:
                    yield read_line(number, raw)
                except ValueError as error:
                    raise ValueError(f"{path}: {error}") from error


@dataclass(frozen=True)
class Reader:
    """Checks the requests of lines.

    Args:
        seed: requests without a `seed` get one derived from this and their `custom_id`, so that their results depend
            neither on the other requests nor on when they run.
    """

    planner: Planner
    seed: int

    def __call__(self, line: Line) -> Request:
        """The request of a line; raises ApiError if a field is wrong, missing, or not supported."""
        if line.fields is None:
            raise ApiError(line.error or "", code="invalid_json")
        for name in line.fields:
            if name not in _LINE_FIELDS:
                message = f"a line must have no fields but {', '.join(_LINE_FIELDS)}, got {quote(name)}"
                raise ApiError(message, param=name)
        if line.fields.get("method") != "POST":
            raise ApiError(f"method must be 'POST', got {quote(line.fields.get('method'))}", param="method")
        url, body = line.fields.get("url"), line.fields.get("body")
        if url not in (CHAT_URL, COMPLETIONS_URL):
            message = f"url must be {CHAT_URL} or {COMPLETIONS_URL}, got {quote(url)}"
            raise ApiError(message, param="url", code="invalid_url")
        if not isinstance(body, dict):
            raise ApiError(f"body must be a JSON object, got {quote(body)}", param="body")
        if body.get("seed") is None:
            body = body | {"seed": self._seed_of(str(line.custom_id))}
        request = read_request(url, body, self.planner)
        if request.is_stream:
            raise ApiError("stream must be false or left out in a batch file, got true", param="stream")
        return request

    def _seed_of(self, custom_id: str) -> int:
        digest = hashlib.sha256(f"{self.seed}:{custom_id}".encode(errors="replace")).digest()
        return int.from_bytes(digest[:7], "big")


@dataclass(frozen=True)
class Result:
    """A line of results, and what it took."""

    line: int  # of the request in the input
    text: bytes
    n_prompt_tokens: int = 0
    n_new_tokens: int = 0
    is_refused: bool = False


def _completed(line: Line, request: Request, pieces: Sequence[Piece]) -> Result:
    """The result of a request, given all of each choice as one piece."""
    counts = Counts(sum(map(len, request.job.prompts)), sum(piece.n_generated for piece in pieces))
    assert isinstance(request.answer, CompletionAnswer)  # by its URL
    body = request.answer.whole(pieces, counts) | {"id": f"{request.answer.prefix}-{line.digest}"}
    del body["usage"]["prompt_tokens_details"]  # depends on the other requests
    return Result(line.number, _text_of(line, 200, body, None), counts.n_prompt, counts.n_generated)


def _refused(line: Line, error: ApiError) -> Result:
    """The result of a request that was wrong. The error is in both places where clients look for it."""
    body = error.body()
    fields = {name: body["error"][name] for name in ("message", "param", "code")} | {"line": line.number}
    return Result(line.number, _text_of(line, error.status, body, fields), is_refused=True)


def _text_of(line: Line, status: int, body: dict[str, Any], error: dict[str, Any] | None) -> bytes:
    response = {"status_code": status, "request_id": f"req_{line.digest}", "body": body}
    whole = {"id": line.result_id, "custom_id": line.custom_id, "response": response, "error": error}
    return json.dumps(whole).encode() + b"\n"


class BatchWork:
    """Runs requests on every rank; the first rank has the input, and gets the results.

    Lines are handed out in rounds, from which each replica takes a static share. All ranks must call `run` together.

    Args:
        lines: the requests without results, on the first rank; ignored on the others.
        write: called on the first rank with each result; the other replicas' come at the end of a round.
    """

    def __init__(self, llama: Llama, lines: Iterable[Line], read: Reader, write: Callable[[Result], None]) -> None:
        self._llama = llama
        self._lines = iter(lines)
        self._read = read
        self._write = write
        self._replica, self._n_replicas = groups.replica()
        self._results: list[Result] = []  # of this replica, that the first rank does not have yet

    def run(self) -> None:
        """Completes all requests."""
        with groups.rank_errors():
            for (line, request), pieces in as_completed(self._llama, self._jobs()):
                if isinstance(pieces, NonFiniteLogitsError):
                    self._add(_refused(line, ApiError(str(pieces), status=500, code="logits_not_finite")))
                else:
                    self._add(_completed(line, request, pieces))
            self._collect()

    def _jobs(self) -> Iterator[tuple[tuple[Line, Request], Job]]:
        """The jobs of this replica's shares. A request that is wrong gets its result at once."""
        while lines := self._next_round():
            for line in lines[self._replica :: self._n_replicas]:
                try:
                    request = self._read(line)
                except ApiError as error:
                    self._add(_refused(line, error))
                else:
                    yield (line, request), request.job

    def _next_round(self) -> list[Line]:
        """Hands over this replica's results; returns the lines of the next round, the same on all ranks."""
        self._collect()
        size = _ROUND * self._llama.model.params.max_batch_size * self._n_replicas
        return groups.broadcast_object(list(islice(self._lines, size)) if groups.is_first_rank() else None) or []

    def _add(self, done: Result) -> None:
        if groups.is_first_rank():
            self._write(done)
        else:
            self._results.append(done)

    def _collect(self) -> None:
        """Writes the results of the other replicas on the first rank."""
        for results in groups.gather_replicas(self._results if self._replica else []):
            for done in results if groups.is_first_rank() else ():
                self._write(done)
        self._results = []
