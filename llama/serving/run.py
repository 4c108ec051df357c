"""A request in the service, as the event loop sees it."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from contextlib import suppress
from typing import Any, TypeVar

from llama.engine.output import Piece
from llama.errors import NonFiniteLogitsError, RankError, printable
from llama.serving.errors import ApiError
from llama.serving.formats import Counts
from llama.serving.jobs import Job, join_choices
from llama.serving.metrics import Metrics
from llama.serving.service import Service

Result = TypeVar("Result")
_SEND_S = 30.0  # beyond a request's time limit, for a client that reads slowly

logger = logging.getLogger(__name__)


class ClientLeftError(Exception):
    """The client closed the connection before its answer was complete."""


class Run:
    """Submits a job, and brings its pieces from the service's thread to the event loop's.

    Pieces for a client that reads slowly are queued here, so that the service never waits. A context manager: at its
    end, what still runs is aborted.

    Args:
        arrived: time of the request's arrival, by `time.perf_counter`.
        timeout_s: maximum time from its arrival to the last piece.

    Attributes:
        counts: the numbers of tokens so far.
    """

    def __init__(self, service: Service, job: Job, metrics: Metrics, *, arrived: float, timeout_s: float) -> None:
        self.counts = Counts(sum(map(len, job.prompts)))
        self._service = service
        self._metrics = metrics
        self._arrived = arrived
        self._n_open = job.n_choices
        self._n_per_prompt = job.n
        self._first: float | None = None  # time of the first token
        self._last = arrived
        self._queue: asyncio.Queue[tuple[float, Piece | BaseException]] = asyncio.Queue()
        self._loop = asyncio.get_running_loop()
        self._number = service.submit(job, self._put)
        timeout = ApiError(
            f"the answer must be complete within the server's time limit of {timeout_s:g} seconds, got a longer one",
            status=504,
            code="timeout",
            headers={"x-should-retry": "false"},
        )
        left_s = timeout_s - (time.perf_counter() - arrived)
        self._timer = self._loop.call_later(left_s, self._queue.put_nowait, (0.0, timeout))
        metrics.prompt_tokens.inc(self.counts.n_prompt)

    def __enter__(self) -> Run:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._timer.cancel()
        self._service.abort(self._number)
        self._metrics.duration.observe(time.perf_counter() - self._arrived)
        if self._first is not None:
            self._metrics.first_token.observe(self._first - self._arrived)
            if self.counts.n_generated > 1:
                self._metrics.per_token.observe((self._last - self._first) / (self.counts.n_generated - 1))

    async def pieces(self) -> AsyncIterator[Piece]:
        """The pieces of all choices. Raises ApiError if the service fails, or the time limit has passed."""
        while self._n_open:
            at, piece = await self._queue.get()
            if isinstance(piece, BaseException):
                raise _api_error(piece) from piece
            if piece.n_generated:
                self._first = self._first or at
                self._last = at
                self.counts.n_generated += piece.n_generated
            if piece.choice % self._n_per_prompt == 0:
                self.counts.n_cached += piece.n_reused
            self._n_open -= piece.finish_reason is not None
            yield piece

    async def all_pieces(self) -> list[Piece]:
        """All of each choice, as one piece; errors as of `pieces`."""
        return join_choices([piece async for piece in self.pieces()])

    def _put(self, piece: Piece | BaseException) -> None:
        """Called in the service's thread."""
        with suppress(RuntimeError):  # the loop has been closed
            self._loop.call_soon_threadsafe(self._queue.put_nowait, (time.perf_counter(), piece))


async def while_connected(
    work: Coroutine[Any, Any, Result], receive: Callable[[], Awaitable[Any]], timeout_s: float
) -> Result:
    """The result of `work`; raises ClientLeftError if the client leaves, or does not read its answer in time.

    Args:
        receive: ASGI's, from which the whole body has been read.
        timeout_s: time limit of the request; a client has `_SEND_S` more to read the answer.
    """

    async def client_leaves() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    working, leaving = asyncio.ensure_future(work), asyncio.ensure_future(client_leaves())
    try:
        await asyncio.wait({working, leaving}, timeout=timeout_s + _SEND_S, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientLeftError
        return working.result()
    finally:
        for task in (working, leaving):
            task.cancel()
        await asyncio.gather(working, leaving, return_exceptions=True)


def _api_error(error: BaseException) -> ApiError:
    if isinstance(error, ApiError):
        return error
    if isinstance(error, RankError):
        return ApiError(f"the server has lost a part of the network: {printable(error)}", status=503, code="rank_lost")
    if isinstance(error, NonFiniteLogitsError):
        logger.error("a request failed: %s", error)
        return ApiError(str(error), status=500, code="logits_not_finite", headers={"x-should-retry": "false"})
    logger.error("a request failed", exc_info=error)
    return ApiError("the server failed to compute the answer; its log says why", status=500, code="failed")
