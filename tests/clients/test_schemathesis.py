"""Schemathesis reads `/openapi.json` and tries what it says and what it does not."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.clients.conftest import MODEL
from tests.conftest import ROOT
from tests.support.serving import ServerProcesses

pytestmark = pytest.mark.clients


def test_schemathesis_finds_nothing(tmp_path: Path) -> None:
    """A body that a schema allows may be refused: roles out of order, a context that is too small."""
    command = Path(sys.executable).with_name("schemathesis")
    if not command.exists():
        pytest.skip("needs schemathesis")
    toy = ROOT / MODEL
    server = ServerProcesses(toy, toy / "tokenizer.model", "--max_seq_len", "128")  # so that no answer is long
    arguments = ["run", f"{server.url}/openapi.json", "--exclude-checks", "positive_data_acceptance"]
    arguments += ["--max-examples", "30", "--phases", "coverage,fuzzing", "--request-timeout", "30"]
    try:
        ran = subprocess.run(
            [command, *arguments], cwd=tmp_path, capture_output=True, text=True, timeout=580, check=False
        )
        assert ran.returncode == 0, ran.stdout[-5000:] + ran.stderr
        assert set(server.terminate()) == {0}
    finally:
        server.kill()
