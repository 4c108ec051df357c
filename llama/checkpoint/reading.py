"""Lists a checkpoint's files, maps them into memory, and refuses those that are damaged or not the network's."""

from __future__ import annotations

import ctypes
import mmap
import os
import pickle
import re
import shlex
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from llama.checkpoint.archive import ArchiveError, check_pickles, read_entries
from llama.checkpoint.format import QUANTIZE, is_known_extra, is_repeated, read_params, stored_dtypes, tensor_shapes
from llama.errors import check_link, check_not_pointer, first_few, first_line, printable, quote
from llama.model import ModelArgs

_BLOCK = 16 * 1024**2  # numbers counted at a time
Fault = tuple[str, str]  # its kind, and the tensor that has it
_SHARD_NAME = re.compile(r"consolidated\.\d+\.pth")


def list_shards(ckpt_dir: str | Path, *, argument: str = "ckpt_dir") -> list[Path]:
    """The checkpoint's files, however many there are, in rank order; errors call the folder `argument`.

    Raises:
        AssertionError: there are none (see `find_shards`).
        FileNotFoundError: one is a link that leads nowhere.
        ValueError: `ckpt_dir` is not a path.
    """
    if not isinstance(ckpt_dir, (str, os.PathLike)):
        raise ValueError(f"{argument} must be the path of a folder, got {quote(ckpt_dir)}")
    if not (shards := _shards_in(Path(ckpt_dir))):
        raise AssertionError(f"no checkpoint files found in {ckpt_dir}\n{_elsewhere(Path(ckpt_dir), argument)}")
    for path in shards:
        check_link(path)
    return shards


def _shards_in(folder: Path) -> list[Path]:
    found = folder.glob("*.pth")
    return sorted(path for path in found if not path.name.startswith(".") and not path.is_dir())


def _elsewhere(folder: Path, argument: str) -> str:
    """What to do about a folder without checkpoint files."""
    must = f"{argument} must be the folder that holds params.json and consolidated.00.pth"
    if not folder.is_dir():
        return f"{must}, got a path where there is none"
    if any((folder / "original").glob("*.pth")):
        return f"{must}, which is {folder / 'original'}"
    if (folder / "config.json").is_file():
        return (
            f"{must}, got a Hugging Face folder; convert it with "
            f"llama convert from_hf --hf_dir {shlex.quote(str(folder))} --output_dir NEW_FOLDER"
        )
    return must


def find_shards(ckpt_dir: str | Path, model_parallel_size: int) -> list[Path]:
    """The checkpoint's files, in rank order.

    Raises:
        AssertionError: there are none, or not `model_parallel_size` of them (raised, so that `python -O` keeps it;
            the first lines are documented to users word for word).
    """
    shards = list_shards(ckpt_dir)
    if len(shards) != model_parallel_size:
        raise AssertionError(
            f"Loading a checkpoint for MP={len(shards)} but world size is {model_parallel_size}\n{_start_with(shards)}"
        )
    return shards


def _start_with(shards: list[Path]) -> str:
    """How to start a program for these files, or which of them do not belong to the checkpoint."""
    names = [path.name for path in shards]
    if odd := [name for name in names if _SHARD_NAME.fullmatch(name) is None]:
        released = [name for name in names if name not in odd]
        return (
            f"every *.pth file in the folder counts: {first_few(list(map(printable, names)), 8)}; "
            f"{first_few(list(map(quote, odd)))} {'is' if len(odd) == 1 else 'are'} not named consolidated.NN.pth: "
            + (f"if the checkpoint is the other {len(released)}, move the rest elsewhere" if released else "is it one?")
        )
    return f"start the program with torchrun --nproc_per_node {len(shards)}, one process per file, or use llama reshard"


def find_tokenizer(ckpt_dir: str | Path) -> Path:
    """Where a checkpoint's `tokenizer.model` is: in its folder or, where `download.sh` puts it, in the parent folder.

    If there is none, the folder's `tokenizer.json`; if there is none either, the path of a `tokenizer.model` in the
    folder, for the error of whoever opens it.
    """
    own, above = Path(ckpt_dir) / "tokenizer.model", Path(ckpt_dir).resolve().parent / "tokenizer.model"
    places = [own, above, Path(ckpt_dir) / "tokenizer.json"]
    return next((path for path in places if path.is_file()), own)


def model_args(
    ckpt_dir: str | Path,
    n_words: int,
    *,
    max_batch_size: int,
    max_seq_len: int,
    tokenizer_path: str | Path | None = None,
) -> ModelArgs:
    """The network that `params.json` describes, with a tokenizer of `n_words` tokens and a run's cache sizes.

    The embedding may have more rows than there are tokens.

    Raises:
        ValueError: a value of the file is wrong, or its `vocab_size` is below the tokenizer's, or a file of the
            checkpoint is cut short or there twice.
    """
    shards = _shards_in(Path(ckpt_dir))
    first = read_shard(shards[0]) if shards else {}
    args = network_args(ckpt_dir, first, n_words)
    if args.vocab_size < n_words:
        tokenizer = "the tokenizer" if tokenizer_path is None else f"the tokenizer {tokenizer_path}"
        raise ValueError(
            f"{Path(ckpt_dir) / 'params.json'}: vocab_size must be at least the tokenizer's number of pieces, got "
            f"{args.vocab_size} where {tokenizer} has {n_words} pieces and added tokens; "
            "give the tokenizer.model that this checkpoint was trained with"
        )
    check_distinct(shards)
    return ModelArgs.of(replace(args, max_batch_size=max_batch_size, max_seq_len=max_seq_len))


def network_args(ckpt_dir: str | Path, state: Mapping[str, Tensor], n_words: int = 0) -> ModelArgs:
    """What params.json describes; a `vocab_size` of -1 becomes the rows of the embedding in `state`, or `n_words`."""
    path = Path(ckpt_dir) / "params.json"
    params = read_params(ckpt_dir)
    params.pop(QUANTIZE, None)
    try:
        args = ModelArgs.of(ModelArgs(**params))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    if args.vocab_size == -1:
        embedding = state.get("tok_embeddings.weight")
        args.vocab_size = (embedding.size(0) if embedding is not None and embedding.dim() == 2 else 0) or n_words
        if not args.vocab_size:
            raise ValueError(f"{path}: vocab_size must be given where there is no 2-D tok_embeddings.weight, got -1")
    return args


def check_distinct(shards: Iterable[Path]) -> None:
    """Raises ValueError if a file is a copy of another, which would give two ranks the same part of the weights.

    Copies are equal in the names, sizes and checksums of their records. Files without checksums are not compared. Only
    the ends of the files are read, so that all ranks find the one that is cut short, before anything is planned.
    """
    known: dict[object, Path] = {}
    for path in shards:
        _check_regular(path)
        try:
            entries = read_entries(path)
        except ArchiveError as error:
            raise _unreadable(path, error) from error
        content = tuple((entry.filename, entry.file_size, entry.CRC) for entry in entries)
        has_checksums = max(entries, key=lambda entry: entry.file_size).CRC
        if has_checksums and (other := known.setdefault(content, path)) is not path:
            raise ValueError(
                f"{path} must hold its own rank's part of the weights, got a copy of {other.name}; download it again"
            )


def load_shard(path: Path, args: ModelArgs, model_parallel_size: int, quantize: str | None = None) -> dict[str, Tensor]:
    """The tensors of one file, checked to be exactly those that `args` describes.

    The file is memory-mapped: the tensors are views of the page cache, in the file's dtype, read when first used.
    `quantize` is the checkpoint's `stored_quantize`.

    Raises:
        ValueError: the file is damaged or holds other objects than tensors; a tensor is missing, unknown or mis-shaped.
    """
    state, shapes = read_shard(path), tensor_shapes(args, model_parallel_size, quantize)
    if faults := tensor_faults(path, state, shapes, {}):
        raise ValueError(faults[0])
    return {name: tensor for name, tensor in state.items() if name in shapes}


def read_shard(path: Path) -> dict[str, Tensor]:
    """The flat name -> tensor dict of one file, memory-mapped on the CPU. Nothing but tensors is unpickled.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is damaged, or holds other objects than tensors.
    """
    _check_regular(path)
    try:
        check_pickles(path)
        with path.open("rb") as file:
            is_utf8 = not any("\ud800" <= character <= "\udfff" for character in str(path))
            name = path if is_utf8 else f"/dev/fd/{file.fileno()}"  # torch takes no other path
            state = torch.load(name, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError as error:
        raise ValueError(  # torch's own words advise to load without `weights_only`, which runs code of the file
            f"{path} must hold tensors alone, got other objects, which are not loaded, or damage; compare its checksum"
        ) from error
    except Exception as error:  # torch raises errors of many kinds over a damaged file
        raise _unreadable(path, error) from error
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise ValueError(f"{path} must hold a flat dict of tensors, as released checkpoint files do")
    return state


def _check_regular(path: Path) -> None:
    if path.exists() and not path.is_file():
        raise ValueError(f"{path} must be a regular file, got a folder, pipe or device")
    check_not_pointer(path)


def _unreadable(path: Path, error: Exception) -> ValueError:
    return ValueError(f"{path} cannot be read ({first_line(error)}); is it cut short? Compare its checksum")


def tensor_faults(
    path: Path,
    state: Mapping[str, Tensor],
    shapes: Mapping[str, tuple[int, ...]],
    sound: dict[str, Tensor],
    fault_of_values: Callable[[str, Tensor], Fault | None] = lambda name, tensor: None,
    *,
    described_by: str = "params.json",
) -> list[str]:
    """What keeps the tensors of `path` from being those of `shapes`: a line per kind of fault, with the first names.

    Args:
        sound: tensors of the checkpoint's other files, which must agree in dtypes and in what every file repeats; those
            of this file are added.
        fault_of_values: called with each tensor that has no other fault.
    """
    faults: defaultdict[str, list[str]] = defaultdict(list)
    for name in shapes:
        if name not in state:
            faults[f"must hold the tensors that {described_by} describes, but lacks"].append(name)
    for name, tensor in state.items():
        if name not in shapes:
            if not is_known_extra(name):
                faults["must hold no other tensors than the network's, but has"].append(printable(name))
        elif fault := _fault(name, tensor, shapes, sound) or fault_of_values(name, tensor):
            faults[fault[0]].append(fault[1])
    return [f"{path} {kind} {first_few(what)}" for kind, what in faults.items()]


def _fault(name: str, tensor: Tensor, shapes: Mapping[str, tuple[int, ...]], sound: dict[str, Tensor]) -> Fault | None:
    dtypes, shape = stored_dtypes(name, shapes), tuple(tensor.shape)
    if shape != shapes[name]:
        return "must have the shapes of its configuration, got", f"{name} of {quote(shape)}, not {shapes[name]}"
    if tensor.dtype not in dtypes or tensor.layout != torch.strided or tensor.is_meta:
        taken = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        return f"must hold dense tensors of {taken}, got", f"{name} ({tensor.dtype}, {tensor.layout}, {tensor.device})"
    other = sound.setdefault(name, tensor)
    if tensor.dtype != other.dtype:
        return "must have the dtypes of the other files, got", f"{name} of {tensor.dtype} for {other.dtype}"
    if other is not tensor and is_repeated(name) and not same_bits(tensor, other):
        return "must repeat the values of the other files, but differs in", name
    return None


def same_bits(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors of one dtype hold the same bytes; a NaN equals itself here."""
    if one.shape != other.shape:
        return False
    return torch.equal(*(tensor.contiguous().view(-1).view(torch.uint8) for tensor in (one, other)))


def count_not_finite(tensor: Tensor) -> int:
    """How many values of a tensor are NaN or infinite."""
    low, high = torch.aminmax(tensor)  # reads at the memory's speed, and NaN anywhere gives NaN
    if torch.isfinite(low) and torch.isfinite(high):
        return 0
    rows = max(1, _BLOCK // tensor[0].numel())
    return sum(int((~torch.isfinite(part)).sum()) for part in torch.split(tensor, rows))


def magnitude(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """The largest absolute value, for `check_range`: NaN if there is one, and 0 if `dtype` has no smaller range."""
    if not tensor.is_floating_point() or torch.finfo(dtype).max >= torch.finfo(tensor.dtype).max:
        return torch.zeros(())
    return torch.stack(torch.aminmax(tensor)).abs().max()  # on the tensor's device, which nothing waits for yet


def check_range(magnitudes: Mapping[str, Tensor], dtype: torch.dtype) -> None:
    """Raises ValueError, with name and value, if a finite one of these becomes infinite in `dtype`."""
    for name, largest in magnitudes.items():
        if torch.isfinite(largest) and torch.isinf(largest.to(dtype)):
            what = str(dtype).removeprefix("torch.")
            raise ValueError(
                f"{name} must have values within {what}'s range, got {largest.item():g}; use dtype bfloat16 or float32"
            )


def release_pages(tensor: Tensor) -> None:
    """Gives back the memory of a tensor of a mapped file, which is read again when it is used."""
    start = -(-tensor.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
    storage = tensor.untyped_storage()  # smaller than the tensor, if that repeats a value
    end = min(tensor.data_ptr() + tensor.nbytes, storage.data_ptr() + storage.nbytes())
    end = end // mmap.PAGESIZE * mmap.PAGESIZE
    if end > start:  # whole pages only: those at the ends hold parts of other tensors
        ctypes.CDLL(None).madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), mmap.MADV_DONTNEED)
