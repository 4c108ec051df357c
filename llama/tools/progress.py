"""Progress bars on stderr, by tqdm where it is installed, and what a command wrote."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from llama.checkpoint.writing import staged_folder
from llama.errors import printable

try:
    from tqdm import tqdm
except ImportError:  # an extra of the tools; without it there are no bars
    tqdm = None

_TERMINAL_S = 0.2  # from the start to the first update, and between two of them, on a terminal
_PLAIN_S = 10.0  # likewise for lines elsewhere, such as in a log file


@contextmanager
def showing(
    label: str, total: int, *, unit: str = "B", done: int = 0, quiet: bool = False
) -> Iterator[Callable[..., None]]:
    """Shows how much of a run is done, its speed and the time left; without tqdm, nothing.

    Yields a function that counts units as done. Its second argument, such as another speed, is shown after them.

    Args:
        unit: what is counted; bytes ("B") are shown in kB, MB or GB.
        done: units that an earlier run did.
    """
    if tqdm is None or quiet:
        yield lambda n, note="": None
        return
    interval = _TERMINAL_S if sys.stderr.isatty() else _PLAIN_S
    with tqdm(
        desc=label,
        total=total,
        initial=done,
        unit=unit,
        unit_scale=unit == "B",
        smoothing=0,  # the mean speed, by which the time left does not jump
        mininterval=interval,
        delay=interval,  # a short run, or an error at its start, shows no bar
        dynamic_ncols=True,
    ) as bar:

        def add(n: int, note: str = "") -> None:
            bar.set_postfix_str(note, refresh=False)
            bar.update(n)

        yield add


@contextmanager
def writing(
    label: str, output_dir: str | Path, n_bytes: int, *, n_passes: int = 2, quiet: bool
) -> Iterator[tuple[Path, Callable[..., None]]]:
    """Yields a `staged_folder` and what counts bytes as written; prints what was written, and in what time.

    Args:
        n_passes: number of times that each byte counts: 2 if its checksum is computed too.
    """
    started = time.monotonic()
    with staged_folder(output_dir, n_bytes) as folder, showing(label, n_passes * n_bytes, quiet=quiet) as add:
        yield folder, add
    if not quiet:
        sizes = [path.stat().st_size for path in Path(output_dir).iterdir()]
        unit, size = ("GiB", 2**30) if sum(sizes) >= 2**30 else ("MiB", 2**20)
        amount, seconds = f"{sum(sizes) / size:.1f} {unit}", time.monotonic() - started
        print(f"wrote {len(sizes)} files, {amount}, to {printable(output_dir, 1000)} in {seconds:.0f} s")
