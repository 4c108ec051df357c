"""How much memory a model needs: `llama memory --model 70B --device_memory 24GiB`.

Prints the plan of `llama.checkpoint.memory`, which `Llama.build` checks before it loads.
"""

from __future__ import annotations

import re
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from llama.checkpoint.format import stored_quantize
from llama.checkpoint.memory import GIB, MemoryPlan
from llama.checkpoint.reading import list_shards, network_args, read_shard
from llama.checkpoint.releases import RELEASES, TRAINED_SEQ_LEN, Release, trained_seq_len
from llama.distributed.device import select_dtype
from llama.errors import quote
from llama.layers.linear import QUANTIZED_FORMS
from llama.tools.commandline import run, with_flags_of
from llama.tools.reshard import check_count

_UNITS = {"GiB": GIB, "G": GIB, "GB": 10**9, "MiB": 1024**2, "M": 1024**2, "MB": 10**6}
_MOST = 2**20  # the largest batch or sequence that is tried


def memory_table(
    ckpt_dir: str | Path | None = None,
    *,
    model: str | None = None,
    max_seq_len: int = 512,
    max_batch_size: int = 4,
    model_parallel_size: int | None = None,
    dtype: str = "float16",
    quantize: str | None = None,
    device_memory: str | None = None,
) -> str:
    """A table of the memory that each rank needs and, for a device, the largest sizes that fit.

    Args:
        ckpt_dir: folder of params.json and consolidated.NN.pth.
        model: one of the published sizes: 7B, 13B, 70B, or CodeLlama-7b, -13b, -34b, -70b; also as released, such as
            7B-chat, llama-2-7b, Llama-2-7b-chat-hf or CodeLlama-34b-Instruct.
        max_seq_len: as for `Llama.build`.
        max_batch_size: as for `Llama.build`.
        model_parallel_size: number of processes that share the model; by default the number of the checkpoint's files.
        dtype: float16, bfloat16 or float32, of weights and cache.
        quantize: "int8" for such weights of the linear layers, as for `Llama.build`; by default the form of the
            checkpoint. The activations are those on CUDA, where a product has its weight in `dtype` meanwhile.
        device_memory: memory of each process's device, such as 24GiB or 80GB.
    """
    if (ckpt_dir is None) == (model is None):
        raise ValueError(f"either ckpt_dir, a folder, or model ({', '.join(RELEASES)}) must be given, and not both")
    if quantize not in (None, *QUANTIZED_FORMS):
        raise ValueError(f"quantize must be {' or '.join(map(repr, (None, *QUANTIZED_FORMS)))}, got {quote(quantize)}")
    if ckpt_dir is None:
        stored, release = None, _release(str(model))
    else:
        stored, shards = stored_quantize(ckpt_dir), list_shards(ckpt_dir)
        release = Release(network_args(ckpt_dir, read_shard(shards[0])), len(shards))
    n_files = release.model_parallel_size
    args = replace(release.args, max_seq_len=max_seq_len, max_batch_size=max_batch_size)
    args.validate()
    ranks = n_files if model_parallel_size is None else model_parallel_size
    check_count(ranks)
    args.check_shards(ranks)
    if stored and ranks != n_files:
        raise ValueError(
            f"model_parallel_size must be the number of files of a quantized checkpoint, {n_files}, got {ranks}; "
            "reshard the checkpoint that it was made from"
        )
    plan = MemoryPlan(args, ranks, select_dtype(dtype, torch.device("cpu")), quantize or stored, "cuda")
    what = dtype if plan.quantize is None else f"{dtype}, {plan.quantize}"
    head = f"{model or ckpt_dir}: {what}, MP={ranks}, max_seq_len={max_seq_len}, max_batch_size={max_batch_size}"
    lines = [head, *_table(plan)]
    if device_memory is not None:
        lines += ["", *_fit(plan, parse_memory(device_memory))]
    return "\n".join(lines)


def parse_memory(text: str) -> int:
    """Bytes of an amount such as "24GiB" or "80 GB"."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Za-z]+)", text.strip())
    units = {unit.lower(): size for unit, size in _UNITS.items()}
    if found is None or found[2].lower() not in units:
        raise ValueError(f"device_memory must be a number and a unit, such as 24GiB or 80GB, got {quote(text)}")
    return int(float(found[1]) * units[found[2].lower()])


def _release(model: str) -> Release:
    names = {name.lower(): name for name in RELEASES} | {"34b": "CodeLlama-34b"}
    size = re.sub(r"^llama-?2-|-(chat|instruct|python|hf)(?![^-])", "", model.lower())
    if size not in names:
        raise ValueError(f"model must be {', '.join(RELEASES)}, got {quote(model)}")
    return RELEASES[names[size]]


def _table(plan: MemoryPlan) -> list[str]:
    ranks = plan.model_parallel_size
    all_ranks = f"{f'all {ranks} ranks':>16}" if ranks > 1 else ""
    lines = [f"{'':12}{'each rank':>14}{all_ranks}"]
    for name in ("weights", "KV cache", "activations", "total"):
        gib = getattr(plan, name.lower().replace(" ", "_")) / GIB
        lines.append(f"{name:12}{gib:10.2f} GiB" + (f"{ranks * gib:12.2f} GiB" if ranks > 1 else ""))
    return lines


def _fit(plan: MemoryPlan, available: int) -> list[str]:
    """Whether it fits on a device, and the largest batch and the longest sequence that fit, the other unchanged."""
    spare, args = available - plan.total, plan.args
    what = f"{spare / GIB:.2f} GiB to spare" if spare >= 0 else f"it lacks {-spare / GIB:.2f} GiB"
    lines = [f"{'fits' if spare >= 0 else 'does not fit'} in {available / GIB:.2f} GiB: {what}"]
    batch, seq = (plan.largest(size, _MOST, available) for size in ("max_batch_size", "max_seq_len"))
    lines.append(f"largest max_batch_size with max_seq_len={args.max_seq_len}: {batch or 'none fits'}")
    trained = trained_seq_len(args)
    family = "Llama 2" if trained == TRAINED_SEQ_LEN else "Code Llama"
    beyond = f" ({family} was trained for {trained})" if seq > trained else ""
    return [*lines, f"largest max_seq_len with max_batch_size={args.max_batch_size}: {seq or 'none fits'}{beyond}"]


@partial(with_flags_of, memory_table)
def main(**arguments: Any) -> int:
    """Prints the memory that each rank needs; the exit status is 1 if it does not fit in `--device_memory`.

    Args:
    """
    table = memory_table(**arguments)
    print(table)
    return int("\ndoes not fit" in table)


if __name__ == "__main__":
    run(main, name="llama memory")
