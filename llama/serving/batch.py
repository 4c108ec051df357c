"""Completes files of requests in OpenAI's batch format, with all replicas of the network; their files of results.

The bodies of requests and results are as in the server, see `llama.serving`.
https://platform.openai.com/docs/api-reference/batch
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from llama.distributed import groups
from llama.engine.output import Piece
from llama.errors import NonFiniteLogitsError, first_few, quote
from llama.generation import Llama
from llama.serving.endpoints import CHAT_URL, COMPLETIONS_URL, Request, read_request
from llama.serving.errors import ApiError
from llama.serving.formats import CompletionAnswer
from llama.serving.jobs import Job, Planner, as_completed

MAX_CHOICES = 4096  # of a request, over all of its prompts
_LINE_FIELDS = ("custom_id", "method", "url", "body")
_ROUND = 8  # requests per row of the cache and replica that are handed out at a time
_SYNC_S = 5.0  # between two times that the results are forced onto the disk


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
        fields = json.loads(raw)
        if not isinstance(fields, dict):
            raise ValueError("it is another value")
    except (ValueError, RecursionError) as problem:  # UnicodeDecodeError too
        error = f"a line must be a JSON object, got {quote(raw.decode(errors='replace'))} ({problem})"
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


def read_body(line: Line, planner: Planner, seed: int) -> Request:
    """The request of a line.

    Args:
        seed: requests without a `seed` get one derived from this and their `custom_id`, so that their results depend
            neither on the other requests nor on when they run.

    Raises:
        ApiError: a field is wrong, missing, or not supported.
    """
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
        digest = hashlib.sha256(f"{seed}:{line.custom_id}".encode(errors="replace")).digest()
        body = body | {"seed": int.from_bytes(digest[:7], "big")}
    request = read_request(url, body, planner)
    if request.is_stream:
        raise ApiError("stream must be false or left out in a batch file, got true", param="stream")
    return request


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
    answer, counts = request.answer, request.answer.counts
    counts.n_generated = sum(piece.n_generated for piece in pieces)
    assert isinstance(answer, CompletionAnswer)  # by its URL
    body = answer.whole(pieces) | {"id": f"{answer.prefix}-{line.digest}"}
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


def complete_lines(
    llama: Llama, lines: Iterable[Line], planner: Planner, seed: int, write: Callable[[Result], None]
) -> None:
    """Completes requests on all ranks, which call this together.

    Lines are handed out in rounds, from which each replica takes a static share.

    Args:
        lines: the requests, on the first rank; ignored on the others.
        seed: as in `read_body`.
        write: called on the first rank with each result; the other replicas' come at the end of a round.
    """
    replica, n_replicas = groups.replica()
    is_first, remaining = groups.is_first_rank(), iter(lines)
    size = _ROUND * llama.model.params.max_batch_size * n_replicas
    unsent: list[Result] = []  # results of this replica that the first rank does not have
    add = write if is_first else unsent.append

    def collect() -> None:
        for results in groups.gather_replicas(unsent if replica else []):
            for result in results if is_first else ():
                write(result)
        unsent.clear()

    def jobs() -> Iterator[tuple[tuple[Line, Request], Job]]:
        while True:
            collect()
            if not (part := groups.broadcast_object(list(islice(remaining, size)) if is_first else None)):
                return
            for line in part[replica::n_replicas]:
                try:
                    request = read_body(line, planner, seed)
                except ApiError as error:
                    add(_refused(line, error))
                else:
                    yield (line, request), request.job

    with groups.rank_errors():
        for (line, request), pieces in as_completed(llama, jobs()):
            if isinstance(pieces, NonFiniteLogitsError):
                add(_refused(line, ApiError.of(pieces)))
            else:
                add(_completed(line, request, pieces))
        collect()


class Results:
    """The file of results, one per line, to which results are added. No other process may have it open.

    Args:
        input: the file of requests.
        path: of the results.

    Attributes:
        pending: numbers of the input's lines that have no result, each with its `custom_id`.
        n_lines: number of requests in the input.
        n_refused: number of results that were errors when this began.

    Raises:
        ValueError: two requests have the same `custom_id`, or a result belongs to no request of the input.
    """

    def __init__(self, input: Path, path: Path) -> None:
        if not input.is_file():
            raise FileNotFoundError(f"--input must be a file of requests, got {input}, where there is none")
        if path.exists() and (not path.is_file() or path.samefile(input)):
            raise ValueError(f"--output must be a file other than --input, got {path}")
        self.pending: dict[int, str | None] = {}
        self._fingerprints: dict[str, int] = {}  # of the runs that wrote results, each with its first line's number
        self._input = input
        self._path = path
        is_new = not path.exists()
        with ExitStack() as undo:
            self._file = undo.enter_context(open(path, "a+b"))
            _lock(self._file.fileno(), path)
            self._synced = time.monotonic()
            if is_new:
                folder = os.open(path.parent, os.O_RDONLY)
                os.fsync(folder)
                os.close(folder)
            self._compare()
            undo.pop_all()  # from here on, `close` closes it

    def _read(self) -> Iterator[tuple[int, dict[str, Any]]]:
        """The results in the file, with the numbers of their lines. Removes a last line that was not written whole."""
        self._file.seek(0)
        for number, raw in enumerate(self._file, start=1):
            is_cut = not raw.endswith(b"\n")
            try:
                fields = json.loads(raw)
                if not isinstance(fields, dict) or not isinstance(fields.get("id"), str):
                    raise ValueError("not a result")
            except (ValueError, RecursionError) as error:
                if is_cut and raw.startswith(b"{"):
                    self._file.truncate(self._file.tell() - len(raw))
                    break
                raise ValueError(
                    f"{self._path}, line {number}: each line must be a result of this command, got "
                    f"{quote(raw.decode(errors='replace'))}; use another --output, or remove the line"
                ) from error
            if is_cut:  # by its newline alone
                self._file.write(b"\n")
            yield number, fields

    def _compare(self) -> None:
        """Finds the requests that have results."""
        numbers: dict[str, int] = {}
        ids: dict[str, int] = {}
        for line in read_requests(self._input):
            ids[line.result_id] = line.number
            self.pending[line.number] = line.custom_id
            if line.custom_id is not None and numbers.setdefault(line.custom_id, line.number) != line.number:
                got = f"{quote(line.custom_id)}, which line {numbers[line.custom_id]} has too"
                raise ValueError(f"{self._input}: line {line.number} must have a custom_id of its own, got {got}")
        self.n_lines, self.n_refused = len(self.pending), 0
        for number, fields in self._read():
            request, custom_id = ids.get(fields["id"]), fields.get("custom_id")
            if request is None:
                was = numbers.get(custom_id) if isinstance(custom_id, str) else None
                now = f"line {was} of the input has another request now" if was else "the input has no such request"
                raise ValueError(
                    f"--output must be a new file, or the results of the same --input, got {self._path}, whose line "
                    f"{number} is the result of custom_id {quote(custom_id)}: {now}; to rerun a corrected request, "
                    "remove its result"
                )
            if request not in self.pending:
                got = f"custom_id {quote(custom_id)} must have one result, got two"
                raise ValueError(f"{self._path}, line {number}: {got}")
            del self.pending[request]
            self.n_refused += bool(fields.get("error"))
            try:
                self._fingerprints.setdefault(fields["response"]["body"]["system_fingerprint"], number)
            except (KeyError, TypeError):  # an error, which does not depend on the network
                continue

    def check_fingerprint(self, mark: str) -> None:
        """Raises ValueError if there are results of another network or seed than the one with this fingerprint."""
        for other, number in self._fingerprints.items():
            if other != mark:
                raise ValueError(
                    "--output must be a new file, or results of the same checkpoint, tokenizer, dtype, quantize, "
                    f"max_seq_len and seed, got {self._path}, whose line {number} is a result of others "
                    f"(system_fingerprint {quote(other)}, now {mark})"
                )

    def remaining(self) -> Iterator[Line]:
        """The requests without results."""
        return (line for line in read_requests(self._input) if line.number in self.pending)

    def append(self, line: bytes) -> None:
        """Adds a line. It is in the file on return, and on the disk within `_SYNC_S` of the next line."""
        try:
            self._file.write(line)
            self._file.flush()
            if time.monotonic() - self._synced > _SYNC_S:
                self._sync()
        except OSError as error:
            raise OSError(
                error.errno,
                f"{self._path} could not be written ({error.strerror}); its whole lines are kept: make room, and start "
                "the command again, which continues where this run stopped",
            ) from error

    def check(self) -> None:
        """Closes the file; raises ValueError unless it has the results of all requests, both files read again."""
        self.close()
        again = Results(self._input, self._path)
        again.close()
        if missing := self.pending | again.pending:
            raise ValueError(
                f"--input and --output must not change while the command runs, got {len(missing)} requests without a "
                f"result in {self._path}, such as {first_few([quote(custom_id) for custom_id in missing.values()])}; "
                "start the command again, which runs them"
            )

    def close(self) -> None:
        if not self._file.closed:
            with self._file:
                self._sync()

    def _sync(self) -> None:
        os.fsync(self._file.fileno())
        self._synced = time.monotonic()


def _lock(fd: int, path: Path) -> None:
    """Locks the file until this process ends; without effect on a file system without locks."""
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise ValueError(
            f"--output must be a file that no other process is writing, got {path}; wait for the other process to end"
        ) from error
    except OSError:
        return
