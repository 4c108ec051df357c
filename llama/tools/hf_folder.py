"""A Hugging Face model folder: `config.json`, and weights in one file or several, read one tensor at a time.

Weights are read from safetensors files or, where there are none, from `pytorch_model*.bin`. Knows nothing of the
released layout.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llama.checkpoint import page_release, read_shard
from llama.tools.tensor_file import SAFETENSORS_DTYPES

try:
    import safetensors
except ImportError:
    safetensors = None  # type: ignore[assignment]

INDEX_SUFFIX = ".index.json"
_WEIGHTS = ("model.safetensors", "pytorch_model.bin")  # or an index of that name, which lists several files


class HuggingFaceFolder:
    """The configuration and the tensors of a folder.

    Attributes:
        config: the content of `config.json`.
        layout: every tensor's shape and dtype, as tensors without values.

    Raises:
        FileNotFoundError: `config.json` or weights are missing.
        ValueError: a file is damaged, or is not what it should be.
        ImportError: there are safetensors files, but no safetensors package.
    """

    def __init__(self, folder: str | Path) -> None:
        if not Path(folder).is_dir():
            raise FileNotFoundError(f"no folder {folder}; give that of a downloaded Hugging Face model")
        self.config = read_json_object(Path(folder) / "config.json")
        self.layout: dict[str, Tensor] = {}
        self._files: dict[str, _SafetensorsFile | _BinFile] = {}  # of each tensor
        paths, listed = _weight_files(Path(folder))
        for path in paths:
            file = _SafetensorsFile(path) if path.suffix == ".safetensors" else _BinFile(path)
            if twice := sorted(self.layout.keys() & file.layout.keys()):
                raise ValueError(f"{path} repeats {twice[0]}, which another file of the folder holds too")
            self.layout |= file.layout
            self._files |= dict.fromkeys(file.layout, file)
        if missing := sorted(listed - self.layout.keys()):
            raise ValueError(f"{folder}: the index lists {missing[0]}, which no file holds")

    def read(self, name: str) -> Tensor:
        """The tensor `name`, a view of its mapped file."""
        return self._files[name].read(name)


class _SafetensorsFile:
    """Opened for each tensor anew: what was read leaves memory with the tensor."""

    def __init__(self, path: Path) -> None:
        if safetensors is None:
            raise ImportError(f"{path} needs the safetensors package; pip install 'llama[convert]' brings it")
        self._path = path
        try:
            with safetensors.safe_open(path, "pt") as file:
                slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 (it is no dict)
        except safetensors.SafetensorError as error:
            raise ValueError(f"{path} cannot be read ({error}); is it cut short? Compare its checksum") from error
        self.layout = {name: self._without_values(name, part) for name, part in slices.items()}

    def read(self, name: str) -> Tensor:
        with safetensors.safe_open(self._path, "pt") as file:
            tensor: Tensor = file.get_tensor(name)
        return tensor

    def _without_values(self, name: str, part: Any) -> Tensor:
        dtype = SAFETENSORS_DTYPES.get(part.get_dtype())
        if dtype is None:
            raise ValueError(
                f"{self._path}: {name} has dtype {part.get_dtype()}; it takes {', '.join(SAFETENSORS_DTYPES)}"
            )
        return torch.empty(part.get_shape(), dtype=dtype, device="meta")


class _BinFile:
    """A file of `torch.save`'s. Before a tensor is read, the last one's memory is given back."""

    def __init__(self, path: Path) -> None:
        self._state = read_shard(path)
        self._release: Callable[[Tensor], None] = page_release(path)
        self._last: Tensor | None = None
        for name, tensor in self._state.items():
            if tensor.dtype not in SAFETENSORS_DTYPES.values() or tensor.layout != torch.strided or tensor.is_meta:
                raise ValueError(f"{path}: {name} is no dense tensor of {', '.join(SAFETENSORS_DTYPES)}")
        self.layout = {str(name): tensor.to("meta") for name, tensor in self._state.items()}

    def read(self, name: str) -> Tensor:
        if self._last is not None:
            self._release(self._last)
        self._last = self._state[name]
        return self._last


def read_json_object(path: Path) -> dict[str, Any]:
    """The content of a JSON file, an object."""
    if not path.is_file():
        raise FileNotFoundError(f"no {path.name} in {path.parent}")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}; it takes a JSON object")
    return content


def _weight_files(folder: Path) -> tuple[list[Path], set[str]]:
    """The files of weights, and the tensors that an index says they hold: the first kind that is there."""
    for name in _WEIGHTS:
        if (folder / name).is_file():
            return [folder / name], set()
        if (folder / f"{name}{INDEX_SUFFIX}").is_file():
            return _listed_files(folder / f"{name}{INDEX_SUFFIX}", suffix=Path(name).suffix)
    raise FileNotFoundError(f"no weights in {folder}; it takes {' or '.join(_WEIGHTS)}, or an index of such files")


def _listed_files(index: Path, *, suffix: str) -> tuple[list[Path], set[str]]:
    weight_map = read_json_object(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"{index} has no weight_map, which says in which file each tensor is")
    for file in weight_map.values():
        if not isinstance(file, str) or Path(file).name != file or "\\" in file or not file.endswith(suffix):
            raise ValueError(f"{index} lists the file {file!r}; it takes names of {suffix} files beside it")
    paths = [index.parent / file for file in sorted(set(weight_map.values()))]
    if missing := [path.name for path in paths if not path.is_file()]:
        raise FileNotFoundError(f"{index} lists {missing[0]}, which is not there; download the folder again")
    return paths, set(weight_map)
