"""The rounds: every engine in a process of its own, all of them in turn at each figure, several times over.

The speed of a machine drifts: what it does while a figure is measured, it does to all engines.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO, TypeVar

from benchmarks import shapes
from benchmarks.job import OURS, PEERS, PUBLISHED, Job, is_over, parse
from benchmarks.report import shown
from benchmarks.worker import LOAD, turns
from llama import ModelArgs

Result = TypeVar("Result")
Figures = dict[str, "float | str"]
OnFigure = Callable[[str, "float | str"], None]
Round = dict[str, dict[str, float]]  # engine -> figure -> value
ROOT = Path(__file__).parent.parent

_FIND = """
import importlib.util, sys
for name in sys.argv[1:]:
    try:
        print("" if importlib.util.find_spec(name) else name)
    except ImportError:
        print(name)
"""


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
        names = [name for name in found if name != PUBLISHED or round_ < self.published_rounds]
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
        _guard(pythons, engine, prepare, engine, python, plan.job, job_file)
    for i in range(plan.repeats):
        prefix = f"round {i + 1}/{plan.repeats}"
        machine = _run([sys.executable, "-m", "benchmarks.machine", str(job_file)], plan.job, _progress(prefix))
        measured: dict[str, Figures] = {"ours": {}, "machine": machine}
        for group in plan.groups(pythons, i):
            measured |= _take_turns(group, pythons, plan.job, job_file, prefix)
        versions |= {name: str(figures["version"]) for name, figures in measured.items() if "version" in figures}
        rounds.append({name: _numeric(figures) for name, figures in measured.items()})
        rounds[i]["ours"] |= _derived(rounds[i], plan)
    return rounds, versions


def _take_turns(
    group: Sequence[str], pythons: dict[str, str], job: Job, job_file: Path, prefix: str
) -> dict[str, Figures]:
    """Every figure of engines that stay loaded until the last of them is through."""
    found: dict[str, Figures] = {engine: {} for engine in group}
    running: dict[str, EngineProcess] = {}
    with ExitStack() as stack:
        for turn in turns(job):
            for engine in filter(pythons.__contains__, group):
                if turn == LOAD:
                    running[engine] = stack.enter_context(EngineProcess(engine, pythons[engine], job, job_file))
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


def _numeric(figures: Figures) -> dict[str, float]:
    return {name: value for name, value in figures.items() if isinstance(value, (int, float))}


def _derived(one_round: Round, plan: Plan) -> dict[str, float]:
    """Our figures relative to what the machine and the formula allow."""
    ours, machine = one_round["ours"], one_round["machine"]
    memory = shapes.memory_plan(plan.args, plan.job)
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
        operations = ours[f"prefill_{length}"] * shapes.operations_per_token(plan.args)
        derived |= {f"share_of_matmul_prefill_{length}": operations / machine["matmul_rate"]}
    return derived


def _progress(prefix: str) -> OnFigure:
    def show(figure: str, value: float | str) -> None:
        say(f"{prefix}: {figure} {value if isinstance(value, str) else shown(figure, value)}")

    return show


def say(text: str) -> None:
    """Prints progress to stderr, so that stdout is the report alone."""
    print(text, file=sys.stderr, flush=True)


def peer_pythons(peers: str | Sequence[str], peer_python: str | Sequence[str], known: Iterable[str]) -> dict[str, str]:
    """The interpreter of each of the peers: NAME=PYTHON of `peer_python`, else this one.

    Args:
        peers: names, as a command line's NAME,NAME or as a sequence; `peer_python` likewise.
        known: the names that there are.
    """
    names, pairs = (
        [name for name in (value.split(",") if isinstance(value, str) else value) if name]
        for value in (peers, peer_python)
    )
    if wrong := [pair for pair in pairs if "=" not in pair]:
        raise ValueError(f"peer_python must be NAME=PYTHON,..., got {', '.join(wrong)}")
    pythons = dict(pair.split("=", 1) for pair in pairs)
    if unknown := [name for name in (*names, *pythons) if name not in known]:
        raise ValueError(f"peers must be of {', '.join(known)}, got {', '.join(unknown)}")
    return {name: pythons.get(name, sys.executable) for name in names}


def missing_packages(peer: str, python: str) -> list[str]:
    """Those of a peer's packages that its environment lacks."""
    found = subprocess.run([python, "-c", _FIND, *PEERS[peer].imports], capture_output=True, text=True, check=False)
    if found.returncode:
        last_words = found.stderr.strip()[-200:]
        raise ValueError(f"--peer_python {peer} must be a Python interpreter, got {python}, which failed: {last_words}")
    return found.stdout.split()


def prepare(engine: str, python: str, job: Job, job_file: Path) -> None:
    """Has the engine write its own files, unless they are there from a run before."""
    done = Path(job.folder) / f"{engine}.done"
    if not done.exists():
        if engine in PEERS:
            shapes.write_hf_folder(job)
        _run([python, "-m", "benchmarks.worker", engine, "prepare", str(job_file)], job, lambda *_: None)
        done.touch()


class EngineProcess:
    """The process of an engine; it sleeps between its turns. `with` ends it."""

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

    def __enter__(self) -> EngineProcess:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()  # it has nothing to keep
        self._process.communicate()
        self._log.close()

    def take_turn(self, turn: str, on_figure: OnFigure) -> Figures:
        """The figures of a turn, each also passed to `on_figure` when it is known.

        Raises:
            RuntimeError: the process ended; the message has the end of its log.
        """
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


def _run(command: list[str], job: Job, on_figure: OnFigure) -> Figures:
    """Runs a process to its end; RuntimeError with the end of its log if it fails."""
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
    """This process's, with the threads that every engine gets, and no way to fetch anything."""
    settings = {"OMP_NUM_THREADS": str(job.threads), "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    return {**os.environ, **settings}
