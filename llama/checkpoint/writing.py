"""Writes files of tensors one tensor at a time, into a folder that is complete or absent.

A file is laid out in full before the first value is there; then each tensor's bytes go to their place. The folder is
written next to its place under another name, then renamed.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import shutil
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import torch
from torch import Tensor

from llama.checkpoint.archive import checksum_offsets, read_records
from llama.tokenizer import ADDED_TOKENS_FILES

GB = 10**9
CHECKLIST = "checklist.chk"
SIDE_FILES = (
    "tokenizer.model",
    "tokenizer.json",
    *ADDED_TOKENS_FILES,
    "generation_config.json",
    "chat_format.json",
    "chat_template.jinja",
    "chat_template.json",
)
_CHUNK = 1024**2  # bytes per system call; with 64 MiB from a mapped file, Linux 6.18 takes twice the time in all
_READ = 16 * 1024**2  # bytes per read
_FLUSH = 64 * 1024**2  # bytes after which a flush to the disk starts
_SAFETENSORS_DTYPES = {torch.float16: "F16", torch.bfloat16: "BF16", torch.float32: "F32"}


class TensorFile:
    """A laid-out file, open for the values. A context manager.

    Flushes run during the writing, not after it. At most twice `_FLUSH` and a tensor are not on the disk yet, so that
    Ctrl-C ends the program soon.

    Args:
        offsets: start of each tensor's bytes.
        checksum_offsets: places of the CRC-32 of each tensor's bytes, in formats that have one.
    """

    def __init__(
        self, path: Path, offsets: Mapping[str, int], checksum_offsets: Mapping[str, tuple[int, ...]] = {}
    ) -> None:
        self._offsets = offsets
        self._checksum_offsets = checksum_offsets
        self._descriptor = os.open(path, os.O_WRONLY)
        self._flusher = ThreadPoolExecutor(max_workers=1)
        self._flush = self._flusher.submit(os.fsync, self._descriptor)
        self._unflushed = 0  # bytes

    def __enter__(self) -> TensorFile:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._flusher.shutdown()
        os.close(self._descriptor)
        if kind is None:
            self._flush.result()  # raises its error, which the system reports only once

    def write(self, name: str, tensor: Tensor) -> int:
        """Writes a tensor, of the dtype and shape that were laid out; returns its number of bytes."""
        values = tensor.contiguous().view(-1).view(torch.uint8).numpy().data
        stated = self._checksum_offsets.get(name, ())
        done = checksum = 0
        while done < len(values):
            chunk = values[done : done + _CHUNK]
            written = os.pwrite(self._descriptor, chunk, self._offsets[name] + done)
            if stated:
                checksum = zlib.crc32(chunk[:written], checksum)
            done += written
        for offset in stated:
            os.pwrite(self._descriptor, checksum.to_bytes(4, "little"), offset)
        self._unflushed += done
        if self._unflushed >= _FLUSH:
            self._flush.result()
            self._flush = self._flusher.submit(os.fsync, self._descriptor)
            self._unflushed = 0
        return done


def lay_out_pth(path: Path, tensors: dict[str, Tensor]) -> TensorFile:
    """Lays out a file as `torch.save` writes it, for tensors that need no values, such as those on the meta device.

    Raises:
        OSError: the file cannot be written.
    """
    blank = {name: torch.empty(tensor.shape, dtype=tensor.dtype) for name, tensor in tensors.items()}  # no page is used
    try:
        with torch.serialization.skip_data():
            torch.save(blank, path)
    except RuntimeError as error:  # torch's file writer does not say why
        raise OSError(
            f"{path} cannot be written; is the disk full, or the size of files limited (ulimit -f)?"
        ) from error
    # torch numbers the tensors in the order of the dict; what it calls the archive depends on the path
    names = {f"data/{i}": name for i, name in enumerate(tensors)}
    offsets, checksums = {}, {}
    records = read_records(path)
    for record, stated in zip(records, checksum_offsets(path, records), strict=True):
        if (name := names.get(record.name.partition("/")[2])) is not None:
            offsets[name], checksums[name] = record.offset, stated
    return TensorFile(path, offsets, checksums)


def write_shards(
    folder: Path,
    layout: dict[str, Tensor],
    n_files: int,
    values: Iterable[tuple[str, Sequence[Tensor]]],
    progress: Callable[[int], None],
) -> None:
    """Writes a checkpoint's files, and their checklist.

    Args:
        layout: what one file holds, without values.
        values: each tensor's name, and what each file holds of it.
        progress: called with numbers of bytes, twice those of the files in all: written, and read for the checklist.
    """
    with ExitStack() as stack:
        paths = [folder / f"consolidated.{rank:02d}.pth" for rank in range(n_files)]
        files = [stack.enter_context(lay_out_pth(path, layout)) for path in paths]
        for name, parts in values:
            for file, part in zip(files, parts, strict=True):
                progress(file.write(name, part))
    write_checklist(folder, progress)


def lay_out_safetensors(path: Path, tensors: dict[str, Tensor]) -> TensorFile:
    """Lays out a safetensors file for tensors that need no values: a JSON header, its length before it."""
    fields: dict[str, object] = {"__metadata__": {"format": "pt"}}  # transformers requires it
    starts, end = {}, 0
    for name, tensor in tensors.items():
        starts[name], end = end, end + tensor.nbytes
        place = {"shape": list(tensor.shape), "data_offsets": [starts[name], end]}
        fields[name] = {"dtype": _SAFETENSORS_DTYPES[tensor.dtype], **place}
    header = json.dumps(fields).encode()
    header += b" " * (-len(header) % 8)  # values start at a multiple of 8
    with path.open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + end)
    return TensorFile(path, {name: 8 + len(header) + start for name, start in starts.items()})


@contextmanager
def staged_folder(output_dir: str | Path, n_bytes: int) -> Iterator[Path]:
    """Yields a folder to write into, which becomes `output_dir` when the block ends, or is removed if it raises.

    The folder is next to `output_dir`, so that renaming it copies nothing. A process that is killed leaves it behind;
    the next run for the same `output_dir` replaces it.

    Args:
        n_bytes: number of bytes that will be written; compared with the free disk space first.

    Raises:
        FileExistsError: `output_dir` exists and is not an empty folder, or another run is writing it.
        OSError: the disk does not have enough space, or writing fails.
    """
    target = Path(output_dir).resolve()
    check_absent(target)
    staged = target.with_name(f".{target.name}.llama-tools-partial")
    there = next(parent for parent in target.parents if parent.exists())
    free = shutil.disk_usage(there).free + sum(512 * path.lstat().st_blocks for path in staged.glob("*"))
    if free < n_bytes:
        raise OSError(f"the disk of {target.parent} must have {n_bytes / GB:.2f} GB free, got {free / GB:.2f} GB")
    target.parent.mkdir(parents=True, exist_ok=True)
    lock = _claim(staged)
    try:
        yield staged
        _flush(*staged.iterdir(), staged)  # to the disk, which the rename must not precede
        staged.rename(target)
        _flush(target.parent)
    except BaseException:
        shutil.rmtree(staged, ignore_errors=True)
        raise
    finally:
        os.close(lock)


def check_absent(output_dir: str | Path) -> None:
    """Raises FileExistsError unless there is nothing, or an empty folder, at `output_dir`."""
    target = Path(output_dir).resolve()
    if target.is_dir() and os.path.ismount(target):
        raise FileExistsError(f"output_dir must not be a mount point, got {output_dir}; give {target}/model")
    if target.exists() and not (target.is_dir() and not any(target.iterdir())):
        raise FileExistsError(f"output_dir must be a new or an empty folder, got {output_dir}, which exists already")


def copy_side_files(source: Path, folder: Path) -> None:
    """Copies what describes a checkpoint's tokens and chats from one folder to another."""
    for name in SIDE_FILES:
        if (source / name).exists():
            shutil.copyfile(source / name, folder / name)


def write_checklist(folder: Path, progress: Callable[[int], None]) -> None:
    """Lists the MD5 sums of a checkpoint's files in `checklist.chk`, as Meta does; tells `progress` the bytes read."""
    listed = [folder / "params.json", *sorted(folder.glob("*.pth"))]
    lines = [f"{md5_of(path, progress)}  {path.name}\n" for path in listed]
    (folder / CHECKLIST).write_text("".join(lines), encoding="utf-8")


def md5_of(path: Path, progress: Callable[[int], None]) -> str:
    digest = hashlib.md5(usedforsecurity=False)
    with path.open("rb") as file:
        while chunk := file.read(_READ):
            digest.update(chunk)
            progress(len(chunk))
    return digest.hexdigest()


def _claim(staged: Path) -> int:
    """Makes an empty folder and locks it until this process ends or closes the returned descriptor."""
    with suppress(FileExistsError):
        staged.mkdir()
    descriptor = os.open(staged, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(descriptor)
        if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
            raise FileExistsError(f"another run is writing {staged}; wait until it ends") from error
        raise
    for path in staged.iterdir():  # what a killed run left
        path.unlink()
    return descriptor


def _flush(*paths: Path) -> None:
    for path in paths:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
