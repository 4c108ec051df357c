"""From a checkpoint file to a network on its device, with the weights held once."""

from __future__ import annotations

import time
from pathlib import Path

import torch

from llama.args import ModelArgs
from llama.checkpoint import load_shard, move, page_release
from llama.kernels import Kernels, can_pack, measure_kernels
from llama.layers import packable_layers
from llama.model import Transformer


class Timings:
    """Seconds of each part of a job, by the name given at its end."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._since = time.perf_counter()

    def __call__(self, name: str) -> None:
        now = time.perf_counter()
        self.seconds[name], self._since = now - self._since, now


def load_model(
    path: Path,
    args: ModelArgs,
    model_parallel_size: int,
    device: torch.device,
    dtype: torch.dtype,
    timings: Timings,
) -> Transformer:
    """The network with one file's weights.

    On a CPU that packs bfloat16 weights, packed forms are held in memory, and the plain weights stay in the mapped
    file, in its dtype. A cache of one row makes do with the plain weights where these are as fast for a single row.
    Elsewhere the weights are moved to the device and the dtype.
    """
    state = load_shard(path, args, model_parallel_size)
    kernels, packs = Kernels(), can_pack(device, dtype)
    if packs:
        one_row = args.max_batch_size == 1
        kernels = measure_kernels(state.values(), dtype, packed_only=not one_row)
        packs = kernels.packs_one_row or not one_row
        timings("probe")
    if not packs:
        move(state, path, device=device, dtype=dtype)
    model = Transformer.from_state(args, state, cache_dtype=dtype)
    timings("weights")
    for layer in packable_layers(model):
        layer.kernels = kernels
    if packs:
        model.pack(dtype, release=page_release(path))
        timings("packing")
    return model
