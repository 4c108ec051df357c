"""Starts an engine's process, in the Python environment it lives in, and has it take its turns.

Knows which packages an engine needs, nothing of what it does with them.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TextIO

from benchmarks.job import Job
from benchmarks.lines import is_over, parse

ROOT = Path(__file__).parent.parent
# What a peer's environment has to hold: what is imported, and what to install for it besides torch.
PEERS: dict[str, tuple[tuple[str, ...], str]] = {
    "eager": (("torch", "fairscale"), "fairscale"),
    "hf_compiled": (("torch", "transformers", "safetensors"), "transformers safetensors"),
    "hf": (("torch", "transformers", "safetensors"), "transformers safetensors"),
    "llama_cpp": (("torch", "llama_cpp", "gguf"), "gguf llama-cpp-python"),
    "openvino": (("torch", "openvino", "optimum.intel", "safetensors"), "openvino optimum-intel"),
    "ctranslate2": (("torch", "ctranslate2", "transformers", "safetensors"), "ctranslate2 transformers safetensors"),
}
CPU_ONLY = ("llama_cpp", "openvino", "ctranslate2")  # as they are measured here

_FIND = """
import importlib.util, sys
for name in sys.argv[1:]:
    try:
        print("" if importlib.util.find_spec(name) else name)
    except ImportError:
        print(name)
"""

Figures = dict[str, float | str]
OnFigure = Callable[[str, float | str], None]


def missing_packages(peer: str, python: str) -> list[str]:
    """Those of a peer's packages that its environment lacks."""
    modules, _ = PEERS[peer]
    found = subprocess.run([python, "-c", _FIND, *modules], capture_output=True, text=True, check=False)
    if found.returncode:
        raise ValueError(f"{python} does not run ({found.stderr.strip()[-200:]}); --peer_python takes {peer}=PYTHON")
    return found.stdout.split()


def prepare(engine: str, python: str, job: Job, job_file: Path) -> None:
    """Has the engine write its own files, unless they are there from a run before."""
    done = Path(job.folder) / f"{engine}.done"
    if not done.exists():
        _run([python, "-m", "benchmarks.worker", engine, "prepare", str(job_file)], job, lambda *_: None)
        done.touch()


class Running:
    """The process of an engine; it sleeps between its turns. Used by `with`, which ends it."""

    def __init__(self, engine: str, python: str, job: Job, job_file: Path) -> None:
        command = [python, "-m", "benchmarks.worker", engine, "measure", str(job_file)]
        self._log = (Path(job.folder) / f"{engine}.log").open("w+", encoding="utf-8", errors="replace")
        self._process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=_environment(job),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
        )

    def __enter__(self) -> Running:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()  # it has nothing to keep
        self._process.communicate()
        self._log.close()

    def take_turn(self, turn: str, on_figure: OnFigure) -> Figures:
        """The figures of a turn, each also told to `on_figure` when it is known; RuntimeError if the process ends."""
        assert self._process.stdin is not None and self._process.stdout is not None
        figures: Figures = {}
        with contextlib.suppress(BrokenPipeError):
            print(turn, file=self._process.stdin, flush=True)
        for line in self._process.stdout:
            if is_over(line):
                return figures
            if parsed := parse(line):
                figures[parsed[0]] = parsed[1]
                on_figure(*parsed)
        raise RuntimeError(_last_words(self._process.wait(), self._log))


def measure_bandwidth(job: Job, job_file: Path, on_figure: OnFigure) -> Figures:
    return _run([sys.executable, "-m", "benchmarks.bandwidth", str(job_file)], job, on_figure)


def _run(command: list[str], job: Job, on_figure: OnFigure) -> Figures:
    """Runs a process to its end; RuntimeError with its last words if it fails."""
    figures: Figures = {}
    log = Path(job.folder) / "last_process.log"
    with log.open("w+", encoding="utf-8", errors="replace") as errors:
        with subprocess.Popen(
            command, cwd=ROOT, env=_environment(job), stdout=subprocess.PIPE, stderr=errors, text=True
        ) as process:
            assert process.stdout is not None
            try:
                for line in process.stdout:
                    if parsed := parse(line):
                        figures[parsed[0]] = parsed[1]
                        on_figure(*parsed)
            except BaseException:
                process.kill()
                raise
        if process.returncode:
            raise RuntimeError(_last_words(process.returncode, errors))
    return figures


def _last_words(status: int, log: TextIO) -> str:
    log.seek(0)
    return f"exit status {status}: {' | '.join(log.read().splitlines()[-4:])}"


def _environment(job: Job) -> dict[str, str]:
    """This process's, with the threads that everyone gets, and no way to fetch anything."""
    settings = {"OMP_NUM_THREADS": str(job.threads), "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    return {**os.environ, **settings}
