"""An engine in a separate process: what it is asked, how its figures are timed, and the lines that it answers with.

`python -m benchmarks.worker ENGINE JOB`, with the job in JSON. Standard library only, since engines may have
separate environments.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import json
import os
import random
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent
PREPARE, LOAD, END = "prepare", "load", "end"  # the turns that are not figures
FIRST_PROMPT = 16  # tokens of the prompt that the first token after loading comes from
PREFILLS = 5  # timed passes of a prefill, of which the median counts

Figures = dict[str, float]


@dataclass(frozen=True)
class Job:
    """One network, one checkpoint, one machine setting, and the sizes to measure."""

    ckpt_dir: str  # a checkpoint in the released format, in one file
    tokenizer_path: str
    folder: str  # where engines put files in their own formats
    dim: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    hidden_dim: int
    vocab_size: int
    norm_eps: float
    rope_theta: float
    device: str = "cpu"
    dtype: str = "bfloat16"
    form: str = ""  # of the checkpoint's linear layers: "int8", or "" for the dtype
    threads: int = 1
    prefill_lengths: Sequence[int] = (16, 128, 512)  # of the prompts, batch 1
    decode_batches: Sequence[int] = (1, 4, 8, 16)
    decode_prompt: int = 128  # tokens of each prompt
    decode_steps: int = 48  # that are timed

    @property
    def max_seq_len(self) -> int:
        """Room for the longest run of any figure."""
        return max(*self.prefill_lengths, FIRST_PROMPT, self.decode_prompt + self.decode_steps) + 2

    @property
    def hf_folder(self) -> Path:
        """The checkpoint as transformers reads it, which other engines convert from."""
        return Path(self.folder) / "hf"

    @property
    def turns(self) -> list[str]:
        """What every engine is asked, in order; those between the first and the last are figures."""
        prefills = [f"prefill_{length}" for length in self.prefill_lengths]
        return [LOAD, *prefills, *(f"decode_{batch}" for batch in self.decode_batches), END]

    def prompts(self, n: int, length: int) -> list[list[int]]:
        """Random ids past the control pieces, the same in every process."""
        source = random.Random(0)
        return [[source.randrange(3, self.vocab_size) for _ in range(length)] for _ in range(n)]


class Adapter:
    """An engine with its network loaded, by the constructor."""

    batches: Sequence[int] = (1, 8)  # the decode batches that it takes part in

    def __init__(self, job: Job, variant: str) -> None: ...

    @staticmethod
    def prepare(job: Job, variant: str) -> None:
        """Writes the engine's own files once; nothing where it reads the job's."""

    def settle(self) -> None:
        """Waits for what the engine does in the background after loading, which the figures shall not depend on."""

    def run(self, prompts: list[list[int]], n_tokens: int, tick: Callable[[], None]) -> None:
        """Completes the prompts greedily by `n_tokens` each, past any EOS.

        Calls `tick` each time every prompt has a new token whose id is on the host.
        """
        raise NotImplementedError


def ticks_of(engine: Adapter, prompts: list[list[int]], n_tokens: int) -> list[float]:
    """Seconds from the start of a run to each of its `n_tokens` ticks."""
    ticks: list[float] = []
    started = time.perf_counter()
    engine.run(prompts, n_tokens, lambda: ticks.append(time.perf_counter() - started))
    if len(ticks) != n_tokens:
        raise RuntimeError(f"{n_tokens} tokens were asked for, got {len(ticks)}")
    return ticks


def figure(engine: Adapter, name: str, job: Job) -> Figures:
    """Tokens per second of a figure such as "prefill_128" or "decode_8"; nothing if the engine takes no part in it."""
    kind, number = name.split("_")
    size = int(number)
    if kind == "prefill":
        times = [ticks_of(engine, job.prompts(1, size), 1)[0] for _ in range(PREFILLS + 1)]
        return {name: size / statistics.median(times[1:])}  # the first pass warms up
    if size not in engine.batches:
        return {}
    ticks = ticks_of(engine, job.prompts(size, job.decode_prompt), job.decode_steps + 2)
    return {name: size * job.decode_steps / (ticks[-1] - ticks[1])}  # the first steps warm up


def peak_memory(device: str) -> Figures:
    """The most GiB of this process that were resident at a time, libraries and mapped files included.

    On CUDA, what torch took from the card. Nothing where the system has no /proc.
    """
    if device.startswith("cuda"):
        import torch

        return {"peak_memory": torch.cuda.max_memory_reserved() / 2**30}
    status = Path("/proc/self/status")
    peak = re.search(r"VmHWM:\s*(\d+)", status.read_text(encoding="ascii")) if status.exists() else None
    return {"peak_memory": int(peak[1]) / 2**20} if peak else {}


@contextlib.contextmanager
def engine_process(engine: str, python: str, job: Job) -> Iterator[Callable[[str], Figures]]:
    """The process of an engine, which sleeps between its turns: yields a function that returns a turn's figures.

    The function raises RuntimeError if the process has ended; the message has the end of its log.
    """
    command = [python, "-m", "benchmarks.worker", engine, json.dumps(asdict(job))]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with (Path(job.folder) / f"{engine}.log").open("w+", encoding="utf-8", errors="replace") as log:
        process = subprocess.Popen(command, cwd=ROOT, env=environment(job), stderr=log, **pipes)

        def take_turn(turn: str) -> Figures:
            with contextlib.suppress(BrokenPipeError):
                print(turn, file=process.stdin, flush=True)
            if line := process.stdout.readline():
                figures: Figures = json.loads(line)
                return figures
            status = process.wait()
            log.seek(0)
            last_words = [line for line in log.read().splitlines() if line and line[0] != " "]  # no traceback
            raise RuntimeError(f"exit status {status}: {' | '.join(last_words[-4:])}")

        try:
            yield take_turn
        finally:
            process.kill()  # it has nothing to keep
            process.communicate()


def prepare(engine: str, python: str, job: Job) -> None:
    """Has the engine write files in its own format; RuntimeError if it fails."""
    with engine_process(engine, python, job) as take_turn:
        take_turn(PREPARE)


def environment(job: Job) -> dict[str, str]:
    """This process's, with the threads that every engine gets, and no way to fetch anything."""
    settings = {"OMP_NUM_THREADS": str(job.threads), "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    return {**os.environ, **settings}


def numbers(value: int | Sequence[int]) -> tuple[int, ...]:
    """A command line's N or N,N,..."""
    return (value,) if isinstance(value, int) else tuple(value)


def say(text: str) -> None:
    """Prints progress to stderr, so that stdout is the report alone."""
    print(text, file=sys.stderr, flush=True)


def pythons_of(peers: str, known: Iterable[str]) -> dict[str, str]:
    """The interpreter of each of the peers NAME or NAME=PYTHON,..."""
    pairs = (item.partition("=") for item in peers.split(",") if item)
    pythons = {name: python or sys.executable for name, _, python in pairs}
    if unknown := pythons.keys() - set(known):
        raise ValueError(f"peers must be of {', '.join(known)}, got {', '.join(sorted(unknown))}")
    return pythons


@contextlib.contextmanager
def left_out_if_it_fails(peer: str, install: str, pythons: dict[str, str]) -> Iterator[None]:
    """Takes a peer whose work fails out of `pythons`, and says what to install; our own failure is an error."""
    try:
        yield
    except (RuntimeError, OSError) as error:
        if peer.startswith("ours"):
            raise
        # The constraints keep pip from fetching another torch, with gigabytes of CUDA.
        hint = f"; pip install -c constraints.txt {install}"
        missing = isinstance(error, OSError) or "ModuleNotFoundError" in str(error)
        say(f"{peer}: left out, {pythons.pop(peer)} failed with {error}{hint * missing}")


def version(package: str, python: str) -> str:
    """A package and its version in an interpreter's environment."""
    code = f"from importlib.metadata import version; print('{package}', version('{package}'))"
    return subprocess.run([python, "-c", code], capture_output=True, text=True, check=True).stdout.strip()


def main(name: str, job_fields: str) -> None:
    """Takes the turns that stdin names, one per line, and answers each with a line: its figures in JSON."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what an engine prints goes to its log
    kind, job = importlib.import_module("benchmarks.peers").ENGINES[name], Job(**json.loads(job_fields))
    for module in kind.imports.split():
        importlib.import_module(module)  # before the clock runs
    for turn in map(str.strip, sys.stdin):
        figures: Figures = {}
        if turn == PREPARE:
            kind.adapter.prepare(job, kind.variant)
        elif turn == LOAD:
            started = time.perf_counter()
            engine = kind.adapter(job, kind.variant)
            figures[LOAD] = time.perf_counter() - started
            ticks_of(engine, job.prompts(1, FIRST_PROMPT), 1)
            figures["first_token"] = time.perf_counter() - started
            engine.settle()
            gc.collect()
            gc.freeze()  # a search for garbage through all of torch takes 60 ms, as long as a step
        else:
            figures = peak_memory(job.device) if turn == END else figure(engine, turn, job)
        print(json.dumps(figures), file=answers, flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
