"""The released checkpoint format: `params.json`, and the names and shapes of the tensors in `consolidated.NN.pth`.

The one place that knows how tensors are named on disk and split over files, one file per model-parallel rank.
"""

from __future__ import annotations

import re
from collections.abc import Container
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llama.errors import check_link, first_few, quote, read_json_object
from llama.layers.linear import QUANTIZED_FORMS
from llama.model import ModelArgs

# Of each tensor what gives its axes their sizes, and the axis that is split over the files (None: every file has all).
_LAYER_TENSORS: dict[str, tuple[tuple[str, ...], int | None]] = {
    "attention.wq.weight": (("dim", "dim"), 0),
    "attention.wk.weight": (("kv_dim", "dim"), 0),
    "attention.wv.weight": (("kv_dim", "dim"), 0),
    "attention.wo.weight": (("dim", "dim"), 1),
    "feed_forward.w1.weight": (("hidden_dim", "dim"), 0),
    "feed_forward.w2.weight": (("dim", "hidden_dim"), 1),
    "feed_forward.w3.weight": (("hidden_dim", "dim"), 0),
    "attention_norm.weight": (("dim",), None),
    "ffn_norm.weight": (("dim",), None),
}
_OTHER_TENSORS: dict[str, tuple[tuple[str, ...], int | None]] = {
    "tok_embeddings.weight": (("vocab_size", "dim"), 1),
    "norm.weight": (("dim",), None),
    "output.weight": (("vocab_size", "dim"), 0),
}
_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
# Llama 2's released files carry rope.freqs, Llama 1's one per layer; they follow from params.json.
_KNOWN_EXTRA = re.compile(r"(layers\.\d+\.attention\.inner_attention\.)?rope\.freqs")
_RUN_SIZES = {"max_batch_size", "max_seq_len"}  # fields of ModelArgs that are a run's, not a checkpoint's
_PARAM_NAMES = {field.name for field in fields(ModelArgs)} - _RUN_SIZES
QUANTIZE = "quantize"  # the key of params.json that names the form of quantized weights
SCALES = ".scales"


def shard_dim(name: str) -> int | None:
    """The axis along which the tensor `name` is split over a checkpoint's files; None if every file has all of it."""
    if is_known_extra(name):
        return None
    _, _, in_layer = name.removeprefix("layers.").partition(".")
    _, dim = _OTHER_TENSORS[name] if name in _OTHER_TENSORS else _LAYER_TENSORS[in_layer]
    return dim


def is_known_extra(name: object) -> bool:
    """Whether files may hold this tensor besides the network's; it is not used."""
    return isinstance(name, str) and _KNOWN_EXTRA.fullmatch(name) is not None


def is_linear(name: str) -> bool:
    """Whether a tensor is the weight of a linear layer, which a quantized checkpoint has as numbers and scales."""
    return name != "tok_embeddings.weight" and not name.endswith(SCALES) and shard_dim(name) is not None


def scales_of(name: str) -> str:
    """The name of the scales of a quantized weight."""
    return name.removesuffix(".weight") + SCALES


def is_repeated(name: str) -> bool:
    """Whether every file of a checkpoint holds the whole tensor, the same in each; scales are each file's own."""
    return not name.endswith(SCALES) and shard_dim(name) is None


def split_tensor(name: str, whole: Tensor, parts: int, vocab_size: int) -> list[Tensor]:
    """What each of `parts` files holds of a tensor: views, unless rows of zeros complete the vocabulary."""
    dim = shard_dim(name)
    if name in ("tok_embeddings.weight", "output.weight") and whole.size(0) < vocab_size:
        whole = torch.cat([whole, whole.new_zeros(vocab_size - whole.size(0), whole.size(1))])
    return [whole] * parts if dim is None else list(whole.chunk(parts, dim))


def join_tensor(name: str, parts: list[Tensor]) -> Tensor:
    """The whole of a tensor from what each file holds of it: the inverse of `split_tensor`."""
    dim = shard_dim(name)
    return parts[0] if dim is None or len(parts) == 1 else torch.cat(parts, dim)


def tensor_shapes(args: ModelArgs, model_parallel_size: int, quantize: str | None = None) -> dict[str, tuple[int, ...]]:
    """Every tensor that one file of a checkpoint holds, in the released order, with its shape there.

    Args:
        quantize: the form that its linear layers are stored in, by `stored_quantize`; their scales come last.
    """
    sizes = {
        "dim": args.dim,
        "kv_dim": args.kv_heads * args.head_dim,
        "hidden_dim": args.hidden_dim,
        "vocab_size": args.vocab_size,
    }
    tensors = _OTHER_TENSORS.copy()
    for i in range(args.n_layers):
        tensors |= {f"layers.{i}.{name}": tensor for name, tensor in _LAYER_TENSORS.items()}
    shapes = {
        name: tuple(sizes[size] // (model_parallel_size if axis == split else 1) for axis, size in enumerate(axes))
        for name, (axes, split) in tensors.items()
    }
    scales = {} if quantize is None else {scales_of(name): shapes[name][:1] for name in shapes if is_linear(name)}
    return shapes | scales


def stored_dtypes(name: str, names: Container[str]) -> tuple[torch.dtype, ...]:
    """The dtypes that a tensor of a file with these `names` may have."""
    if name.endswith(SCALES):
        return (torch.float32,)
    return (torch.int8,) if scales_of(name) in names else _DTYPES


def stored_quantize(ckpt_dir: str | Path) -> str | None:
    """The form in which `llama quantize` wrote a checkpoint's linear layers; None for plain weights."""
    form: str | None = read_params(ckpt_dir).get(QUANTIZE)
    return form


def read_params(ckpt_dir: str | Path) -> dict[str, Any]:
    """The content of `params.json`: fields of `ModelArgs`, which checks their values, and `QUANTIZE`.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not a JSON object, or has a key that this library does not know.
    """
    path = Path(ckpt_dir) / "params.json"
    if not path.is_file():
        check_link(path)
        raise FileNotFoundError(f"no params.json in {ckpt_dir}; it is released beside the .pth files")
    params = read_json_object(path)
    unknown = sorted(params.keys() - _PARAM_NAMES - {QUANTIZE})
    if unknown:
        raise ValueError(
            f"{path}: keys must be among {', '.join(sorted(_PARAM_NAMES))}, "
            f"got {first_few([quote(key) for key in unknown])}; this library runs networks of Llama 2's architecture, "
            "and such keys belong to another one"
        )
    if QUANTIZE in params and params[QUANTIZE] not in QUANTIZED_FORMS:
        raise ValueError(
            f"{path}: {QUANTIZE} must be {' or '.join(map(repr, QUANTIZED_FORMS))}, got {quote(params[QUANTIZE])}; "
            "use the version of this library that wrote the checkpoint, or quantize it again"
        )
    return params
