"""Python programs in processes of their own, forked from one that has imported torch.

A new interpreter needs more than a second for that import, longer than most programs of the tests take for the rest.
"""

from __future__ import annotations

import atexit
import multiprocessing
import os
import re
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
FORKSERVER = multiprocessing.get_context("forkserver")


_LAUNCHER = re.compile(
    r"RANK|LOCAL_|WORLD_SIZE|MASTER_|TORCHELASTIC|LLAMA_API_KEY|OMP_NUM_THREADS|.*_proxy", re.IGNORECASE
)


def clean_environment() -> dict[str, str]:
    """That of a user's shell: no variable of a launcher's, no key, no proxy, no setting for threads."""
    return {name: value for name, value in os.environ.items() if not _LAUNCHER.match(name)}


def rank_environment(rank: int, world_size: int, port: int) -> dict[str, str]:
    """What torchrun sets for a rank on one machine."""
    ranks = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size, "LOCAL_WORLD_SIZE": world_size}
    return {name: str(value) for name, value in ranks.items()} | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def wait_until(holds: Callable[[], bool], seconds: float = 30) -> None:
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.01)


def preload(*modules: str) -> None:
    """Has the process that others are forked from import these too, unless it runs already."""
    FORKSERVER.set_forkserver_preload(["llama", "llama.tools.commandline", "tests.conftest", *modules])


class Program:
    """`python ARGUMENTS`, which begin with -m, -c or a file, with the methods of `subprocess.Popen` that tests use.

    Args:
        files: what it reads, and what it appends its output and its errors to.
        env: all of its environment; None for this process's.
    """

    def __init__(
        self, *arguments: object, files: tuple[Path, Path, Path], env: Mapping[str, str] | None = None, cwd: Path = ROOT
    ) -> None:
        preload()
        self.args = [os.fspath(word) if isinstance(word, Path) else str(word) for word in arguments]
        environment = dict(os.environ if env is None else env)
        paths = [os.fspath(path) for path in files]
        self._process = FORKSERVER.Process(target=_run, args=(self.args, paths, environment, str(cwd)))
        self._process.start()
        self.pid = self._process.pid

    def poll(self) -> int | None:
        return self._process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        self._process.join(timeout)
        if (status := self.poll()) is None:
            raise subprocess.TimeoutExpired(self.args, timeout or 0.0)
        return status

    def send_signal(self, number: int) -> None:
        if self.poll() is None and self.pid is not None:
            os.kill(self.pid, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def run_python(
    *arguments: object, env: Mapping[str, str] | None = None, cwd: Path = ROOT, input: str = "", timeout: float = 120
) -> subprocess.CompletedProcess[str]:
    """Runs a `Program` to its end: its status, output and errors as text.

    Args:
        input: its standard input.
    """
    with tempfile.TemporaryDirectory() as folder:
        given, printed, errors = (Path(folder, name) for name in ("in", "out", "err"))
        given.write_text(input)
        program = Program(*arguments, files=(given, printed, errors), env=env, cwd=cwd)
        try:
            status = program.wait(timeout)
        finally:
            program.kill()
        texts = (path.read_text(errors="surrogateescape") for path in (printed, errors))
        return subprocess.CompletedProcess(program.args, status, *texts)


def _run(words: list[str], paths: list[str], env: dict[str, str], cwd: str) -> None:
    for number, path in enumerate(paths):
        file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND if number else os.O_RDONLY, 0o600)
        os.dup2(file, number)
        os.close(file)
    encoding = env.get("PYTHONIOENCODING")
    sys.stdin = open(0, closefd=False)  # noqa: SIM115
    sys.stdout = open(1, "w", encoding=encoding, closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", 1, encoding, "backslashreplace", closefd=False)  # noqa: SIM115
    os.environ.clear()
    os.environ.update(env)
    os.chdir(cwd)
    try:
        if words[0] == "-m":
            sys.modules.pop(words[1], None)  # what is imported already is run without a warning
            sys.argv = words[1:]
            runpy.run_module(words[1], run_name="__main__", alter_sys=True)
        elif words[0] == "-c":
            sys.argv = ["-c", *words[2:]]
            exec(compile(words[1], "<string>", "exec"), {"__name__": "__main__"})
        else:
            sys.argv = words
            runpy.run_path(words[0], run_name="__main__")
    finally:
        atexit._run_exitfuncs()  # as at the end of an interpreter, which multiprocessing leaves out
