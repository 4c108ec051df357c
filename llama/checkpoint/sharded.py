"""A checkpoint folder read as whole tensors, one at a time, whatever the number of its files.

The files are memory-mapped, and the memory of one tensor is freed before the next one is read.
"""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from llama.checkpoint.format import is_known_extra, join_tensor, stored_quantize, tensor_shapes
from llama.checkpoint.reading import check_distinct, list_shards, network_args, read_shard, release_pages, tensor_faults


class ShardedCheckpoint:
    """The whole tensors of a checkpoint; all names and shapes are checked before the first is read.

    Quantized checkpoints have no whole tensors: each file's scales are for its own part of a layer's inputs.

    Attributes:
        args: the network; its vocabulary is the embedding's where params.json has -1.
        paths: the files, in rank order.
        layout: every whole tensor, without values (on the meta device), in the released order; `rope.freqs` and the
            like last, if the files have them.

    Raises:
        AssertionError, FileNotFoundError: the folder holds no `*.pth` file, or no params.json.
        ValueError: params.json or a file is wrong, or a tensor that every file repeats differs, or the checkpoint is
            quantized.
    """

    def __init__(self, ckpt_dir: str | Path) -> None:
        self.paths = list_shards(ckpt_dir)
        if (form := stored_quantize(ckpt_dir)) is not None:
            raise ValueError(
                f"{ckpt_dir} must have plain weights for this, got {form} weights; use the checkpoint that it was "
                "made from, and quantize the result"
            )
        states = [read_shard(path) for path in self.paths]
        check_distinct(self.paths)
        self.args = network_args(ckpt_dir, states[0])
        n_files = len(self.paths)
        try:
            self.args.check_shards(n_files)
        except ValueError as error:
            raise ValueError(f"{ckpt_dir} has {n_files} files, but {error}; is a file missing?") from error
        shapes = tensor_shapes(self.args, n_files)
        sound: dict[str, Tensor] = {}
        for path, state in zip(self.paths, states, strict=True):
            extra = filter(is_known_extra, state)
            if faults := tensor_faults(path, state, shapes | dict.fromkeys(extra, (self.args.head_dim // 2,)), sound):
                raise ValueError(faults[0])
        shared = (name for name in filter(is_known_extra, states[0]) if all(name in state for state in states))
        self._parts = {name: [state[name] for state in states] for name in [*shapes, *shared]}
        self._last: list[Tensor] = []  # the parts that were read last
        meta = {name: [part.to("meta") for part in parts] for name, parts in self._parts.items()}
        self.layout = {name: join_tensor(name, parts) for name, parts in meta.items()}

    def whole(self, name: str) -> Tensor:
        """The tensor `name`, joined from all files; with a single file, a view of the mapped file."""
        return join_tensor(name, self.parts(name))

    def parts(self, name: str) -> list[Tensor]:
        """What each file holds of the tensor `name`: views of the mapped files.

        The memory of the tensor before is freed; it is read from its file again if it is still in use.
        """
        for part in self._last:
            release_pages(part)
        self._last = self._parts[name]
        return self._last
