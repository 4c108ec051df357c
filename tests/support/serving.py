"""Servers for tests: the routes in this process, and `llama serve` in others, as torchrun would start them."""

from __future__ import annotations

import json
import socket
import tempfile
import threading
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
from starlette.testclient import TestClient

from llama import Llama
from llama.serving.app import Server, make_app
from llama.serving.service import Service
from llama.serving.settings import ServerSettings
from tests.support.processes import Program, clean_environment, free_port, rank_environment

START_S = 120.0


@contextmanager
def running(llama: Llama, **settings: Any) -> Iterator[Service]:
    """A service with its loop in a thread of this process."""
    service = Service(llama, **settings)
    thread = threading.Thread(target=service.run)
    thread.start()
    try:
        yield service
    finally:
        service.stop()
        thread.join(30)
        assert not thread.is_alive()


def web_of(
    service: Service,
    *,
    api_keys: Sequence[str] = (),
    allowed_hosts: Collection[str] | None = None,
    fingerprint: str | None = None,
    **settings: Any,
) -> TestClient:
    """A client of a server's routes in this process."""
    state = Server("llama", ServerSettings(**settings), api_keys, allowed_hosts)
    state.ready(service, fingerprint)
    return TestClient(make_app(state))


class ServerProcesses:
    """A server of one or several ranks on a free loopback port."""

    def __init__(self, checkpoint: Path, tokenizer: Path, *flags: str, ranks: int = 1) -> None:
        self._folder = tempfile.TemporaryDirectory()
        files = [Path(self._folder.name, name) for name in ("in", "out", "log")]
        for file in files:
            file.touch()
        self._out, self._log = files[1:]
        port = free_port()
        command = ["-m", "llama.tools.serve", "--ckpt_dir", checkpoint, "--tokenizer_path", tokenizer]
        command += ["--port", "0", "--device", "cpu", "--dtype", "float32", *flags]
        self.processes = []
        for rank in range(ranks):
            launcher = rank_environment(rank, ranks, port) if ranks > 1 else {}
            environment = clean_environment() | {"OMP_NUM_THREADS": "1"} | launcher
            process = Program(*command, env=environment, files=(files[0], self._out, self._log))
            self.processes.append(process)
        try:
            self.url = self._wait_until_ready()
        except BaseException:
            self.kill()
            raise

    def _wait_until_ready(self) -> str:
        self.wait(lambda: "\n" in self._out.read_text(), START_S)
        (line, *_) = self._out.read_text().splitlines()
        assert "http://" in line, self.log()
        url = line[line.index("http://") :].partition(",")[0]
        self.wait(lambda: httpx.get(f"{url}/health").status_code == 200, START_S)
        return url

    def wait(self, holds: Callable[[], bool], seconds: float) -> None:
        """Until something holds, while all ranks run."""
        end = time.monotonic() + seconds
        while not holds():
            assert all(process.poll() is None for process in self.processes), self.log()
            assert time.monotonic() < end, self.log()
            time.sleep(0.02)

    def metric(self, name: str) -> float:
        """The value of a metric without labels."""
        text = httpx.get(f"{self.url}/metrics").text
        return next(float(line.split()[1]) for line in text.splitlines() if line.startswith(f"{name} "))

    def wait_until_idle(self, seconds: float = 20) -> None:
        """Until no request, and no sequence, runs or waits."""
        names = ("llama_requests_open", "llama_sequences_running", "llama_sequences_waiting")
        self.wait(lambda: not any(map(self.metric, names)), seconds)

    def send(
        self, path: str, body: Any, *, until: int | None = None, receive_buffer: int | None = None
    ) -> socket.socket:
        """Sends a request, or the first bytes of it, and reads nothing."""
        raw = json.dumps(body)
        head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        head += f"Content-Length: {len(raw)}\r\n\r\n"
        host, port = self.url.removeprefix("http://").split(":")
        connection = socket.socket()
        if receive_buffer:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        connection.connect((host, int(port)))
        connection.sendall((head + raw).encode()[:until])
        return connection

    def log(self) -> str:
        """What all ranks have written to stderr."""
        return self._log.read_text()

    def terminate(self) -> list[int]:
        """Asks all ranks to end, as torchrun does for a SIGTERM; returns their statuses."""
        for process in self.processes:
            process.terminate()
        try:
            return [process.wait(timeout=60) for process in self.processes]
        finally:
            self.kill()

    def kill(self) -> None:
        for process in self.processes:
            process.kill()
            process.wait()
