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
    shapes: str = "toy,110m,1b",
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
    for shape in shapes.split(","):
        with tempfile.TemporaryDirectory() as folder:
            job = None if shape == "toy" else make_job(shape, Path(folder))
            paths = (job.ckpt_dir, job.tokenizer_path) if job else (TOY, TOY / "tokenizer.model")
            llama = Llama.build(*paths, 256, 1, device="cpu")
        _seconds(llama, tokens, 0)  # warms up
        times: dict[int, list[float]] = {0: [], n_loops: []}
        for _ in range(repeats):
            for n, seconds in times.items():
                time.sleep(wait)
                seconds.append(_seconds(llama, tokens, n))
        idle, busy = map(statistics.median, times.values())
        print(f"{shape:8}  {idle:8.3f}  {busy:8.3f}  {busy / idle:6.1f}", flush=True)


def _seconds(llama: Llama, n_tokens: int, n_loops: int) -> float:
    """The time of one greedy answer while that many busy loops run."""
    loops = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(n_loops)]
    try:
        time.sleep(0.2)  # until they run
        started = time.perf_counter()
        llama.generate([list(range(3, 67))], n_tokens, temperature=0, ignore_eos=True)
        return time.perf_counter() - started
    finally:
        for loop in loops:
            loop.kill()
            loop.wait()


if __name__ == "__main__":
    run(main)
