"""The rounds: every engine in a process of its own, all of them in turn at each figure, again and again.

Whatever the machine does while a figure is measured, it does to all of them. Knows nothing of how figures are shown.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from benchmarks import ceiling, engines
from benchmarks.job import Job
from benchmarks.measure import LOAD, turns
from benchmarks.report import OURS, shown
from llama import ModelArgs

Result = TypeVar("Result")
Round = dict[str, dict[str, float]]  # engine -> figure -> value


@dataclass(frozen=True)
class Plan:
    """What is to run: the network, the job that every engine gets, and who takes part in how many rounds."""

    args: ModelArgs
    job: Job
    pythons: dict[str, str]  # of each engine, in the order of a round
    repeats: int
    published_rounds: int
    one_at_a_time: bool

    def groups(self, found: Iterable[str], round_: int) -> list[list[str]]:
        """The engines of a round, of those found to work: whose processes are there at the same time.

        Each round another one is the first at every figure.
        """
        names = [name for name in found if name != "published" or round_ < self.published_rounds]
        first = round_ % len(names)
        names = names[first:] + names[:first]
        return [[name] for name in names] if self.one_at_a_time else [names]


def run_rounds(plan: Plan) -> tuple[list[Round], dict[str, str]]:
    """The figures of each round, and the engines' versions. A peer that fails is left out from there on.

    Raises:
        RuntimeError: our own process failed.
    """
    job_file = Path(plan.job.folder) / "job.json"
    plan.job.write(job_file)
    pythons = dict(plan.pythons)
    rounds: list[Round] = []
    versions: dict[str, str] = {}
    for engine, python in plan.pythons.items():
        say(f"{engine}: writing its files")
        _guard(pythons, engine, engines.prepare, engine, python, plan.job, job_file)
    for i in range(plan.repeats):
        prefix = f"round {i + 1}/{plan.repeats}"
        machine = engines.measure_bandwidth(plan.job, job_file, _progress(f"{prefix}  machine"))
        measured: dict[str, engines.Figures] = {"ours": {}, "machine": machine}
        for group in plan.groups(pythons, i):
            measured |= _take_turns(group, pythons, plan.job, job_file, prefix)
        versions |= {name: str(figures["version"]) for name, figures in measured.items() if "version" in figures}
        rounds.append({name: _numeric(figures) for name, figures in measured.items()})
        rounds[i]["ours"] |= _derived(rounds[i], plan)
    return rounds, versions


def _take_turns(
    group: Sequence[str], pythons: dict[str, str], job: Job, job_file: Path, prefix: str
) -> dict[str, engines.Figures]:
    """Every figure of engines that stay loaded until the last of them is through."""
    found: dict[str, engines.Figures] = {engine: {} for engine in group}
    running: dict[str, engines.Running] = {}
    with ExitStack() as stack:
        for turn in turns(job):
            for engine in filter(pythons.__contains__, group):
                if turn == LOAD:
                    running[engine] = stack.enter_context(engines.Running(engine, pythons[engine], job, job_file))
                show = _progress(f"{prefix}  {engine}")
                found[engine] |= _guard(pythons, engine, running[engine].take_turn, turn, show) or {}
    return found


def _guard(pythons: dict[str, str], engine: str, work: Callable[..., Result], *args: object) -> Result | None:
    """What the work returns; if a peer's fails, says so and takes the peer out."""
    try:
        return work(*args)
    except RuntimeError as error:
        if engine in OURS:
            raise
        say(f"{engine}: left out, it failed with {error}")
        del pythons[engine]
        return None


def _numeric(figures: engines.Figures) -> dict[str, float]:
    return {name: value for name, value in figures.items() if isinstance(value, (int, float))}


def _derived(one_round: Round, plan: Plan) -> dict[str, float]:
    """Our figures held against what the machine and the formula allow."""
    ours, machine = one_round["ours"], one_round["machine"]
    memory = ceiling.memory_plan(plan.args, plan.job)
    own = ours["peak_memory"] - ours["memory_before"]
    loading = machine["read_file"] + ours.get("load_packing", 0.0)
    derived = {
        "memory_planned": memory.total,
        "memory_over_weights_and_cache_ratio": own / (memory.weights + memory.kv_cache),
        "memory_over_plan_ratio": own / memory.total,
        "first_token_over_reading_and_packing_ratio": ours["first_token"] / loading,
    }
    for batch in plan.job.decode_batches:
        if f"sampling_{batch}" in ours:
            steps_per_second = ours[f"decode_{batch}"] / batch
            derived |= {f"share_of_step_sampling_{batch}": ours[f"sampling_{batch}"] * steps_per_second}
    for length in plan.job.prefill_lengths:
        operations = ours[f"prefill_{length}"] * ceiling.operations_per_token(plan.args)
        derived |= {f"share_of_matmul_prefill_{length}": operations / machine["matmul_rate"]}
    return derived


def _progress(prefix: str) -> engines.OnFigure:
    def show(figure: str, value: float | str) -> None:
        say(f"{prefix}: {figure} {value if isinstance(value, str) else shown(figure, value)}")

    return show


def say(text: str) -> None:
    """Progress: to stderr, so that stdout is the report alone."""
    print(text, file=sys.stderr, flush=True)
