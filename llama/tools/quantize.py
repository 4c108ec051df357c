"""A checkpoint with int8 weights: `llama quantize --ckpt_dir llama-2-7b --output_dir llama-2-7b-int8`.

`Llama.build` loads it as what `quantize="int8"` makes of the original while loading: about half the bytes to keep and
to read, and none of the rounding left to do.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from llama.checkpoint.format import is_linear, scales_of, tensor_shapes
from llama.checkpoint.reading import count_not_finite
from llama.checkpoint.sharded import ShardedCheckpoint
from llama.checkpoint.writing import copy_side_files, write_shards
from llama.errors import quote, read_json_object
from llama.layers.kernels import quantize_values
from llama.layers.linear import QUANTIZED_FORMS
from llama.tools.commandline import run
from llama.tools.progress import writing
from llama.tools.reshard import check_places


def quantize(ckpt_dir: str | Path, output_dir: str | Path, form: str = "int8", *, quiet: bool = False) -> None:
    """Writes a checkpoint whose linear layers are int8 numbers with scales; it has as many files as the original.

    It computes exactly what `Llama.build(..., quantize="int8")` computes with the original on as many ranks. To have it
    for another number of ranks, reshard the original first: the scales of `wo` and `w2` belong to one rank's inputs.

    Needs a few times the memory of the largest tensor. `output_dir` appears when it is complete: a run that is
    interrupted leaves nothing.

    Args:
        ckpt_dir: folder of params.json and consolidated.NN.pth, any number of them.
        output_dir: folder to make. What ckpt_dir has of tokenizer and chat format is copied there, and checklist.chk
            is written.
        form: form of the linear layers' weights, int8.
        quiet: shows no progress.
    """
    check_places(ckpt_dir, output_dir)
    if form not in QUANTIZED_FORMS:
        raise ValueError(f"form must be {' or '.join(QUANTIZED_FORMS)}, got {quote(form)}")
    source = ShardedCheckpoint(ckpt_dir)
    layout = _layout(source, form)
    n_bytes = len(source.paths) * sum(tensor.nbytes for tensor in layout.values())
    with writing("quantize", output_dir, n_bytes, quiet=quiet) as (folder, add):
        params = read_json_object(Path(ckpt_dir) / "params.json") | {"quantize": form}
        (folder / "params.json").write_text(json.dumps(params), encoding="utf-8")
        copy_side_files(Path(ckpt_dir), folder)
        write_shards(folder, layout, len(source.paths), _quantized(source), add)


def _layout(source: ShardedCheckpoint, form: str) -> dict[str, Tensor]:
    """The tensors of one file, on the meta device."""
    shapes = tensor_shapes(source.args, len(source.paths), form)
    dtypes = {name: torch.int8 if is_linear(name) else source.layout[name].dtype for name in source.layout}
    return {
        name: torch.empty(shape, dtype=dtypes.get(name, torch.float32), device="meta") for name, shape in shapes.items()
    }


def _quantized(source: ShardedCheckpoint) -> Iterator[tuple[str, list[Tensor]]]:
    """What each file holds of each tensor, with one of the original's in memory at a time."""
    for name in tensor_shapes(source.args, 1):
        parts = source.parts(name)
        for path, part in zip(source.paths, parts, strict=True):
            if n_bad := count_not_finite(part):
                raise ValueError(f"{path}: {name} must be finite, got {n_bad} values that are NaN or infinite")
        if not is_linear(name):
            yield name, parts
            continue
        quantized = [quantize_values(part) for part in parts]
        yield name, [values for values, _ in quantized]
        yield scales_of(name), [scales for _, scales in quantized]


if __name__ == "__main__":
    run(quantize, name="llama quantize")
