"""torchrun starts the ranks of a server again: after one of them is killed, the server is healthy once more."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest

from tests.conftest import ROOT

pytestmark = pytest.mark.faults
READY_S = 120.0  # to start and load, on a busy machine


def children(pid: int) -> dict[int, int]:
    """The processes of a launcher by their rank; empty while they are being started."""
    listed = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    ranks = {}
    for child in map(int, listed):
        try:
            environment = Path(f"/proc/{child}/environ").read_bytes().split(b"\0")
        except OSError:  # it has just ended
            continue
        ranks |= {int(entry[5:]): child for entry in environment if entry.startswith(b"RANK=")}
    return ranks


def is_healthy(url: str) -> bool:
    try:
        return httpx.get(f"{url}/health", timeout=5).status_code == 200
    except httpx.TransportError:
        return False


def wait(holds: Callable[[], bool], seconds: float, log: Callable[[], str]) -> float:
    """Waits until something holds; returns how many seconds that took."""
    start = time.monotonic()
    while not holds():
        assert time.monotonic() - start < seconds, log()
        time.sleep(0.1)
    return time.monotonic() - start


@pytest.mark.parametrize("launcher", [(), ("--standalone",)], ids=["one port", "standalone"])
def test_a_killed_rank_is_started_again_with_the_others(
    launcher: tuple[str, ...], checkpoint_in: Callable[[int], Path], tokenizer_path: Path
) -> None:
    """Without --standalone all attempts share one store, in which the killed attempt has left its keys."""
    ports = []
    for _ in range(2):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            ports.append(probe.getsockname()[1])
    url = f"http://127.0.0.1:{ports[0]}"
    launcher = launcher or ("--master_addr", "127.0.0.1", "--master_port", str(ports[1]))
    server = ["-m", "llama.tools.serve", "--ckpt_dir", str(checkpoint_in(2))]
    server += ["--tokenizer_path", str(tokenizer_path), "--port", str(ports[0]), "--max_seq_len", "64"]
    command = [sys.executable, "-m", "torch.distributed.run", *launcher, "--nproc_per_node", "2"]
    with tempfile.TemporaryFile("w+") as stderr:

        def log() -> str:
            stderr.seek(0)
            return stderr.read()

        started = subprocess.Popen(
            [*command, "--max_restarts", "2", *server, "--device", "cpu", "--grace_s", "1"],
            cwd=ROOT,
            env={name: value for name, value in os.environ.items() if "proxy" not in name.lower()},
            stdout=subprocess.DEVNULL,
            stderr=stderr,
        )
        try:
            wait(lambda: is_healthy(url), READY_S, log)
            for killed in (1, 0):
                before = children(started.pid)
                os.kill(before[killed], signal.SIGKILL)
                wait(lambda gone=before: not set(children(started.pid).values()) & set(gone.values()), 60, log)
                wait(lambda: is_healthy(url), READY_S, log)
                answer = httpx.post(f"{url}/v1/completions", json={"prompt": "fox", "max_tokens": 4}, timeout=60)
                assert answer.status_code == 200, answer.text
        finally:
            started.terminate()
            started.wait(timeout=60)
