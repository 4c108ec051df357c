"""What a run's figures are held against: the bytes that a decode step has to read, and the memory that a build plans.

Knows the network's sizes, nothing of engines or time.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch

from benchmarks.job import Job
from llama import ModelArgs
from llama.checkpoint import tensor_shapes
from llama.memory import MemoryPlan, plan_memory


def bytes_per_decode_step(args: ModelArgs, job: Job) -> float:
    """Bytes that one decode step has to read at batch 1.

    Every weight but the embedding table, of which it reads one row, and the keys and values that are there in the
    middle of the timed steps.
    """
    shapes = tensor_shapes(args, 1)
    weights = sum(math.prod(shape) for name, shape in shapes.items() if name != "tok_embeddings.weight")
    kv_len = job.decode_prompt + job.decode_steps / 2
    cached = 2 * args.n_layers * args.kv_heads * args.head_dim * kv_len
    return _dtype(job).itemsize * (weights + cached)


def operations_per_token(args: ModelArgs) -> float:
    """Floating-point operations that a prompt's token takes in the layers' products: attention and logits left out."""
    shapes = tensor_shapes(args, 1)
    return 2.0 * sum(math.prod(shape) for name, shape in shapes.items() if name.startswith("layers."))


def memory_plan(args: ModelArgs, job: Job) -> MemoryPlan:
    """What `Llama.build` counts on for this job's cache sizes."""
    sized = replace(args, max_batch_size=job.max_batch_size, max_seq_len=job.max_seq_len)
    return plan_memory(sized, 1, _dtype(job))


def _dtype(job: Job) -> torch.dtype:
    dtype: torch.dtype = getattr(torch, job.dtype)
    return dtype
