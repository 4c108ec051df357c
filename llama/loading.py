"""From a checkpoint file to a network on its device, with the weights held once."""

from __future__ import annotations

import logging
import time
from pathlib import Path

import torch

from llama import runtime
from llama.args import ModelArgs
from llama.checkpoint import load_shard, load_to_device, page_release
from llama.kernels import Kernels, can_pack, can_quantize, measure_kernels
from llama.layers import packable_layers
from llama.model import Transformer
from llama.quoting import quote

logger = logging.getLogger(__name__)


class Timings:
    """Seconds of each part of a job, by the name given at its end."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._since = time.perf_counter()

    def __call__(self, name: str) -> None:
        now = time.perf_counter()
        self.seconds[name] = self.seconds.get(name, 0.0) + now - self._since
        self._since = now


def check_quantize(quantize: str | None, device: torch.device) -> None:
    """Raises ValueError unless `quantize` is None, or a form that layers on the device can have."""
    if quantize is None:
        return
    if quantize != "int8":
        raise ValueError(f"quantize must be None or 'int8', got {quote(quantize)}")
    if device.type != "cpu":
        raise ValueError(
            f"quantize='int8' must be used on a CPU, got device {device}; leave it out, or use device='cpu'"
        )
    if not can_quantize(device):
        raise ValueError(
            "quantize='int8' must have a processor and a build of torch with fast and exact int8 products in oneDNN, "
            "got ones without (on x86, AVX-VNNI or AVX-512 VNNI is needed); leave it out"
        )


def load_model(
    path: Path,
    args: ModelArgs,
    model_parallel_size: int,
    device: torch.device,
    dtype: torch.dtype,
    timings: Timings,
    quantize: str | None = None,
) -> Transformer:
    """The network with one file's weights.

    On a CPU that packs bfloat16 weights, packed forms are held in memory, and the plain weights stay in the mapped
    file, in its dtype. A cache of one row makes do with the plain weights where these are as fast for a single row.
    Quantized forms are held like packed ones, for any dtype. Elsewhere the weights are moved to the device and the
    dtype.
    """
    state = load_shard(path, args, model_parallel_size)
    kernels, packs = Kernels(), quantize is not None or can_pack(device, dtype)
    if packs and quantize is None:
        one_row = args.max_batch_size == 1
        kernels = measure_kernels(state.values(), dtype, packed_only=not one_row)
        packs = kernels.packs_one_row or not one_row
        timings("probe")
        if runtime.is_first_rank():
            logger.info("Kernels measured: %s", kernels)
    if not packs:
        load_to_device(state, path, device=device, dtype=dtype)
    model = Transformer.from_state(args, state, cache_dtype=dtype)
    timings("weights")
    for layer in packable_layers(model):
        layer.kernels = kernels
        layer.quantize = quantize
    if packs:
        model.pack(dtype, release=page_release(path))
        timings("packing" if quantize is None else "quantizing")
    return model
