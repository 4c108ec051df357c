"""This library as an engine: `Llama.build`, then the loop of steps that `generate` drains."""

from __future__ import annotations

import logging
import statistics
import time
from collections.abc import Callable, Iterator

import torch

from benchmarks.job import Job
from llama import Llama
from llama.engine import Call, Sequence
from llama.sampling import Sampler

_NO_TOKEN = -1  # in place of EOS: random weights may choose any token, and every row shall run to its end


# Random weights give flat probabilities. Those of trained ones fall off: in a spread of logits like this, the set that
# top_p=0.9 leaves at temperature 0.6 has some tens of tokens.
_SPREAD = 3.0


class Ours:
    ragged = True

    def __init__(self, llama: Llama, batches: tuple[int, ...]) -> None:
        self.llama = llama
        self.batches = batches
        self.load_parts: dict[str, float] = {}

    def run(self, prompts: list[list[int]], n_tokens: int, tick: Callable[[], None]) -> None:
        sampler = Sampler(0.0, 1.0, 1, torch.Generator(self.llama.model.norm.weight.device))
        call = Call(Sequence(list(prompt), sampler, 0, n_tokens, _NO_TOKEN) for prompt in prompts)
        for done, _ in enumerate(self.llama.engine.run(call), 1):
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
        sampler, lanes = Sampler(0.6, 0.9, batch, generator), torch.arange(batch, device=device)
        seconds = []
        for _ in range(30):
            started = time.perf_counter()
            sampler(logits, lanes).tolist()
            seconds.append(time.perf_counter() - started)
        return statistics.median(seconds)


class _Parts(logging.Handler):
    """Keeps what `Llama.build` says of the parts of its time."""

    seconds: dict[str, float] = {}  # noqa: RUF012

    def emit(self, record: logging.LogRecord) -> None:
        self.seconds = getattr(record, "parts", self.seconds)


def version(job: Job) -> str:
    return f"torch {torch.__version__}"


def prepare(job: Job) -> None:
    """Nothing: the checkpoint is in this library's format."""


def load(job: Job, quantize: str | None = None) -> Ours:
    parts = _Parts()
    logger = logging.getLogger("llama")
    logger.addHandler(parts)
    logger.setLevel(logging.INFO)
    engine = Ours(build(job, job.max_batch_size, quantize), job.decode_batches)
    engine.load_parts = parts.seconds
    return engine


def build(job: Job, max_batch_size: int, quantize: str | None = None) -> Llama:
    return Llama.build(
        job.ckpt_dir,
        job.tokenizer_path,
        max_seq_len=job.max_seq_len,
        max_batch_size=max_batch_size,
        device=job.device,
        dtype=job.dtype,
        quantize=quantize,
    )
