"""Node's clients of OpenAI's API: `clients.mjs` has their ordinary use."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.clients.conftest import MODEL

pytestmark = pytest.mark.clients
PACKAGES = ("openai", "ai", "@ai-sdk/openai", "@ai-sdk/openai-compatible")
FOLDER = "CLIENTS_NODE_MODULES"


def test_nodes_clients(url: str, tmp_path: Path) -> None:
    node, modules = shutil.which("node"), Path(os.environ.get(FOLDER, "node_modules"))
    if not node or not all((modules / name).is_dir() for name in PACKAGES):
        pytest.skip(f"needs node and, in the folder {FOLDER}, npm install {' '.join(PACKAGES)}")
    shutil.copy(Path(__file__).with_name("clients.mjs"), tmp_path)
    (tmp_path / "node_modules").symlink_to(modules.resolve())
    ran = subprocess.run(
        [node, "clients.mjs", url, MODEL], cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert ran.stdout.count("ok ") >= 25
