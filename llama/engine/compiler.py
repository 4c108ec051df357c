"""Compiles modules ahead of time (`torch.export`, AOTInductor) in another process, and keeps the results on disk.

The process has low priority and ends with this one. What it has compiled is loaded by later processes at once.
"""

from __future__ import annotations

import atexit
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
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO, Any, TypeAlias

import torch
from torch import Tensor, nn

from llama.errors import first_line

Compiled: TypeAlias = Callable[[list[Tensor]], Sequence[Tensor]]

_LONGEST_S = 600  # after which a compiler is taken for one that never ends
_CHILD = "from llama.engine.compiler import compile_jobs; compile_jobs()"

logger = logging.getLogger(__name__)


class CompileError(Exception):
    """Compiling failed; the message says why."""


@dataclass(frozen=True)
class Job:
    """A module to compile.

    Attributes:
        name: unique among the jobs of a `Compiler`.
        module: `module(*inputs)` is traced. Can be pickled.
        inputs: example inputs on the meta device.
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
        self._error: str | None = None
        self._thread = threading.Thread(target=self._run, name="compiler", daemon=True)
        self._thread.start()

    def result(self, name: str, *, wait: bool) -> Compiled | None:
        """Return what a job was compiled to, a function of the list of its inputs; None if it is not ready.

        Raises:
            CompileError: it could not be compiled.
        """
        while wait and name not in self._loaded and self._thread.is_alive():  # a forked process has no such thread
            self._thread.join(0.02)
        if name not in self._loaded and self._error:
            raise CompileError(self._error)
        return self._loaded.get(name)

    def _run(self) -> None:
        started = time.perf_counter()
        try:
            folder = private_folder()
            missing = [file for file in self._jobs if not self._load(folder / file)]
            if missing and not has_cpp_compiler():
                raise CompileError("a C++ compiler must be installed, such as g++, or named by CXX; got none")
            if missing:
                _compile_in_process(folder, {file: self._jobs[file] for file in missing}, self._load)
                logger.info("Compiled the decode step in %.0f seconds", time.perf_counter() - started)
            if len(self._loaded) < len(self._jobs):
                self._error = "the compiler left no result that can be loaded"
        except Exception as error:  # whatever happens here, the network runs uncompiled
            self._error = str(error) if isinstance(error, CompileError) else f"{type(error).__name__}: {error}"

    def _load(self, path: Path) -> bool:
        """Load a result if it is there and undamaged."""
        try:
            with zipfile.ZipFile(path) as archive:
                if archive.testzip() is not None:
                    return False
        except (OSError, zipfile.BadZipFile):
            return False
        # As `torch._inductor.aoti_load_package`, which imports the compiler first: steps would wait a second for that.
        # The True: the network's lock lets one thread in at a time.
        loaded = torch._C._aoti.AOTIModelPackageLoader(str(path), "model", True, 1, -1)
        self._loaded[self._jobs[path.name].name] = loaded.boxed_run
        return True


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
        writable = os.access(folder, os.W_OK)
    except OSError as error:
        raise CompileError(f"the folder of compiled code must be writable, got {folder}: {error.strerror}") from None
    if not writable:
        raise CompileError(f"the folder of compiled code must be writable, got {folder}")
    if hasattr(os, "getuid") and (status.st_uid != os.getuid() or status.st_mode & (stat.S_IWGRP | stat.S_IWOTH)):
        raise CompileError(f"the folder of compiled code must be this user's alone, got {folder}")
    return folder


def _processor() -> str:
    """What compiled code depends on: it is made for this processor's instructions."""
    with suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line for line in lines if line.startswith(("flags", "Features")))
    return torch.backends.cpu.get_cpu_capability()


def _compile_in_process(folder: Path, jobs: dict[str, Job], done: Callable[[Path], bool]) -> None:
    """Compile jobs in a separate process; calls `done` with each result's path as soon as it is there."""
    with tempfile.TemporaryDirectory(dir=folder) as scratch, tempfile.TemporaryFile() as errors:
        process = _start_process(folder, errors)
        assert process.stdin and process.stdout
        stop = threading.Timer(_LONGEST_S, _kill, [process])
        stop.daemon = True
        stop.start()
        end = partial(_end, process, threading.current_thread())
        atexit.register(end)
        try:
            with suppress(BrokenPipeError):
                pickle.dump((scratch, jobs), process.stdin)
                process.stdin.flush()  # and stays open: its end tells the process that this one is gone
            for line in process.stdout:
                name = line.decode(errors="replace").strip()
                if name in jobs:
                    os.replace(Path(scratch, name), folder / name)
                    done(folder / name)
            status = process.wait()
        finally:
            ended = stop.is_alive()
            stop.cancel()
            _kill(process)
            with suppress(BrokenPipeError):
                process.stdin.close()
            atexit.unregister(end)
        if not ended:
            raise CompileError(f"the compiler must end within {_LONGEST_S} seconds")
        if status:
            errors.seek(0)
            lines = errors.read().decode(errors="replace").strip().splitlines()
            raise CompileError(lines[-1] if lines else f"the compiler ended with status {status}")


def _start_process(folder: Path, errors: IO[bytes]) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-c", _CHILD],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=errors,
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join(sys.path),
            "TORCHINDUCTOR_CACHE_DIR": str(folder / "inductor"),  # with what it has learned of the C++ compiler
            "TORCHINDUCTOR_COMPILE_THREADS": "1",
        },
        start_new_session=True,  # Ctrl-C is for this process
    )


def _kill(process: subprocess.Popen[bytes]) -> None:
    """End a process, if it runs, and what it has started."""
    if process.poll() is not None:
        return
    with suppress(OSError):
        if hasattr(os, "killpg"):
            os.killpg(process.pid, signal.SIGKILL)
        else:
            process.kill()
    process.wait()


def _end(process: subprocess.Popen[bytes], waiting: threading.Thread) -> None:
    """End a process with this one, and have the thread that waits for it tidy up."""
    _kill(process)
    waiting.join(10)


def compile_jobs() -> None:
    """Compile the jobs of standard input into a folder, and print the name of each when it is there."""
    os.nice(19)
    folder, jobs = pickle.load(sys.stdin.buffer)
    threading.Thread(target=_end_with_parent, args=(folder,), daemon=True).start()
    report, sys.stdout = sys.stdout, sys.stderr
    try:
        for name, job in jobs.items():
            compile_job(job, Path(folder, name))
            print(name, file=report, flush=True)
    except Exception as error:  # its last line is the reason that the other process gives
        print(f"{type(error).__name__}: {first_line(error)}", file=sys.stderr)
        sys.exit(1)


def _end_with_parent(folder: str) -> None:
    """Ends this process, and the C++ compiler that it runs, once the one that started it has gone."""
    os.read(sys.stdin.fileno(), 1)
    shutil.rmtree(folder, ignore_errors=True)
    if hasattr(os, "killpg"):
        os.killpg(0, signal.SIGKILL)
    os._exit(1)


def export_job(job: Job, device: torch.device) -> torch.export.ExportedProgram:
    """Trace a job's module, for a device."""
    with torch.inference_mode(False), torch.no_grad():
        inputs = tuple(torch.empty_like(tensor, device=device) for tensor in job.inputs)  # never touched
        return torch.export.export(job.module, inputs, dynamic_shapes=job.dynamic_shapes, strict=False)


def compile_job(job: Job, path: Path) -> None:
    """Compile a job to a package at `path`."""
    from torch._inductor import aoti_compile_and_package

    aoti_compile_and_package(export_job(job, torch.device("cpu")), package_path=str(path), inductor_configs=job.options)
