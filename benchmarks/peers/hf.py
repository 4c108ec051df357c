"""Hugging Face transformers: sdpa attention, a static cache, a greedy loop by hand, logits of the last position.

Its dynamic cache, which grows by copying, takes a fifth longer for a step at batch 8, and as long at batch 1. The
variant "compiled" is its own recipe for a GPU, a static cache and `torch.compile`.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import transformers
from transformers import LlamaForCausalLM, LogitsProcessorList, StaticCache

from benchmarks.job import Job


class HuggingFace:
    batches = (1, 8)
    ragged = False

    def __init__(self, model: transformers.PreTrainedModel, job: Job) -> None:
        self.model, self.clock = model, job.clock

    @torch.inference_mode()
    def run(self, prompts: list[list[int]], n_tokens: int, tick: Callable[[], None]) -> None:
        tokens = torch.tensor(prompts, device=self.model.device)
        cache = StaticCache(config=self.model.config, max_cache_len=tokens.size(1) + n_tokens)
        for _ in range(n_tokens):
            logits = self.model(input_ids=tokens, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
            tokens = logits[:, -1:].argmax(-1)
            tokens.tolist()
            tick()

    @torch.inference_mode()
    def decode_script(self, prompt: list[int], output: list[int], prompt_lookup: bool) -> dict[str, float]:
        """Seconds and passes from the first token to the last, by its `generate`, which is made to choose `output`."""
        script = torch.tensor(prompt + output)
        ends: list[float] = []

        def force(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
            if ids.size(1) < len(script):  # drafts may reach past the end
                scores[:, script[ids.size(1)]] = 1e4
            return scores

        hook = self.model.register_forward_hook(lambda *_: ends.append(self.clock()))
        self.model.generate(
            script[None, : len(prompt)],
            max_new_tokens=len(output),
            do_sample=False,
            eos_token_id=None,
            logits_processor=LogitsProcessorList([force]),
            **({"prompt_lookup_num_tokens": 10} if prompt_lookup else {}),
        )
        ended = self.clock()
        hook.remove()
        return {"seconds": ended - ends[0], "passes": max(1, len(ends) - 1)}


class CompiledHuggingFace(HuggingFace):
    """The prefill runs as it is, steps of one token as one compiled graph.

    The cache is kept: a new one would have new addresses, and with them a new capture.
    """

    def __init__(self, model: transformers.PreTrainedModel, job: Job) -> None:
        super().__init__(model, job)
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


def version(job: Job, variant: str) -> str:
    return f"transformers {transformers.__version__}, torch {torch.__version__}"


def prepare(job: Job, variant: str) -> None:
    """Nothing: it reads `job.hf_folder`."""


def load(job: Job, variant: str) -> HuggingFace:
    dtype = getattr(torch, job.dtype)
    model = LlamaForCausalLM.from_pretrained(job.hf_folder, dtype=dtype, attn_implementation="sdpa")
    model.to(torch.device(job.device)).eval()
    return CompiledHuggingFace(model, job) if variant == "compiled" else HuggingFace(model, job)
