"""Completes the requests of a batch with all replicas of the network."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice

from llama.distributed import groups
from llama.errors import NonFiniteLogitsError
from llama.generation import Llama
from llama.serving.batch_file import Line, Reader, error_result, result
from llama.serving.endpoints import Request
from llama.serving.errors import ApiError
from llama.serving.jobs import Job, as_completed

_ROUND = 8  # requests per row of the cache and replica that are handed out at a time


@dataclass(frozen=True)
class Result:
    """A line of results, and what it took.

    Attributes:
        line: number of the request's line in the input.
        text: the line of results.
        n_prompt_tokens: 0 for a request that was refused.
        n_new_tokens: number of generated tokens.
        is_refused: whether the request was wrong.
    """

    line: int
    text: bytes
    n_prompt_tokens: int = 0
    n_new_tokens: int = 0
    is_refused: bool = False


class BatchWork:
    """Runs requests on every rank; the first rank has the input, and gets the results.

    Lines are handed out in rounds, from which each replica takes a static share. All ranks must call `run` together.

    Args:
        lines: the requests without results, on the first rank; ignored on the others.
        read: checks a request.
        fingerprint: goes into the results.
        write: called on the first rank with each result; those of the other replicas come at the end of a round.
    """

    def __init__(
        self,
        llama: Llama,
        lines: Iterable[Line],
        read: Reader,
        fingerprint: str,
        write: Callable[[Result], None],
    ) -> None:
        self._llama = llama
        self._lines = iter(lines)
        self._read = read
        self._fingerprint = fingerprint
        self._write = write
        self._replica, self._n_replicas = groups.replica()
        self._results: list[Result] = []  # of this replica, that the first rank does not have yet

    def run(self) -> None:
        """Completes all requests."""
        for (line, request), pieces in as_completed(self._llama, self._jobs()):
            if isinstance(pieces, NonFiniteLogitsError):
                error = ApiError(str(pieces), status=500, code="logits_not_finite")
                self._add(Result(line.number, error_result(line, error), is_refused=True))
                continue
            self._add(
                Result(
                    line.number,
                    result(line, request, pieces, self._read.model, self._fingerprint),
                    sum(map(len, request.job.prompts)),
                    sum(piece.n_generated for piece in pieces),
                )
            )
        self._collect()

    def _jobs(self) -> Iterator[tuple[tuple[Line, Request], Job]]:
        """The jobs of this replica's shares. A request that is wrong gets its result at once."""
        while lines := self._next_round():
            for line in lines[self._replica :: self._n_replicas]:
                try:
                    request = self._read(line)
                except ApiError as error:
                    self._add(Result(line.number, error_result(line, error), is_refused=True))
                    continue
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
            if groups.is_first_rank():
                for done in results:
                    self._write(done)
        self._results = []
