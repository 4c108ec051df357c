"""Whether a checkpoint folder is complete and sound: `llama verify --ckpt_dir llama-2-7b`.

Compares checksums with `checklist.chk`, and every tensor with what `params.json` describes. Only reads.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from llama.checkpoint import reading
from llama.checkpoint.format import stored_quantize, tensor_shapes
from llama.checkpoint.releases import find_release
from llama.checkpoint.writing import CHECKLIST, md5_of
from llama.errors import first_few, printable, quote
from llama.tokenizer import Tokenizer
from llama.tools.commandline import run, with_flags_of
from llama.tools.progress import showing

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

    @contextmanager
    def take_error(self) -> Iterator[None]:
        """Makes the error of a file that cannot be read a problem."""
        try:
            yield
        except (ValueError, OSError) as error:
            self.problems.append(str(error))


def verify(ckpt_dir: str | Path, *, tokenizer_path: str | Path | None = None, quiet: bool = False) -> Findings:
    """Checks a checkpoint folder, reading every file once or twice, one tensor in memory at a time.

    Args:
        ckpt_dir: folder of params.json and consolidated.NN.pth.
        tokenizer_path: its tokenizer.model; by default that in ckpt_dir or, as downloaded, in the folder above.
        quiet: shows no progress.
    """
    folder, found = Path(ckpt_dir), Findings()
    shards = reading.list_shards(folder)
    tokenizer = reading.find_tokenizer(folder) if tokenizer_path is None else Path(tokenizer_path)
    has_tokenizer = tokenizer_path is not None or (tokenizer.is_file() and tokenizer.suffix == ".model")
    checklists = {folder / CHECKLIST: {"params.json", *(path.name for path in shards)}}
    if not (folder / CHECKLIST).is_file():
        found.notes.append(f"checksums were not compared: there is no {CHECKLIST} in {folder}")
    if has_tokenizer:
        checklists[tokenizer.parent / TOKENIZER_CHECKLIST] = {tokenizer.name}
    listed: dict[Path, str] = {}
    for path, required in checklists.items():
        if path.is_file():
            listed |= _read_checklist(path, found, required)
    n_bytes = sum(path.stat().st_size for path in [*listed, *shards])
    with showing("verify", n_bytes, quiet=quiet) as add:
        for path, expected in listed.items():
            if (got := md5_of(path, add)) != expected:
                found.problems.append(f"{path} must have the listed MD5 sum {expected}, got {got}; download it again")
        n_words = 0
        if not has_tokenizer:
            found.notes.append("the vocabulary was not compared: no tokenizer.model was found; give tokenizer_path")
        else:
            with found.take_error():
                n_words = Tokenizer(tokenizer).n_words
        _check_shards(folder, shards, n_words, found, add)
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
        matched = _LINE.fullmatch(_MAC_LINE.sub(r"\2  \1", line.strip()))
        if matched is None:
            found.problems.append(f"{path}: line {number} must be an MD5 sum and a file name")
            continue
        md5, name = matched.groups()
        unlisted.discard(name)
        if name == ".." or Path(name).name != name:
            found.problems.append(f"{path}: line {number} must name a file beside it, got {quote(name)}")
        elif not (path.parent / name).is_file():
            found.problems.append(f"{path.parent / printable(name)} is missing, which {path.name} lists")
        else:
            listed[path.parent / name] = md5.lower()
    if unlisted:
        found.problems.append(
            f"{path} must list every file, but lacks {first_few(sorted(unlisted), _SHOWN)}; download it again"
        )
    return listed


def _check_shards(folder: Path, shards: list[Path], n_words: int, found: Findings, add: Callable[[int], None]) -> None:
    """Checks every file's tensors. The first readable file gives the number of parts and what all files repeat."""
    there, names = [path.name for path in shards], [f"consolidated.{rank:02d}.pth" for rank in range(len(shards))]
    if there != names:
        found.problems.append(f"{folder} must hold {first_few(names, _SHOWN)}, got {first_few(there, _SHOWN)}")
    states: dict[Path, dict[str, Tensor]] = {}  # mapped
    for path in shards:
        with found.take_error():
            states[path] = reading.read_shard(path)
    with found.take_error():
        reading.check_distinct(states)
    if not states:
        return
    with found.take_error():
        shapes = _expected_shapes(folder, next(iter(states.values())), len(shards), n_words, found)
        sound: dict[str, Tensor] = {}
        for path, state in states.items():
            fault_of_values = partial(_fault_of_values, add)
            found.problems += reading.tensor_faults(path, state, shapes, sound, fault_of_values)


def _fault_of_values(add: Callable[[int], None], name: str, tensor: Tensor) -> reading.Fault | None:
    n_bad = reading.count_not_finite(tensor)
    reading.release_pages(tensor)
    add(tensor.nbytes)
    return ("must hold finite numbers, got NaN or infinite values in", f"{name} ({n_bad})") if n_bad else None


def _expected_shapes(
    folder: Path, state: dict[str, Tensor], n_files: int, n_words: int, found: Findings
) -> dict[str, tuple[int, ...]]:
    """The shapes of every file's tensors by params.json and the number of parts, which `state`, one file's, tells.

    Raises:
        ValueError: params.json is wrong.
    """
    embedding = state.get("tok_embeddings.weight")
    columns = embedding.size(1) if embedding is not None and embedding.dim() == 2 else 0
    args = reading.network_args(folder, state)
    parts = args.dim // columns if columns and args.dim % columns == 0 else n_files
    args.check_shards(parts)
    if parts != n_files:
        found.problems.append(f"{folder} must hold the {parts} files that the tensors are split over, got {n_files}")
    name, release = find_release(args) or ("", None)
    if release is not None and release.model_parallel_size != parts:
        published = release.model_parallel_size
        found.notes.append(f"{name} was published in {published} files; this one is split over {parts}")
    if args.vocab_size < n_words:
        found.problems.append(
            f"{folder}: the vocabulary must be at least the tokenizer's {n_words} tokens, got {args.vocab_size}"
        )
    return tensor_shapes(args, parts, stored_quantize(folder))


@partial(with_flags_of, verify)
def main(ckpt_dir: str, **options: Any) -> int:
    """Checks a checkpoint folder and prints the problems, one per line; the exit status is then 1.

    Args:
        ckpt_dir: folder of params.json and consolidated.NN.pth.
    """
    found = verify(ckpt_dir, **options)
    for line in [*found.problems, *(f"note: {note}" for note in found.notes)]:
        print(printable(line, _MAX_LINE))
    if not found.problems:
        print(f"ok: {printable(ckpt_dir, _MAX_LINE)}, {len(reading.list_shards(ckpt_dir))} files")
    return int(bool(found.problems))


if __name__ == "__main__":
    run(main, n_threads=1, name="llama verify")
