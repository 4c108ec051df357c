"""Fixtures: the server's routes in this process, on the random checkpoint."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator

import pytest
from starlette.testclient import TestClient

from llama import Llama
from llama.serving.service import Service
from tests.support.serving import running, web_of


@pytest.fixture(scope="module")
def service(llama: Llama) -> Iterator[Service]:
    with running(llama, max_waiting=8) as service:
        yield service


@pytest.fixture
def serve(service: Service) -> Callable[..., TestClient]:
    """Makes a client of a server with the given settings."""
    return functools.partial(web_of, service)
