"""A folder that is complete or absent: written beside its place under another name, then renamed."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

GB = 10**9


@contextmanager
def staged_folder(output_dir: str | Path, n_bytes: int) -> Iterator[Path]:
    """Yields a folder to write into, which becomes `output_dir` when the block ends, or is removed if it raises.

    The folder is beside `output_dir`, so that renaming it copies nothing. A process that is killed leaves it behind;
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
    check_space(target.parent, n_bytes - _size(staged))
    target.parent.mkdir(parents=True, exist_ok=True)
    lock = _claim(staged)
    try:
        yield staged
        _flush(staged)
        staged.rename(target)
        _flush_entry(target.parent)
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


def check_space(folder: Path, n_bytes: int) -> None:
    """Raises OSError if the disk of `folder`, which need not exist yet, has less than `n_bytes` free."""
    there = next(parent for parent in (folder, *folder.parents) if parent.exists())
    free = shutil.disk_usage(there).free
    if free < n_bytes:
        raise OSError(f"the disk of {folder} must have {n_bytes / GB:.2f} GB free, got {free / GB:.2f} GB")


def _claim(staged: Path) -> int:
    """Makes an empty folder and locks it until this process ends or closes the returned descriptor."""
    if staged.is_dir() and not staged.is_symlink():
        leftover = _lock(staged)
        shutil.rmtree(staged)
        os.close(leftover)
    staged.mkdir()
    return _lock(staged)


def _lock(folder: Path) -> int:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(descriptor)
        if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
            raise FileExistsError(f"another run is writing {folder}; wait until it ends") from error
        raise
    return descriptor


def _size(folder: Path) -> int:
    return sum(512 * path.lstat().st_blocks for path in folder.rglob("*")) if folder.is_dir() else 0


def _flush(folder: Path) -> None:
    """Waits until everything in the folder is on the disk, which the rename must not precede."""
    for path in sorted(folder.rglob("*")):
        _flush_entry(path)
    _flush_entry(folder)


def _flush_entry(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
