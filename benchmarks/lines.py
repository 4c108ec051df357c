"""What a measuring process and the one that started it tell each other.

One names a turn, the other answers with its figures, a JSON line each as soon as it is known, and says when it is over.

Standard library only: every engine's environment imports it.
"""

from __future__ import annotations

import json

_OVER = json.dumps({"turn": "over"})


def emit(name: str, value: float | str) -> None:
    """Prints one figure, in SI units: seconds, bytes, tokens or bytes a second."""
    print(json.dumps({"figure": name, "value": value}), flush=True)


def emit_over() -> None:
    """Says that the turn's figures are all there."""
    print(_OVER, flush=True)


def is_over(line: str) -> bool:
    return line.strip() == _OVER


def parse(line: str) -> tuple[str, float | str] | None:
    """The figure of a line; None if an engine printed something else."""
    try:
        fields = json.loads(line)
        return fields["figure"], fields["value"]
    except (ValueError, KeyError, TypeError):
        return None
