"""An engine in a process of its own: what it is asked, how its figures are timed, and the lines that it answers with.

`python -m benchmarks.worker ENGINE prepare|measure JOB`, with the job in JSON. Standard library only, since each engine
may have an environment of its own.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import json
import os
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent
LOAD, END = "load", "end"  # the turns before and after those of the figures
FIRST_PROMPT = 16  # tokens of the prompt that the first token after loading comes from
PREFILLS = 5  # timed passes of a prefill, of which the median counts

Figures = dict[str, float]


@dataclass(frozen=True)
class Job:
    """One network, one checkpoint, one machine setting, and the sizes to measure.

    Attributes:
        ckpt_dir: a checkpoint in the released format, in one file.
        tokenizer_path: the `tokenizer.model` that `Llama.build` asks for; nothing is encoded with it.
        folder: where engines put files in their own formats.
        n_kv_heads, hidden_dim, vocab_size: resolved, never None or -1.
        prefill_lengths: prompt lengths of the prefill figures, batch 1.
        decode_batches, decode_prompt, decode_steps: batch sizes of the decode figures, their prompts' length, and the
            number of timed steps.
    """

    shape: str
    ckpt_dir: str
    tokenizer_path: str
    folder: str
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
    threads: int = 1
    prefill_lengths: Sequence[int] = (16, 128, 512)
    decode_batches: Sequence[int] = (1, 4, 8, 16)
    decode_prompt: int = 128
    decode_steps: int = 48

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
    """An engine with its network loaded, by the constructor.

    Attributes:
        batches: the decode batches that it takes part in.
    """

    batches: Sequence[int] = (1, 8)

    def __init__(self, job: Job, variant: str) -> None: ...

    @staticmethod
    def prepare(job: Job, variant: str) -> None:
        """Writes the engine's own files once; nothing where it reads the job's."""

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


def figure(engine: Adapter, name: str, job: Job) -> float | None:
    """Tokens per second of a figure such as "prefill_128" or "decode_8"; None if the engine takes no part in it."""
    kind, number = name.split("_")
    size = int(number)
    if kind == "prefill":
        times = [ticks_of(engine, job.prompts(1, size), 1)[0] for _ in range(PREFILLS + 1)]
        return size / statistics.median(times[1:])  # the first pass warms up
    if size not in engine.batches:
        return None
    ticks = ticks_of(engine, job.prompts(size, job.decode_prompt), job.decode_steps + 2)
    return size * job.decode_steps / (ticks[-1] - ticks[1])  # the first steps warm up


def peak_memory(device: str) -> float:
    """The most GiB of this process that were resident at a time, libraries and mapped files included.

    On CUDA: what torch took from the card.
    """
    if device.startswith("cuda"):
        import torch

        return float(torch.cuda.max_memory_reserved()) / 2**30
    try:
        status = Path("/proc/self/status").read_text(encoding="ascii")
        return float(next(line.split()[1] for line in status.splitlines() if line.startswith("VmHWM:"))) / 2**20
    except OSError:  # no /proc; getrusage keeps a parent's peak, so it comes second
        import resource

        return float(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss) / (
            2**30 if sys.platform == "darwin" else 2**20
        )


def measure(load: Callable[[], Adapter], job: Job) -> None:
    """Takes the turns that stdin names, one per line, and prints each one's figures; loading comes first."""
    assert sys.stdin.readline().strip() == LOAD
    started = time.perf_counter()
    engine = load()
    loaded = time.perf_counter() - started
    ticks_of(engine, job.prompts(1, FIRST_PROMPT), 1)
    _answer({LOAD: loaded, "first_token": time.perf_counter() - started})
    gc.collect()
    gc.freeze()  # a search for garbage through all of torch takes 60 ms: in a timed step it would look like a slow one
    for turn in map(str.strip, sys.stdin):
        name, value = ("peak_memory", peak_memory(job.device)) if turn == END else (turn, figure(engine, turn, job))
        _answer({} if value is None else {name: value})


def _answer(figures: Figures) -> None:
    """Ends a turn: prints its figures, in seconds, GiB or tokens per second."""
    print(json.dumps({"figures": figures}), flush=True)


class EngineProcess:
    """The process of an engine, which sleeps between its turns. `with` ends it."""

    def __init__(self, engine: str, python: str, job: Job) -> None:
        self._log = (Path(job.folder) / f"{engine}.log").open("w+", encoding="utf-8", errors="replace")
        self._process = subprocess.Popen(
            _command(engine, python, "measure", job),
            cwd=ROOT,
            env=environment(job),
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

    def take_turn(self, turn: str) -> Figures:
        """The figures of a turn.

        Raises:
            RuntimeError: the process ended; the message has the end of its log.
        """
        assert self._process.stdin is not None and self._process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            print(turn, file=self._process.stdin, flush=True)
        for line in self._process.stdout:
            if (figures := parse(line)) is not None:
                return figures
        status = self._process.wait()
        self._log.seek(0)
        raise RuntimeError(_failure(status, self._log.read()))


def parse(line: str) -> Figures | None:
    """The figures of a line; None for the output of other programs."""
    with contextlib.suppress(ValueError, KeyError, TypeError):
        figures: Figures = json.loads(line)["figures"]
        return figures
    return None


def _failure(status: int, log: str) -> str:
    last_words = [line for line in log.splitlines() if line and not line.startswith(" ")]  # a traceback is indented
    return f"exit status {status}: {' | '.join(last_words[-4:])}"


def prepare(engine: str, python: str, job: Job) -> None:
    """Has the engine write files in its own format; RuntimeError if it fails."""
    command = _command(engine, python, "prepare", job)
    ended = subprocess.run(command, cwd=ROOT, env=environment(job), capture_output=True, text=True, check=False)
    if ended.returncode:
        raise RuntimeError(_failure(ended.returncode, ended.stderr))


def _command(engine: str, python: str, action: str, job: Job) -> list[str]:
    return [python, "-m", "benchmarks.worker", engine, action, json.dumps(asdict(job))]


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


def main(name: str, action: str, job_fields: str) -> None:
    engine = importlib.import_module("benchmarks.peers").ENGINES[name]
    job = Job(**json.loads(job_fields))
    for module in engine.imports.split():
        importlib.import_module(module)  # before the clock runs
    if action == "prepare":
        engine.adapter.prepare(job, engine.variant)
    else:
        measure(lambda: engine.adapter(job, engine.variant), job)


if __name__ == "__main__":
    main(*sys.argv[1:])
