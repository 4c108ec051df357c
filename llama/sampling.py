"""From logits to the next token id.

Knows nothing of prompts, positions or stopping: it sees one step's logits.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

GREEDY_BELOW = 1e-30


@dataclass
class Sampler:
    """How the next tokens of a call are drawn, and the random stream they are drawn from.

    Each step takes the same amount from the stream, whatever rows take part: one exponential a lane and vocabulary
    entry. A row that ends, or that was never there, therefore does not shift the numbers that other rows see.

    Attributes:
        temperature: the logits are divided by it; 0, or so little that they would overflow, takes the likeliest token.
        top_p: above 0, up to 1; the draw is from the smallest set of tokens whose mass exceeds it (nucleus
            sampling; Holtzman et al., 2020).
        n_lanes: number of rows that a full step has.
        generator: the stream, on the logits' device.
        steps: how often the stream was drawn from.
    """

    temperature: float
    top_p: float
    n_lanes: int
    generator: torch.Generator
    steps: int = 0

    def __call__(self, logits: Tensor, lanes: Tensor) -> Tensor:
        """The next token of each row: (bsz,) int64, from logits (bsz, vocab) float32 and each row's lane (bsz,)."""
        if self.temperature < GREEDY_BELOW:
            return logits.argmax(-1)
        probs = torch.softmax(logits / self.temperature, dim=-1)
        return sample_top_p(probs, self.top_p, race=self._race(logits.size(-1))[lanes]).squeeze(-1)

    def skip_to(self, steps: int, vocab_size: int) -> None:
        """Draws, for no row, until as many steps were made."""
        while self.steps < steps:
            self._race(vocab_size)

    def _race(self, vocab_size: int) -> Tensor:
        """One step's exponentials: (n_lanes, vocab_size) float32."""
        self.steps += 1
        race = torch.empty(self.n_lanes, vocab_size, device=self.generator.device)
        return race.exponential_(generator=self.generator)


def sample_top_p(probs: Tensor, p: float, *, race: Tensor | None = None) -> Tensor:
    """Draws from the smallest set of likeliest tokens whose mass exceeds `p`.

    A token stays while the mass before it is at most `p`. The draw is what `torch.multinomial(..., 1)` computes
    inside, without its device sync: each token runs for an exponential time over its probability, the first one wins.

    Args:
        probs: (bsz, vocab) float32.
        p: 0 < p <= 1.
        race: (bsz, vocab) exponentials for the tokens in descending order of probability; None draws them from
            torch's default generator.

    Returns:
        (bsz, 1) int64.
    """
    probs_sort, probs_idx = probs.sort(dim=-1, descending=True)
    mass_before = probs_sort.cumsum(dim=-1) - probs_sort
    probs_sort = probs_sort.masked_fill(mass_before > p, 0.0)
    probs_sort = probs_sort / probs_sort.sum(dim=-1, keepdim=True)
    if race is None:
        race = torch.empty_like(probs_sort).exponential_()
    winner = (probs_sort / race).argmax(dim=-1, keepdim=True)
    return probs_idx.gather(-1, winner)
