"""The progress of a long run over many bytes, on stderr."""

from __future__ import annotations

import sys
import time
from types import TracebackType

GB = 10**9
_TERMINAL_S = 0.2  # between two updates of the line on a terminal
_PLAIN_S = 5.0  # between two lines elsewhere


class Progress:
    """Shows bytes done, speed and time left: one line that is updated on a terminal, a line every 5 s elsewhere.

    A context manager; at its end a last line gives the total.

    Args:
        label: start of the line.
        total: number of bytes of the whole run.
        quiet: shows nothing.
    """

    def __init__(self, label: str, total: int, *, quiet: bool = False) -> None:
        self._label, self._total, self._quiet = label, total, quiet
        self._done = 0
        self._terminal = sys.stderr.isatty()
        self._started = self._shown = time.monotonic()

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._terminal and self._shown > self._started:
            print(file=sys.stderr)
        if error is None and not self._quiet:
            seconds = time.monotonic() - self._started
            print(f"{self._label}: {self._done / GB:.2f} GB in {_duration(seconds)}", file=sys.stderr)

    def add(self, n_bytes: int) -> None:
        """Counts `n_bytes` as done."""
        self._done += n_bytes
        now = time.monotonic()
        if not self._quiet and now - self._shown >= (_TERMINAL_S if self._terminal else _PLAIN_S):
            self._show(now)

    def _show(self, now: float) -> None:
        self._shown = now
        start, end = ("\r\033[K", "") if self._terminal else ("", "\n")
        print(f"{start}{self.line(now - self._started)}", end=end, file=sys.stderr, flush=True)

    def line(self, seconds: float) -> str:
        """The line after `seconds`, such as "reshard: 1.10 of 2.20 GB (50%), 0.55 GB/s, 2 s left"."""
        speed = self._done / max(seconds, 1e-9)
        share = 100 * self._done // max(self._total, 1)
        left = f", {_duration((self._total - self._done) / speed)} left" if speed else ""
        return (
            f"{self._label}: {self._done / GB:.2f} of {self._total / GB:.2f} GB ({share}%), {speed / GB:.2f} GB/s{left}"
        )


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes:02d} min"
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"
