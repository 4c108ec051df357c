"""This library as an engine: `Llama.build`, then the loop of steps that `generate` drains."""

from __future__ import annotations

import logging
import statistics
import time
from collections.abc import Callable, Iterator

import torch

from benchmarks.bandwidth import typical_bandwidth
from benchmarks.ceiling import bytes_per_decode_step
from benchmarks.job import Job
from benchmarks.measure import decode_rate
from llama import Llama
from llama.decoding import decode
from llama.sampling import Sampler

_NO_TOKEN = -1  # in place of EOS: random weights may choose any token, and every row shall run to its end


# Random weights give flat probabilities. Those of trained ones fall off: in a spread of logits like this, the set that
# top_p=0.9 leaves at temperature 0.6 has some tens of tokens.
_SPREAD = 3.0
_TURNS = 5


class Ours:
    ragged = True

    def __init__(self, llama: Llama, batches: tuple[int, ...]) -> None:
        self.llama = llama
        self.batches = batches
        self.load_parts: dict[str, float] = {}

    def run(self, prompts: list[list[int]], n_tokens: int, tick: Callable[[], None]) -> None:
        n = len(prompts)
        sampler = Sampler(0.0, 1.0, n, torch.Generator(self.llama.model.norm.weight.device))
        steps = decode(
            self.llama.model,
            prompts,
            sampler,
            lanes=range(n),
            max_gen_len=n_tokens,
            eos_id=_NO_TOKEN,
            stepper=self.llama.stepper,
        )
        for done, _ in enumerate(steps, 1):
            if done % n == 0:
                tick()

    def extras(self, job: Job) -> Iterator[tuple[str, float]]:
        """What only this library is asked: the parts of loading, how long choosing a step's tokens takes, and batch 1
        in a build for no more, in which the weights stay as they are. Takes the network with it."""
        yield from ((f"load_{name.replace(' ', '_')}", seconds) for name, seconds in self.load_parts.items())
        yield from ((f"sampling_{batch}", self._sampling(batch)) for batch in self.batches)
        if 1 in self.batches:
            del self.llama
            self.llama = _build(job, max_batch_size=1)
            yield "decode_alone", decode_rate(self, job.prompts([job.decode_prompt]), job.decode_steps)
            yield "share_of_bandwidth_decode_alone", self._share_of_bandwidth(job)

    def _share_of_bandwidth(self, job: Job) -> float:
        """The median rate of reading in steps at batch 1, over that of plain reading right before each of them: what a
        machine shared with others gives changes from one minute to the next."""
        bytes_per_step = bytes_per_decode_step(self.llama.model.params, job)
        prompts = job.prompts([job.decode_prompt])
        shares = []
        for _ in range(_TURNS):
            bandwidth = typical_bandwidth(job.device)
            shares.append(bytes_per_step * decode_rate(self, prompts, job.decode_steps // 2) / bandwidth)
        return statistics.median(shares)

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


def load(job: Job) -> Ours:
    parts = _Parts()
    logger = logging.getLogger("llama")
    logger.addHandler(parts)
    logger.setLevel(logging.INFO)
    engine = Ours(_build(job, job.max_batch_size), job.decode_batches)
    engine.load_parts = parts.seconds
    return engine


def _build(job: Job, max_batch_size: int) -> Llama:
    return Llama.build(
        job.ckpt_dir,
        job.tokenizer_path,
        max_seq_len=job.max_seq_len,
        max_batch_size=max_batch_size,
        device=job.device,
        dtype=job.dtype,
    )
