"""Splits a checkpoint over a number of files: `llama reshard --ckpt_dir IN --output_dir OUT ...`."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path

from llama.checkpoint.format import read_params, split_tensor
from llama.checkpoint.sharded import ShardedCheckpoint
from llama.checkpoint.writing import check_absent, copy_side_files, write_shards
from llama.errors import quote
from llama.model import ModelArgs
from llama.tools.commandline import run
from llama.tools.progress import writing


def reshard(ckpt_dir: str | Path, output_dir: str | Path, model_parallel_size: int, *, quiet: bool = False) -> None:
    """Writes a checkpoint split over another number of files; every value stays exact to the bit.

    Needs a few times the memory of the largest tensor. `output_dir` appears when it is complete: a run that is
    interrupted leaves nothing.

    Args:
        ckpt_dir: folder of params.json and consolidated.NN.pth, any number of them.
        output_dir: folder to make. params.json is copied there, and what ckpt_dir has of tokenizer and chat format;
            checklist.chk is written.
        model_parallel_size: number of files to write, one per process (GPU) that will run the model. Where the
            vocabulary is no multiple of it, tokens of zeros are added, which are never sampled.
        quiet: shows no progress bar.
    """
    check_places(ckpt_dir, output_dir)
    check_count(model_parallel_size)
    source = ShardedCheckpoint(ckpt_dir)
    args = with_even_vocabulary(source.args, model_parallel_size)
    split = partial(split_tensor, parts=model_parallel_size, vocab_size=args.vocab_size)
    layout = {name: split(name, whole)[0] for name, whole in source.layout.items()}
    n_bytes = model_parallel_size * sum(part.nbytes for part in layout.values())
    with writing("reshard", output_dir, n_bytes, quiet=quiet) as (folder, add):
        copy_side_files(Path(ckpt_dir), folder)
        shutil.copyfile(Path(ckpt_dir) / "params.json", folder / "params.json")
        if args.vocab_size != source.args.vocab_size:
            params = read_params(ckpt_dir) | {"vocab_size": args.vocab_size}
            (folder / "params.json").write_text(json.dumps(params), encoding="utf-8")
        values = ((name, split(name, source.whole(name))) for name in source.layout)
        write_shards(folder, layout, model_parallel_size, values, add)


def check_places(source: str | Path, output_dir: str | Path) -> None:
    """Raises unless `output_dir` is a place to write what is read from `source`."""
    for name, path in (("the input folder", source), ("output_dir", output_dir)):
        if not isinstance(path, (str, os.PathLike)):
            raise ValueError(f"{name} must be a path, got {quote(path)}")
    if Path(source).resolve() == Path(output_dir).resolve():
        raise ValueError(f"output_dir must not be the input folder, got {output_dir}; give the name of a new one")
    check_absent(output_dir)


def with_even_vocabulary(args: ModelArgs, model_parallel_size: int) -> ModelArgs:
    """`args` with the next larger vocabulary that as many files can share.

    Raises:
        ValueError: another size cannot be split that way.
    """
    args = replace(args, vocab_size=-(-args.vocab_size // model_parallel_size) * model_parallel_size)
    args.check_shards(model_parallel_size)
    return args


def check_count(model_parallel_size: int) -> None:
    if not isinstance(model_parallel_size, int) or isinstance(model_parallel_size, bool) or model_parallel_size < 1:
        raise ValueError(f"model_parallel_size must be an integer of at least 1, got {quote(model_parallel_size)}")


if __name__ == "__main__":
    run(reshard, n_threads=1, name="llama reshard")
