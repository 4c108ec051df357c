"""Hugging Face transformers with a static cache and `torch.compile`, its own recipe for a GPU: see `hf`."""

from __future__ import annotations

from collections.abc import Callable

import torch
from transformers import StaticCache

from benchmarks.job import Job
from benchmarks.peers import hf
from benchmarks.peers.hf import HuggingFace, prepare, version

__all__ = ["load", "prepare", "version"]


class CompiledHuggingFace(HuggingFace):
    """The prefill runs as it is, one-token steps as one compiled graph; the cache is kept, since a new one would have
    new addresses, and with them a new capture."""

    def __init__(self, model: object, job: Job) -> None:
        super().__init__(model)  # type: ignore[arg-type]
        self.max_seq_len = job.max_seq_len
        self.caches: dict[int, StaticCache] = {}
        self.step = torch.compile(self._step, mode="reduce-overhead", fullgraph=False)

    def _step(self, tokens: torch.Tensor, position: torch.Tensor, cache: StaticCache) -> torch.Tensor:
        return self.model(
            input_ids=tokens, cache_position=position, past_key_values=cache, use_cache=True, logits_to_keep=1
        ).logits

    @torch.inference_mode()
    def run(self, prompts: list[list[int]], n_tokens: int, tick: Callable[[], None]) -> None:
        tokens = torch.tensor(prompts, device=self.model.device)
        bsz, length = tokens.shape
        if bsz not in self.caches:
            self.caches[bsz] = StaticCache(config=self.model.config, max_cache_len=self.max_seq_len)
        cache = self.caches[bsz]
        cache.reset()
        step = self._step
        position = torch.arange(length, device=tokens.device)
        for _ in range(n_tokens):
            logits = step(tokens, position, cache)
            tokens = logits[:, -1:].argmax(-1).clone()
            position = position[-1:] + 1
            step = self.step
            tokens.tolist()
            tick()


def load(job: Job) -> CompiledHuggingFace:
    return CompiledHuggingFace(hf.load(job).model, job)
