"""A request in the service, as the event loop sees it."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Coroutine
from contextlib import suppress
from typing import Any, TypeVar

from starlette.types import Receive

from llama.engine.output import Piece
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

    Pieces for a client that reads slowly are queued here, so that the service never waits.

    Args:
        counts: gets the number of tokens so far.
        arrived: time of the request's arrival, by `time.perf_counter`.
        timeout_s: maximum time from its arrival to the last piece.
    """

    def __init__(
        self, service: Service, job: Job, counts: Counts, metrics: Metrics, *, arrived: float, timeout_s: float
    ) -> None:
        self._counts = counts
        self._service = service
        self._metrics = metrics
        self._arrived = arrived
        self._timeout_s = timeout_s
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
        metrics.prompt_tokens.inc(self._counts.n_prompt)

    async def pieces(self) -> AsyncIterator[Piece]:
        """The pieces of all choices. Raises ApiError if the service fails, or the time limit has passed."""
        while self._n_open:
            at, piece = await self._queue.get()
            if isinstance(piece, BaseException):
                if (error := ApiError.of(piece)).status == 500:
                    logger.error("a request failed: %s", piece, exc_info=piece if error.code == "failed" else None)
                raise error from piece
            if piece.n_generated:
                self._first = self._first or at
                self._last = at
                self._counts.n_generated += piece.n_generated
            if piece.choice % self._n_per_prompt == 0:
                self._counts.n_cached += piece.n_reused
            self._n_open -= piece.finish_reason is not None
            yield piece

    async def all_pieces(self) -> list[Piece]:
        """All of each choice, as one piece; errors as of `pieces`."""
        return join_choices([piece async for piece in self.pieces()])

    async def until_left(self, work: Coroutine[Any, Any, Result], receive: Receive) -> Result:
        """The result of `work` on the pieces. At its end, what still runs of the job is aborted.

        Args:
            receive: ASGI's, from which the whole body has been read.

        Raises:
            ClientLeftError: the client left, or did not read its answer within `_SEND_S` of the time limit.
        """

        async def client_leaves() -> None:
            while (await receive())["type"] != "http.disconnect":
                pass

        tasks = working, _ = asyncio.ensure_future(work), asyncio.ensure_future(client_leaves())
        try:
            await asyncio.wait(tasks, timeout=self._timeout_s + _SEND_S, return_when=asyncio.FIRST_COMPLETED)
            if not working.done():
                raise ClientLeftError
            return working.result()
        finally:
            for task in tasks:
                task.cancel()
            self._end()  # first: this task may be cancelled again while it waits
            await asyncio.gather(*tasks, return_exceptions=True)

    def _end(self) -> None:
        self._timer.cancel()
        self._service.abort(self._number)
        self._metrics.duration.observe(time.perf_counter() - self._arrived)
        if self._first is not None:
            self._metrics.first_token.observe(self._first - self._arrived)
            if self._counts.n_generated > 1:
                self._metrics.per_token.observe((self._last - self._first) / (self._counts.n_generated - 1))

    def _put(self, piece: Piece | BaseException) -> None:
        """Called in the service's thread."""
        with suppress(RuntimeError):  # the loop has been closed
            self._loop.call_soon_threadsafe(self._queue.put_nowait, (time.perf_counter(), piece))
