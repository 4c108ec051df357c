"""Plans the passes of a prefill: prompts of similar lengths share a pass, and long ones are split into chunks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from llama.engine.cuda_graphs import MAX_WIDTH


@dataclass(frozen=True)
class PrefillPass:
    """One pass of a prefill.

    Attributes:
        places: indices of the pass's prompts, in ascending order.
        start, end: the range of positions that the pass computes; beyond the end of a shorter prompt it is padding.
    """

    places: list[int]
    start: int
    end: int


def plan_prefill(
    lengths: Sequence[int], max_positions: int, pass_cost: int, chunk: int | None = None
) -> list[PrefillPass]:
    """Plans the passes that prefill prompts.

    Args:
        lengths: number of tokens of each prompt.
        max_positions: maximum number of positions per pass, including padding; a pass of one prompt may exceed it.
        pass_cost: fixed cost of a pass, in positions.
        chunk: maximum number of positions per pass, with longer prompts split into several passes; None to never
            split.
    """
    passes = []
    for group in prefill_groups(lengths, min(max_positions, chunk or max_positions), pass_cost):
        longest = max(lengths[i] for i in group)
        start = 0
        while start < longest:
            end = min(longest, start + (chunk or longest))
            # A decode step between two passes may write padding to a row's last positions: see `StaticStepper`.
            end = longest if longest - end <= MAX_WIDTH else end
            passes.append(PrefillPass(group, start, end))
            start = end
    return passes


def prefill_groups(lengths: Sequence[int], max_positions: int, pass_cost: int) -> list[list[int]]:
    """Groups prompts by length so that the total cost of padding and passes is minimal.

    Args:
        lengths: number of tokens of each prompt.
        max_positions: maximum number of positions per pass, including padding; a pass of one prompt may exceed it.
        pass_cost: fixed cost of a pass, in positions.

    Returns:
        The indices of each group's prompts, in ascending order.
    """
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    best: list[tuple[int, int]] = [(0, 0)]  # for the first n prompts in order: minimum cost, start of the last group
    for end in range(1, len(order) + 1):
        costs = []
        for start in range(end):
            positions = lengths[order[start]] * (end - start)
            if positions <= max_positions or end - start == 1:
                costs.append((best[start][0] + positions + pass_cost, start))
        best.append(min(costs))
    groups: list[list[int]] = []
    end = len(order)
    while end:
        start = best[end][1]
        groups.append(sorted(order[start:end]))
        end = start
    return groups[::-1]
