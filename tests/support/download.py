"""What runs download.sh: a server that fails in every way we know of, a folder of tools, a terminal."""

import hashlib
import http.server
import os
import pty
import random
import select
import shutil
import subprocess
import sys
import termios
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "download.sh"
BASH = shutil.which("bash")
SHARDS = {"7b": 1, "13b": 2, "70b": 8, "7b-chat": 1, "13b-chat": 2, "70b-chat": 8}
SHARD_SIZE = 150_000
TOOLS = ["cat", "df", "mkdir", "mv", "rm", "sed", "sleep", "stty", "tail", "tr", "wc"]
SECRET = "SeCrEt"
QUERY = f"Policy={SECRET}-eyJTdGF0_~&Signature={SECRET}~x-y_z&Key-Pair-Id={SECRET}K15"
SHARD = "llama-2-7b/consolidated.00.pth"
HANG_S = 600  # a test that waits longer hangs; no test may depend on how busy the machine is


def checklist_of(files: dict[str, bytes]) -> bytes:
    return b"".join(f"{hashlib.md5(body).hexdigest()}  {name}\n".encode() for name, body in files.items())


def make_tree() -> dict[str, bytes]:
    """Every file that Meta publishes, under its path, with shards of SHARD_SIZE bytes."""
    rng = random.Random(0)
    tokenizer = {"tokenizer.model": rng.randbytes(3000)}
    tree = {"LICENSE": b"licence\n", "USE_POLICY.md": b"policy\n", **tokenizer}
    tree["tokenizer_checklist.chk"] = checklist_of(tokenizer)
    for model, n_shards in SHARDS.items():
        files = {f"consolidated.{i:02d}.pth": rng.randbytes(SHARD_SIZE) for i in range(n_shards)}
        files["params.json"] = f'{{"model": "{model}"}}'.encode()
        files["checklist.chk"] = checklist_of(files)
        tree.update({f"llama-2-{model}/{name}": body for name, body in files.items()})
    return tree


TREE = make_tree()


def tree_of(*models: str, without: str = "") -> dict[str, bytes]:
    folders = tuple(f"llama-2-{model}/" for model in models)
    return {path: b for path, b in TREE.items() if ("/" not in path or path.startswith(folders)) and path != without}


@dataclass
class Fault:
    """How the server misbehaves on the next `times` requests for a path."""

    status: int | None = None  # this status instead of the file
    cut_at: int | None = None  # the connection ends at this offset of the file
    hang_at: int | None = None  # the same, but the connection stays open and silent
    body: bytes | None = None  # this instead of the file
    ignore_range: bool = False
    times: int = 1


class Server(http.server.ThreadingHTTPServer):
    """Attributes:
    requests: the path of each request, and the range that it asked for.
    hanging: is set once a client waits on a silent connection.
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.tree = dict(TREE)
        self.query = QUERY
        self.faults: dict[str, list[Fault]] = {}
        self.requests: list[tuple[str, str | None]] = []
        self.hanging = threading.Event()
        self.closing = threading.Event()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/*?{self.query}"

    def fault(self, path: str, **how: Any) -> None:
        self.faults.setdefault(path, []).append(Fault(**how))

    def next_fault(self, path: str) -> Fault:
        faults = self.faults.get(path)
        if not faults:
            return Fault()
        faults[0].times -= 1
        return faults[0] if faults[0].times else faults.pop(0)

    def ranges(self, path: str = SHARD) -> list[str | None]:
        return [asked for requested, asked in self.requests if requested == path]

    def paths(self) -> list[str]:
        return sorted(path for path, _ in self.requests)

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that goes away is part of these tests."""


class Handler(http.server.BaseHTTPRequestHandler):
    server: Server
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_GET(self) -> None:
        url = urlsplit(self.path)
        path = url.path.removeprefix("/")
        asked = self.headers.get("Range")
        self.server.requests.append((path, asked))
        fault = self.server.next_fault(path)
        body = self.server.tree.get(path) if fault.body is None else fault.body
        start = int(asked.removeprefix("bytes=").rstrip("-")) if asked and not fault.ignore_range else 0
        self.close_connection = True
        if url.query != self.server.query:
            self.refuse(403)
        elif fault.status is not None:
            self.refuse(fault.status)
        elif body is None:
            self.refuse(404)
        elif start and start >= len(body):
            self.refuse(416)
        else:
            self.serve(body, start, fault)

    def refuse(self, status: int) -> None:
        message = b"<html>an error page, which must not end up in a file</html>"
        self.send_response(status)
        self.send_header("Content-Length", str(len(message)))
        self.end_headers()
        self.wfile.write(message)

    def serve(self, body: bytes, start: int, fault: Fault) -> None:
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(body) - 1}/{len(body)}")
        self.send_header("Content-Length", str(len(body) - start))
        self.end_headers()
        end = next((at for at in (fault.cut_at, fault.hang_at) if at is not None), len(body))
        self.wfile.write(body[start:end])
        if fault.hang_at is not None:
            self.server.hanging.set()
            self.server.closing.wait(HANG_S)


def real_tool(name: str) -> str:
    path = shutil.which(name)
    if path is None:
        pytest.skip(f"needs {name}")
    return path


def is_gnu_wget_1() -> bool:
    wget = shutil.which("wget")
    return wget is not None and b"GNU Wget 1" in subprocess.run([wget, "--version"], capture_output=True).stdout


class Download:
    """A folder of tools, a target folder, and the server's link: what a run of the script sees.

    All of 7B but its shard is in the target folder already.
    """

    def __init__(self, folder: Path, server: Server, downloader: str) -> None:
        assert BASH is not None
        self.bash = BASH
        self.script = SCRIPT
        self.folder = folder
        self.server = server
        self.downloader = downloader
        self.bin, self.target, self.home = folder / "bin", folder / "target", folder / "home"
        self.bin.mkdir()
        self.home.mkdir()
        for tool in [*TOOLS, downloader]:
            (self.bin / tool).symlink_to(real_tool(tool))
        self.install_md5("md5sum" if shutil.which("md5sum") else "md5")
        self.env = {
            "PATH": str(self.bin),
            "HOME": str(self.home),
            "PRESIGNED_URL": server.url,
            "MODEL_SIZE": "7B",
            "TARGET_FOLDER": str(self.target),
            "RETRY_DELAY": "0",
            "RETRIES": "2",
            "SKIP_SPACE_CHECK": "1",
        }
        self.put(tree_of("7b", without=SHARD))

    def install(self, name: str, shell_text: str) -> None:
        """Puts a stand-in for a tool in its place."""
        path = self.bin / name
        path.unlink(missing_ok=True)
        path.write_text(f"#!{self.bash}\n{shell_text}\n")
        path.chmod(0o700)

    def remove_tools(self, *names: str) -> None:
        for name in names:
            (self.bin / name).unlink(missing_ok=True)

    def install_md5(self, name: str) -> None:
        """Leaves `name` as the only tool for checksums; md5 is macOS's own or a stand-in that knows `md5 -r FILE`."""
        self.remove_tools("md5sum", "md5")
        if name == "md5sum" or shutil.which("md5"):
            (self.bin / name).symlink_to(real_tool(name))
        else:
            code = "import hashlib, sys; p = sys.argv[1]; print(hashlib.md5(open(p, 'rb').read()).hexdigest(), p)"
            self.install("md5", f'[ "$1" = -r ] || exit 64\nexec "{sys.executable}" -I -S -c "{code}" "$2"')

    def start(self, *args: str, cwd: Path | None = None, **kwargs: Any) -> "subprocess.Popen[str]":
        return subprocess.Popen(
            [self.bash, str(self.script), *args],
            cwd=cwd or self.folder,
            env=self.env,
            start_new_session=True,
            **{"stdin": subprocess.DEVNULL, "stdout": -1, "stderr": subprocess.STDOUT, "text": True, **kwargs},
        )

    def run(
        self, *says: str, args: tuple[str, ...] = (), status: int = 0, cwd: Path | None = None, **env: str | None
    ) -> str:
        """Runs the script, which has to end with that status and to say that; returns its output.

        Args:
            env: is added to the variables, for later runs too; None takes one away.
        """
        self.env = {name: value for name, value in (self.env | env).items() if value is not None}
        return self.finish(self.start(*args, cwd=cwd), *says, status=status)

    def finish(self, process: "subprocess.Popen[str]", *says: str, status: int = 0) -> str:
        output, _ = process.communicate(timeout=HANG_S)
        self.check_secrecy(output)
        assert process.returncode == status, output
        for words in says:
            assert words in output
        return output

    def check_secrecy(self, output: str) -> None:
        assert SECRET not in output
        for path in self.folder.rglob("*"):
            if path.is_file() and path.parent != self.bin and path.stat().st_size < 10_000_000:
                assert SECRET.encode() not in path.read_bytes(), path

    def put(self, files: dict[str, bytes]) -> None:
        for path, body in files.items():
            file = self.target / path
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(body)

    def files(self) -> dict[str, bytes]:
        found = (path for path in self.target.rglob("*") if path.is_file())
        return {path.relative_to(self.target).as_posix(): path.read_bytes() for path in found}


class Terminal:
    """The script at a pseudo-terminal; what it shows is collected in `shown`."""

    def __init__(self, download: Download) -> None:
        self.master, self.slave = pty.openpty()
        self.process = download.start(stdin=self.slave, stdout=self.slave, stderr=self.slave)
        self.shown = ""

    def read(self) -> bool:
        """Collects what is there; False once nothing more can come."""
        ready, _, _ = select.select([self.master], [], [], 0.05)
        if ready:
            self.shown += os.read(self.master, 65536).decode()
        return bool(ready) or self.process.poll() is None

    def wait_for(self, text: str) -> None:
        deadline = time.monotonic() + HANG_S
        while text not in self.shown:
            assert self.read() and time.monotonic() < deadline, self.shown

    def type(self, text: str) -> None:
        for start in range(0, len(text), 1000):
            os.write(self.master, text[start : start + 1000].encode())
            time.sleep(0.02)

    def finish(self) -> int:
        while self.read():
            pass
        return self.process.wait(HANG_S)

    @property
    def echoes(self) -> bool:
        return bool(termios.tcgetattr(self.slave)[3] & termios.ECHO)

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self.slave)
        os.close(self.master)
