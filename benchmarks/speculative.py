"""Speculative decoding beside plain decoding, in turn: tokens per pass, acceptance, tokens per second.

    python benchmarks/speculative.py
    python benchmarks/speculative.py --ckpt_dir tiny-llama --draft_ckpt_dir tiny-llama

Without `--ckpt_dir` the weights are random, and the texts scripted: a hook raises the logit of the scripted token, at
every position that the network computes, so that all the work is done. The texts repeat their prompt and themselves as
summaries that quote, edits of code, lists after examples and dialogs do, or hardly at all. A draft model of a tenth of
the size agrees with the script in a given share of positions. With `--ckpt_dir` the network writes its own texts.
"""

from __future__ import annotations

import json
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

if __name__ == "__main__":  # run as a file: packages are looked for in the repository, not in this folder
    sys.path[0] = str(Path(__file__).parent.parent)

import torch
from torch import Tensor, nn

from benchmarks.job import Job
from benchmarks.machine import cpu_model
from benchmarks.rounds import EngineProcess, missing_packages, peer_pythons, prepare, say
from benchmarks.scripts import SCRIPTS, SPEAKING_PROMPTS, Script, repeated_ngrams
from benchmarks.shapes import make_job
from benchmarks.worker import LOAD
from llama import Llama
from llama.distributed.device import available_cores
from llama.model import CachePositions
from llama.tools.commandline import run

DRAFT_SHAPE = "110m"  # a tenth of 1b
OWN_SEQ_LEN = 2048
PEERS = ("hf", "llama_cpp")
Text = TypeVar("Text")


class Scripted:
    """A forward hook on a network that has it choose the tokens of a script.

    Args:
        agreement: the share of positions in which it does; elsewhere it chooses another token.
    """

    def __init__(self, network: nn.Module, agreement: float = 1.0) -> None:
        self.tokens: list[int] = []
        self._agreement = agreement
        self._handle = network.register_forward_hook(self._force, with_kwargs=True)

    def start(self, script: Script) -> None:
        """Begins a text."""
        draw = random.Random(sum(script.prompt))  # other positions in each text
        self.tokens = [t if draw.random() < self._agreement else t - 1 for t in script.prompt + script.output]

    def _force(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], logits: Tensor) -> None:
        start_pos, last = args[1], kwargs.get("last")
        first = int(start_pos.start[0]) if isinstance(start_pos, CachePositions) else start_pos
        first, n_positions = first + (0 if last is None else int(last[0])), logits.size(1)
        wanted = self.tokens[first + 1 : first + 1 + n_positions]
        for place, token in enumerate(wanted):
            logits[:, place, token] = 1e4

    def remove(self) -> None:
        self._handle.remove()


class PassTimes:
    """Notes when each pass of a network ended."""

    def __init__(self, network: nn.Module, clock: Callable[[], float] = time.perf_counter) -> None:
        self.ends: list[float] = []
        self.clock = clock
        self._handle = network.register_forward_hook(lambda *_: self.ends.append(clock()))

    def remove(self) -> None:
        self._handle.remove()


@dataclass(frozen=True)
class Run:
    """One text, decoded once.

    Attributes:
        tokens: of the completion.
        rate: tokens per second after the first one.
        per_pass: tokens per pass of the network after the first one.
        accepted: share of the drafted tokens that were accepted; None if there were none.
    """

    tokens: list[int]
    rate: float
    per_pass: float
    accepted: float | None


def decode(llama: Llama, times: PassTimes, prompt: list[int], n_tokens: int, speculative: str | None) -> Run:
    """Completes a prompt greedily."""
    times.ends.clear()
    before = llama.engine.draft_counts
    drafted, accepted = before.drafted, before.accepted
    (tokens,), _ = llama.generate([prompt], n_tokens, temperature=0, speculative=speculative)
    ended = times.clock()
    counts = llama.engine.draft_counts
    share = (counts.accepted - accepted) / (counts.drafted - drafted) if counts.drafted > drafted else None
    n_more, n_passes = max(1, len(tokens) - 1), max(1, len(times.ends) - 1)
    return Run(tokens, n_more / (ended - times.ends[0]), n_more / n_passes, share)


def warm_up(llama: Llama) -> None:
    """The first speculative call times passes of the network and its draft model."""
    times = []
    for speculative in (None, None, "prompt_lookup"):
        started = time.perf_counter()
        llama.generate([[llama.tokenizer.bos_id]], 2, temperature=0, speculative=speculative)
        times.append(time.perf_counter() - started)
    print(f"the first speculative call took {times[2] - times[1]:.1f} s longer than a plain one")


@dataclass(frozen=True)
class Sizes:
    """Of scripted texts: tokens of the prompt and the completion, texts of each kind, how often each is decoded.

    And whether CPU time is measured.
    """

    n_prompt: int
    n_tokens: int
    n_texts: int
    repeats: int
    cpu_time: bool

    def scripts(self, kind: str, vocab_size: int) -> list[Script]:
        draws = map(random.Random, range(self.n_texts))
        return [SCRIPTS[kind](draw, vocab_size, self.n_prompt, self.n_tokens) for draw in draws]


def compare(
    texts: Sequence[Text], decode_as: Callable[[Text, str | None], Run], speculative: str, repeats: int
) -> tuple[list[Run], list[Run]]:
    """Plain and speculative runs of each text, in turn, each time the other one first."""
    plain: list[Run] = []
    drafted: list[Run] = []
    for text in texts:
        for i in range(repeats):
            ways = [(None, plain), (speculative, drafted)]
            for way, runs in ways if i % 2 == 0 else ways[::-1]:
                runs.append(decode_as(text, way))
    return plain, drafted


def report(name: str, repetition: float | None, plain: Sequence[Run], drafted: Sequence[Run]) -> dict[str, Any]:
    """Prints a row; returns its figures."""
    ratios = [b.rate / a.rate for a, b in zip(plain, drafted, strict=True)]
    accepted = [r.accepted for r in drafted if r.accepted is not None]
    same = sum(a.tokens == b.tokens for a, b in zip(plain, drafted, strict=True)) if plain[0].tokens else None
    figures = {
        "text": name,
        "repeated_8grams": repetition,
        "plain": statistics.median(r.rate for r in plain),
        "speculative": statistics.median(r.rate for r in drafted),
        "tokens_per_pass": statistics.median(r.per_pass for r in drafted),
        "accepted": statistics.median(accepted) if accepted else None,
        "ratios": ratios,
        "same": None if same is None else same / len(plain),
    }
    shown = "        " if repetition is None else f"{repetition:7.0%} "
    share = "      -" if not accepted else f"{statistics.median(accepted):7.0%}"
    print(
        f"{name:34}{shown}{figures['plain']:8.1f}{figures['speculative']:8.1f} {statistics.median(ratios):6.2f} "
        f"({min(ratios):.2f} to {max(ratios):.2f}){figures['tokens_per_pass']:7.2f}{share}"
        + ("" if same is None else f"{same:5}/{len(plain)}"),
        flush=True,
    )
    return figures


HEADER = f"{'':34}  8-grams  plain   spec.  ratio, range      per pass accepted same text"


def scripted_texts(llama: Llama, sizes: Sizes) -> list[dict[str, Any]]:
    """Prompt lookup on every kind of script."""
    clock = time.process_time if sizes.cpu_time else time.perf_counter
    hook, times = Scripted(llama.model), PassTimes(llama.model, clock)

    def decode_script(script: Script, way: str | None) -> Run:
        hook.start(script)
        return decode(llama, times, script.prompt, len(script.output), way)

    rows = []
    for kind in SCRIPTS:
        scripts = sizes.scripts(kind, llama.model.vocab_size)
        repetition = statistics.mean(map(repeated_ngrams, scripts))
        runs = compare(scripts, decode_script, "prompt_lookup", sizes.repeats)
        rows.append(report(f"prompt lookup, {kind}", repetition, *runs))
    hook.remove()
    times.remove()
    return rows


def scripted_draft(llama: Llama, agreements: Sequence[float], sizes: Sizes) -> list[dict[str, Any]]:
    """A draft model at several shares of agreement, on texts that hardly repeat."""
    clock = time.process_time if sizes.cpu_time else time.perf_counter
    hook, times = Scripted(llama.model), PassTimes(llama.model, clock)
    scripts = sizes.scripts("without repetition", llama.model.vocab_size)
    rows = []
    for agreement in agreements:
        draft_hook = Scripted(llama.draft_model, agreement)

        def decode_script(script: Script, way: str | None, draft_hook: Scripted = draft_hook) -> Run:
            hook.start(script)
            draft_hook.start(script)
            return decode(llama, times, script.prompt, len(script.output), way)

        rows.append(
            report(f"draft, agreement {agreement}", None, *compare(scripts, decode_script, "draft", sizes.repeats))
        )
        draft_hook.remove()
    hook.remove()
    times.remove()
    return rows


def own_texts(llama: Llama, prompts: dict[str, Any], ways: Sequence[str], n_tokens: int, repeats: int) -> list[Any]:
    """Texts that the network itself writes."""
    times = PassTimes(llama.model)
    rows = []
    for name, prompt in prompts.items():
        ids = llama.tokenizer.encode(prompt, bos=True, eos=False) if isinstance(prompt, str) else prompt
        for way in ways:
            plain, drafted = compare([ids], lambda p, w: decode(llama, times, p, n_tokens, w), way, repeats)
            repetition = repeated_ngrams(Script(ids, plain[0].tokens))
            rows.append(report(f"{way.replace('_', ' ')}, {name}", repetition, plain, drafted))
    return rows


def peer_texts(name: str, python: str, job: Job, sizes: Sizes) -> list[dict[str, Any]]:
    """A peer's own prompt lookup beside its own plain decoding, on the same scripts."""
    job_file = Path(job.folder) / "job.json"
    job.write(job_file)
    prepare(name, python, job, job_file)
    rows = []
    with EngineProcess(name, python, job, job_file) as process:
        process.take_turn(LOAD, lambda *_: None)

        def decode_there(script: Script, way: str | None) -> Run:
            turn = {"prompt": script.prompt, "output": script.output, "prompt_lookup": way is not None}
            figures = process.take_turn(json.dumps(turn), lambda *_: None)
            n_more = len(script.output) - 1
            return Run([], n_more / float(figures["seconds"]), n_more / float(figures["passes"]), None)

        for kind in SCRIPTS:
            scripts = sizes.scripts(kind, job.vocab_size)
            runs = compare(scripts, decode_there, "prompt_lookup", sizes.repeats)
            rows.append(report(f"{name}, {kind}", None, *runs))
    return rows


def main(
    shape: str = "1b",
    ckpt_dir: str | None = None,
    *,
    tokenizer_path: str | None = None,
    draft_ckpt_dir: str | None = None,
    prompts: str | None = None,
    n_prompt: int = 200,
    n_tokens: int = 128,
    n_texts: int = 3,
    repeats: int = 1,
    agreements: Sequence[float] = (0.5, 0.7, 0.8, 0.9),
    dtype: str = "bfloat16",
    max_batch_size: int = 8,
    threads: int | None = None,
    cpu_time: bool = False,
    peers: str | Sequence[str] = "",
    peer_python: str | Sequence[str] = "",
    work_dir: str | None = None,
) -> None:
    """Prints a row per kind of text: tokens per second without and with drafts, their ratio, tokens per pass.

    Args:
        shape: tiny, 200m or 1b, of random weights, whose texts are scripted.
        ckpt_dir: a checkpoint that writes its own texts instead.
        tokenizer_path: of `ckpt_dir`; None for its tokenizer.model.
        draft_ckpt_dir: its draft model; None for prompt lookup alone.
        prompts: a JSON file, an object of names and prompts (strings, or lists of ids), for `ckpt_dir`.
        n_prompt: tokens of a scripted prompt.
        n_tokens: tokens that are generated.
        n_texts: scripted texts of each kind.
        repeats: of each text.
        agreements: of the draft model with the script.
        cpu_time: measures CPU time, of one thread, in place of the time that passes: for busy machines.
        peers: of hf and llama_cpp, whose own prompt lookup is to be measured on the same scripts.
        peer_python: NAME=PYTHON,...: the interpreters of peers that live in environments of their own.
        work_dir: keeps the weights there for the next run, for `bench.py` too; None for a temporary folder.
    """
    torch.set_num_threads(1 if cpu_time else threads or available_cores())
    print(f"{cpu_model()}, {torch.get_num_threads()} threads, torch {torch.__version__}, {dtype}, batch 1")
    options: dict[str, Any] = {"dtype": dtype, "device": "cpu", "max_batch_size": max_batch_size}
    if ckpt_dir:
        tokenizer_path = tokenizer_path or str(Path(ckpt_dir) / "tokenizer.model")
        llama = Llama.build(ckpt_dir, tokenizer_path, OWN_SEQ_LEN, draft_ckpt_dir=draft_ckpt_dir, **options)
        warm_up(llama)
        texts = json.loads(Path(prompts).read_text(encoding="utf-8")) if prompts else SPEAKING_PROMPTS
        print(f"{Path(ckpt_dir).name}\n{HEADER}")
        ways = ["prompt_lookup"] + ["draft"] * bool(draft_ckpt_dir)
        rows = own_texts(llama, texts, ways, n_tokens, max(2, repeats))
    else:
        pythons = peer_pythons(peers, peer_python, PEERS)
        sizes = Sizes(n_prompt, n_tokens, n_texts, repeats, cpu_time)
        with ExitStack() as stack:
            folder = Path(work_dir or stack.enter_context(tempfile.TemporaryDirectory()))
            of_draft = [agreements] if isinstance(agreements, float) else list(agreements)
            rows = scripted(shape, folder, options, of_draft, sizes, pythons)
    print(json.dumps({"benchmark": "speculative", "shape": ckpt_dir or shape, "rows": rows}))


def scripted(
    shape: str,
    folder: Path,
    options: dict[str, Any],
    agreements: Sequence[float],
    sizes: Sizes,
    pythons: dict[str, str],
) -> list[dict[str, Any]]:
    """All rows of random weights, whose files are in `folder` or are made there."""
    _, job = make_job(shape, None, folder / f"{shape}-{options['dtype']}", options["dtype"])
    draft_shape = "tiny" if shape == "tiny" else DRAFT_SHAPE
    _, draft_job = make_job(draft_shape, None, folder / f"{draft_shape}-{options['dtype']}", options["dtype"])
    length = sizes.n_prompt + sizes.n_tokens + 1
    llama = Llama.build(job.ckpt_dir, job.tokenizer_path, length, draft_ckpt_dir=draft_job.ckpt_dir, **options)
    warm_up(llama)
    print(f"{shape}, drafts by {draft_shape}, random weights, scripted texts\n{HEADER}")
    rows = scripted_texts(llama, sizes) + scripted_draft(llama, agreements, sizes)
    del llama
    for name, python in pythons.items():
        if missing := missing_packages(name, python):
            say(f"{name}: left out, {python} has no {', '.join(missing)}")
        else:
            rows += peer_texts(
                name, python, replace(job, threads=torch.get_num_threads(), cpu_time=sizes.cpu_time), sizes
            )
    return rows


if __name__ == "__main__":
    run(main)
