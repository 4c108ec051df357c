"""This library as an engine: `Llama.build`, then the loop of steps that `generate` drains."""

from __future__ import annotations

from collections.abc import Callable

import torch

from benchmarks.job import Job
from llama import Llama
from llama.decoding import decode
from llama.sampling import Sampler

_NO_TOKEN = -1  # in place of EOS: random weights may choose any token, and every row shall run to its end


class Ours:
    ragged = True

    def __init__(self, llama: Llama, batches: tuple[int, ...]) -> None:
        self.llama = llama
        self.batches = batches

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


def version(job: Job) -> str:
    return f"torch {torch.__version__}"


def prepare(job: Job) -> None:
    """Nothing: the checkpoint is in this library's format."""


def load(job: Job) -> Ours:
    llama = Llama.build(
        job.ckpt_dir,
        job.tokenizer_path,
        max_seq_len=job.max_seq_len,
        max_batch_size=job.max_batch_size,
        device=job.device,
        dtype=job.dtype,
    )
    return Ours(llama, job.decode_batches)
