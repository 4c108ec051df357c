"""From the rounds' figures to a report: medians of each engine, ratios of ours to each peer; tables, JSON, a picture.

A ratio is taken within a round, in which the engines took turns, and always says how many times as good ours is: for
seconds and bytes it is the peer's figure over ours.
"""

from __future__ import annotations

import json
import platform
import re
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.peers import ENGINES

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Round = dict[str, dict[str, float]]  # engine -> figure -> value
_UNITS = {  # by a figure's first word
    **{"load": "s", "first": "s", "prefill": "tok/s", "decode": "tok/s", "peak": "GiB"},
    **{"tokens": "", "rate": "tok/s", "between": "s"},
}
_LESS_IS_BETTER = ("load", "first_token", "peak_memory")
_FORMS = {name: engine.form for name, engine in ENGINES.items()}  # of the weights
_FORMS |= {"limit": "", "limit_int8": "int8", "limit_int4": "int4"}


@dataclass(frozen=True)
class Line:
    """One figure over the rounds, such as "decode_8"; `engine` is "OURS/PEER" and `unit` "x" for a ratio."""

    figure: str
    engine: str
    unit: str
    values: list[float]

    @property
    def median(self) -> float:
        return statistics.median(self.values)


def engine_lines(rounds: Sequence[Round]) -> list[Line]:
    """Every figure of every engine."""
    return [
        Line(figure, engine, unit_of(figure), [r[engine][figure] for r in rounds if figure in r.get(engine, {})])
        for engine, figure in _names(rounds)
    ]


def ratio_lines(rounds: Sequence[Round]) -> list[Line]:
    """How many times as good each of our builds is as our default one, and as others with the same form of weights."""
    lines = []
    for other, figure in _names(rounds):
        for ours in (name for name in ENGINES if name.startswith("ours") and name != other):
            if other != "ours" and (other.startswith("ours") or _FORMS[ours] != _FORMS[other]):
                continue
            both = [r for r in rounds if figure in r.get(ours, {}) and figure in r.get(other, {})]
            pairs = [(r[ours][figure], r[other][figure]) for r in both]
            less = figure in _LESS_IS_BETTER
            if pairs:
                lines.append(Line(figure, f"{ours}/{other}", "x", [b / a if less else a / b for a, b in pairs]))
    return lines


def _names(rounds: Sequence[Round]) -> list[tuple[str, str]]:
    """(engine, figure) in order of first appearance."""
    return list(dict.fromkeys((engine, figure) for r in rounds for engine in r for figure in r[engine]))


def unit_of(figure: str) -> str:
    return _UNITS[figure.split("_")[0]]


def shown(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.2f}" if value >= 1 else f"{value:.3f}"


def json_lines(lines: Sequence[Line], context: dict[str, Any]) -> str:
    """One object per line, each complete with the run's `context`: shape, dtype, machine, versions."""
    objects = (asdict(line) | {"median": line.median} | context for line in lines)
    return "".join(json.dumps(fields) + "\n" for fields in objects)


def page(lines: Sequence[Line], ratios: Sequence[Line]) -> str:
    """The tables as text: medians in a row per engine and a column per figure, ratios, and what was unsteady."""
    figures = list(dict.fromkeys(line.figure for line in lines))
    medians = {(line.engine, line.figure): shown(line.median) for line in lines}
    table = [["median", *figures], ["", *map(unit_of, figures)]]
    for engine in dict.fromkeys(line.engine for line in lines):
        table.append([engine, *(medians.get((engine, figure), "") for figure in figures)])
    compared = [["times as good, in each round", "", "median, range"]]
    compared += [[line.engine, line.figure, spread(line.values)] for line in ratios]
    moved = [line for line in lines if max(line.values) > 1.5 * min(line.values)]
    spans = [f"{line.engine} {line.figure} {spread(line.values)}" for line in moved]
    unsteady = ["differed by half or more between rounds: " + "none" * (not spans), *spans]
    return "\n".join([*_aligned(table), "", *_aligned(compared), "", *unsteady])


def _aligned(rows: list[list[str]]) -> Iterator[str]:
    """The rows with their first column to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for first, *others in rows:
        cells = [cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True)]
        yield "  ".join([first.ljust(widths[0]), *cells]).rstrip()


def spread(values: Sequence[float], digits: int = 2) -> str:
    """Values over the rounds as "MEDIAN (MIN to MAX)"."""
    return f"{statistics.median(values):.{digits}f} ({min(values):.{digits}f} to {max(values):.{digits}f})"


def in_turn(names: Sequence[str], round_: int) -> list[str]:
    """The names in the order of a round, each of which begins with another one."""
    first = round_ % len(names)
    return [*names[first:], *names[:first]]


def cpu_model() -> str:
    """The processor's name, and on x86 its family and model: names of virtual machines leave out which one it is."""
    info = Path("/proc/cpuinfo")
    text = info.read_text(encoding="utf-8") if info.exists() else ""
    fields = dict(reversed(re.findall(r"^(cpu family|model|model name)\s*: (.*)$", text, re.MULTILINE)))
    kind = f" (family {fields['cpu family']}, model {fields['model']})" if "cpu family" in fields else ""
    return fields.get("model name", platform.processor() or platform.machine()) + kind


def plot(readings: str, path: Path) -> None:
    """Draws `json_lines`: each engine's tokens per second at batch 1 against the memory's limit of its form of weights.

    One panel per machine and network. Needs matplotlib.
    """
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    panels: dict[tuple[str, str], list[Line]] = {}
    for fields in map(json.loads, readings.splitlines()):
        if fields["figure"] == "decode_1" and fields["unit"] != "x":
            where = fields["machine"].get("gpu", fields["machine"]["cpu"])
            line = Line("decode_1", fields["engine"], fields["unit"], fields["values"])
            panels.setdefault((f"{fields['shape']}, {where}", fields["dtype"]), []).append(line)
    with rc_context({"svg.hashsalt": "llama", "svg.fonttype": "none"}):  # the same readings, the same file
        picture = Figure(figsize=(max(6.0, 0.6 * sum(map(len, panels.values()))), 4.2))
        sizes = [len(lines) for lines in panels.values()]
        axes = picture.subplots(1, len(panels), squeeze=False, width_ratios=sizes)[0]
        for each, ((title, dtype), lines) in zip(axes, panels.items(), strict=True):
            _panel(each, lines, dtype)
            each.set_title(title, fontsize=9)
        axes[0].set_ylabel("tokens per second, one sequence")
        picture.tight_layout()
        picture.savefig(path, dpi=150, metadata={"Date": None} if path.suffix == ".svg" else None)


def _panel(axes: Axes, lines: Sequence[Line], dtype: str) -> None:
    """A group of bars per form of weights, with a band for the limit's range and a line for its median."""
    limits = {_FORMS[line.engine]: line for line in lines if "limit" in line.engine}
    engines = [line for line in lines if "limit" not in line.engine]
    names: list[str] = []
    for form in dict.fromkeys(_FORMS[line.engine] for line in engines):
        group = sorted((line for line in engines if _FORMS[line.engine] == form), key=lambda line: line.median)
        places = [len(names) + i for i in range(len(group))]
        names += [line.engine for line in group]
        if form in limits:
            left, right, limit = places[0] - 0.45, places[-1] + 0.45, limits[form]
            axes.fill_between(
                [left, right], min(limit.values), max(limit.values), color="tab:orange", alpha=0.2, linewidth=0
            )
            axes.hlines(limit.median, left, right, color="tab:orange")
            axes.annotate(f"{form or dtype}: memory's limit", (left, max(limit.values)), fontsize=7, va="bottom")
        medians = [line.median for line in group]
        colors = ["tab:blue" if line.engine.startswith("ours") else "tab:gray" for line in group]
        low, high = ([abs(line.median - end(line.values)) for line in group] for end in (min, max))
        bars = axes.bar(places, medians, width=0.7, yerr=(low, high), color=colors, capsize=2, alpha=0.85)
        axes.bar_label(bars, labels=[f"{median:.0f}" for median in medians], fontsize=7)
    axes.set_xticks(range(len(names)), names, rotation=40, ha="right", fontsize=7)
