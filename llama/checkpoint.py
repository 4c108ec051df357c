"""The released checkpoint format: `params.json` and one `consolidated.NN.pth` a model-parallel rank.

The one place that knows how tensors are named on disk and split over files. Knows nothing of the network's maths, of
processes or of text.
"""

from __future__ import annotations

import ctypes
import json
import mmap
import os
import pickle
from collections.abc import Callable
from dataclasses import fields, replace
from functools import partial
from itertools import cycle
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llama.args import ModelArgs

# The axis along which each tensor is split over the files; None: every file has the whole of it.
_LAYER_SHARD_DIMS: dict[str, int | None] = {
    "attention.wq.weight": 0,
    "attention.wk.weight": 0,
    "attention.wv.weight": 0,
    "attention.wo.weight": 1,
    "feed_forward.w1.weight": 0,
    "feed_forward.w2.weight": 1,
    "feed_forward.w3.weight": 0,
    "attention_norm.weight": None,
    "ffn_norm.weight": None,
}
_OTHER_SHARD_DIMS: dict[str, int | None] = {
    "tok_embeddings.weight": 1,
    "norm.weight": None,
    "output.weight": 0,
}
_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
KNOWN_EXTRA = "rope.freqs"  # released files carry it; it follows from params.json
_RUN_SIZES = {"max_batch_size", "max_seq_len"}  # fields of ModelArgs that are a run's, not a checkpoint's
_PARAM_NAMES = {field.name for field in fields(ModelArgs)} - _RUN_SIZES


def shard_dim(name: str) -> int | None:
    """The axis along which the tensor `name` is split over a checkpoint's files; None if every file has all of it."""
    if name == KNOWN_EXTRA:
        return None
    if name in _OTHER_SHARD_DIMS:
        return _OTHER_SHARD_DIMS[name]
    _, _, in_layer = name.removeprefix("layers.").partition(".")
    return _LAYER_SHARD_DIMS[in_layer]


def split_tensor(name: str, whole: Tensor, parts: int) -> list[Tensor]:
    """What each of `parts` files holds of a tensor; views."""
    dim = shard_dim(name)
    return [whole] * parts if dim is None else list(whole.chunk(parts, dim))


def join_tensor(name: str, parts: list[Tensor]) -> Tensor:
    """The whole of a tensor from what each file holds of it: the inverse of `split_tensor`."""
    dim = shard_dim(name)
    return parts[0] if dim is None or len(parts) == 1 else torch.cat(parts, dim)


def tensor_shapes(args: ModelArgs, model_parallel_size: int) -> dict[str, tuple[int, ...]]:
    """Every tensor that one file of a checkpoint holds, in the released order, with its shape there."""
    kv_dim = args.kv_heads * args.head_dim
    in_layer: dict[str, tuple[int, ...]] = {
        "attention.wq.weight": (args.dim, args.dim),
        "attention.wk.weight": (kv_dim, args.dim),
        "attention.wv.weight": (kv_dim, args.dim),
        "attention.wo.weight": (args.dim, args.dim),
        "feed_forward.w1.weight": (args.hidden_dim, args.dim),
        "feed_forward.w2.weight": (args.dim, args.hidden_dim),
        "feed_forward.w3.weight": (args.hidden_dim, args.dim),
        "attention_norm.weight": (args.dim,),
        "ffn_norm.weight": (args.dim,),
    }
    whole: dict[str, tuple[int, ...]] = {
        "tok_embeddings.weight": (args.vocab_size, args.dim),
        "norm.weight": (args.dim,),
    }
    whole["output.weight"] = (args.vocab_size, args.dim)
    for i in range(args.n_layers):
        whole |= {f"layers.{i}.{name}": shape for name, shape in in_layer.items()}
    return {name: _shard_shape(shape, shard_dim(name), model_parallel_size) for name, shape in whole.items()}


def _shard_shape(shape: tuple[int, ...], dim: int | None, parts: int) -> tuple[int, ...]:
    return tuple(size // parts if axis == dim else size for axis, size in enumerate(shape))


def list_shards(ckpt_dir: str | Path) -> list[Path]:
    """The checkpoint's files, however many there are, in rank order.

    Raises:
        AssertionError: there are none (see `find_shards`).
    """
    shards = sorted(path for path in Path(ckpt_dir).glob("*.pth") if not path.name.startswith("."))
    if not shards:
        raise AssertionError(
            f"no checkpoint files found in {ckpt_dir}\n"
            "ckpt_dir takes the folder that holds params.json and consolidated.00.pth"
        )
    return shards


def find_shards(ckpt_dir: str | Path, model_parallel_size: int) -> list[Path]:
    """The checkpoint's files, in rank order.

    Raises:
        AssertionError: there are none, or not `model_parallel_size` of them (raised, so that `python -O` keeps it;
            the first lines are documented to users word for word).
    """
    shards = list_shards(ckpt_dir)
    if len(shards) != model_parallel_size:
        raise AssertionError(
            f"Loading a checkpoint for MP={len(shards)} but world size is {model_parallel_size}\n"
            f"start the program with torchrun --nproc_per_node {len(shards)}, one process a file"
        )
    return shards


def read_params(ckpt_dir: str | Path) -> dict[str, Any]:
    """The content of `params.json`, its keys checked; `ModelArgs` checks the values.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no JSON object, or has a key that this library does not know.
    """
    path = Path(ckpt_dir) / "params.json"
    if not path.is_file():
        raise FileNotFoundError(f"no params.json in {ckpt_dir}; it is released beside the .pth files")
    try:
        params = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(params, dict):
        raise ValueError(f"{path} holds a {type(params).__name__}; it takes a JSON object")
    unknown = sorted(params.keys() - _PARAM_NAMES)
    if unknown:
        raise ValueError(
            f"{path} has the unknown key{'s' * (len(unknown) > 1)} {', '.join(map(repr, unknown))}; "
            f"it takes {', '.join(sorted(_PARAM_NAMES))}"
        )
    return params


def model_args(ckpt_dir: str | Path, n_words: int, *, max_batch_size: int, max_seq_len: int) -> ModelArgs:
    """The network that `params.json` describes, with a tokenizer of `n_words` pieces and a run's cache sizes.

    Raises:
        ValueError: a value of the file is wrong, or its `vocab_size` is not the tokenizer's.
    """
    params = read_params(ckpt_dir)
    if params.get("vocab_size", -1) == -1:
        params["vocab_size"] = n_words
    try:
        args = ModelArgs.of(ModelArgs(**params))
    except ValueError as error:
        raise ValueError(f"{Path(ckpt_dir) / 'params.json'}: {error}") from error
    if args.vocab_size != n_words:
        raise ValueError(
            f"{Path(ckpt_dir) / 'params.json'} has vocab_size={args.vocab_size}, but the tokenizer has {n_words} "
            "pieces; give the tokenizer.model that this checkpoint was trained with"
        )
    return ModelArgs.of(replace(args, max_batch_size=max_batch_size, max_seq_len=max_seq_len))


def load_shard(path: Path, args: ModelArgs, model_parallel_size: int) -> dict[str, Tensor]:
    """The tensors of one file, checked to be exactly those that `args` asks for.

    The file is memory-mapped: the tensors are views of the page cache, in the file's dtype, read when first used.

    Raises:
        ValueError: the file is damaged or holds other things than tensors; a tensor is missing, unknown or mis-shaped.
    """
    state = read_shard(path)
    state.pop(KNOWN_EXTRA, None)
    check_tensors(path, state, tensor_shapes(args, model_parallel_size))
    return state


def move(state: dict[str, Tensor], path: Path, *, device: torch.device, dtype: torch.dtype) -> None:
    """Replaces the tensors read from `path` by ones on `device` in `dtype`, never holding two copies of the whole."""
    release = page_release(path)
    copy = _PinnedCopy(device) if device.type == "cuda" else partial(torch.Tensor.to, device=device)
    for name, tensor in state.items():
        state[name] = copy(tensor).to(dtype)
        if state[name] is not tensor:
            release(tensor)


class _PinnedCopy:
    """Copies tensors to a CUDA device through pinned memory: one buffer is filled while the other one travels.

    The driver would otherwise copy mapped pages to a small pinned buffer of its own, with the device waiting for it.
    """

    def __init__(self, device: torch.device, buffer_bytes: int = 64 * 1024**2) -> None:
        self._device = device
        self._size = buffer_bytes
        self._ring = cycle([(_pinned(buffer_bytes), torch.cuda.Event()) for _ in range(2)])

    def __call__(self, tensor: Tensor) -> Tensor:
        copied = torch.empty(tensor.shape, dtype=tensor.dtype, device=self._device)
        parts = [_bytes_of(t).split(self._size) for t in (tensor.contiguous(), copied)]
        for source, target in zip(*parts, strict=True):
            buffer, arrived = next(self._ring)
            arrived.synchronize()
            staged = buffer[: len(source)].copy_(source)
            target.copy_(staged, non_blocking=True)
            arrived.record(torch.cuda.current_stream(self._device))
        return copied


def _pinned(n_bytes: int) -> Tensor:
    return torch.empty(n_bytes, dtype=torch.uint8, pin_memory=True)


def _bytes_of(tensor: Tensor) -> Tensor:
    """A view of a contiguous tensor's memory."""
    return tensor.flatten().view(torch.uint8)


def page_release(path: Path) -> Callable[[Tensor], None]:
    """A function that gives back the memory of a tensor read from `path`; the file is read again when it is used."""
    madvise = getattr(ctypes.CDLL(None), "madvise", None) if os.name == "posix" else None
    if madvise is None or not _is_mappable(path):
        return lambda tensor: None

    def release(tensor: Tensor) -> None:
        start = -(-tensor.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
        storage = tensor.untyped_storage()  # smaller than the tensor, if that repeats a value
        end = min(tensor.data_ptr() + tensor.nbytes, storage.data_ptr() + storage.nbytes())
        end = end // mmap.PAGESIZE * mmap.PAGESIZE
        if end > start:  # whole pages only: those at the ends hold parts of other tensors
            madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), mmap.MADV_DONTNEED)

    return release


def read_shard(path: Path) -> dict[str, Tensor]:
    """The flat name -> tensor dict of one file, memory-mapped on the CPU. Nothing but tensors is unpickled."""
    mappable = _is_mappable(path)
    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=mappable)
    except pickle.UnpicklingError as error:
        raise ValueError(  # torch's own words advise to load without `weights_only`, which runs code of the file
            f"{path} holds other things than tensors, which are not loaded, or is damaged; compare its checksum"
        ) from error
    except Exception as error:  # torch raises errors of many kinds over a damaged file
        raise ValueError(
            f"{path} cannot be read ({_first_line(error)}); is it cut short? Compare its checksum"
        ) from error
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise ValueError(f"{path} is not a flat dict of tensors, which is what a released checkpoint file holds")
    return state


def _is_mappable(path: Path) -> bool:
    """Whether it has torch.save's format since 1.6, a zip file; the one before cannot be mapped."""
    with path.open("rb") as file:
        return file.read(2) == b"PK"


def _first_line(error: Exception) -> str:
    lines = str(error).splitlines() or [type(error).__name__]
    return lines[0]


def check_tensors(path: Path, state: dict[str, Tensor], shapes: dict[str, tuple[int, ...]]) -> None:
    """Raises ValueError, naming what is wrong, unless `state`, read from `path`, holds exactly these tensors."""
    if missing := [name for name in shapes if name not in state]:
        raise ValueError(f"{path} lacks {_some(missing)}, which params.json asks for")
    if extra := [str(name) for name in state if name not in shapes]:
        raise ValueError(f"{path} has {_some(extra)}, which the network does not have")
    for name, shape in shapes.items():
        tensor = state[name]
        if tuple(tensor.shape) != shape:
            raise ValueError(f"{path}: {name} has shape {tuple(tensor.shape)}; by params.json it takes {shape}")
        if tensor.layout != torch.strided or tensor.device.type == "meta":
            raise ValueError(f"{path}: {name} has no values of its own; it takes a dense tensor")
        if tensor.dtype not in _DTYPES:
            raise ValueError(f"{path}: {name} has dtype {tensor.dtype}; it takes float16, bfloat16 or float32")


def _some(names: list[str]) -> str:
    """The first few names and how many more."""
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more
