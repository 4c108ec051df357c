"""The process of one engine, and how its figures are timed: `python -m benchmarks.worker ENGINE prepare|measure JOB`.

An engine completes prompts of ids, and reports each time that all of them have a new token; the rest is here. Standard
library only, apart from the engine's own module.
"""

from __future__ import annotations

import gc
import importlib
import json
import statistics
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol

from benchmarks.job import ENGINES, Job, emit, emit_over

LOAD, END = "load", "end"  # the turns around those of the figures
FIRST_PROMPT = 16  # tokens of the prompt that the first token after loading comes from
MIN_SAMPLES, MIN_SECONDS = 2, 1.0  # a pass is timed until both are reached
MAX_SAMPLES = 15
LONG_SECONDS = 10.0  # a pass that takes longer is timed once, since warming up makes no difference to it


Clock = Callable[[], float]


class Engine(Protocol):
    """A loaded network.

    Attributes:
        batches: the decode batches that it takes part in; if there are none, it is out of the prefill figures too.
        ragged: whether it takes prompts of different lengths.
    """

    batches: tuple[int, ...]
    ragged: bool

    def run(self, prompts: list[list[int]], n_tokens: int, tick: Callable[[], None]) -> None:
        """Completes the prompts greedily by `n_tokens` each, past any EOS.

        Calls `tick` each time every prompt has a new token whose id is on the host.
        """


def ticks_of(engine: Engine, prompts: list[list[int]], n_tokens: int, clock: Clock) -> list[float]:
    """Seconds from the start of a run to each of its `n_tokens` ticks."""
    ticks: list[float] = []
    started = clock()
    engine.run(prompts, n_tokens, lambda: ticks.append(clock() - started))
    if len(ticks) != n_tokens:
        raise RuntimeError(f"{n_tokens} tokens were asked for, got {len(ticks)}")
    return ticks


def first_token_seconds(engine: Engine, prompts: list[list[int]], clock: Clock) -> float:
    """The median time until every prompt has its first token, after one pass that warms up."""
    (first,) = ticks_of(engine, prompts, 1, clock)
    if first > LONG_SECONDS:
        return first
    samples: list[float] = []
    while len(samples) < MIN_SAMPLES or (sum(samples) < MIN_SECONDS and len(samples) < MAX_SAMPLES):
        samples += ticks_of(engine, prompts, 1, clock)
    return statistics.median(samples)


def prefill_rate(engine: Engine, prompt: list[int], clock: Clock) -> float:
    """Tokens of the prompt per second until the first new token."""
    return len(prompt) / first_token_seconds(engine, [prompt], clock)


def decode_rate(engine: Engine, prompts: list[list[int]], steps: int, clock: Clock) -> float:
    """New tokens per second, of all prompts together, from each prompt's third token on: the first steps warm up."""
    ticks = ticks_of(engine, prompts, steps + 2, clock)
    return len(prompts) * steps / (ticks[-1] - ticks[1])


def turns(job: Job) -> list[str]:
    """What every engine is asked, in order; those between the first and the last are figures."""
    prefills = [f"prefill_{length}" for length in job.prefill_lengths]
    return [LOAD, *prefills, *(f"decode_{batch}" for batch in job.decode_batches), "ragged_first_token", END]


def figure(engine: Engine, name: str, job: Job) -> float | None:
    """The value of a figure; None if the engine takes no part in it."""
    kind, _, size = name.partition("_")
    if kind == "prefill":
        return prefill_rate(engine, job.prompts([int(size)])[0], job.clock) if engine.batches else None
    if kind == "ragged":
        return first_token_seconds(engine, job.prompts(list(job.ragged_lengths)), job.clock) if engine.ragged else None
    if int(size) not in engine.batches:
        return None
    return decode_rate(engine, job.prompts([job.decode_prompt] * int(size)), job.decode_steps, job.clock)


def peak_memory(device: str) -> float:
    """The most bytes of this process that were resident at a time, libraries and mapped files included.

    On CUDA: what torch took from the card.
    """
    if device.startswith("cuda"):
        import torch

        return float(torch.cuda.max_memory_reserved())
    try:
        status = Path("/proc/self/status").read_text(encoding="ascii")
        return 1024 * float(next(line.split()[1] for line in status.splitlines() if line.startswith("VmHWM:")))
    except OSError:  # no /proc; getrusage keeps a parent's peak, so it comes second
        import resource

        unit = 1 if sys.platform == "darwin" else 1024
        return float(unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)


def measure(name: str, job: Job) -> None:
    """Takes the turns that stdin names, one per line, and emits their figures; loading comes first."""
    assert sys.stdin.readline().strip() == LOAD
    spec = ENGINES[name]
    module = importlib.import_module(spec.module)
    emit("version", module.version(job, spec.variant))
    emit("memory_before", peak_memory(job.device))
    started = job.clock()
    engine = module.load(job, spec.variant)
    emit("load", job.clock() - started)
    ticks_of(engine, job.prompts([FIRST_PROMPT]), 1, job.clock)
    emit("first_token", job.clock() - started)
    emit_over()
    gc.collect()
    gc.freeze()  # a search for garbage through all of torch takes 60 ms: in a timed step it would look like a slow one
    for line in sys.stdin:
        for figure_name, value in _take_turn(engine, line.strip(), job):
            emit(figure_name, value)
        emit_over()


def _take_turn(engine: Any, turn: str, job: Job) -> Iterator[tuple[str, float]]:
    if turn.startswith("{"):
        yield from engine.decode_script(**json.loads(turn)).items()
    elif turn == END:
        yield "peak_memory", peak_memory(job.device)
        yield from engine.extras(job) if hasattr(engine, "extras") else ()
    elif (value := figure(engine, turn, job)) is not None:
        yield turn, value


def main(name: str, action: str, job_file: str) -> None:
    job = Job.read(Path(job_file))
    if action == "measure":
        measure(name, job)
    else:
        importlib.import_module(ENGINES[name].module).prepare(job, ENGINES[name].variant)


if __name__ == "__main__":
    main(*sys.argv[1:])
