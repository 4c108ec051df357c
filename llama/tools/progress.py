"""Progress bars on stderr, by tqdm where it is installed."""

from __future__ import annotations

import sys
from types import TracebackType
from typing import Any

try:
    from tqdm import tqdm
except ImportError:  # an extra of the tools; without it there are no bars
    tqdm = None

_TERMINAL_S = 0.2  # from the start to the first update, and between two of them, on a terminal
_PLAIN_S = 10.0  # likewise for lines elsewhere, such as in a log file


class Progress:
    """Shows how much of a run is done, its speed and the time left. A context manager.

    Without tqdm it shows nothing.

    Args:
        label: start of the line.
        total: units of the whole run.
        unit: what is counted; bytes ("B") are shown in kB, MB or GB.
        done: units that an earlier run did.
        quiet: shows nothing.
    """

    def __init__(self, label: str, total: int, *, unit: str = "B", done: int = 0, quiet: bool = False) -> None:
        self._bar: Any = None
        if tqdm is not None and not quiet:
            interval = _TERMINAL_S if sys.stderr.isatty() else _PLAIN_S
            self._bar = tqdm(
                desc=label,
                total=total,
                initial=done,
                unit=unit,
                unit_scale=unit == "B",
                smoothing=0,  # the mean speed, by which the time left does not jump
                mininterval=interval,
                delay=interval,  # a short run, or an error at its start, shows no bar
                dynamic_ncols=True,
            )

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.close()

    def add(self, n: int = 1, note: str = "") -> None:
        """Counts `n` units as done. A note, such as another speed, is shown at the end of the line."""
        if self._bar is not None:
            if note:
                self._bar.set_postfix_str(note, refresh=False)
            self._bar.update(n)
