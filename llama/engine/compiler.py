"""Compiles modules ahead of time (`torch.export`, AOTInductor) in another process, and keeps the results on disk.

The process has low priority and ends with this one. What it has compiled is loaded by later processes at once.
"""

from __future__ import annotations

import fcntl
import hashlib
import logging
import os
import pickle
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import threading
import time
import zipfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from llama.errors import first_line

Compiled: TypeAlias = Callable[[list[Tensor]], Sequence[Tensor]]

_LONGEST_S = 600  # after which a compiler is taken for one that never ends
_POLL_S = 0.1
_JOBS = "jobs"  # file that they are handed over in
_CHILD = "import os; os.nice(19); from llama.engine.compiler import compile_jobs; compile_jobs()"

logger = logging.getLogger(__name__)


class CompileError(Exception):
    """Compiling failed; the message says why."""


@dataclass(frozen=True)
class Job:
    """A module to compile.

    Attributes:
        module: `module(*inputs)` is traced. Can be pickled.
        inputs: examples on the meta device.
        dynamic_shapes: as for `torch.export.export`.
        options: of inductor.
    """

    name: str
    module: nn.Module
    inputs: list[Tensor]
    dynamic_shapes: dict[str, Any]
    options: dict[str, Any]


class Compiler:
    """Loads the jobs' results from disk, or has them compiled, in a thread that only waits.

    Args:
        key: identifies what the jobs compute, to find the results of an earlier process.
    """

    def __init__(self, key: str, jobs: Sequence[Job]) -> None:
        digest = hashlib.sha256(f"{key} {torch.__version__} {_processor()}".encode()).hexdigest()[:20]
        self._jobs = {f"{digest}-{job.name}.pt2": job for job in jobs}
        self._loaded: dict[str, Compiled] = {}
        self._error: Exception | None = None
        self._thread = threading.Thread(target=self._run, name="compiler", daemon=True)
        self._thread.start()

    def result(self, name: str, *, wait: bool) -> Compiled | None:
        """Return what a job was compiled to, a function of the list of its inputs; None if it is not ready.

        Raises:
            Exception: it could not be compiled.
        """
        while wait and name not in self._loaded and self._thread.is_alive():  # a forked process has no such thread
            self._thread.join(0.02)
        if name not in self._loaded and self._error:
            raise self._error
        return self._loaded.get(name)

    def _run(self) -> None:
        started = time.perf_counter()
        try:
            folder = private_folder()
            if self._load(folder):
                return
            if not has_cpp_compiler():
                raise CompileError("a C++ compiler must be installed, such as g++, or named by CXX; got none")
            with _locked(folder):  # while another process compiles, such as another rank, which does the same
                if self._load(folder):
                    return
                self._compile(folder)
            if not self._load(folder):
                raise CompileError("the compiler left no result that can be loaded")
            logger.info("Compiled the decode step in %.0f seconds", time.perf_counter() - started)
        except Exception as error:  # whatever happens here, the network runs uncompiled
            self._error = error

    def _load(self, folder: Path) -> bool:
        """Load the results that are there, undamaged and not loaded yet; return whether all are loaded."""
        for file, job in self._jobs.items():
            if job.name not in self._loaded and _is_undamaged(folder / file):
                # As `torch._inductor.aoti_load_package`, which imports the compiler first: steps would wait a second
                # for that. The True: the network's lock lets one thread in at a time.
                loaded = torch._C._aoti.AOTIModelPackageLoader(str(folder / file), "model", True, 1, -1)
                self._loaded[job.name] = loaded.boxed_run
        return len(self._loaded) == len(self._jobs)

    def _compile(self, folder: Path) -> None:
        """Compile what is not loaded in a separate process; load each result as soon as it is there."""
        with (
            tempfile.TemporaryDirectory(dir=folder, ignore_cleanup_errors=True) as scratch,
            tempfile.TemporaryFile() as errors,
        ):
            jobs = {file: job for file, job in self._jobs.items() if job.name not in self._loaded}
            Path(scratch, _JOBS).write_bytes(pickle.dumps(jobs))
            process = subprocess.Popen(
                [sys.executable, "-c", _CHILD, scratch, str(os.getpid())],
                stdin=subprocess.DEVNULL,
                stdout=errors,
                stderr=errors,
                env={
                    **os.environ,
                    "PYTHONPATH": os.pathsep.join(sys.path),
                    "TORCHINDUCTOR_CACHE_DIR": str(folder / "inductor"),  # with what it has learned of the C++ compiler
                    "TORCHINDUCTOR_COMPILE_THREADS": "1",
                },
                start_new_session=True,  # Ctrl-C is for this process
            )
            with suppress(OSError):  # on Linux, a session's processes compete with others' as a group
                Path(f"/proc/{process.pid}/autogroup").write_text("19")
            end = time.monotonic() + _LONGEST_S
            try:
                while process.poll() is None:
                    if time.monotonic() > end:
                        raise CompileError(f"the compiler must end within {_LONGEST_S} seconds")
                    time.sleep(_POLL_S)
                    self._load(folder)
            finally:
                if process.poll() is None:
                    os.killpg(process.pid, signal.SIGKILL)  # and what it has started
                    process.wait()
            if process.returncode:
                errors.seek(0)
                lines = errors.read().decode(errors="replace").strip().splitlines()
                raise CompileError(lines[-1] if lines else f"the compiler ended with status {process.returncode}")


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Waits until no other process has the folder locked, and locks it; on a file system without locks, goes on.

    Goes on too when another has it for longer than a compiler may take: the other may be stopped, or have left the lock
    to a process that was forked from it.
    """
    fd = os.open(folder, os.O_RDONLY)
    end = time.monotonic() + _LONGEST_S
    try:
        with suppress(OSError):
            while not _try_lock(fd) and time.monotonic() < end:
                time.sleep(_POLL_S)
        yield
    finally:
        with suppress(OSError):
            fcntl.flock(fd, fcntl.LOCK_UN)  # forked processes have the file open too, and with it the lock
        os.close(fd)


def _try_lock(fd: int) -> bool:
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _is_undamaged(path: Path) -> bool:
    """Whether a result is there and whole: loading another could end the process."""
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.testzip() is None
    except (OSError, zipfile.BadZipFile):
        return False


def has_cpp_compiler() -> bool:
    """Whether there is the C++ compiler that inductor would call: `CXX`, else the system's default."""
    return shutil.which(os.environ.get("CXX", "clang++" if sys.platform == "darwin" else "g++")) is not None


def private_folder() -> Path:
    """The folder of compiled code, `TORCHINDUCTOR_CACHE_DIR` or one in the user's cache; no one else can write there.

    Raises:
        CompileError: it cannot be made, or another user could have put code there.
    """
    given = os.environ.get("TORCHINDUCTOR_CACHE_DIR")
    cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    folder = Path(given) / "llama" if given else cache / "llama"
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = folder.stat()
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise CompileError(f"the folder of compiled code must be writable, got {folder}: {error.strerror}") from None
    if hasattr(os, "getuid") and (status.st_uid != os.getuid() or status.st_mode & (stat.S_IWGRP | stat.S_IWOTH)):
        raise CompileError(f"the folder of compiled code must be this user's alone, got {folder}")
    return folder


def _processor() -> str:
    """What compiled code depends on: it is made for this processor's instructions."""
    with suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line for line in lines if line.startswith(("flags", "Features")))
    return torch.backends.cpu.get_cpu_capability()


def compile_jobs() -> None:
    """Compile the jobs of a `Compiler`, in a process of its own; move each result to its place when it is there."""
    scratch, parent = Path(sys.argv[1]), int(sys.argv[2])
    threading.Thread(target=_end_with_parent, args=(scratch, parent), daemon=True).start()
    try:
        for file, job in pickle.loads((scratch / _JOBS).read_bytes()).items():
            compile_job(job, scratch / file)
            os.replace(scratch / file, scratch.parent / file)
    except Exception as error:  # its last line is the reason that the other process gives
        print(f"{type(error).__name__}: {first_line(error)}", file=sys.stderr)
        sys.exit(1)


def _end_with_parent(scratch: Path, parent: int) -> None:
    """Ends this process, and the C++ compiler that it runs, once the one that started it has gone."""
    while os.getppid() == parent:
        time.sleep(_POLL_S)
    shutil.rmtree(scratch, ignore_errors=True)
    os.killpg(0, signal.SIGKILL)


def export_job(job: Job, device: torch.device) -> torch.export.ExportedProgram:
    """Trace a job's module, for a device."""
    with torch.inference_mode(False), torch.no_grad():
        inputs = tuple(torch.empty_like(tensor, device=device) for tensor in job.inputs)  # never touched
        return torch.export.export(job.module, inputs, dynamic_shapes=job.dynamic_shapes, strict=False)


def compile_job(job: Job, path: Path) -> None:
    """Compile a job to a package at `path`."""
    from torch._inductor import aoti_compile_and_package

    aoti_compile_and_package(export_job(job, torch.device("cpu")), package_path=str(path), inductor_configs=job.options)
