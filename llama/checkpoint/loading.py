"""From checkpoint folders to networks on their device, with the weights held once."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import partial
from itertools import cycle
from pathlib import Path

import torch
from torch import Tensor

from llama.checkpoint import reading
from llama.checkpoint.format import SCALES, is_linear, scales_of, stored_quantize
from llama.checkpoint.memory import MemoryPlan, available_memory, free_address_space, out_of_memory
from llama.distributed import groups
from llama.distributed.device import (
    check_threads,
    keep_freed_memory,
    processes_on,
    select_device,
    select_dtype,
    set_threads,
)
from llama.errors import quote
from llama.layers.kernels import (
    Kernels,
    can_pack,
    can_quantize,
    measure_kernels,
    quantize_values,
    use_huge_pages,
)
from llama.layers.linear import QUANTIZED_FORMS, packable_layers
from llama.model import Transformer
from llama.text.tokenizer_json import load_tokenizer
from llama.tokenizer import Tokenizer

logger = logging.getLogger(__name__)
_LOADING_TIMEOUT_S = 2 * 3600.0  # for all ranks to load their shards, which may come over a slow network


def choose_quantize(quantize: str | None, ckpt_dir: str | Path, device: torch.device) -> str | None:
    """The form of the linear layers: the one that is asked for, or that the checkpoint is stored in, or None.

    Raises:
        ValueError: there is no such form, or the device cannot have it.
    """
    if quantize not in (None, *QUANTIZED_FORMS):
        raise ValueError(f"quantize must be {' or '.join(map(repr, (None, *QUANTIZED_FORMS)))}, got {quote(quantize)}")
    stored = stored_quantize(ckpt_dir)
    if (quantize := quantize or stored) is None:
        return None
    what = f"{quantize!r} weights, as {ckpt_dir} has," if stored else f"quantize={quantize!r}"
    otherwise = "use the checkpoint that it was made from" if stored else "leave it out"
    if device.type == "cuda":
        return quantize
    if device.type != "cpu":
        raise ValueError(f"{what} must be used on a CPU or CUDA, got device {device}; {otherwise}, or use device='cpu'")
    if not can_quantize(device):
        raise ValueError(
            f"{what} must have a processor and a build of torch with fast and exact int8 products in oneDNN, "
            f"got ones without (on x86, AVX-VNNI or AVX-512 VNNI is needed); {otherwise}"
        )
    return quantize


def load_networks(
    ckpt_dir: str | Path,
    tokenizer_path: str | Path,
    draft_ckpt_dir: str | Path | None,
    *,
    max_seq_len: int,
    max_batch_size: int,
    model_parallel_size: int | None,
    device: str | torch.device | None,
    dtype: str | torch.dtype | None,
    quantize: str | None,
    threads: int | None = None,
    tokenizer_class: type[Tokenizer] = Tokenizer,
    network_class: type[Transformer] = Transformer,
) -> tuple[Tokenizer, list[Transformer]]:
    """Sets up the processes and loads this rank's shards; arguments and errors as in `Llama.build`.

    All is checked before anything is loaded.

    Returns:
        The tokenizer; the network, and the draft model if there is one.
    """
    check_threads(threads)
    mp = groups.resolve_model_parallel_size(model_parallel_size)
    folders = [(ckpt_dir, reading.find_shards(ckpt_dir, mp))]
    if draft_ckpt_dir is not None:
        folders.append((draft_ckpt_dir, reading.list_shards(draft_ckpt_dir, argument="draft_ckpt_dir")))
        if (n_files := len(folders[1][1])) != mp:
            raise AssertionError(
                f"draft_ckpt_dir must hold as many checkpoint files as ckpt_dir, {mp}, got {n_files} in "
                f"{draft_ckpt_dir}; llama reshard writes it with another number of files"
            )
    tokenizer = load_tokenizer(tokenizer_path, ckpt_dir, tokenizer_class)
    device = select_device(device)
    dtype = select_dtype(dtype, device)
    sources = []  # the files of the network, and of the draft model, and what they need
    for folder, paths in folders:
        sizes = {"max_batch_size": max_batch_size, "max_seq_len": max_seq_len}
        args = reading.model_args(folder, tokenizer.n_words, **sizes, tokenizer_path=tokenizer_path)
        args.check_shards(mp)
        plan = MemoryPlan(args, mp, dtype, choose_quantize(quantize, folder, device), device.type)
        sources.append((paths, plan))
    _check_memory(sources, device)
    set_threads(threads)
    groups.init_process_groups(mp, device)
    with groups.rank_errors(), keep_freed_memory(device):
        rank = groups.model_parallel_rank()
        try:
            models = [_load_model(paths[rank], plan, device, network_class) for paths, plan in sources]
        except torch.OutOfMemoryError as error:
            raise out_of_memory(error, sources[0][1], str(device)) from None
    same = ("build", [plan for _, plan in sources], device.type)
    groups.compare_calls(same, timeout_s=_LOADING_TIMEOUT_S)
    return tokenizer, models


def _check_memory(sources: Sequence[tuple[list[Path], MemoryPlan]], device: torch.device) -> None:
    """Raises MemoryError unless all networks fit together."""
    available = available_memory(device) // processes_on(device)
    if device.type == "cpu":
        n_mapped = sum(max(path.stat().st_size for path in paths) for paths, _ in sources)
        available = min(available, max(0, free_address_space() - n_mapped))
    for _, plan in reversed(sources):  # the draft model first, which leaves the rest to the network
        plan.check(available, str(device))
        available -= plan.total


def _load_model(path: Path, plan: MemoryPlan, device: torch.device, network_class: type[Transformer]) -> Transformer:
    """The network with the weights of this rank's file.

    On a CPU that packs bfloat16 weights, packed forms are held in memory, and the plain weights stay in the mapped
    file, in its dtype. A cache of one row makes do with the plain weights where these are as fast for a single row.
    Quantized forms are held like packed ones, for any dtype. Elsewhere the weights are moved to the device and the
    dtype, or quantized there.
    """
    args, dtype, quantize = plan.args, plan.dtype, plan.quantize
    state = reading.load_shard(path, args, plan.model_parallel_size, stored_quantize(path.parent))
    kernels, packs = Kernels(), can_pack(device, dtype) or (quantize is not None and device.type == "cpu")
    if packs and quantize is None:
        kernels = measure_kernels(state.values(), dtype, packed_only=args.max_batch_size > 1)
    kernels = groups.broadcast_object(kernels)  # other kernels round otherwise, and replicas should agree
    if packs and quantize is None:
        packs = kernels.packs_one_row or args.max_batch_size > 1
        if groups.is_first_rank():
            logger.info("Kernels measured: %s", kernels)
    if packs:
        reading.check_range({name: reading.magnitude(t, dtype) for name, t in state.items()}, dtype)
    else:
        load_to_device(state, device=device, dtype=dtype, quantize=quantize is not None)
    model = network_class.from_state(args, state, cache_dtype=dtype)
    layers = packable_layers(model) if packs else []
    for layer in layers:
        layer.kernels = kernels
        layer.quantize = quantize
    if packs:
        model.pack(dtype, release=reading.release_pages)
    elif device.type == "cpu":
        use_huge_pages(model.parameters())
    return model


def load_to_device(
    state: dict[str, Tensor], *, device: torch.device, dtype: torch.dtype, quantize: bool = False
) -> None:
    """Replaces the tensors of a mapped file by copies on `device` in `dtype`; never holds two copies of the whole.

    Args:
        quantize: quantizes the weights of linear layers to int8 there, unless they are, and adds their scales.

    Raises:
        ValueError: a value is beyond the range of `dtype`.
    """
    magnitudes = {}
    copy = _PinnedCopy(device) if device.type == "cuda" else partial(torch.Tensor.to, device=device)
    for name, tensor in list(state.items()):
        state[name] = copied = copy(tensor)
        magnitudes[name] = reading.magnitude(copied, dtype)
        if quantize and is_linear(name) and copied.dtype != torch.int8:
            state[name], state[scales_of(name)] = quantize_values(copied)
        elif copied.dtype != torch.int8 and not name.endswith(SCALES):
            state[name] = copied.to(dtype)
        if state[name] is not tensor:
            reading.release_pages(tensor)
    reading.check_range(magnitudes, dtype)


class _PinnedCopy:
    """Copies tensors to a CUDA device through pinned memory: one buffer is filled while the other one travels.

    The driver would otherwise copy mapped pages to a small pinned buffer, with the device waiting for it.
    """

    def __init__(self, device: torch.device, buffer_bytes: int = 64 * 1024**2) -> None:
        self._device = device
        self._size = buffer_bytes
        buffers = [torch.empty(buffer_bytes, dtype=torch.uint8, pin_memory=True) for _ in range(2)]
        self._ring = cycle([(buffer, torch.cuda.Event()) for buffer in buffers])

    def __call__(self, tensor: Tensor) -> Tensor:
        copied = torch.empty(tensor.shape, dtype=tensor.dtype, device=self._device)
        parts = [t.flatten().view(torch.uint8).split(self._size) for t in (tensor.contiguous(), copied)]
        for source, target in zip(*parts, strict=True):
            buffer, arrived = next(self._ring)
            arrived.synchronize()
            staged = buffer[: len(source)].copy_(source)
            target.copy_(staged, non_blocking=True)
            arrived.record(torch.cuda.current_stream(self._device))
        return copied
