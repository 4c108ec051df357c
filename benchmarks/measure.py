"""What is timed, and how, the same for every engine.

An engine takes prompts of ids and reports each time that all of them have a new token; everything else is here. Knows
no engine; standard library only.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from benchmarks.job import Job

LOAD, END = "load", "end"  # the turns around those of the figures
MIN_SAMPLES, MIN_SECONDS = 2, 1.0  # a pass is timed until both are reached
MAX_SAMPLES = 15
LONG_SECONDS = 10.0  # of a pass that is timed once, since warming up is lost in it


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


def ticks_of(engine: Engine, prompts: list[list[int]], n_tokens: int) -> list[float]:
    """Seconds from the start of a run to each of its `n_tokens` ticks."""
    ticks: list[float] = []
    started = time.perf_counter()
    engine.run(prompts, n_tokens, lambda: ticks.append(time.perf_counter() - started))
    if len(ticks) != n_tokens:
        raise RuntimeError(f"{n_tokens} tokens were asked for, {len(ticks)} came")
    return ticks


def first_token_seconds(engine: Engine, prompts: list[list[int]]) -> float:
    """The median time until every prompt has its first token, after one pass that warms up."""
    (first,) = ticks_of(engine, prompts, 1)
    if first > LONG_SECONDS:
        return first
    samples: list[float] = []
    while len(samples) < MIN_SAMPLES or (sum(samples) < MIN_SECONDS and len(samples) < MAX_SAMPLES):
        samples += ticks_of(engine, prompts, 1)
    return statistics.median(samples)


def prefill_rate(engine: Engine, prompt: list[int]) -> float:
    """Tokens of the prompt per second until the first new token."""
    return len(prompt) / first_token_seconds(engine, [prompt])


def decode_rate(engine: Engine, prompts: list[list[int]], steps: int) -> float:
    """New tokens per second, of all prompts together, from each prompt's third token on: the first steps warm up."""
    ticks = ticks_of(engine, prompts, steps + 2)
    return len(prompts) * steps / (ticks[-1] - ticks[1])


def turns(job: Job) -> list[str]:
    """What every engine is asked, in order; those between the first and the last are figures."""
    prefills = [f"prefill_{length}" for length in job.prefill_lengths]
    return [LOAD, *prefills, *(f"decode_{batch}" for batch in job.decode_batches), "ragged_first_token", END]


def figure(engine: Engine, name: str, job: Job) -> float | None:
    """The value of a figure; None if the engine takes no part in it."""
    kind, _, size = name.partition("_")
    if kind == "prefill":
        return prefill_rate(engine, job.prompts([int(size)])[0]) if engine.batches else None
    if kind == "ragged":
        return first_token_seconds(engine, job.prompts(list(job.ragged_lengths))) if engine.ragged else None
    if int(size) not in engine.batches:
        return None
    return decode_rate(engine, job.prompts([job.decode_prompt] * int(size)), job.decode_steps)


def peak_memory() -> float:
    """The most bytes of this process that were resident at a time, libraries and mapped files included."""
    try:
        status = Path("/proc/self/status").read_text(encoding="ascii")
        return 1024 * float(next(line.split()[1] for line in status.splitlines() if line.startswith("VmHWM:")))
    except OSError:  # no /proc; its neighbour keeps a parent's peak, so it comes second
        import resource

        unit = 1 if sys.platform == "darwin" else 1024
        return float(unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
