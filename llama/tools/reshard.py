"""Splits a checkpoint over a number of files: `llama reshard --ckpt_dir IN --output_dir OUT ...`."""

from __future__ import annotations

import os
import shutil
from contextlib import ExitStack
from pathlib import Path

from llama.checkpoint.chat_format import CHAT_FORMAT_FILE
from llama.checkpoint.format import split_tensor
from llama.checkpoint.sharded import ShardedCheckpoint
from llama.checkpoint.writing import check_absent, lay_out_pth, staged_folder
from llama.errors import quote
from llama.tools.commandline import run
from llama.tools.progress import Progress


def reshard(ckpt_dir: str | Path, output_dir: str | Path, model_parallel_size: int, *, quiet: bool = False) -> None:
    """Writes a checkpoint split over another number of files; every value stays exact to the bit.

    Needs a few times the memory of the largest tensor. `output_dir` appears when it is complete: a run that is
    interrupted leaves nothing.

    Args:
        ckpt_dir: folder of params.json and consolidated.NN.pth, any number of them.
        output_dir: folder to make. params.json is copied there, and tokenizer.model and chat_format.json if they are
            in ckpt_dir.
        model_parallel_size: number of files to write, one per process (GPU) that will run the model.
        quiet: whether to show no progress bar.

    Raises:
        AssertionError: `ckpt_dir` holds no checkpoint files.
        FileNotFoundError: it holds no params.json.
        FileExistsError: `output_dir` exists and is not empty.
        ValueError: the checkpoint is damaged, or cannot be split that way.
        OSError: the disk does not have enough space.
    """
    check_places(ckpt_dir, output_dir)
    check_count(model_parallel_size)
    source = ShardedCheckpoint(ckpt_dir)
    source.args.check_shards(model_parallel_size)
    parts = {name: split_tensor(name, whole, model_parallel_size)[0] for name, whole in source.layout.items()}
    n_bytes = model_parallel_size * sum(part.nbytes for part in parts.values())
    with (
        staged_folder(output_dir, n_bytes) as folder,
        Progress("reshard", n_bytes, quiet=quiet) as progress,
        ExitStack() as stack,
    ):
        for name in ("params.json", "tokenizer.model", CHAT_FORMAT_FILE):
            if (Path(ckpt_dir) / name).exists():
                shutil.copyfile(Path(ckpt_dir) / name, folder / name)
        paths = [folder / f"consolidated.{rank:02d}.pth" for rank in range(model_parallel_size)]
        files = [stack.enter_context(lay_out_pth(path, parts)) for path in paths]
        for name in source.names:
            for file, part in zip(files, split_tensor(name, source.whole(name), model_parallel_size), strict=True):
                progress.add(file.write(name, part))


def check_places(source: str | Path, output_dir: str | Path) -> None:
    """Raises unless `output_dir` is a place to write what is read from `source`."""
    for name, path in (("the input folder", source), ("output_dir", output_dir)):
        if not isinstance(path, (str, os.PathLike)):
            raise ValueError(f"{name} must be a path, got {quote(path)}")
    if Path(source).resolve() == Path(output_dir).resolve():
        raise ValueError(f"output_dir must not be the input folder, got {output_dir}; give the name of a new one")
    check_absent(output_dir)


def check_count(model_parallel_size: int) -> None:
    if not isinstance(model_parallel_size, int) or isinstance(model_parallel_size, bool) or model_parallel_size < 1:
        raise ValueError(f"model_parallel_size must be an integer of at least 1, got {quote(model_parallel_size)}")


def command() -> None:
    run(reshard, n_threads=1, name="llama reshard")


if __name__ == "__main__":
    command()
