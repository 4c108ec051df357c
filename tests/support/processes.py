"""Python programs in processes of their own, forked from one that has imported torch.

A new interpreter needs more than a second for that import, longer than most programs of the tests take for the rest.
"""

from __future__ import annotations

import atexit
import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
FORKSERVER = multiprocessing.get_context("forkserver")


def preload(*modules: str) -> None:
    """Has the process that others are forked from import these too, unless it runs already."""
    FORKSERVER.set_forkserver_preload(["llama", "llama.tools.commandline", "tests.conftest", *modules])


def run_python(
    *arguments: object, env: Mapping[str, str] | None = None, cwd: Path = ROOT, input: str = "", timeout: float = 120
) -> subprocess.CompletedProcess[str]:
    """What `python ARGUMENTS` does, which begin with -m, -c or a file: its status, output and errors as text.

    Args:
        env: all of its environment; None for this process's.
        input: its standard input.
    """
    preload()
    words = [os.fspath(word) if isinstance(word, Path) else str(word) for word in arguments]
    with tempfile.TemporaryDirectory() as folder:
        paths = [os.path.join(folder, name) for name in ("in", "out", "err")]
        Path(paths[0]).write_text(input)
        process = FORKSERVER.Process(
            target=_run, args=(words, paths, dict(os.environ if env is None else env), str(cwd))
        )
        process.start()
        process.join(timeout)
        if process.is_alive():
            process.kill()
            process.join()
            raise subprocess.TimeoutExpired(words, timeout, *(Path(path).read_bytes() for path in paths[1:]))
        printed = (Path(path).read_text(errors="surrogateescape") for path in paths[1:])
        return subprocess.CompletedProcess(words, process.exitcode or 0, *printed)


def _run(words: list[str], paths: list[str], env: dict[str, str], cwd: str) -> None:
    for number, path in enumerate(paths):
        file = os.open(path, os.O_RDONLY if number == 0 else os.O_WRONLY | os.O_CREAT)
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
