"""Clients that connect and send nothing, read nothing, or send half: the server goes on answering the others."""

from __future__ import annotations

import asyncio
import logging
import resource
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import httpx
import pytest
import uvicorn

from llama.serving import app, connections
from llama.serving.app import Server, make_app
from llama.serving.connections import Connection, Troubles
from llama.serving.service import Service
from llama.serving.settings import ServerSettings
from tests.conftest import ROOT
from tests.support.processes import wait_until

Start = Callable[..., str]
COMPLETION = b'{"prompt": "x", "max_tokens": 60, "temperature": 0}'


@pytest.fixture
def start(service: Service, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Starts a server in a thread of this process; returns its address. Its state is `start.server`."""
    with ExitStack() as stack:

        def begin(*, limit: int = 4096, idle_s: float = 20.0, **settings: Any) -> str:
            monkeypatch.setattr(Connection, "limit", limit)
            monkeypatch.setattr(Connection, "troubles", Troubles())
            monkeypatch.setattr(connections, "IDLE_S", idle_s)
            state = Server("llama", ServerSettings(**settings))
            state.ready(service)
            begin.server = state  # type: ignore[attr-defined]
            config = uvicorn.Config(make_app(state), http=Connection, lifespan="off", log_level="error")
            http = uvicorn.Server(config)
            listener = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
            thread = threading.Thread(target=lambda: asyncio.run(http.serve([listener])))
            thread.start()

            def stop() -> None:
                http.force_exit = http.should_exit = True
                thread.join(20)

            stack.callback(stop)
            return f"127.0.0.1:{listener.getsockname()[1]}"

        yield begin


@contextmanager
def connected(address: str, n: int, *, receive_buffer: int | None = None) -> Iterator[list[socket.socket]]:
    host, port = address.split(":")
    with ExitStack() as stack:
        sockets = []
        for _ in range(n):
            one = stack.enter_context(socket.socket())
            if receive_buffer:
                one.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
            one.settimeout(30)
            one.connect((host, int(port)))
            sockets.append(one)
        yield sockets


def request(body: bytes, *headers: str, path: str = "/v1/completions", length: bool = True) -> bytes:
    lines = [f"POST {path} HTTP/1.1", "Host: localhost", "Content-Type: application/json", *headers]
    lines += [f"Content-Length: {len(body)}"] * length
    return "\r\n".join([*lines, "", ""]).encode() + body


def read_all(connection: socket.socket) -> bytes:
    received = b""
    while part := connection.recv(65536):
        received += part
    return received


def is_healthy(address: str) -> bool:
    try:
        return httpx.get(f"http://{address}/health", timeout=20).status_code == 200
    except httpx.TransportError:
        return False


def test_silent_connections_make_room_for_new_ones(start: Start, caplog: pytest.LogCaptureFixture) -> None:
    address = start(limit=5)
    with caplog.at_level(logging.WARNING), connected(address, 30):
        for _ in range(10):
            assert is_healthy(address)
    assert len([r for r in caplog.records if "connections may be open" in r.getMessage()]) == 1


@pytest.mark.parametrize("sent", [b"", b"GET /health HTTP/1.1\r\nHost: localhost\r\nX-Slow: "])
def test_a_connection_without_a_whole_request_is_closed(start: Start, sent: bytes) -> None:
    """Bytes that trickle in do not extend its time."""
    with connected(start(idle_s=0.4), 1) as (client,):
        client.settimeout(0.05)
        began = time.monotonic()
        while time.monotonic() - began < 10:
            try:
                client.sendall(sent[:10] and b"x")
                if not client.recv(100):
                    break
            except TimeoutError:
                continue
            except OSError:
                break
        assert 0.3 < time.monotonic() - began < 5


def test_a_body_that_does_not_come_is_an_error_and_no_traceback(
    start: Start, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(app, "_BODY_S", 0.2)
    with connected(start(), 1) as (client,):
        client.sendall(request(COMPLETION)[:-5])
        answer = client.recv(65536)
        if answer.endswith(b"\r\n\r\n"):  # the body may come after the head
            answer += client.recv(65536)
        assert answer.startswith(b"HTTP/1.1 408 ")
        assert b"must come within 0.2 seconds" in answer
    assert not caplog.records


def test_streams_that_are_never_read_are_ended(start: Start, service: Service) -> None:
    address = start(limit=4, idle_s=0.5)
    body = b'{"prompt": "x", "n": 8, "stream": true, "logprobs": 5, "max_tokens": 60}'
    with connected(address, 4, receive_buffer=2048) as clients:
        for client in clients:
            client.sendall(request(body))
        wait_until(lambda: is_healthy(address), 40)
    wait_until(lambda: not service.n_requests)


def test_a_client_that_ends_its_side_after_its_request_is_answered(start: Start) -> None:
    address = start()
    for body in (COMPLETION, COMPLETION[:-1] + b', "stream": true}'):
        with connected(address, 1) as (client,):
            client.sendall(request(body))
            client.shutdown(socket.SHUT_WR)
            answer = read_all(client)
        assert b"HTTP/1.1 200 OK" in answer
        assert answer.endswith((b"}}", b"[DONE]\n\n\r\n0\r\n\r\n")) or b'"usage"' in answer


def test_a_client_that_leaves_while_its_whole_answer_is_computed_frees_its_slot(start: Start, service: Service) -> None:
    address = start()
    before = service.n_generated
    with connected(address, 1) as (client,):
        client.sendall(request(COMPLETION[:-1] + b', "n": 8}'))
        while not service.n_requests:
            time.sleep(0.001)
    wait_until(lambda: not service.n_requests)
    assert service.n_generated - before < 8 * 60


def test_half_a_body_is_no_request(start: Start, service: Service) -> None:
    with connected(start(), 1) as (client,):
        client.sendall(request(COMPLETION)[:-5])
        client.shutdown(socket.SHUT_WR)
        assert read_all(client) == b""
    assert service.n_requests == 0


def test_two_lengths_end_the_connection(start: Start) -> None:
    with connected(start(), 1) as (client,):
        client.sendall(request(b"2\r\n{}\r\n0\r\n\r\n", "Transfer-Encoding: chunked"))
        answer = read_all(client)
    assert answer.startswith(b"HTTP/1.1 400")
    assert b"connection: close" in answer


def test_the_sum_of_open_bodies_is_bounded(start: Any) -> None:
    address = start(max_body_bytes=200_000)
    with connected(address, 40) as clients:
        for client in clients:
            client.sendall(request(b" " * 199_999 + b"x", length=True)[:-2])
        end, seen = time.monotonic() + 30, 0
        while not seen or seen != start.server.n_body_bytes:  # until no more bytes come
            assert time.monotonic() < end
            seen = start.server.n_body_bytes
            time.sleep(0.5)
        assert seen <= 16 * 200_000
        refused = 0
        for client in clients:
            client.settimeout(0.01)
            try:
                refused += client.recv(100).startswith(b"HTTP/1.1 503")
            except TimeoutError:
                continue
            except OSError:
                refused += 1
        assert 10 < refused < 40
        answer = httpx.post(f"http://{address}/v1/completions", json={"prompt": "x", "max_tokens": 1}, timeout=20)
        assert answer.status_code == 200
    answer = httpx.post(
        f"http://{address}/v1/completions", content=b"x" * 200_001, headers={"Content-Type": "application/json"}
    )
    assert answer.status_code == 413


def test_more_connections_than_files_stop_nobody(checkpoint: Path, tokenizer_path: Path, tmp_path: Path) -> None:
    """150 of them at 128 files, first silent, then with streams that nobody reads; the log has a few lines."""
    command = [sys.executable, "-m", "llama.tools.serve", "--ckpt_dir", str(checkpoint), "--port", "0"]
    command += ["--tokenizer_path", str(tokenizer_path), "--device", "cpu", "--max_seq_len", "256", "--grace_s", "1"]
    log = tmp_path / "log"
    with open(log, "w") as file:
        server = subprocess.Popen(
            command,
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=file,
            text=True,
            preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (128, 128)),
        )
    try:
        assert server.stdout
        line = server.stdout.readline()
        address = line[line.index("http://") + 7 :].partition(",")[0]
        wait_until(lambda: "ready" in log.read_text(), 120)
        for body in (b"", b'{"prompt": "x", "stream": true, "logprobs": 5, "max_tokens": 200, "n": 4}'):
            with connected(address, 150, receive_buffer=2048) as clients:
                for client in clients if body else ():
                    with suppress(OSError):
                        client.sendall(request(body))
                wait_until(lambda: is_healthy(address), 40)
                if body:
                    server.terminate()
                    assert server.wait(30) == 0
    finally:
        server.kill()
        server.wait()
        server.stdout.close()
    assert log.stat().st_size < 10_000, log.read_text()
    assert "Traceback" not in log.read_text()
