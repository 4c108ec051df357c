"""How a measuring process tells its figures to the one that started it: a JSON line each, as soon as it is known.

Standard library only: every engine's environment imports it.
"""

from __future__ import annotations

import json


def emit(name: str, value: float | str) -> None:
    """Prints one figure, in SI units: seconds, bytes, tokens or bytes a second."""
    print(json.dumps({"figure": name, "value": value}), flush=True)


def parse(line: str) -> tuple[str, float | str] | None:
    """The figure of a line; None if an engine printed something else."""
    try:
        fields = json.loads(line)
        return fields["figure"], fields["value"]
    except (ValueError, KeyError, TypeError):
        return None
