"""The speed of this library, and of other engines in turn with it: `python benchmarks/bench.py --shape 1b --peers hf`.

Every engine has a process, all of them take turns at each figure, several times over: what the machine does while a
figure is measured, it does to all engines. Nothing is fetched.
"""

from __future__ import annotations

import importlib.util
import itertools
import platform
import statistics
import sys
import tempfile
import time
import timeit
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path

if __name__ == "__main__":  # run as a file: packages are looked for in the repository, not in this folder
    sys.path[0] = str(Path(__file__).parent.parent)

import torch
import torch.nn.functional as F
from torch.profiler import ProfilerActivity, profile

from benchmarks import report
from benchmarks.networks import SHAPES, bytes_per_decode_step, make_job, write_hf_folder
from benchmarks.peers import ENGINES, GptFast, Ours
from benchmarks.report import Round
from benchmarks.worker import (
    LOAD,
    Figures,
    Job,
    engine_process,
    left_out_if_it_fails,
    numbers,
    prepare,
    pythons_of,
    say,
    version,
)
from llama.checkpoint.format import QUANTIZE
from llama.distributed.device import available_cores
from llama.tools.commandline import run

BUFFER_BYTES = 2**30  # far more than any cache holds
PASSES = 4


def main(
    shape: str = "1b",
    *,
    peers: str = "",
    device: str = "cpu",
    dtype: str = "bfloat16",
    repeats: int = 5,
    threads: int | None = None,
    batches: Sequence[int] = (1, 4, 8, 16),
    prefills: Sequence[int] = (16, 128, 512),
    decode_steps: int = 48,
    one_at_a_time: bool = False,
    profile_step: str | None = None,
    json: str | None = None,
    plot: str | None = None,
    readings: str | None = None,
) -> None:
    """Measures loading, prefill, decode and memory; prints medians and ratios.

    Args:
        shape: tiny, 110m, 200m, 1b, 7b, 13b or 70b, of random weights; 70b in int8, with 70 GB of memory for them.
        peers: NAME or NAME=PYTHON,...: what runs in turn with this library's default build, if it is installed, with
            its interpreter: hf, llama_cpp, llama_cpp_q8_0, llama_cpp_q4_0, openvino, openvino_int8, openvino_int4,
            ctranslate2 (int8), gpt_fast (a retelling, under torch.compile), and further builds of this library:
            ours_max_batch_1, ours_compiled, ours_int8, ours_int8_compiled and, for CUDA, ours_eager (without its
            graphs) and ours_no_look_ahead.
        device: "cpu" or "cuda".
        dtype: "bfloat16", "float16" or "float32", of weights and arithmetic.
        repeats: number of rounds.
        threads: of every engine; None for as many as there are cores.
        batches: sizes of the decode figures; the peers, but for gpt_fast, take part in 1 and 8.
        prefills: prompt lengths of the prefill figures.
        decode_steps: number of timed steps of a decode figure.
        one_at_a_time: have an engine take all its figures before the next one is loaded. Without it they take turns at
            each figure, which needs memory for all of them at the same time, 16 GB at 1b in bfloat16 with all peers.
        profile_step: in place of all that, prints where the time of decode steps of this build (ours, ours_int8, ...)
            goes, for the first of `batches` in a cache of the largest.
        json: file to write one JSON line per figure to.
        plot: file to draw decoding against the memory's limit to.
        readings: file of such JSON lines to draw, in place of measuring.
    """
    _check(repeats, profile_step, plot, json)
    if readings:
        report.plot(Path(readings).read_text(encoding="utf-8"), Path(plot or "performance.svg"))
        return
    pythons = {"ours": sys.executable}
    pythons |= pythons_of(peers, [name for name in ENGINES if device == "cpu" or not ENGINES[name].cpu_only])
    if SHAPES.get(shape, {}).get(QUANTIZE) and (others := [name for name in pythons if not name.startswith("ours")]):
        raise ValueError(f"peers must be builds of this library at shape {shape}, which is in int8, got {others}")
    n_threads = threads or available_cores()
    torch.set_num_threads(n_threads)
    sizes = {"decode_batches": numbers(batches), "prefill_lengths": numbers(prefills), "decode_steps": decode_steps}
    with tempfile.TemporaryDirectory() as folder:
        job = make_job(shape, Path(folder), dtype, device=device, threads=n_threads, **sizes)
        if profile_step:
            print(step_profile(job, profile_step))
            return
        rounds = run_rounds(job, pythons, repeats, one_at_a_time=one_at_a_time)
        versions = {engine: version(ENGINES[engine].install.split()[0], pythons[engine]) for engine in pythons}
    context = {"shape": shape, "device": device, "dtype": dtype, "threads": n_threads}
    context |= {"machine": describe_machine(device), "versions": versions}
    lines, ratios = report.engine_lines(rounds), report.ratio_lines(rounds)
    print(f"{shape}, {dtype}, {device}, {n_threads} threads, {repeats} rounds: {report.cpu_model()}\n{versions}\n")
    print(report.page(lines, ratios))
    readings = report.json_lines([*lines, *ratios], context)
    if json:
        Path(json).write_text(readings, encoding="utf-8")
    if plot:
        report.plot(readings, Path(plot))


def _check(repeats: int, profile_step: str | None, plot: str | None, json: str | None) -> None:
    """Raises ValueError for an argument that would fail after the rounds, or make none."""
    if repeats < 1:
        raise ValueError(f"repeats must be 1 or more, got {repeats}")
    own = [name for name in ENGINES if name.startswith("ours")]
    if profile_step not in (None, *own):
        raise ValueError(f"profile_step must be one of {', '.join(own)}, got {profile_step}")
    for file in (plot, json):
        if file and not Path(file).resolve().parent.is_dir():
            raise ValueError(f"--plot and --json must name files in folders that exist, got {file}; make its folder")
    if plot and importlib.util.find_spec("matplotlib") is None:
        raise SystemExit("--plot needs matplotlib; pip install -c constraints.txt -e '.[bench]' brings it")


def run_rounds(job: Job, pythons: dict[str, str], repeats: int, *, one_at_a_time: bool) -> list[Round]:
    """The figures of each round. A peer that fails is left out from there on, and taken out of `pythons`."""
    for engine in list(pythons):
        say(f"{engine}: writing its files")
        if ENGINES[engine].adapter not in (Ours, GptFast):
            write_hf_folder(job)
        with left_out_if_it_fails(engine, ENGINES[engine].install, pythons):
            prepare(engine, pythons[engine], job)
    rounds: list[Round] = []
    for i in range(repeats):
        say(f"round {i + 1}/{repeats}")
        measured: Round = limits(job, list(pythons)) if 1 in job.decode_batches else {}
        names = report.in_turn(list(pythons), i)
        for group in [[name] for name in names] if one_at_a_time else [names]:
            measured |= _take_turns(group, pythons, job)
        rounds.append(measured)
    return rounds


def _take_turns(group: Sequence[str], pythons: dict[str, str], job: Job) -> Round:
    """Every figure of engines that stay loaded until the last of them is through."""
    found: Round = {engine: {} for engine in group}
    running: dict[str, Callable[[str], Figures]] = {}
    with ExitStack() as stack:
        for turn in job.turns:
            for engine in filter(pythons.__contains__, group):
                with left_out_if_it_fails(engine, ENGINES[engine].install, pythons):
                    if turn == LOAD:
                        running[engine] = stack.enter_context(engine_process(engine, pythons[engine], job))
                    figures = running[engine](turn)
                    found[engine] |= figures
                    for figure, value in figures.items():
                        say(f"  {engine}: {figure} {report.shown(value)} {report.unit_of(figure)}")
    return found


def limits(job: Job, engines: Sequence[str]) -> Round:
    """The tokens per second at batch 1 that reading the weights allows now, by form of weights."""
    bandwidth = _read_bandwidth(job.device)
    forms = dict.fromkeys(ENGINES[engine].form for engine in engines)
    return {
        f"limit{'_' * bool(form)}{form}": {"decode_1": bandwidth / bytes_per_decode_step(job, form)} for form in forms
    }


@torch.inference_mode()
def _read_bandwidth(device: str) -> float:
    """Bytes per second of the fastest of several kernels that read a large buffer with little arithmetic per byte.

    Which of them comes closest to the memory's speed differs between machines. On CUDA a copy, which reads and writes.
    """
    buffer = torch.ones(BUFFER_BYTES // 4, device=device)
    halves = buffer.view(torch.bfloat16).view(-1, 4096)  # the same bytes: zeros and ones in turn
    row = torch.ones(1, 4096, dtype=torch.bfloat16, device=device)
    readers: list[Callable[[], object]] = [buffer.sum, lambda: buffer.dot(buffer), lambda: F.linear(row, halves)]
    if device.startswith("cuda"):
        target = torch.empty_like(buffer[: len(buffer) // 2])
        readers = [lambda: (target.copy_(buffer[: len(target)]), torch.cuda.synchronize())]
    seconds = []
    for read in readers:
        read()  # warms up
        seconds += timeit.repeat(read, number=1, repeat=PASSES)
    return BUFFER_BYTES / min(seconds)


def step_profile(job: Job, engine: str) -> str:
    """A decode step's time, its memory's limit, and torch's table of the operations in `job.decode_steps` of them."""
    ours = Ours(job, ENGINES[engine].variant)
    ours.settle()
    batch, ticks = job.decode_batches[0], []
    on_cuda = job.device.startswith("cuda")
    prompts = job.prompts(batch, job.decode_prompt)
    ours.run(prompts, job.decode_steps, lambda: ticks.append(time.perf_counter()))
    step = statistics.median(b - a for a, b in itertools.pairwise(ticks))
    limit = bytes_per_decode_step(job, ENGINES[engine].form) / _read_bandwidth(job.device)
    with profile(activities=[ProfilerActivity.CUDA if on_cuda else ProfilerActivity.CPU]) as recorded:
        ours.run(prompts, job.decode_steps, lambda: None)
    table = recorded.key_averages().table(f"self_{'cuda' if on_cuda else 'cpu'}_time_total", row_limit=16)
    return f"a step takes {1e3 * step:.1f} ms; reading its weights and cache {1e3 * limit:.1f} ms\n{table}"


def describe_machine(device: str) -> dict[str, str | int]:
    """Processor, cores and versions, as they go into every JSON line."""
    gpu = {"gpu": torch.cuda.get_device_name(device)} if device.startswith("cuda") else {}
    versions = {"system": platform.platform(), "python": platform.python_version(), "torch": torch.__version__}
    return {"cpu": report.cpu_model(), "cores": available_cores(), **gpu, **versions}


if __name__ == "__main__":
    run(main)
