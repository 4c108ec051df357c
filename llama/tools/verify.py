"""Whether a checkpoint folder is complete and sound: `llama verify --ckpt_dir llama-2-7b`.

Compares checksums with `checklist.chk`, and every tensor with what `params.json` describes. Only reads.
"""

from __future__ import annotations

import re
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from llama.checkpoint.format import is_known_extra, is_repeated, stored_dtypes, stored_quantize, tensor_shapes
from llama.checkpoint.reading import (
    check_distinct,
    count_not_finite,
    list_shards,
    network_args,
    page_release,
    read_shard,
)
from llama.checkpoint.releases import find_release
from llama.checkpoint.sharded import same_bits
from llama.checkpoint.writing import CHECKLIST, md5_of
from llama.errors import first_few, printable, quote
from llama.tokenizer import Tokenizer
from llama.tools.commandline import run
from llama.tools.progress import Progress

TOKENIZER_CHECKLIST = "tokenizer_checklist.chk"
_LINE = re.compile(r"([0-9a-fA-F]{32})\s+\*?(?:\./)?(\S.*)")  # as md5sum writes it; * marks binary mode
_MAC_LINE = re.compile(r"MD5 \((.+)\) = ([0-9a-fA-F]{32})")  # as macOS's md5 writes it
_SHOWN = 5  # tensors of one kind of problem that are named
_MAX_LINE = 4000  # characters of a problem that are printed


@dataclass
class Findings:
    """The result: problems, one line each, and notes on what could not be compared."""

    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def verify(ckpt_dir: str | Path, *, tokenizer_path: str | Path | None = None, quiet: bool = False) -> Findings:
    """Checks a checkpoint folder, reading every file once or twice, one tensor in memory at a time.

    Args:
        ckpt_dir: folder of params.json and consolidated.NN.pth.
        tokenizer_path: its tokenizer.model; by default that in ckpt_dir or, as downloaded, in the folder above.
        quiet: shows no progress.

    Raises:
        AssertionError: the folder holds no checkpoint files.
    """
    folder, found = Path(ckpt_dir), Findings()
    shards = list_shards(folder)
    tokenizer = _find_tokenizer(folder, tokenizer_path)
    listed: dict[Path, str] = {}
    if (folder / CHECKLIST).is_file():
        listed |= _read_checklist(folder / CHECKLIST, found, {"params.json", *(path.name for path in shards)})
    else:
        found.notes.append(f"checksums were not compared: there is no {CHECKLIST} in {folder}")
    if tokenizer is not None and (tokenizer.parent / TOKENIZER_CHECKLIST).is_file():
        listed |= _read_checklist(tokenizer.parent / TOKENIZER_CHECKLIST, found, {tokenizer.name})
    n_bytes = sum(path.stat().st_size for path in [*listed, *shards])
    with Progress("verify", n_bytes, quiet=quiet) as progress:
        for path, checksum in listed.items():
            _check_sum(path, checksum, found, progress)
        n_words = _check_tokenizer(tokenizer, found)
        _check_shards(folder, shards, n_words, found, progress)
    return found


def _read_checklist(path: Path, found: Findings, required: set[str]) -> dict[Path, str]:
    """The files that a list of checksums names, all of them there, with their MD5 sums.

    Args:
        required: names of files that it must list.
    """
    listed: dict[Path, str] = {}
    unlisted = set(required)
    for number, line in enumerate(path.read_text(errors="replace").splitlines(), start=1):
        if not line.strip():
            continue
        matched = _LINE.fullmatch(line.strip())
        if swapped := _MAC_LINE.fullmatch(line.strip()):
            matched = _LINE.fullmatch(f"{swapped[2]}  {swapped[1]}")
        unlisted -= {matched[2]} if matched else set()
        if matched is None:
            found.problems.append(f"{path}: line {number} must be an MD5 sum and a file name")
        elif matched[2] == ".." or Path(matched[2]).name != matched[2]:
            found.problems.append(f"{path}: line {number} must name a file beside it, got {quote(matched[2])}")
        elif not (path.parent / matched[2]).is_file():
            found.problems.append(f"{path.parent / printable(matched[2])} is missing, which {path.name} lists")
        else:
            listed[path.parent / matched[2]] = matched[1].lower()
    if unlisted:
        found.problems.append(
            f"{path} must list every file, but lacks {first_few(sorted(unlisted), _SHOWN)}; download it again"
        )
    return listed


def _check_sum(path: Path, expected: str, found: Findings, progress: Progress) -> None:
    if (got := md5_of(path, progress.add)) != expected:
        found.problems.append(f"{path} must have the listed MD5 sum {expected}, got {got}; download it again")


def _find_tokenizer(folder: Path, tokenizer_path: str | Path | None) -> Path | None:
    if tokenizer_path is not None:
        return Path(tokenizer_path)
    places = [folder / "tokenizer.model", folder.resolve().parent / "tokenizer.model"]
    return next((place for place in places if place.is_file()), None)


def _check_tokenizer(path: Path | None, found: Findings) -> int | None:
    """The tokenizer's number of pieces, if there is one."""
    if path is None:
        found.notes.append("the vocabulary was not compared: no tokenizer.model was found; give tokenizer_path")
        return None
    try:
        return Tokenizer(path).n_words
    except (ValueError, OSError) as error:
        found.problems.append(str(error))
        return None


def _check_shards(folder: Path, shards: list[Path], n_words: int | None, found: Findings, progress: Progress) -> None:
    """Checks every file's tensors. The first readable file gives the number of parts and what all files repeat."""
    if [path.name for path in shards] != (names := [f"consolidated.{rank:02d}.pth" for rank in range(len(shards))]):
        there = [path.name for path in shards]
        found.problems.append(f"{folder} must hold {first_few(names, _SHOWN)}, got {first_few(there, _SHOWN)}")
    try:
        check_distinct(shards)
    except ValueError as error:
        found.problems.append(str(error))
    shapes: dict[str, tuple[int, ...]] | None = None
    first: dict[str, Tensor] = {}
    for path in shards:
        try:
            state = read_shard(path)
        except (ValueError, OSError) as error:
            found.problems.append(str(error))
            continue
        try:
            shapes = shapes or _expected_shapes(folder, state, len(shards), n_words, found)
        except (ValueError, OSError) as error:
            found.problems.append(str(error))
            return
        for kind, names in _faults(path, state, shapes, first, progress).items():
            found.problems.append(f"{path}: {kind}: {first_few(names, _SHOWN)}")


def _expected_shapes(
    folder: Path, state: dict[str, Tensor], n_files: int, n_words: int | None, found: Findings
) -> dict[str, tuple[int, ...]]:
    """The shapes of every file's tensors by params.json and the number of parts, which `state`, one file's, tells.

    Raises:
        ValueError: params.json is wrong.
    """
    embedding = state.get("tok_embeddings.weight")
    columns = embedding.size(1) if embedding is not None and embedding.dim() == 2 else 0
    args = network_args(folder, state)
    parts = args.dim // columns if columns and args.dim % columns == 0 else n_files
    args.check_shards(parts)
    if parts != n_files:
        found.problems.append(f"{folder} must hold the {parts} files that the tensors are split over, got {n_files}")
    release = find_release(args)
    if release is not None and release[1].model_parallel_size != parts:
        name, published = release
        found.notes.append(
            f"{name} was published in {published.model_parallel_size} files; this one is split over {parts}"
        )
    if n_words is not None and args.vocab_size < n_words:
        found.problems.append(
            f"{folder}: the vocabulary must be at least the tokenizer's {n_words} tokens, got {args.vocab_size}"
        )
    return tensor_shapes(args, parts, stored_quantize(folder))


def _faults(
    path: Path,
    state: dict[str, Tensor],
    shapes: dict[str, tuple[int, ...]],
    first: dict[str, Tensor],
    progress: Progress,
) -> dict[str, list[str]]:
    """The faults of one file's tensors: for each kind, the tensors that have it.

    Args:
        first: the first file's tensors, those that are split without values; filled by the first call.
    """
    faults: defaultdict[str, list[str]] = defaultdict(list)
    faults["missing"] = [name for name in shapes if name not in state]
    release = page_release(path)
    for name, tensor in state.items():
        if name in shapes:
            fault = _fault(name, tensor, shapes[name], stored_dtypes(name, shapes), first)
            if fault is None:
                release(tensor)
            else:
                faults[fault[0]].append(fault[1])
        elif not is_known_extra(name):
            faults["not in the network"].append(printable(name))
        progress.add(tensor.numel() * tensor.element_size())
    return {kind: names for kind, names in faults.items() if names}


def _fault(
    name: str, tensor: Tensor, shape: tuple[int, ...], dtypes: tuple[torch.dtype, ...], first: dict[str, Tensor]
) -> tuple[str, str] | None:
    """The kind of the fault of a tensor and a description, or None."""
    if tuple(tensor.shape) != shape:
        return "wrong shape", f"{name} must be {shape} by params.json, got {quote(tuple(tensor.shape))}"
    if tensor.dtype not in dtypes or tensor.layout != torch.strided or tensor.is_meta:
        return f"not a dense tensor of {', '.join(str(dtype).removeprefix('torch.') for dtype in dtypes)}", name
    if n_bad := count_not_finite(tensor):
        return "NaN or infinite values", f"{name} has {n_bad}"
    known = first.setdefault(name, tensor.clone() if is_repeated(name) else tensor.to("meta"))
    if known.dtype != tensor.dtype:
        return "another dtype than in the first file", f"{name} is {tensor.dtype}, there {known.dtype}"
    if not known.is_meta and not same_bits(known, tensor):
        return "not the values of the first file, which every file must repeat", name
    return None


def main(ckpt_dir: str, *, tokenizer_path: str | None = None, quiet: bool = False) -> int:
    """Checks a checkpoint folder and prints the problems, one per line; the exit status is then 1.

    Args:
        ckpt_dir: folder of params.json and consolidated.NN.pth.
        tokenizer_path: its tokenizer.model; by default the one in ckpt_dir or in its parent folder.
        quiet: shows no progress.
    """
    found = verify(ckpt_dir, tokenizer_path=tokenizer_path, quiet=quiet)
    for line in [*found.problems, *(f"note: {note}" for note in found.notes)]:
        print(printable(line, _MAX_LINE))
    if not found.problems:
        print(f"ok: {printable(ckpt_dir, _MAX_LINE)}, {len(list_shards(ckpt_dir))} files")
    return int(bool(found.problems))


if __name__ == "__main__":
    run(main, n_threads=1, name="llama verify")
