"""A server of the toy checkpoint for clients that nobody here wrote. `requirements.txt` has their versions."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.conftest import ROOT
from tests.support.serving import ServerProcesses

MODEL = "tiny-llama"


@pytest.fixture(scope="session")
def server() -> Iterator[ServerProcesses]:
    toy = ROOT / MODEL
    server = ServerProcesses(toy, toy / "tokenizer.model", "--max_batch_size", "8")
    yield server
    try:
        assert set(server.terminate()) == {0}
        assert "Traceback" not in server.log()
    finally:
        server.kill()


@pytest.fixture
def url(server: ServerProcesses) -> str:
    return f"{server.url}/v1"
