"""What other programs on the same cores cost: `python benchmarks/busy.py` times answers with and without busy loops.

Idle and busy rounds take turns, each after the wait in which the library returns to several threads. Nothing is
fetched. Unset `OMP_NUM_THREADS`, which fixes the number of threads.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

if __name__ == "__main__":  # run as a file: packages are looked for in the repository, not in this folder
    sys.path[0] = str(Path(__file__).parent.parent)

import torch

from benchmarks.networks import make_job
from llama import Llama
from llama.distributed.device import available_cores
from llama.tools.commandline import run

TOY = Path(__file__).parent.parent / "tiny-llama"


def main(
    shapes: str | Sequence[str] = "toy,110m,1b",
    *,
    loops: int | None = None,
    repeats: int = 5,
    tokens: int = 48,
    wait: float = 10.0,
) -> None:
    """Prints the median seconds of an answer, idle and busy, and the ratio of the two.

    Args:
        shapes: of toy, tiny, 110m, 200m, 1b, 7b and 13b; all but the toy have random weights.
        loops: number of busy loops; None for as many as there are cores.
        repeats: rounds of both kinds.
        tokens: length of an answer.
        wait: seconds between rounds, longer than the library stays at one thread.
    """
    n_loops = available_cores() if loops is None else loops
    print(f"{n_loops} busy loops on {available_cores()} cores, answers of {tokens} tokens, torch {torch.__version__}")
    print(f"{'shape':8}  {'idle, s':>8}  {'busy, s':>8}  {'ratio':>6}")
    for shape in shapes.split(",") if isinstance(shapes, str) else shapes:
        llama = _build(shape)
        _seconds(llama, tokens)  # warms up
        idle: list[float] = []
        busy: list[float] = []
        for _ in range(repeats):
            time.sleep(wait)
            idle.append(_seconds(llama, tokens))
            time.sleep(wait)
            with _busy(n_loops):
                busy.append(_seconds(llama, tokens))
        a, b = statistics.median(idle), statistics.median(busy)
        print(f"{shape:8}  {a:8.3f}  {b:8.3f}  {b / a:6.1f}", flush=True)


def _build(shape: str) -> Llama:
    if shape == "toy":
        return Llama.build(TOY, TOY / "tokenizer.model", 256, 1, device="cpu")
    with tempfile.TemporaryDirectory() as folder:
        job = make_job(shape, Path(folder))
        return Llama.build(job.ckpt_dir, job.tokenizer_path, 256, 1, device="cpu")


def _seconds(llama: Llama, n_tokens: int) -> float:
    """The time of one greedy answer."""
    started = time.perf_counter()
    llama.generate([list(range(3, 67))], n_tokens, temperature=0, ignore_eos=True)
    return time.perf_counter() - started


@contextmanager
def _busy(n: int) -> Iterator[None]:
    """Run n busy loops meanwhile."""
    loops = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(n)]
    try:
        time.sleep(0.2)  # until they run
        yield
    finally:
        for loop in loops:
            loop.kill()
            loop.wait()


if __name__ == "__main__":
    run(main)
