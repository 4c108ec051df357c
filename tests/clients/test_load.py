"""A load generator that nobody here wrote: 32 clients for 20 seconds, each its next request when the last one ended."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from llama.tools.convert import to_hf
from tests.clients.conftest import MODEL
from tests.conftest import ROOT
from tests.support.serving import ServerProcesses

pytestmark = pytest.mark.clients
N_CLIENTS, SECONDS = 32, 20.0


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_guidellm_has_no_error(server: ServerProcesses, tmp_path: Path, path: str) -> None:
    pytest.importorskip("guidellm", reason="needs tests/clients/requirements.txt")
    toy = ROOT / MODEL
    to_hf(toy, toy / "tokenizer.model", tmp_path / "hf", quiet=True)
    options = {
        "backend": f"kind=openai_http,target={server.url},model={MODEL},request_format={path}",
        "profile": f"kind=concurrent,streams={N_CLIENTS}",
        "constraint": f"kind=max_duration,seconds={SECONDS:g}",
        "tokenizer": f"kind=huggingface_auto,model={tmp_path / 'hf'}",
        "data": "kind=synthetic_text,prompt_tokens=64,output_tokens=32",
    }
    command = [str(Path(sys.executable).with_name("guidellm")), "run", "--disable-console"]
    command += [word for name, value in options.items() for word in (f"--{name}", value)]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HOME": str(tmp_path)}
    subprocess.run(command, cwd=tmp_path, env=environment, check=True, timeout=180)
    (benchmark,) = json.loads((tmp_path / "benchmarks.json").read_text())["benchmarks"]
    totals = benchmark["metrics"]["request_totals"]
    print(totals)
    assert totals["errored"] == 0
    assert totals["successful"] >= N_CLIENTS
