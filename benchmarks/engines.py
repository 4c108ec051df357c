"""Starts an engine's process, in the Python environment it lives in, and collects what it says.

Knows which packages an engine needs, nothing of what it does with them.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from benchmarks.job import Job
from benchmarks.lines import parse

ROOT = Path(__file__).parent.parent
# What a peer's environment has to hold: what is imported, and what to install for it. torch comes first everywhere.
PEERS: dict[str, tuple[tuple[str, ...], str]] = {
    "eager": (("torch", "fairscale"), "torch fairscale"),
    "hf_compiled": (("torch", "transformers", "safetensors"), "torch transformers safetensors"),
    "hf": (("torch", "transformers", "safetensors"), "torch transformers safetensors"),
    "llama_cpp": (("torch", "llama_cpp", "gguf"), "torch gguf llama-cpp-python"),
    "openvino": (("torch", "openvino", "optimum.intel", "safetensors"), "torch openvino optimum-intel"),
    "ctranslate2": (("torch", "ctranslate2", "transformers", "safetensors"), "torch ctranslate2 transformers"),
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


def measure(
    engine: str, python: str, job: Job, job_file: Path, on_figure: Callable[[str, float | str], None]
) -> Figures:
    """One round of an engine: all its figures, each also told to `on_figure` when it is known."""
    return _run([python, "-m", "benchmarks.worker", engine, "measure", str(job_file)], job, on_figure)


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
            for line in process.stdout:
                if parsed := parse(line):
                    figures[parsed[0]] = parsed[1]
                    on_figure(*parsed)
        if process.returncode:
            errors.seek(0)
            raise RuntimeError(f"exit status {process.returncode}: {' | '.join(errors.read().splitlines()[-4:])}")
    return figures


def _environment(job: Job) -> dict[str, str]:
    """This process's, with the threads that everyone gets, and no way to fetch anything."""
    settings = {"OMP_NUM_THREADS": str(job.threads), "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    return {**os.environ, **settings}
