"""The errors that callers handle, and the quoting of values in messages.

A quoted value is one line of printable characters of bounded length. It can come from an untrusted file or request: a
tensor's name may contain terminal escape sequences, and a key in `params.json` may be a gigabyte long.
"""

from __future__ import annotations

import json
import re
import reprlib
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

LIMIT = 80  # maximum number of characters of a value that a message shows
_MAX_JSON_BYTES = 4 * 1024**2  # some 60 times the index of a published 70B model's tensors
_LFS = b"version https://git-lfs"
_short = reprlib.Repr()
_short.maxtuple = _short.maxlist = 8
_short.maxstring = _short.maxother = _short.maxlong = LIMIT


class PromptError(ValueError, AssertionError):
    """An invalid prompt or argument. It is an AssertionError too, because Meta's package raises that."""


class RankError(RuntimeError):
    """Another rank failed, ended, did not respond in time, or made a different call."""


class NonFiniteLogitsError(ArithmeticError):
    """The network computed logits that are NaN or infinite."""

    def __init__(self, where: str) -> None:
        super().__init__(
            f"logits must be finite numbers, got NaN or infinity {where}: a weight is damaged, or a value exceeds the "
            "range of the dtype; try dtype bfloat16 or float32, and check the files with: llama verify"
        )


def missing_extra(extra: str, error: ImportError) -> ImportError:
    """Return the error that names an extra which is not installed, and how to install its packages."""
    try:
        lines = metadata.requires("llama-reference") or []
    except metadata.PackageNotFoundError:  # a clone that is not installed
        lines = []
    packages = [line.partition(";")[0].strip() for line in lines if re.search(rf"extra == ['\"]{extra}['\"]", line)]
    install = " ".join(f"'{package}'" for package in packages) or f"-e '.[{extra}]'"
    return ImportError(f"the extra [{extra}] must be installed, got: {error}; run: pip install {install}")


def quote(value: object) -> str:
    """`repr(value)`, shortened and escaped."""
    if isinstance(value, str):
        return repr(value) if len(value) <= LIMIT else f"{value[:LIMIT]!r}... ({len(value)} characters)"
    try:
        return printable(_short.repr(value))
    except ValueError:  # Python refuses to print an int of thousands of digits
        return f"a {type(value).__name__} too large to show"


def printable(text: object, limit: int = LIMIT) -> str:
    """The first `limit` characters of `str(text)`, without quotes, non-printable ones escaped as in `repr`."""
    whole = str(text)
    shown = whole if len(whole) <= limit else whole[:limit] + "..."
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in shown)


def first_few(names: Sequence[str], n: int = 3) -> str:
    """The first names of a list, and how many more there are."""
    more = f" and {len(names) - n} more" if len(names) > n else ""
    return ", ".join(names[:n]) + more


def first_line(error: Exception) -> str:
    """The first line of an error's message, or the name of its type if that is empty."""
    lines = str(error).splitlines() or [type(error).__name__]
    return printable(lines[0], limit=200)


def check_link(path: Path) -> None:
    """Raises FileNotFoundError if there is a symbolic link at `path` that leads nowhere."""
    if path.is_symlink() and not path.exists():
        raise FileNotFoundError(f"{path} must be a file, got a link to {path.readlink()}, which does not exist")


def check_not_pointer(path: Path) -> None:
    """Raises ValueError if a file, which must exist, is Git LFS's placeholder for a file that was not downloaded."""
    with path.open("rb") as file:
        if file.read(len(_LFS)) == _LFS:
            raise ValueError(
                f"{path} must be the file itself, got a Git LFS pointer to it; run git lfs pull in its folder"
            )


def read_json_object(path: Path, max_bytes: int = _MAX_JSON_BYTES) -> dict[str, Any]:
    """The content of a JSON file that holds an object.

    Raises:
        ValueError: it does not, or has more bytes than any such file of a model; the message names the file.
    """
    if (n_bytes := path.stat().st_size) > max_bytes:
        raise ValueError(f"{path} must have at most {max_bytes} bytes, got {n_bytes}; download it again")
    check_not_pointer(path)
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))  # with a byte order mark or without
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} must be JSON, got an error: {first_line(error)}; download it again") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold a JSON object, got {type(content).__name__}; download it again")
    return content
