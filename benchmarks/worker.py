"""The process of one engine: `python -m benchmarks.worker ENGINE prepare|measure JOB.json`.

Knows the order of events, nothing of any engine.
"""

from __future__ import annotations

import importlib
import sys
import time
from pathlib import Path

from benchmarks.job import Job
from benchmarks.lines import emit
from benchmarks.measure import figures, peak_memory, ticks_of

ENGINES = {
    "ours": "benchmarks.ours",
    "eager": "benchmarks.peers.eager",
    "published": "benchmarks.published_way",
    "hf": "benchmarks.peers.hf",
    "hf_compiled": "benchmarks.peers.hf_compiled",
    "llama_cpp": "benchmarks.peers.llama_cpp",
    "openvino": "benchmarks.peers.openvino",
    "ctranslate2": "benchmarks.peers.ctranslate2",
}
FIRST_PROMPT = 16  # tokens of the prompt that the first token after loading comes from


def measure(name: str, job: Job) -> None:
    """Loads the engine and emits all its figures."""
    module = importlib.import_module(ENGINES[name])
    emit("version", module.version(job))
    emit("memory_before", _peak_memory(job))
    started = time.perf_counter()
    engine = module.load(job)
    emit("load", time.perf_counter() - started)
    ticks_of(engine, job.prompts([FIRST_PROMPT]), 1)
    emit("first_token", time.perf_counter() - started)
    for figure, value in figures(engine, job):
        emit(figure, value)
    emit("peak_memory", _peak_memory(job))
    for figure, value in engine.extras(job) if hasattr(engine, "extras") else ():
        emit(figure, value)


def _peak_memory(job: Job) -> float:
    """Of this process; on CUDA, of what torch took from the card."""
    if not job.device.startswith("cuda"):
        return peak_memory()
    import torch

    return float(torch.cuda.max_memory_reserved())


def main(name: str, action: str, job_file: str) -> None:
    job = Job.read(Path(job_file))
    if action == "prepare":
        importlib.import_module(ENGINES[name]).prepare(job)
    else:
        measure(name, job)


if __name__ == "__main__":
    main(*sys.argv[1:])
