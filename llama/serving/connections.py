"""Connections of the server: how many may be open, and how long one may stay without a request.

A client that connects and sends nothing must not keep others out. At the cap, the connection that has waited longest
for a request makes room for the new one.
"""

from __future__ import annotations

import asyncio
import logging
import resource
import time
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

IDLE_S = 20.0  # in which a client has to send a request's headers or its next request, or to read something
PROBE_S = 0.02  # between the first two looks for whether a client that ended its side has left
_LOOKS = 10  # at a connection in that time
_MOST = 4096  # connections: each takes some 100 kB
_SPARE_FILES = 64  # for everything but connections
_LOG_S = 60.0  # between two lines about the same trouble

logger = logging.getLogger(__name__)


def raise_file_limit() -> int:
    """Raises the limit of open files as far as this process may; returns the number of connections that fit."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        soft = hard
    except (OSError, ValueError):  # such as "unlimited" on macOS
        pass
    return _MOST if soft == resource.RLIM_INFINITY else max(1, min(_MOST, soft - min(_SPARE_FILES, soft // 2)))


class Troubles:
    """Logs each kind of trouble at most once a minute, with how often it came up. For the event loop's thread alone."""

    def __init__(self) -> None:
        self._counts: dict[str, int] = {}
        self._logged: dict[str, float] = {}

    def log(self, what: str) -> None:
        self._counts[what] = self._counts.get(what, 0) + 1
        now = time.monotonic()
        if now - self._logged.get(what, -_LOG_S) >= _LOG_S:
            logger.warning("%s (%d times since the last such line)", what, self._counts.pop(what))
            self._logged[what] = now

    def handle(self, loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        """asyncio's exception handler: it reports every connection that it cannot accept, thousands of times."""
        if isinstance(context.get("exception"), OSError) and "socket" in context:
            self.log(f"connections cannot be accepted: {context['exception']}")
        elif "_start_serving" not in context.get("message", ""):  # it tries to listen again, also after the end
            loop.default_exception_handler(context)


class Connection(H11Protocol):
    """One client's connection."""

    limit = _MOST
    troubles = Troubles()
    _since = 0.0  # time of the last request's end, or when the client last read something of an answer
    _unsent = 0  # bytes, at the last look
    _timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        if len(self.connections) >= self.limit:
            self.troubles.log(f"at most {self.limit} connections may be open, got a further one")
            others = [other for other in self.connections if isinstance(other, Connection)]
            if not (waiting := [other for other in others if not other._is_answering()]):
                transport.abort()
                return
            min(waiting, key=lambda other: other._since)._abort()
        super().connection_made(transport)
        self._since = self.loop.time()
        self._look()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._since = self.loop.time()

    def eof_received(self) -> bool:  # type: ignore[override]
        """Keeps the connection open for the answer, if a whole request has come."""
        if not self._is_answering() or self.cycle.more_body:
            return False
        self.cycle.keep_alive = False
        self._probe()
        return True

    def connection_lost(self, exc: Exception | None) -> None:
        if self._timer is not None:
            self._timer.cancel()
        if self.transport is not None:  # it was not refused
            super().connection_lost(exc)

    def _is_answering(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete

    def _look(self) -> None:
        """Limits the time without a request, and the time in which a client reads nothing of an answer.

        Bytes of an incomplete request do not extend it.
        """
        unsent = self.transport.get_write_buffer_size()
        if (self._is_answering() and not self.flow.write_paused) or 0 < unsent < self._unsent:
            self._since = self.loop.time()
        elif self.loop.time() - self._since > IDLE_S:
            return self._abort()
        self._unsent = unsent
        self._timer = self.loop.call_later(IDLE_S / _LOOKS, self._look)

    def _abort(self) -> None:
        """Closes at once, also if the client does not read what was sent."""
        self.connections.discard(self)
        self.transport.abort()

    def _probe(self, pause_s: float = PROBE_S) -> None:
        """Finds out whether a client that has ended its side still waits for the answer.

        A client that left ends its side just the same. It resets the connection when something is sent, for which an
        interim response is there.
        """
        if self.transport.is_closing() or not self._is_answering():
            return
        if not self.cycle.response_started and self.cycle.scope["http_version"] == "1.1":
            self.transport.write(self.conn.send(h11.InformationalResponse(status_code=100, headers=[])) or b"")
        self.loop.call_later(pause_s, self._probe, min(2 * pause_s, IDLE_S))
