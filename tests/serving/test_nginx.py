"""Two servers behind nginx, with examples/deploying/nginx.conf: what clients see while servers end."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

from tests.conftest import ROOT, TEXT
from tests.support.load import CLIENTS, Load
from tests.support.processes import free_port
from tests.support.serving import ServerProcesses

NGINX = shutil.which("nginx") or shutil.which("/usr/sbin/nginx")
pytestmark = pytest.mark.skipif(NGINX is None, reason="no nginx found; install the system's package nginx")
FLAGS = ("--max_seq_len", "128", "--max_batch_size", "4", "--model_name", "llama")
FEW = ("--max_seq_len", "128", "--max_batch_size", "1", "--max_waiting", "1", "--model_name", "llama")
# The parts of nginx's own configuration around that of the page: everything in one folder, by one process.
AROUND = """
daemon off;
pid {folder}/nginx.pid;
error_log {folder}/error.log info;
events {{ worker_connections 256; }}
http {{
    access_log off;
    client_body_temp_path {folder}/body;
    proxy_temp_path {folder}/proxy;
    fastcgi_temp_path {folder}/fastcgi;
    uwsgi_temp_path {folder}/uwsgi;
    scgi_temp_path {folder}/scgi;
    include {folder}/llama.conf;
}}
"""


class Replicas:
    """Two servers and nginx in front of them.

    Attributes:
        url: nginx's address.
    """

    def __init__(self, start: Callable[..., ServerProcesses], folder: Path, *flags: str) -> None:
        listen, *self.ports = (free_port() for _ in range(3))
        self.url = f"http://127.0.0.1:{listen}"
        self._start = start
        with ThreadPoolExecutor() as pool:
            self.servers = list(pool.map(lambda port: start(port, *flags), self.ports))
        text = (ROOT / "examples" / "deploying" / "nginx.conf").read_text(encoding="utf-8")
        for shown, port in {"listen 8000": listen, ":8001": self.ports[0], ":8002": self.ports[1]}.items():
            assert text.count(shown) == 1
            text = text.replace(shown, re.sub(r"\d+", str(port), shown))
        (folder / "llama.conf").write_text(text.replace("listen ", "listen 127.0.0.1:"))
        (folder / "nginx.conf").write_text(AROUND.format(folder=folder))
        command = [str(NGINX), "-p", str(folder), "-c", str(folder / "nginx.conf"), "-e", str(folder / "error.log")]
        self._nginx = subprocess.Popen(command)

    def restart(self, i: int, *flags: str) -> None:
        """Ends a server by SIGTERM, while it answers, and starts another one at its port."""
        assert self.servers[i].terminate() == [0], self.servers[i].log()
        self.servers[i] = self._start(self.ports[i], *flags)

    def close(self) -> None:
        self._nginx.terminate()
        self._nginx.wait(timeout=30)
        for server in self.servers:
            server.kill()


@contextmanager
def running(folder: Path, checkpoint: Path, tokenizer_path: Path, *flags: str) -> Iterator[Replicas]:
    def start(port: int, *flags: str) -> ServerProcesses:
        return ServerProcesses(checkpoint, tokenizer_path, "--port", str(port), *flags)

    replicas = Replicas(start, folder, *flags)
    try:
        yield replicas
    finally:
        replicas.close()


def test_the_configuration_passes_answers_streams_and_refusals_on(
    tmp_path: Path, checkpoint: Path, tokenizer_path: Path
) -> None:
    with running(tmp_path, checkpoint, tokenizer_path, *FEW) as replicas:
        body = {"prompt": TEXT[0], "max_tokens": 100, "temperature": 0}
        with httpx.Client(base_url=replicas.url, timeout=60) as web:
            assert web.get("/health").json() == {"status": "ok"}
            assert web.get("/metrics").status_code == 404
            alone = web.post("/v1/completions", json=body).json()["choices"][0]["text"]
            with web.stream("POST", "/v1/completions", json=body | {"stream": True}) as stream:
                parts = list(stream.iter_raw())
            whole = b"".join(parts)
            assert len(parts) > 1 + len(whole) / 4096, "more parts than nginx's buffers would make"
            *events, done = whole.decode().strip().split("\n\n")
            chunks = [json.loads(event.removeprefix("data: ")) for event in events]
            assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == alone
            assert done == "data: [DONE]"
            with web.stream("POST", "/v1/completions", json=body | {"stream": True}) as stream:
                next(stream.iter_raw())  # and leaves
        for server in replicas.servers:
            server.wait_until_idle()
        with Load(replicas.url) as load:
            load.wait_for(60)
        assert set(load.ended) == {"answered", "503"}, "refusals of full servers, and none of nginx's own"
        replicas.servers[0].kill()
        assert httpx.get(f"{replicas.url}/health").status_code == 200


@pytest.mark.faults
def test_only_streams_that_had_begun_fail_when_a_server_does(
    tmp_path: Path, checkpoint: Path, tokenizer_path: Path
) -> None:
    with running(tmp_path, checkpoint, tokenizer_path, *FLAGS) as replicas:
        with Load(replicas.url) as restarted:
            for i in range(2):
                restarted.wait_for(CLIENTS)
                replicas.restart(i, *FLAGS)
            restarted.wait_for(CLIENTS)
        with Load(replicas.url) as killed:
            killed.wait_for(4 * CLIENTS)
            replicas.servers[0].kill()
            killed.wait_for(4 * CLIENTS)
        replicas.servers[0] = replicas._start(replicas.ports[0], *FEW)
        replicas.restart(1, *FEW)
        with Load(replicas.url) as crowded:
            crowded.wait_for(100)
    print(f"restarted {dict(restarted.ended)}, one killed {dict(killed.ended)}, overload {dict(crowded.ended)}")
    assert set(restarted.ended) == {"answered"}
    assert set(killed.ended) <= {"answered", "broken"}
    assert killed.ended["broken"] <= CLIENTS // 2, "at most the streams that were open"
    assert set(crowded.ended) == {"answered", "503"}
