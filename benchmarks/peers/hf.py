"""Hugging Face transformers: sdpa attention, a static cache, a greedy loop by hand, logits of the last position.

Its dynamic cache, which grows by copying, takes a fifth longer for a step at batch 8, and as long at batch 1.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import transformers
from transformers import LlamaForCausalLM, StaticCache

from benchmarks.job import Job
from benchmarks.peers.hf_folder import write_hf_folder


class HuggingFace:
    batches = (1, 8)
    ragged = False

    def __init__(self, model: transformers.PreTrainedModel) -> None:
        self.model = model

    @torch.inference_mode()
    def run(self, prompts: list[list[int]], n_tokens: int, tick: Callable[[], None]) -> None:
        tokens = torch.tensor(prompts, device=self.model.device)
        cache = StaticCache(config=self.model.config, max_cache_len=tokens.size(1) + n_tokens)
        for _ in range(n_tokens):
            logits = self.model(input_ids=tokens, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
            tokens = logits[:, -1:].argmax(-1)
            tokens.tolist()
            tick()


def version(job: Job) -> str:
    return f"transformers {transformers.__version__}, torch {torch.__version__}"


def prepare(job: Job) -> None:
    write_hf_folder(job)


def load(job: Job) -> HuggingFace:
    dtype = getattr(torch, job.dtype)
    model = LlamaForCausalLM.from_pretrained(write_hf_folder(job), dtype=dtype, attn_implementation="sdpa")
    model.to(torch.device(job.device))
    return HuggingFace(model.eval())
