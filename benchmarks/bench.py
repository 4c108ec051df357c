"""`python benchmarks/bench.py --shape 1b --peers hf,llama_cpp`: this library's speed, and other engines' beside it.

Reads top-down: the arguments, the checkpoint, the rounds, the report. Nothing is fetched.
"""

from __future__ import annotations

import importlib.util
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

if __name__ == "__main__":  # run as a file: packages are looked for in the repository, not in this folder
    sys.path[0] = str(Path(__file__).parent.parent)

from benchmarks import report
from benchmarks.job import PEERS, PUBLISHED, Job
from benchmarks.machine import describe_machine
from benchmarks.rounds import Plan, missing_packages, peer_pythons, run_rounds, say
from benchmarks.shapes import make_job
from llama.distributed.device import available_cores
from llama.tools.commandline import run


def main(
    shape: str = "1b",
    ckpt_dir: str | None = None,
    *,
    peers: str | Sequence[str] = "",
    device: str = "cpu",
    dtype: str = "bfloat16",
    quantize: str | None = None,
    compile: bool = False,
    repeats: int = 5,
    threads: int | None = None,
    batches: Sequence[int] = (1, 4, 8, 16),
    prefills: Sequence[int] = (16, 128, 512),
    decode_prompt: int = 128,
    decode_steps: int = 48,
    published_rounds: int = 1,
    one_at_a_time: bool = False,
    cpu_time: bool = False,
    peer_python: str | Sequence[str] = "",
    work_dir: str | None = None,
    plot: str | None = None,
    json: str | None = None,
) -> None:
    """Measures loading, prefill, decode, a ragged batch and memory; prints medians and ratios.

    Args:
        shape: tiny, 200m, 1b, 7b or 13b, of random weights; with `ckpt_dir` only a name for the report.
        ckpt_dir: a checkpoint in one file to measure instead.
        peers: of hf, hf_compiled, llama_cpp, llama_cpp_q8_0, llama_cpp_q4_0, openvino, openvino_int8, openvino_int4,
            ctranslate2 (int8) and ours_eager (this library without CUDA graphs), those to run in turn with it; those
            that are not installed are left out.
        device: "cpu" or "cuda".
        dtype: "bfloat16", "float16" or "float32", of weights and arithmetic.
        quantize: "int8" or "int4" measures this library with such weights too, in turn with the others.
        compile: measures this library with compiled steps too; with `quantize`, also both together.
        repeats: number of rounds.
        threads: of every engine; None for as many as there are cores.
        batches: sizes of the decode figures; the peers take part in 1 and 8.
        prefills: prompt lengths of the prefill figures.
        decode_prompt: length of the decode figures' prompts.
        decode_steps: number of timed steps of a decode figure.
        published_rounds: number of rounds in which the ragged batch also goes the published code's way (more than a
            minute at 1b); 0 leaves it out.
        one_at_a_time: have an engine take all its figures before the next one is loaded. Without it they take turns at
            each figure, which needs memory for all of them at the same time, 16 GB at 1b in bfloat16 with all peers.
        cpu_time: measures the CPU time of the engines' processes in place of the time that passes, with one thread:
            for comparisons on a machine that is busy with other work.
        peer_python: NAME=PYTHON,...: the interpreters of peers that live in environments of their own.
        work_dir: keeps the weights in every engine's format there for the next run (1b in bfloat16: 14 GB with all
            peers); None for a temporary folder.
        plot: file to draw bars to.
        json: file to write one JSON line per figure to.
    """
    _check(repeats, quantize, plot, json)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(work_dir or temporary).resolve() / f"{Path(ckpt_dir).name if ckpt_dir else shape}-{dtype}"
        args, job = make_job(shape, ckpt_dir, folder, dtype)
        n_threads = 1 if cpu_time else threads or available_cores()
        job = replace(job, device=device, threads=n_threads, cpu_time=cpu_time)
        job = replace(job, decode_batches=_numbers(batches), decode_prompt=decode_prompt, decode_steps=decode_steps)
        job = replace(job, prefill_lengths=_numbers(prefills))
        pythons = dict.fromkeys(_own_engines(job, quantize, compiled=compile), sys.executable)
        pythons |= _installed(peers, peer_python, device)
        if published_rounds:
            pythons[PUBLISHED] = sys.executable
        rounds, versions = run_rounds(Plan(args, job, pythons, repeats, published_rounds, one_at_a_time))
    machine = describe_machine(device)
    rounds_ = f"{repeats} round{'s' * (repeats > 1)}"
    threads_ = f"{job.threads} thread{'s' * (job.threads > 1)}" + ", CPU time" * cpu_time
    title = f"{job.shape}, {dtype}, {device}, {threads_}, {rounds_}: {machine['cpu']}"
    lines, ratios = report.engine_lines(rounds), report.ratio_lines(rounds)
    print(report.page(title, versions, lines, ratios))
    if json:
        context = {"shape": job.shape, "device": device, "dtype": dtype, "threads": job.threads}
        context |= {"machine": machine, "versions": versions}
        Path(json).write_text(report.json_lines([*lines, *ratios], context), encoding="utf-8")
    if plot:
        report.plot(lines, versions, title, Path(plot))


def _check(repeats: int, quantize: str | None, plot: str | None, json: str | None) -> None:
    """Raises ValueError for an argument that would fail after the rounds, or make none."""
    if repeats < 1:
        raise ValueError(f"repeats must be 1 or more, got {repeats}")
    if quantize not in (None, "int8", "int4"):
        raise ValueError(f"quantize must be 'int8' or 'int4', got {quantize!r}; leave it out for no quantization")
    for file in (plot, json):
        if file and not Path(file).resolve().parent.is_dir():
            raise ValueError(f"--plot and --json must name files in folders that exist, got {file}; make its folder")
    if plot and importlib.util.find_spec("matplotlib") is None:
        raise SystemExit("--plot needs matplotlib; pip install -c constraints.txt -e '.[bench]' brings it")


def _own_engines(job: Job, quantize: str | None, *, compiled: bool) -> list[str]:
    """The builds of this library that take part."""
    names = ["ours"]
    if job.device == "cpu" and 1 in job.decode_batches:
        names.append("ours_max_batch_1")
    names += ["ours_compiled"] * compiled
    if quantize:
        names += [f"ours_{quantize}"] + [f"ours_{quantize}_compiled"] * compiled
    return names


def _installed(peers: str | Sequence[str], peer_python: str | Sequence[str], device: str) -> dict[str, str]:
    """The peers that can run here and their interpreters; prints what the others lack."""
    found = {}
    for peer, python in peer_pythons(peers, peer_python, PEERS).items():
        if device != "cpu" and PEERS[peer].cpu_only:
            say(f"{peer}: left out, it is measured on CPUs only")
        elif missing := missing_packages(peer, python):
            # The constraints keep pip from fetching another torch, with gigabytes of CUDA.
            hint = f"pip install -c constraints.txt torch {PEERS[peer].install}"
            say(f"{peer}: left out, {python} has no {', '.join(missing)}; {hint}")
        else:
            found[peer] = python
    return found


def _numbers(value: int | Sequence[int]) -> tuple[int, ...]:
    return (value,) if isinstance(value, int) else tuple(value)


if __name__ == "__main__":
    run(main)
