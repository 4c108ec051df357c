"""Which prompts go through which pass of a prefill: together where they are of like lengths, long ones in chunks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from llama.stepping import MAX_WIDTH


@dataclass(frozen=True)
class PrefillPass:
    """One pass of a prefill.

    Attributes:
        places: of its prompts, in ascending order.
        start, end: the positions that it computes; those behind a prompt's end are padding.
    """

    places: list[int]
    start: int
    end: int


def plan_prefill(
    lengths: Sequence[int], most_positions: int, pass_cost: int, chunk: int | None = None
) -> list[PrefillPass]:
    """The passes that put prompts into the cache.

    Args:
        lengths: of the prompts.
        most_positions: that a pass may have, padding counted, unless it is of one prompt.
        pass_cost: what each pass costs besides its positions, in positions.
        chunk: most positions of a pass, also of one prompt, which then takes several; None for whole prompts.
    """
    passes = []
    for group in prefill_groups(lengths, min(most_positions, chunk or most_positions), pass_cost):
        longest = max(lengths[i] for i in group)
        start = 0
        while start < longest:
            end = min(longest, start + (chunk or longest))
            # A step that comes between may write padding to the last positions of a row: see `stepping.StaticStepper`.
            end = longest if longest - end <= MAX_WIDTH else end
            passes.append(PrefillPass(group, start, end))
            start = end
    return passes


def prefill_groups(lengths: Sequence[int], most_positions: int, pass_cost: int) -> list[list[int]]:
    """Splits prompts into passes of like lengths, such that padding and passes together cost least.

    Args:
        lengths: of the prompts.
        most_positions: that a pass may have, padding counted, unless it is of one prompt.
        pass_cost: what each pass costs besides its positions, in positions.

    Returns:
        The places of each pass's prompts, in ascending order.
    """
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    best: list[tuple[int, int]] = [(0, 0)]  # for the first n prompts in order: the least cost, the last pass's start
    for end in range(1, len(order) + 1):
        costs = []
        for start in range(end):
            positions = lengths[order[start]] * (end - start)
            if positions <= most_positions or end - start == 1:
                costs.append((best[start][0] + positions + pass_cost, start))
        best.append(min(costs))
    groups: list[list[int]] = []
    end = len(order)
    while end:
        start = best[end][1]
        groups.append(sorted(order[start:end]))
        end = start
    return groups[::-1]
