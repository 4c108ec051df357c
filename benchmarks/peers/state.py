"""The released checkpoint's tensors, for engines that have to put them into other formats. Needs torch alone."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from benchmarks.job import Job


def read_state(job: Job) -> dict[str, Tensor]:
    """Released names -> tensors, memory-mapped, in the job's dtype."""
    shard = next(Path(job.ckpt_dir).glob("*.pth"))
    state = torch.load(shard, map_location="cpu", weights_only=True, mmap=True)
    state.pop("rope.freqs", None)
    return {name: tensor.to(getattr(torch, job.dtype)) for name, tensor in state.items()}
