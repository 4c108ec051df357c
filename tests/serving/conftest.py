"""Fixtures: the server's routes in this process, on the random checkpoint."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator

import pytest
from starlette.testclient import TestClient

from llama import Llama
from llama.serving.app import Server, make_app
from llama.serving.service import Service


@pytest.fixture(scope="module")
def service(llama: Llama) -> Iterator[Service]:
    service = Service(llama, max_waiting=8)
    thread = threading.Thread(target=service.run)
    thread.start()
    yield service
    service.stop()
    thread.join()


@pytest.fixture
def serve(service: Service) -> Callable[..., TestClient]:
    """Makes a client of a server with the given settings."""

    def make(**settings: object) -> TestClient:
        state = Server("llama", **settings)  # type: ignore[arg-type]
        state.ready(service)
        return TestClient(make_app(state))

    return make
