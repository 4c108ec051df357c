"""`python benchmarks/bench.py --shape 1b --peers hf,llama_cpp`: this library's speed, and other engines' beside it.

Reads top-down: the arguments, the checkpoint, the rounds, the report. Each engine runs in a process of its own, all of
them in turn in every round, so that whatever the machine does to one it does to all.
"""

from __future__ import annotations

import json as json_module
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # run as a file: packages are looked for in the repository, not in this folder
    sys.path[0] = str(Path(__file__).parent.parent)

import fire
import torch

from benchmarks import ceiling, engines, report
from benchmarks.job import Job
from benchmarks.machine import available_cores, describe_machine
from benchmarks.shapes import SHAPES, vocab_size_of, write_checkpoint, write_tokenizer
from llama import ModelArgs
from llama.checkpoint import find_shards, read_params

DTYPES = ("bfloat16", "float16", "float32")


@dataclass(frozen=True)
class Plan:
    """What is to run: the network, the job that every engine gets, and who takes part in how many rounds."""

    args: ModelArgs
    job: Job
    pythons: dict[str, str]  # of each engine, in the order of a round
    repeats: int
    published_rounds: int

    def takes_part(self, engine: str, round_: int) -> bool:
        return engine != "published" or round_ < self.published_rounds


def main(
    shape: str = "1b",
    ckpt_dir: str | None = None,
    *,
    peers: str | Sequence[str] = "",
    device: str = "cpu",
    dtype: str = "bfloat16",
    repeats: int = 5,
    threads: int | None = None,
    batches: Sequence[int] = (1, 4, 8, 16),
    decode_steps: int = 32,
    published_rounds: int = 1,
    peer_python: str | Sequence[str] = "",
    work_dir: str | None = None,
    plot: str | None = None,
    json: str | None = None,
) -> None:
    """Measures loading, prefill, decode, a ragged batch and memory; prints medians and ratios.

    Args:
        shape: tiny, 1b, 7b or 13b, of random weights made on the spot; with `ckpt_dir` only a name for the report.
        ckpt_dir: a checkpoint in one file to measure instead.
        peers: of hf, llama_cpp, openvino and ctranslate2, those to run beside; who is not installed is left out.
        device: "cpu" or "cuda".
        dtype: of weights and arithmetic, for all engines.
        repeats: number of rounds.
        threads: of every engine; None for as many as there are cores.
        batches: sizes of the decode figures; the peers take part in 1 and 8.
        decode_steps: number of timed steps of a decode figure.
        published_rounds: number of rounds in which the ragged batch is also run the published code's way, which takes
            about ten times as long as everything else; 0 leaves it out.
        peer_python: NAME=PYTHON,...: the interpreters of peers that live in environments of their own.
        work_dir: keeps the weights in every engine's format there for the next run (1b in bfloat16: 11 GB with all
            peers); None for a temporary folder.
        plot: file to draw bars to.
        json: file to write a JSON line a figure to.
    """
    draw = _plotter() if plot else None
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(work_dir or temporary) / f"{Path(ckpt_dir).name if ckpt_dir else shape}-{dtype}"
        folder.mkdir(parents=True, exist_ok=True)
        args, job = _make_job(shape, ckpt_dir, folder, device, dtype)
        job = replace(job, threads=threads or available_cores(), decode_batches=_numbers(batches))
        job = replace(job, decode_steps=decode_steps)
        pythons = {"ours": sys.executable, **_installed(_names(peers), _names(peer_python), device)}
        if published_rounds:
            pythons["published"] = sys.executable
        rounds, versions = run_rounds(Plan(args, job, pythons, repeats, published_rounds))
    context = {"shape": job.shape, "device": device, "dtype": dtype, "threads": job.threads}
    context |= {"machine": describe_machine(device), "versions": versions}
    lines, ratios = report.engine_lines(rounds), report.ratio_lines(rounds)
    title = f"{job.shape}, {dtype}, {device}, {job.threads} threads, {repeats} rounds: {context['machine']['cpu']}"
    print("\n".join([title, json_module.dumps(versions), "", report.table(lines), "", report.ratio_table(ratios)]))
    if json:
        Path(json).write_text(report.json_lines([*lines, *ratios], context), encoding="utf-8")
    if draw and plot:
        draw(lines, title, Path(plot))


def _make_job(shape: str, ckpt_dir: str | None, folder: Path, device: str, dtype: str) -> tuple[ModelArgs, Job]:
    """The network and the job; makes what files are missing: random weights, a tokenizer of the right size."""
    if dtype not in DTYPES:
        raise ValueError(f"dtype is {dtype!r}; it takes {', '.join(DTYPES)}")
    if ckpt_dir is None and shape not in SHAPES:
        raise ValueError(f"shape is {shape!r}; it takes {', '.join(SHAPES)}, or a ckpt_dir")
    checkpoint = Path(ckpt_dir) if ckpt_dir else folder / "checkpoint"
    if ckpt_dir is None and not (checkpoint / "consolidated.00.pth").exists():
        say(f"making random weights: {shape}, {dtype}")
        write_checkpoint(checkpoint, shape, getattr(torch, dtype))
    find_shards(checkpoint, 1)
    params = read_params(checkpoint)
    if params.get("vocab_size", -1) == -1:
        params["vocab_size"] = vocab_size_of(checkpoint)
    args = ModelArgs(**params)
    write_tokenizer(folder / "tokenizer.model", args.vocab_size)
    job = Job(
        shape=checkpoint.name if ckpt_dir else shape,
        ckpt_dir=str(checkpoint.resolve()),
        tokenizer_path=str((folder / "tokenizer.model").resolve()),
        folder=str(folder.resolve()),
        dim=args.dim,
        n_layers=args.n_layers,
        n_heads=args.n_heads,
        n_kv_heads=args.kv_heads,
        hidden_dim=args.hidden_dim,
        vocab_size=args.vocab_size,
        norm_eps=args.norm_eps,
        rope_theta=args.rope_theta,
        device=device,
        dtype=dtype,
    )
    return args, job


def _installed(peers: Sequence[str], peer_pythons: Sequence[str], device: str) -> dict[str, str]:
    """The peers that can run here and their interpreters; says of the others what they lack."""
    pythons = dict(pair.split("=", 1) for pair in peer_pythons)
    if unknown := [peer for peer in (*peers, *pythons) if peer not in engines.PEERS]:
        raise ValueError(f"peers has {', '.join(unknown)}; it takes {', '.join(engines.PEERS)}")
    found = {}
    for peer in peers:
        python = pythons.get(peer, sys.executable)
        if device != "cpu" and peer in engines.CPU_ONLY:
            say(f"{peer}: measured on the CPU only, left out")
        elif missing := engines.missing_packages(peer, python):
            say(f"{peer}: left out, {python} has no {', '.join(missing)}; pip install {engines.PEERS[peer][1]}")
        else:
            found[peer] = python
    return found


def run_rounds(plan: Plan) -> tuple[list[dict[str, dict[str, float]]], dict[str, str]]:
    """The figures of each round and engine, and the engines' versions. An engine that fails is left out from there on.

    Raises:
        RuntimeError: our own process failed.
    """
    job_file = Path(plan.job.folder) / "job.json"
    plan.job.write(job_file)
    pythons = dict(plan.pythons)
    for engine in list(pythons):
        say(f"{engine}: writing its files")
        _guarded(engine, pythons, lambda e=engine: engines.prepare(e, pythons[e], plan.job, job_file))
    rounds: list[dict[str, dict[str, float]]] = []
    versions: dict[str, str] = {}
    for i in range(plan.repeats):
        bandwidth = engines.measure_bandwidth(plan.job, job_file, _progress("machine", i, plan))
        rounds.append({"ours": {}, "machine": _numeric(bandwidth)})
        for engine in [engine for engine in pythons if plan.takes_part(engine, i)]:
            show = _progress(engine, i, plan)
            figures = _guarded(
                engine, pythons, lambda e=engine, s=show: engines.measure(e, pythons[e], plan.job, job_file, s)
            )
            if figures:
                versions[engine] = str(figures["version"])
                rounds[-1][engine] = _numeric(figures)
        rounds[-1]["ours"] |= _derived(rounds[-1], plan)
    return rounds, versions


def _guarded(engine: str, pythons: dict[str, str], work: Callable[[], Any]) -> Any:
    """What the work returns; if a peer's fails, says so and takes the peer out."""
    try:
        return work()
    except RuntimeError as error:
        if engine == "ours":
            raise
        say(f"{engine}: left out, it failed with {error}")
        del pythons[engine]
        return None


def _numeric(figures: engines.Figures) -> dict[str, float]:
    return {name: value for name, value in figures.items() if isinstance(value, (int, float))}


def _derived(one_round: dict[str, dict[str, float]], plan: Plan) -> dict[str, float]:
    """Our figures held against what the machine and the formula allow."""
    ours = one_round["ours"]
    memory = ceiling.memory_plan(plan.args, plan.job)
    own = ours["peak_memory"] - ours["memory_before"]
    derived = {
        "memory_planned": memory.total,
        "memory_over_weights_and_cache_ratio": own / (memory.weights + memory.kv_cache),
        "memory_over_plan_ratio": own / memory.total,
    }
    if "decode_1" in ours:
        read = ours["decode_1"] * ceiling.bytes_per_step(plan.args, plan.job)
        derived |= {"share_of_bandwidth_decode_1": read / one_round["machine"]["read_bandwidth"]}
    return derived


def _progress(engine: str, round_: int, plan: Plan) -> Callable[[str, float | str], None]:
    def show(figure: str, value: float | str) -> None:
        shown = value if isinstance(value, str) else report.shown(figure, value)
        say(f"round {round_ + 1}/{plan.repeats}  {engine}: {figure} {shown}")

    return show


def _plotter() -> Callable[[Sequence[report.Line], str, Path], None]:
    try:
        from benchmarks.plot import plot
    except ImportError as error:
        raise SystemExit(f"--plot needs matplotlib ({error}); pip install -e '.[bench]'") from error
    return plot


def _names(value: str | Sequence[str]) -> list[str]:
    """Fire makes a tuple of "a,b", a str of "a" and of "a=/b,c=/d"."""
    return [name for name in (value.split(",") if isinstance(value, str) else value) if name]


def _numbers(value: int | Sequence[int]) -> tuple[int, ...]:
    return (value,) if isinstance(value, int) else tuple(value)


def say(text: str) -> None:
    """Progress: to stderr, so that stdout is the report alone."""
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    fire.Fire(main)
