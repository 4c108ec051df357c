"""Compiling in another process: nothing waits, nothing is left behind, and only this user's own results are loaded."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest
import torch
from torch import nn

from llama.engine import compiler
from llama.engine.compiler import CompileError, Compiler, Job, has_cpp_compiler, private_folder

JOB = Job("twice", nn.Identity(), [torch.empty(2, device="meta")], {}, {})
SLEEP = "import time; time.sleep(600)"


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(compiler, "has_cpp_compiler", lambda: True)
    return tmp_path / "llama"


def error_of(made: Compiler) -> str:
    with pytest.raises(CompileError) as raised:
        made.result("twice", wait=True)
    made._thread.join()
    return str(raised.value)


def child(monkeypatch: pytest.MonkeyPatch, code: str) -> None:
    monkeypatch.setattr(compiler, "_CHILD", code)


def test_a_compilers_last_line_is_the_error(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    child(monkeypatch, "import sys; sys.exit('a warning\\nKindError: no such operation')")
    assert error_of(Compiler("key", [JOB])) == "KindError: no such operation"
    assert [path.name for path in folder.iterdir()] == []


def test_a_result_that_is_announced_but_not_there_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    child(monkeypatch, "pass")
    assert "no result" in error_of(Compiler("key", [JOB]))


def test_a_compiler_that_never_ends_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    child(monkeypatch, SLEEP)
    monkeypatch.setattr(compiler, "_LONGEST_S", 0.5)
    assert error_of(Compiler("key", [JOB])) == "the compiler must end within 0.5 seconds"


def test_without_waiting_there_is_no_result_yet(monkeypatch: pytest.MonkeyPatch) -> None:
    child(monkeypatch, SLEEP)
    monkeypatch.setattr(compiler, "_LONGEST_S", 2)
    made = Compiler("key", [JOB])
    started = time.perf_counter()
    assert made.result("twice", wait=False) is None
    assert time.perf_counter() - started < 1
    made._thread.join()


def test_one_at_a_time_compiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """The others wait for its result, and load it."""
    compiled: list[Compiler] = []

    def compile(self: Compiler, folder: Path) -> None:
        compiled.append(self)
        time.sleep(0.2)

    monkeypatch.setattr(Compiler, "_compile", compile)
    monkeypatch.setattr(Compiler, "_load", lambda self, folder: bool(compiled))
    compilers = [Compiler("key", [JOB]) for _ in range(3)]
    for each in compilers:
        each._thread.join()
        assert each._error is None
    assert len(compiled) == 1


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_process_does_not_keep_the_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And who waits for a lock that is never released goes on, as late as a compiler may take."""
    with compiler._locked(tmp_path):
        worker = os.fork()
        if worker == 0:
            time.sleep(60)
            os._exit(0)
        monkeypatch.setattr(compiler, "_LONGEST_S", 0.2)
        with compiler._locked(tmp_path):
            pass
    monkeypatch.setattr(compiler, "_LONGEST_S", 60)
    try:
        started = time.monotonic()
        with compiler._locked(tmp_path):
            assert time.monotonic() - started < 30
    finally:
        os.kill(worker, signal.SIGKILL)
        os.waitpid(worker, 0)


def test_a_missing_cpp_compiler_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    monkeypatch.setenv("CXX", "/nowhere/g++")
    assert not has_cpp_compiler()
    assert error_of(Compiler("key", [JOB])) == (
        "a C++ compiler must be installed, such as g++, or named by CXX; got none"
    )


ENDS = """
import os, signal, time
os.environ["TORCHINDUCTOR_CACHE_DIR"] = {folder!r}
from tests.engine.test_compiler import JOB
from llama.engine import compiler
compiler.has_cpp_compiler = lambda: True
compiler._CHILD = '''
import os, time
from llama.engine import compiler
compiler.compile_job = lambda *job: (open({pid!r}, 'w').write(str(os.getpid())), time.sleep(600))
compiler.compile_jobs()
'''
made = compiler.Compiler("key", [JOB])
while not os.path.exists({pid!r}) or not open({pid!r}).read():
    time.sleep(0.01)
{end}
"""


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs /proc")
@pytest.mark.parametrize("end", ["", "os.kill(os.getpid(), signal.SIGKILL)"], ids=["ends", "is killed"])
def test_a_compiler_ends_with_the_program(tmp_path: Path, end: str) -> None:
    pid = tmp_path / "pid"
    code = ENDS.format(folder=str(tmp_path), pid=str(pid), end=end)
    subprocess.run([sys.executable, "-c", code], check=not end, timeout=120, cwd=Path(__file__).parents[2])
    latest = time.monotonic() + 20
    while is_running(int(pid.read_text())):
        assert time.monotonic() < latest
        time.sleep(0.02)
    assert [path.name for path in (tmp_path / "llama").iterdir()] == []


def is_running(pid: int) -> bool:
    """Whether there is such a process, other than one that has ended and waits to be fetched."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_a_damaged_result_is_compiled_again(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    """Loading it could end the process."""
    child(monkeypatch, "import sys; sys.exit('compiled again')")
    folder.mkdir(mode=0o700)
    made = Compiler("key", [JOB])
    made._thread.join()
    (name,) = made._jobs
    with zipfile.ZipFile(folder / name, "w") as archive:
        archive.writestr("model.so", b"code" * 100)
    content = bytearray((folder / name).read_bytes())
    for damaged in (content[:-9], content.replace(b"codecode", b"codeedoc", 1), b""):
        (folder / name).write_bytes(damaged)
        assert error_of(Compiler("key", [JOB])) == "compiled again"


@pytest.mark.skipif(not hasattr(os, "getuid"), reason="needs POSIX users")
@pytest.mark.parametrize("whose", ["another user's", "writable by others", "a file"])
def test_a_folder_that_others_can_write_to_is_not_used(
    whose: str, monkeypatch: pytest.MonkeyPatch, folder: Path
) -> None:
    if whose == "a file":
        folder.touch()
    else:
        assert private_folder() == folder and folder.stat().st_mode & 0o777 == 0o700
    if whose == "another user's":
        monkeypatch.setattr(os, "getuid", lambda: folder.stat().st_uid + 1)
    if whose == "writable by others":
        folder.chmod(0o777)
    with pytest.raises(CompileError, match="the folder of compiled code must be"):
        private_folder()
    assert error_of(Compiler("key", [JOB])).startswith("the folder of compiled code must be")


def test_the_default_folder_is_the_users_own(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert private_folder() == tmp_path / "cache" / "llama"
