"""From the rounds' figures to a report: medians of each engine, ratios of ours to each peer; tables, JSON, a picture.

A ratio is taken within a round, in which the engines took turns, and always says how many times as good ours is: for
seconds and bytes it is the peer's figure over ours.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.job import ENGINES, OURS

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Rounds = Sequence[dict[str, dict[str, float]]]  # [round][engine][figure]
_LESS_IS_BETTER = ("load", "first_token", "ragged_first_token", "peak_memory", "sampling")
_SCALES = {"GiB": 2.0**30, "GB/s": 1e9, "GFLOP/s": 1e9, "ms": 1e-3, "%": 0.01}
_UNITS = {  # by the first word of a figure's name
    **dict.fromkeys(("load", "first", "ragged"), "s"),
    **dict.fromkeys(("prefill", "decode"), "tok/s"),
    **dict.fromkeys(("peak", "memory"), "GiB"),
    "sampling": "ms",
    "matmul": "GFLOP/s",
    "share": "%",
}
_PLOTTED = {
    "decode_1": "decode, batch 1",
    "decode_8": "decode, batch 8",
    "prefill_128": "prefill, 128 tokens",
    "ragged_first_token": "first tokens of a ragged batch of 8",
    "peak_memory": "peak memory",
}
_LEGEND = """\
ours_...      this library: max_batch_1 in a build for a single row, int8 and int4 with quantize=, compiled with
              compile=True
published     a ragged batch as Meta's published code steps it, with plain layers
machine       its memory and arithmetic
load          from the start of building or opening the network; imports are not counted
first_token   from there to the first token of a prompt of 16
ragged_...    first tokens of 8 prompts of 8 to 256 tokens
memory_...    before: resident with everything imported; planned: what Llama.build counts on
peak_memory   resident, with libraries and mapped files
share_of_...  of the median step, of plain reading in turn with it, of the best matrix product\
"""


@dataclass(frozen=True)
class Line:
    """One figure over the rounds.

    Attributes:
        figure: its name, such as "decode_8".
        engine: whose it is; for a ratio "OURS/PEER", such as "ours_int8/llama_cpp_q8_0".
        unit: of values; "x" for a ratio.
        values: one per round, in that unit.
    """

    figure: str
    engine: str
    unit: str
    values: list[float]

    @property
    def median(self) -> float:
        return statistics.median(self.values)


def unit_of(figure: str) -> str:
    if figure in ("read_file", "read_bandwidth"):
        return "s" if figure == "read_file" else "GB/s"
    return "x" if figure.endswith("_ratio") else _UNITS[figure.split("_")[0]]


def engine_lines(rounds: Rounds) -> list[Line]:
    """Every figure of every engine."""
    return [
        Line(figure, engine, unit_of(figure), [value / _SCALES.get(unit_of(figure), 1) for value in values])
        for engine, figure, values in _collect(rounds)
    ]


def ratio_lines(rounds: Rounds) -> list[Line]:
    """How many times as good ours is, for every figure that a peer has too, and our other builds than the default."""
    lines = []
    for peer, figure, _ in _collect(rounds):
        for ours in _compared_with(peer) if figure != "memory_before" else ():
            pairs = [
                (r[ours][figure], r[peer][figure]) for r in rounds if _has(r, ours, figure) and _has(r, peer, figure)
            ]
            less = figure.startswith(_LESS_IS_BETTER)
            if pairs:
                lines.append(Line(figure, f"{ours}/{peer}", "x", [b / a if less else a / b for a, b in pairs]))
    return lines


def _compared_with(peer: str) -> list[str]:
    """Our builds; those with quantized weights are compared with the default build and with other quantized engines."""
    if peer in OURS:
        return [ours for ours in OURS if ours != "ours"] if peer == "ours" else []
    quantized_peer = peer in ENGINES and ENGINES[peer].quantized
    return [ours for ours, spec in OURS.items() if quantized_peer or not spec.quantized]


def _collect(rounds: Rounds) -> list[tuple[str, str, list[float]]]:
    """(engine, figure, values over the rounds), in order of first appearance."""
    keys = dict.fromkeys((engine, figure) for r in rounds for engine in r for figure in r[engine])
    return [(engine, figure, [r[engine][figure] for r in rounds if _has(r, engine, figure)]) for engine, figure in keys]


def _has(one_round: dict[str, dict[str, float]], engine: str, figure: str) -> bool:
    return figure in one_round.get(engine, {})


def json_lines(lines: Sequence[Line], context: dict[str, Any]) -> str:
    """One object per line, each complete with the run's `context`: shape, dtype, machine, versions."""
    objects = [
        {**asdict(line), "min": min(line.values), "median": line.median, "max": max(line.values), **context}
        for line in lines
    ]
    return "".join(json.dumps(fields) + "\n" for fields in objects)


def page(title: str, versions: dict[str, str], lines: Sequence[Line], ratios: Sequence[Line]) -> str:
    """The whole report as text."""
    head = [title, *(f"{engine}: {version}" for engine, version in versions.items())]
    return "\n".join([*head, "", table(lines), "", ratio_table(ratios), "", _unsteady(lines), _LEGEND])


def _unsteady(lines: Sequence[Line]) -> str:
    """The figures that differed most between the rounds: medians hide it."""
    moved = [line for line in lines if max(line.values) > 1.5 * min(line.values)]
    ranges = [f"{line.engine} {line.figure} {number(min(line.values))} to {number(max(line.values))}" for line in moved]
    return "\n".join(["differed by half or more between rounds: " + ("none" if not ranges else ""), *ranges, ""])


def table(lines: Sequence[Line]) -> str:
    """One row per figure, one column per engine: medians."""
    engines = list(dict.fromkeys(line.engine for line in lines))
    found = {(line.figure, line.engine): line for line in lines}
    rows = [["median", "unit", *engines]]
    for figure in dict.fromkeys(line.figure for line in lines):
        cells = [found.get((figure, engine)) for engine in engines]
        rows.append([figure, unit_of(figure), *("" if cell is None else number(cell.median) for cell in cells)])
    return _aligned(rows)


def ratio_table(lines: Sequence[Line]) -> str:
    """One row per ratio: min, median and max over the rounds."""
    rows = [["times as good, in each round", "", "min", "median", "max"]]
    rows += [
        [line.engine, line.figure, *map(number, (min(line.values), line.median, max(line.values)))] for line in lines
    ]
    return _aligned(rows)


def number(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.2f}"


def _aligned(rows: list[list[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join(
            cell.ljust(w) if i < 2 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]
    return "\n".join(line.rstrip() for line in lines)


def shown(figure: str, value: float) -> str:
    """A single value as the tables show it."""
    unit = unit_of(figure)
    return f"{number(value / _SCALES.get(unit, 1))} {unit}"


def plot(lines: Sequence[Line], versions: dict[str, str], title: str, path: Path) -> None:
    """Writes a picture in the format of the file's ending: one panel per figure, one bar per engine. Needs matplotlib.

    Error bars are the range over the rounds. Engines with quantized weights are marked as such.
    """
    from matplotlib.figure import Figure

    labels = {
        engine: f"{engine}, {version[-4:]}"
        for engine, version in versions.items()
        if version.endswith(("int8", "int4"))
    }
    figures = [figure for figure in _PLOTTED if any(line.figure == figure for line in lines)]
    picture = Figure(figsize=(3.2 * len(figures), 3.6))
    panels = picture.subplots(1, len(figures), squeeze=False)
    for axes, figure in zip(panels[0], figures, strict=True):
        _panel(axes, [line for line in lines if line.figure == figure], _PLOTTED[figure], labels)
    picture.suptitle(title, fontsize=9)
    picture.tight_layout()
    picture.savefig(path, dpi=150)


def _panel(axes: Axes, lines: Sequence[Line], title: str, labels: dict[str, str]) -> None:
    names = [labels.get(line.engine, line.engine) for line in lines]
    medians = [line.median for line in lines]
    below = [line.median - min(line.values) for line in lines]
    above = [max(line.values) - line.median for line in lines]
    colors = ["tab:blue" if line.engine in OURS else "tab:gray" for line in lines]
    bars = axes.bar(names, medians, width=0.7, yerr=(below, above), color=colors, capsize=3)
    axes.bar_label(bars, labels=[number(median) for median in medians], fontsize=8, padding=2)
    axes.set_title(title, fontsize=9)
    axes.set_ylabel(lines[0].unit, fontsize=8)
    axes.set_xticks(range(len(names)), names, rotation=35, ha="right", fontsize=8)
    axes.set_xlim(-0.6, max(len(names), 2) - 0.4)
    axes.margins(y=0.15)
