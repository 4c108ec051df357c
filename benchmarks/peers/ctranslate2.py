"""CTranslate2: its own generator, in the job's dtype where the CPU's backend has it, else with int8 weights.

A generator of int8 weights reads half as many bytes a token: the report names the type beside the version.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import ctranslate2
import torch
from ctranslate2.converters.transformers import LlamaLoader
from transformers import LlamaForCausalLM

from benchmarks.job import Job
from benchmarks.peers.hf_folder import write_hf_folder


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


def compute_type(job: Job) -> str:
    return job.dtype if job.dtype in ctranslate2.get_supported_compute_types(job.device) else "int8"


def version(job: Job) -> str:
    return f"ctranslate2 {ctranslate2.__version__}, {compute_type(job)}"


def prepare(job: Job) -> None:
    """Converts in memory from transformers' model; ids stand for text, since a generator takes pieces."""
    model = LlamaForCausalLM.from_pretrained(write_hf_folder(job), dtype=getattr(torch, job.dtype))
    spec = LlamaLoader().get_model_spec(model)
    spec.register_vocabulary([f"<{token}>" for token in range(job.vocab_size)])
    spec.config.layer_norm_epsilon = job.norm_eps
    spec.config.unk_token, spec.config.bos_token, spec.config.eos_token = "<0>", "<1>", "<2>"
    spec.validate()
    spec.optimize(quantization=compute_type(job))
    folder = Path(job.folder) / "ctranslate2"
    folder.mkdir(exist_ok=True)
    spec.save(str(folder))


def load(job: Job) -> CTranslate2:
    folder = str(Path(job.folder) / "ctranslate2")
    kind, threads = compute_type(job), job.threads
    return CTranslate2(ctranslate2.Generator(folder, job.device, compute_type=kind, intra_threads=threads))
