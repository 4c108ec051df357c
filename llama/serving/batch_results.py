"""The file of results of a batch, and the requests that have results in it."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from llama.errors import quote
from llama.serving.batch_file import read_requests

try:
    import fcntl
except ImportError:  # not a POSIX system: two runs at the same time are not detected there
    fcntl = None  # type: ignore[assignment]

_SYNC_S = 5.0  # between two times that the results are forced onto the disk


class Results:
    """The file of results, one per line, to which results are added. No other process may have it open.

    Attributes:
        n_lines: number of requests in the input.
        pending: numbers of its lines that have no result, each with its `custom_id`.
        fingerprints: of the runs that wrote results, each with the number of its first line in the output.
    """

    def __init__(self, path: Path) -> None:
        self.n_lines = 0
        self.pending: dict[int, str | None] = {}
        self.fingerprints: dict[str, int] = {}
        self._path = path
        is_new = not path.exists()
        self._file = open(path, "a+b")  # noqa: SIM115 (`close` closes it)
        try:
            _lock(self._file.fileno(), path)
        except BaseException:
            self._file.close()
            raise
        self._size = self._file.seek(0, os.SEEK_END)
        self._synced = time.monotonic()
        if is_new and os.name == "posix":
            folder = os.open(path.parent, os.O_RDONLY)
            os.fsync(folder)
            os.close(folder)

    def read(self) -> Iterator[tuple[int, dict[str, Any]]]:
        """The results in the file, with the numbers of their lines. Removes a last line that was not written whole."""
        self._file.seek(0)
        for number, raw in enumerate(self._file, start=1):
            is_cut = not raw.endswith(b"\n")
            try:
                fields = json.loads(raw)
                if not isinstance(fields, dict) or not isinstance(fields.get("id"), str):
                    raise ValueError("not a result")
            except (ValueError, RecursionError) as error:
                if is_cut and raw.startswith(b"{"):
                    self._file.truncate(self._size - len(raw))
                    break
                raise ValueError(
                    f"{self._path}, line {number}: each line must be a result of this command, got "
                    f"{quote(raw.decode(errors='replace'))}; use another --output, or remove the line"
                ) from error
            if is_cut:  # by its newline alone
                self._file.write(b"\n")
            yield number, fields
        self._size = self._file.seek(0, os.SEEK_END)

    def compare(self, input: Path) -> None:
        """Finds the requests that have results: sets `n_lines`, `pending` and `fingerprints`.

        Raises:
            ValueError: two requests have the same `custom_id`, or a result belongs to no request of the input.
        """
        numbers: dict[str, int] = {}
        ids: dict[str, int] = {}
        for line in read_requests(input):
            ids[line.result_id] = line.number
            self.pending[line.number] = line.custom_id
            if line.custom_id is not None and numbers.setdefault(line.custom_id, line.number) != line.number:
                raise ValueError(
                    f"{input}: line {line.number} must have a custom_id of its own, got {quote(line.custom_id)}, which "
                    f"line {numbers[line.custom_id]} has too"
                )
        self.n_lines = len(self.pending)
        for number, fields in self.read():
            request, custom_id = ids.get(fields["id"]), fields.get("custom_id")
            if request is None:
                was = numbers.get(custom_id) if isinstance(custom_id, str) else None
                now = f"line {was} of the input has another request now" if was else "the input has no such request"
                raise ValueError(
                    f"--output must be a new file, or the results of the same --input, got {self._path}, whose line "
                    f"{number} is the result of custom_id {quote(custom_id)}: {now}"
                )
            if request not in self.pending:
                got = f"custom_id {quote(custom_id)} must have one result, got two"
                raise ValueError(f"{self._path}, line {number}: {got}")
            del self.pending[request]
            try:
                self.fingerprints.setdefault(fields["response"]["body"]["system_fingerprint"], number)
            except (KeyError, TypeError):  # an error, which does not depend on the network
                continue

    def append(self, line: bytes) -> None:
        """Adds a line. It is in the file on return, and on the disk within `_SYNC_S` of the next line."""
        try:
            self._file.write(line)
            self._file.flush()
            if time.monotonic() - self._synced > _SYNC_S:
                self._sync()
        except OSError as error:
            raise OSError(
                error.errno,
                f"{self._path} could not be written ({error.strerror}); its whole lines are kept: make room, and start "
                "the command again, which continues where this run stopped",
            ) from error
        self._size += len(line)

    def check(self) -> None:
        """Raises ValueError unless the path still leads to this file, with all that was written to it."""
        size = os.fstat(self._file.fileno()).st_size
        if not self._path.exists() or not os.path.samestat(os.stat(self._path), os.fstat(self._file.fileno())):
            problem = "which was removed or replaced"
        elif size != self._size:
            problem = f"which has {size} bytes instead of {self._size}"
        else:
            return
        raise ValueError(
            f"--output must not change while the command runs, got {self._path}, {problem}; start the command again "
            "to run the requests whose results are gone"
        )

    def close(self) -> None:
        try:
            self._sync()
        finally:
            self._file.close()

    def _sync(self) -> None:
        os.fsync(self._file.fileno())
        self._synced = time.monotonic()


def _lock(fd: int, path: Path) -> None:
    """Locks the file until this process ends; without effect on a file system without locks."""
    if fcntl is None:
        return
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise ValueError(
            f"--output must be a file that no other process is writing, got {path}; wait for the other process to end"
        ) from error
    except OSError:
        return
