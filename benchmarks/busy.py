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
PROMPT = list(range(3, 67))


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
        with tempfile.TemporaryDirectory() as folder:
            llama = _build(shape, Path(folder))
            seconds: dict[int, list[float]] = {0: [], n_loops: []}
            _answer(llama, tokens)
            for n in [0, n_loops] * repeats:
                time.sleep(wait)
                with _busy(n):
                    seconds[n].append(_answer(llama, tokens))
            idle, busy = (statistics.median(taken) for taken in seconds.values())
            print(f"{shape:8}  {idle:8.3f}  {busy:8.3f}  {busy / idle:6.1f}", flush=True)


def _build(shape: str, folder: Path) -> Llama:
    checkpoint, tokenizer = TOY, TOY / "tokenizer.model"
    if shape != "toy":
        job = make_job(shape, folder)
        checkpoint, tokenizer = Path(job.ckpt_dir), Path(job.tokenizer_path)
    return Llama.build(checkpoint, tokenizer, 256, 1, device="cpu")


def _answer(llama: Llama, n_tokens: int) -> float:
    """The seconds of one greedy answer."""
    started = time.perf_counter()
    llama.generate([PROMPT], n_tokens, temperature=0, ignore_eos=True)
    return time.perf_counter() - started


@contextmanager
def _busy(n: int) -> Iterator[None]:
    """Run n busy loops meanwhile."""
    loops = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(n)]
    try:
        time.sleep(0.2 * bool(n))  # until they run
        yield
    finally:
        for loop in loops:
            loop.kill()
            loop.wait()


if __name__ == "__main__":
    run(main)
