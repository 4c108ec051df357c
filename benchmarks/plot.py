"""The report's lines as bars: one panel a figure, one bar an engine, the range over the rounds on top.

Needs matplotlib.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.report import OURS, Line, number

TITLES = {
    "decode_1": "decode, batch 1",
    "decode_8": "decode, batch 8",
    "prefill_128": "prefill, 128 tokens",
    "ragged_first_token": "first tokens of a ragged batch of 8",
    "peak_memory": "peak memory",
}


def plot(lines: Sequence[Line], versions: dict[str, str], title: str, path: Path) -> None:
    """Writes the picture, in the format that the file's ending names. int8 weights are marked as such."""
    labels = {engine: f"{engine}, int8" for engine, version in versions.items() if version.endswith("int8")}
    figures = [figure for figure in TITLES if any(line.figure == figure for line in lines)]
    picture = Figure(figsize=(3.2 * len(figures), 3.6))
    panels = picture.subplots(1, len(figures), squeeze=False)
    for axes, figure in zip(panels[0], figures, strict=True):
        _panel(axes, [line for line in lines if line.figure == figure], TITLES[figure], labels)
    picture.suptitle(title, fontsize=9)
    picture.tight_layout()
    picture.savefig(path, dpi=150)


def _panel(axes: Axes, lines: Sequence[Line], title: str, labels: dict[str, str]) -> None:
    names = [labels.get(line.engine, line.engine) for line in lines]
    medians = [line.median for line in lines]
    below = [line.median - min(line.values) for line in lines]
    above = [max(line.values) - line.median for line in lines]
    colors = ["tab:blue" if name in OURS else "tab:gray" for name in names]
    bars = axes.bar(names, medians, width=0.7, yerr=(below, above), color=colors, capsize=3)
    axes.bar_label(bars, labels=[number(median) for median in medians], fontsize=8, padding=2)
    axes.set_title(title, fontsize=9)
    axes.set_ylabel(lines[0].unit, fontsize=8)
    axes.set_xticks(range(len(names)), names, rotation=35, ha="right", fontsize=8)
    axes.set_xlim(-0.6, max(len(names), 2) - 0.4)
    axes.margins(y=0.15)
