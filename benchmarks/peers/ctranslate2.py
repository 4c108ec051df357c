"""CTranslate2: its own generator, with int8 weights, as it is mostly used on CPUs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import ctranslate2
import torch
from ctranslate2.converters.transformers import LlamaLoader
from transformers import LlamaForCausalLM

from benchmarks.job import Job

COMPUTE_TYPE = "int8"


class CTranslate2:
    batches = (1, 8)
    ragged = False

    def __init__(self, generator: ctranslate2.Generator) -> None:
        self.generator = generator

    def run(self, prompts: list[list[int]], n_tokens: int, tick: Callable[[], None]) -> None:
        last = len(prompts) - 1

        def on_token(result: ctranslate2.GenerationStepResult) -> bool:
            if result.batch_id == last:
                tick()
            return False

        self.generator.generate_batch(
            [[f"<{token}>" for token in prompt] for prompt in prompts],
            max_length=n_tokens,
            min_length=n_tokens,  # past any EOS
            include_prompt_in_result=False,
            sampling_topk=1,
            callback=on_token,
        )


def version(job: Job, variant: str) -> str:
    return f"ctranslate2 {ctranslate2.__version__}, {COMPUTE_TYPE}"


def prepare(job: Job, variant: str) -> None:
    """Converts in memory from transformers' model; ids stand for text, since a generator takes pieces."""
    model = LlamaForCausalLM.from_pretrained(job.hf_folder, dtype=getattr(torch, job.dtype))
    spec = LlamaLoader().get_model_spec(model)
    spec.register_vocabulary([f"<{token}>" for token in range(job.vocab_size)])
    spec.config.layer_norm_epsilon = job.norm_eps
    spec.config.unk_token, spec.config.bos_token, spec.config.eos_token = "<0>", "<1>", "<2>"
    spec.validate()
    spec.optimize(quantization=COMPUTE_TYPE)
    folder = Path(job.folder) / "ctranslate2"
    folder.mkdir(exist_ok=True)
    spec.save(str(folder))


def load(job: Job, variant: str) -> CTranslate2:
    folder = str(Path(job.folder) / "ctranslate2")
    generator = ctranslate2.Generator(folder, job.device, compute_type=COMPUTE_TYPE, intra_threads=job.threads)
    return CTranslate2(generator)
