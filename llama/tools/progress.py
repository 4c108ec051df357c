"""Progress bars on stderr, by tqdm where it is installed, and what a command wrote."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from llama.checkpoint.writing import staged_folder
from llama.errors import printable

try:
    from tqdm import tqdm
except ImportError:  # an extra of the tools; without it there are no bars
    tqdm = None

_TERMINAL_S = 0.2  # from the start to the first update, and between two of them, on a terminal
_PLAIN_S = 10.0  # likewise for lines elsewhere, such as in a log file


class Progress(ExitStack):
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
        super().__init__()
        self._bar: Any = None
        if tqdm is not None and not quiet:
            interval = _TERMINAL_S if sys.stderr.isatty() else _PLAIN_S
            bar = tqdm(
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
            self._bar = self.enter_context(bar)

    def add(self, n: int = 1, note: str = "") -> None:
        """Counts `n` units as done. A note, such as another speed, is shown at the end of the line."""
        if self._bar is not None:
            if note:
                self._bar.set_postfix_str(note, refresh=False)
            self._bar.update(n)


@contextmanager
def writing(
    label: str, output_dir: str | Path, n_bytes: int, *, n_passes: int = 2, quiet: bool
) -> Iterator[tuple[Path, Progress]]:
    """Yields a `staged_folder` and its progress; prints what was written, and in what time.

    Args:
        n_passes: number of times that each byte counts: 2 if its checksum is computed too.
    """
    started = time.monotonic()
    with staged_folder(output_dir, n_bytes) as folder, Progress(label, n_passes * n_bytes, quiet=quiet) as progress:
        yield folder, progress
    if not quiet:
        sizes = [path.stat().st_size for path in Path(output_dir).iterdir()]
        unit, size = ("GiB", 2**30) if sum(sizes) >= 2**30 else ("MiB", 2**20)
        amount, seconds = f"{sum(sizes) / size:.1f} {unit}", time.monotonic() - started
        print(f"wrote {len(sizes)} files, {amount}, to {printable(output_dir, 1000)} in {seconds:.0f} s")
