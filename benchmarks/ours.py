"""This library as an engine: `Llama.build`, then the loop of steps that `generate` drains."""

from __future__ import annotations

import logging
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch

from benchmarks.job import Job
from benchmarks.machine import typical_bandwidth
from benchmarks.shapes import bytes_per_decode_step
from benchmarks.worker import decode_rate
from llama import Llama
from llama.engine.cuda_graphs import PlainStepper
from llama.engine.engine import Call, TokenResult
from llama.engine.engine import Sequence as EngineSequence
from llama.engine.sampling import Sampler

_BANDWIDTH_TURNS = 5
# Random weights give flat probabilities. Those of trained ones fall off: in a spread of logits like this, the set that
# top_p=0.9 leaves at temperature 0.6 has some tens of tokens.
_SPREAD = 3.0
_OPTIONS: dict[str, dict[str, Any]] = {  # of `Llama.build`
    "": {},
    "max_batch_1": {},
    "eager": {"cuda_graphs": False},
    "compiled": {"compile": True},
    "int8": {"quantize": "int8"},
    "int8_compiled": {"quantize": "int8", "compile": True},
    "int4": {"quantize": "int4"},
    "int4_compiled": {"quantize": "int4", "compile": True},
}


def greedy_steps(llama: Llama, prompts: Iterable[Iterable[int]], n_tokens: Sequence[int]) -> Iterator[TokenResult]:
    """Completes each prompt greedily by its number of tokens, past any EOS, in one call."""
    sampler = Sampler(0.0, 1.0, 1, torch.Generator(llama.model.norm.weight.device))
    pairs = zip(prompts, n_tokens, strict=True)
    return llama.engine.run(Call(EngineSequence(list(prompt), sampler, 0, n, frozenset()) for prompt, n in pairs))


class Ours:
    ragged = True

    def __init__(self, llama: Llama, batches: tuple[int, ...]) -> None:
        self.llama = llama
        self.batches = batches
        self.load_parts: dict[str, float] = {}

    def run(self, prompts: list[list[int]], n_tokens: int, tick: Callable[[], None]) -> None:
        for done, _ in enumerate(greedy_steps(self.llama, prompts, [n_tokens] * len(prompts)), 1):
            if done % len(prompts) == 0:
                tick()

    def extras(self, job: Job) -> Iterator[tuple[str, float]]:
        """What only this library is asked: the parts of loading, and how long choosing a step's tokens takes."""
        yield from ((f"load_{name.replace(' ', '_')}", seconds) for name, seconds in self.load_parts.items())
        yield from ((f"sampling_{batch}", self._sampling(batch)) for batch in self.batches)

    def _sampling(self, batch: int) -> float:
        """The median seconds of a draw for that many rows, at the default temperature and top_p."""
        device = self.llama.model.norm.weight.device
        generator = torch.Generator(device).manual_seed(0)
        logits = _SPREAD * torch.randn(batch, self.llama.model.vocab_size, generator=generator, device=device)
        logits = logits.to(self.llama.model.norm.weight.dtype).float()  # with the equals that rounding brings
        sampler = Sampler(0.6, 0.9, batch, generator)
        seconds = []
        for step in range(30):
            started = time.perf_counter()
            sampler(logits, range(batch), [step] * batch).tolist()
            sampler.mark_used(0, step + 1)
            seconds.append(time.perf_counter() - started)
        return statistics.median(seconds)


class OursForOneRow(Ours):
    """A build with `max_batch_size=1`."""

    ragged = False

    def extras(self, job: Job) -> Iterator[tuple[str, float]]:
        yield "share_of_bandwidth_decode_1", self._share_of_bandwidth(job)

    def _share_of_bandwidth(self, job: Job) -> float:
        """The median of the bytes read per second in decode steps over the rate of plain reading right before each."""
        bytes_per_step = bytes_per_decode_step(self.llama.model.params, job)
        prompts = job.prompts([job.decode_prompt])
        shares = []
        for _ in range(_BANDWIDTH_TURNS):
            bandwidth = typical_bandwidth(job.device)
            shares.append(
                bytes_per_step * decode_rate(self, prompts, job.decode_steps // 2, time.perf_counter) / bandwidth
            )
        return statistics.median(shares)


class _LoadTimes(logging.Handler):
    """Keeps the seconds of each part of `Llama.build`, which it logs."""

    def __init__(self) -> None:
        super().__init__()
        self.seconds: dict[str, float] = {}

    def emit(self, record: logging.LogRecord) -> None:
        self.seconds = getattr(record, "parts", self.seconds)


def version(job: Job, variant: str) -> str:
    form = variant.removesuffix("_compiled")
    return f"torch {torch.__version__}" + (f", {form}" if form in ("int8", "int4") else "")


def prepare(job: Job, variant: str) -> None:
    """Nothing: the checkpoint is in this library's format."""


def load(job: Job, variant: str) -> Ours:
    times = _LoadTimes()
    logger = logging.getLogger("llama")
    logger.addHandler(times)
    logger.setLevel(logging.INFO)
    for_one = variant == "max_batch_1"
    llama = Llama.build(
        job.ckpt_dir,
        job.tokenizer_path,
        max_seq_len=job.max_seq_len,
        max_batch_size=1 if for_one else job.max_batch_size,
        device=job.device,
        dtype=job.dtype,
        **_OPTIONS[variant],
    )
    if variant == "eager":
        llama.stepper = PlainStepper(llama.model, llama.model.params.max_seq_len)
    engine = OursForOneRow(llama, (1,)) if for_one else Ours(llama, job.decode_batches)
    engine.load_parts = times.seconds
    return engine
