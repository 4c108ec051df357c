"""The process of one engine: `python -m benchmarks.worker ENGINE prepare|measure JOB.json`.

Knows the order of events, nothing of any engine.
"""

from __future__ import annotations

import gc
import importlib
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

from benchmarks.job import Job
from benchmarks.lines import emit, emit_over
from benchmarks.measure import END, LOAD, Engine, figure, peak_memory, ticks_of

ENGINES = {
    "ours": "benchmarks.ours",
    "alone": "benchmarks.alone",
    "int8": "benchmarks.int8",
    "eager": "benchmarks.peers.eager",
    "published": "benchmarks.published_way",
    "hf": "benchmarks.peers.hf",
    "hf_compiled": "benchmarks.peers.hf_compiled",
    "llama_cpp": "benchmarks.peers.llama_cpp",
    "openvino": "benchmarks.peers.openvino",
    "ctranslate2": "benchmarks.peers.ctranslate2",
}
FIRST_PROMPT = 16  # tokens of the prompt that the first token after loading comes from


def measure(module: ModuleType, job: Job) -> None:
    """Takes the turns that stdin names, a line each, and emits their figures; loading comes first."""
    assert sys.stdin.readline().strip() == LOAD
    emit("version", module.version(job))
    emit("memory_before", _peak_memory(job))
    started = time.perf_counter()
    engine = module.load(job)
    emit("load", time.perf_counter() - started)
    ticks_of(engine, job.prompts([FIRST_PROMPT]), 1)
    emit("first_token", time.perf_counter() - started)
    emit_over()
    gc.collect()
    gc.freeze()  # a search for garbage through all of torch takes 60 ms: in a timed step it would look like a slow one
    for line in sys.stdin:
        for name, value in _take_turn(engine, line.strip(), job):
            emit(name, value)
        emit_over()


def _take_turn(engine: Engine, turn: str, job: Job) -> Iterator[tuple[str, float]]:
    if turn == END:
        yield "peak_memory", _peak_memory(job)
        yield from engine.extras(job) if hasattr(engine, "extras") else ()
    elif (value := figure(engine, turn, job)) is not None:
        yield turn, value


def _peak_memory(job: Job) -> float:
    """Of this process; on CUDA, of what torch took from the card."""
    if not job.device.startswith("cuda"):
        return peak_memory()
    import torch

    return float(torch.cuda.max_memory_reserved())


def main(name: str, action: str, job_file: str) -> None:
    job = Job.read(Path(job_file))
    module = importlib.import_module(ENGINES[name])
    if action == "prepare":
        module.prepare(job)
    else:
        measure(module, job)


if __name__ == "__main__":
    main(*sys.argv[1:])
