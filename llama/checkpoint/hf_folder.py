"""A Hugging Face model folder: `config.json`, and weights in one file or several, read one tensor at a time.

Weights are read from safetensors files or, where there are none, from `pytorch_model*.bin`.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llama.checkpoint.format import page_release, read_json_object, read_shard
from llama.checkpoint.writing import SAFETENSORS_DTYPES
from llama.errors import printable, quote

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
        ValueError: a file is damaged or of another format.
        ImportError: there are safetensors files, but no safetensors package.
    """

    def __init__(self, folder: str | Path) -> None:
        if not Path(folder).is_dir():
            raise FileNotFoundError(
                f"hf_dir must be the folder of a downloaded Hugging Face model, got no folder {folder}"
            )
        if not (Path(folder) / "config.json").is_file():
            raise FileNotFoundError(
                f"hf_dir must be the folder of a downloaded Hugging Face model, got no config.json in {folder}"
            )
        self.config = read_json_object(Path(folder) / "config.json")
        self.layout: dict[str, Tensor] = {}
        self._files: dict[str, _SafetensorsFile | _BinFile] = {}  # of each tensor
        paths, listed = _weight_files(Path(folder))
        for path in paths:
            file = _SafetensorsFile(path) if path.suffix == ".safetensors" else _BinFile(path)
            if twice := sorted(self.layout.keys() & file.layout.keys()):
                raise ValueError(f"{path} must not repeat tensors of another file, got {printable(twice[0])}")
            self.layout |= file.layout
            self._files |= dict.fromkeys(file.layout, file)
        if missing := sorted(listed - self.layout.keys()):
            raise ValueError(
                f"{folder}: the files must hold all tensors of the index, got none named {printable(missing[0])}"
            )

    def read(self, name: str) -> Tensor:
        """The tensor `name`, a view of its mapped file."""
        return self._files[name].read(name)


class _SafetensorsFile:
    """A safetensors file. It is opened for each tensor, so that the mapped memory is freed with the tensor."""

    def __init__(self, path: Path) -> None:
        if safetensors is None:
            raise ImportError(
                f"{path} needs the package safetensors, of the extra [convert]; install it with: "
                'pip install -e ".[convert]"'
            )
        self._path = path
        try:
            with safetensors.safe_open(path, "pt") as file:
                slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 (it is no dict)
        except safetensors.SafetensorError as error:
            reason = printable(error, limit=200)
            raise ValueError(f"{path} cannot be read ({reason}); is it cut short? Compare its checksum") from error
        self.layout = {name: self._without_values(name, part) for name, part in slices.items()}

    def read(self, name: str) -> Tensor:
        with safetensors.safe_open(self._path, "pt") as file:
            tensor: Tensor = file.get_tensor(name)
        return tensor

    def _without_values(self, name: str, part: Any) -> Tensor:
        dtype = SAFETENSORS_DTYPES.get(part.get_dtype())
        if dtype is None:
            raise ValueError(
                f"{self._path}: {printable(name)} must have dtype {', '.join(SAFETENSORS_DTYPES)}, "
                f"got {part.get_dtype()}"
            )
        return torch.empty(part.get_shape(), dtype=dtype, device="meta")


class _BinFile:
    """A file that `torch.save` wrote. Before a tensor is read, the memory of the previous one is freed."""

    def __init__(self, path: Path) -> None:
        self._state = read_shard(path)
        self._release: Callable[[Tensor], None] = page_release(path)
        self._last: Tensor | None = None
        for name, tensor in self._state.items():
            if tensor.dtype not in SAFETENSORS_DTYPES.values() or tensor.layout != torch.strided or tensor.is_meta:
                raise ValueError(f"{path}: {printable(name)} must be a dense tensor of {', '.join(SAFETENSORS_DTYPES)}")
        self.layout = {str(name): tensor.to("meta") for name, tensor in self._state.items()}

    def read(self, name: str) -> Tensor:
        if self._last is not None:
            self._release(self._last)
        self._last = self._state[name]
        return self._last


def _weight_files(folder: Path) -> tuple[list[Path], set[str]]:
    """The files of weights, of the first kind found, and the tensors that an index lists."""
    for name in _WEIGHTS:
        if (folder / name).is_file():
            return [folder / name], set()
        if (folder / f"{name}{INDEX_SUFFIX}").is_file():
            return _listed_files(folder / f"{name}{INDEX_SUFFIX}", suffix=Path(name).suffix)
    raise FileNotFoundError(
        f"no weights in {folder}, which must hold {' or '.join(_WEIGHTS)}, or an index of such files"
    )


def _listed_files(index: Path, *, suffix: str) -> tuple[list[Path], set[str]]:
    weight_map = read_json_object(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"{index} must have a weight_map, which names the file of each tensor; download it again")
    for file in weight_map.values():
        if not isinstance(file, str) or Path(file).name != file or "\\" in file or not file.endswith(suffix):
            raise ValueError(f"{index} must list {suffix} files beside it, got {quote(file)}")
    paths = [index.parent / file for file in sorted(set(weight_map.values()))]
    if missing := [path.name for path in paths if not path.is_file()]:
        raise FileNotFoundError(f"{index} lists {printable(missing[0])}, which is missing; download the folder again")
    return paths, set(weight_map)
