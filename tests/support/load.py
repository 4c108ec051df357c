"""Clients of a server in closed loops, while something happens to it."""

from __future__ import annotations

import itertools
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx

from tests.conftest import TEXT

CLIENTS = 16


class Load:
    """Clients in closed loops, half of which stream, until the context ends; counts how their requests ended."""

    def __init__(self, url: str) -> None:
        self.ended: Counter[str] = Counter()
        self._url = url
        self._stops = threading.Event()
        self._pool = ThreadPoolExecutor(CLIENTS)

    def __enter__(self) -> Load:
        self._clients = [self._pool.submit(self._run, i) for i in range(CLIENTS)]
        return self

    def __exit__(self, *_: object) -> None:
        self._stops.set()
        for client in self._clients:
            client.result()

    def wait_for(self, n: int, seconds: float = 60) -> None:
        """Waits until that many more requests have ended."""
        end, until = time.monotonic() + seconds, self.ended.total() + n
        while self.ended.total() < until:
            assert time.monotonic() < end, self.ended
            time.sleep(0.02)

    def _run(self, client: int) -> None:
        with httpx.Client(base_url=self._url, timeout=60) as web:
            for i in itertools.count():
                if self._stops.is_set():
                    return
                body = {
                    "prompt": f"{TEXT[i % 3]} {client}",
                    "max_tokens": 60,
                    "temperature": 0,
                    "stream": bool(client % 2),
                }
                self.ended[_ask(web, body)] += 1


def _ask(web: httpx.Client, body: dict[str, Any]) -> str:
    """How a request ended: "answered", its status, "broken" if its stream broke off, "lost" if it got no answer."""
    has_begun = False
    try:
        with web.stream("POST", "/v1/completions", json=body) as answer:
            has_begun = body["stream"]
            received = answer.read()
    except httpx.TransportError:
        return "broken" if has_begun else "lost"
    if answer.status_code != 200:
        return str(answer.status_code)
    return "answered" if not body["stream"] or received.endswith(b"data: [DONE]\n\n") else "broken"
