"""A load generator: 32 clients that stream for 20 seconds, each its next request when the last one has ended."""

from __future__ import annotations

import asyncio
import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import httpx
import pytest

from llama.tools.convert import to_hf
from tests.clients.conftest import MODEL
from tests.conftest import ROOT
from tests.support.serving import ServerProcesses

pytestmark = pytest.mark.clients
N_CLIENTS, SECONDS = 32, 20.0
# What `vllm bench serve` sends.
BENCH: dict[str, Any] = {
    "model": MODEL,
    "temperature": 0.0,
    "repetition_penalty": 1.0,
    "logprobs": None,
    "stream": True,
    "stream_options": {"include_usage": True, "continuous_usage_stats": True},
}


def body_of(rng: random.Random) -> tuple[str, dict[str, Any]]:
    words = " ".join(rng.choices(["llama", "grass", "city", "tea", "night"], k=rng.randint(1, 60)))
    limit = {"max_tokens": rng.randint(1, 32)}
    if rng.random() < 0.5:
        return "/v1/completions", BENCH | limit | {"prompt": words}
    chat = {name: value for name, value in BENCH.items() if name != "logprobs"}
    return "/v1/chat/completions", chat | limit | {"messages": [{"role": "user", "content": words}]}


async def stream(web: httpx.AsyncClient, path: str, body: dict[str, Any]) -> None:
    """Raises AssertionError unless the answer is whole."""
    events = []
    async with web.stream("POST", path, json=body) as answer:
        assert answer.status_code == 200, await answer.aread()
        async for line in answer.aiter_lines():
            if line:
                events.append(line.removeprefix("data: "))
    assert events[-1] == "[DONE]"
    usage = json.loads(events[-2])["usage"]
    assert 0 <= usage["completion_tokens"] <= body["max_tokens"]
    finished = [chunk for chunk in map(json.loads, events[:-2]) if chunk["choices"][0]["finish_reason"]]
    assert len(finished) == 1


def test_32_streams_for_20_seconds_have_no_error(server: ServerProcesses) -> None:
    async def client(web: httpx.AsyncClient, seed: int, end: float) -> int:
        rng, n = random.Random(seed), 0
        while time.monotonic() < end:
            await stream(web, *body_of(rng))
            n += 1
        return n

    async def run() -> int:
        limits = httpx.Limits(max_connections=N_CLIENTS, max_keepalive_connections=N_CLIENTS)
        async with httpx.AsyncClient(base_url=server.url, timeout=60, limits=limits, trust_env=False) as web:
            end = time.monotonic() + SECONDS
            return sum(await asyncio.gather(*(client(web, seed, end) for seed in range(N_CLIENTS))))

    n = asyncio.run(run())
    print(f"{n} requests in {SECONDS:g} s")
    assert n >= N_CLIENTS
    server.wait_until_idle()


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
