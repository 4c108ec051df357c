"""From one step's logits to the next token ids."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from typing import cast

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
        top_p: 0 to 1; the draw is from the smallest set of tokens whose mass exceeds it (nucleus
            sampling; Holtzman et al., 2020).
        n_lanes: number of rows that a full step has.
        generator: the stream, on the logits' device.
        draw: replaces `sample_top_p`, and is called as `draw(probs, top_p)`; None for the built-in sampling.
        steps: how often the stream was drawn from.
    """

    temperature: float
    top_p: float
    n_lanes: int
    generator: torch.Generator
    draw: Callable[[Tensor, float], Tensor] | None = None
    steps: int = 0
    # The stream's state before and after the last step.
    _states: tuple[Tensor, Tensor] | None = field(default=None, init=False, repr=False)

    @property
    def is_greedy(self) -> bool:
        """Whether it takes the most likely token, without random numbers."""
        return self.temperature < GREEDY_BELOW

    def __call__(self, logits: Tensor, lanes: Tensor) -> Tensor:
        """The next token of each row: (bsz,) int64, from logits (bsz, vocab) float32 and each row's lane (bsz,)."""
        if self.is_greedy:
            return logits.argmax(-1)
        probs = torch.softmax(logits / self.temperature, dim=-1)
        if self.draw is not None:
            return self.draw(probs, self.top_p).reshape(-1)
        numbers = self._numbers(logits.size(-1))
        if logits.device.type == "cpu":
            return _sample_rows(probs, self.top_p, numbers[lanes])
        return sample_top_p(probs, self.top_p, race=_race(numbers[lanes])).squeeze(-1)

    def skip_to(self, steps: int, vocab_size: int) -> None:
        """Draws, for no row, until as many steps were made."""
        while self.steps < steps:
            self._numbers(vocab_size)

    def step_back(self) -> None:
        """Gives back what the last step took from the stream, unless others have drawn from it since."""
        if self._states is not None:
            before, after = self._states
            if torch.equal(self.generator.get_state(), after):
                self.generator.set_state(before)
                self.steps -= 1
            self._states = None

    def _numbers(self, vocab_size: int) -> Tensor:
        """What one step takes from the stream, (n_lanes, vocab_size): see `_race`."""
        self.steps += 1
        before = self.generator.get_state()
        shape, device = (self.n_lanes, vocab_size), self.generator.device
        if device.type == "cpu" and _exponentials_are_logarithms():
            numbers = torch.empty(shape, dtype=torch.float64).uniform_(generator=self.generator)
        else:
            numbers = torch.empty(shape, device=device).exponential_(generator=self.generator)
        self._states = before, self.generator.get_state()
        return numbers


def _race(numbers: Tensor) -> Tensor:
    """Exponentials, float32, of the numbers taken from the stream.

    Those that are float64 are the uniform numbers that `exponential_` would have taken the logarithm of; it costs more
    than all else in a step's sampling, and only the likeliest tokens need it.
    """
    return -torch.log1p(-numbers).float() if numbers.dtype == torch.float64 else numbers


@cache
def _exponentials_are_logarithms() -> bool:
    """Whether `exponential_` is that on this CPU. On an Intel one, torch leaves it to MKL, which is fast by itself."""
    uniform = torch.empty(256, dtype=torch.float64).uniform_(generator=torch.Generator().manual_seed(0))
    return torch.equal(_race(uniform), torch.empty(256).exponential_(generator=torch.Generator().manual_seed(0)))


def _sample_rows(probs: Tensor, p: float, numbers: Tensor) -> Tensor:
    """`sample_top_p` (bsz,), mostly with no more of a row sorted than can be in the set."""
    tokens = [_sample_row(row, p, mine) for row, mine in zip(probs, numbers, strict=True)]
    rest = [i for i, token in enumerate(tokens) if token is None]
    if rest:
        whole = sample_top_p(probs[rest], p, race=_race(numbers[rest])).squeeze(-1)
        for i, token in zip(rest, whole, strict=True):
            tokens[i] = token
    return torch.stack(cast(list[Tensor], tokens))


def _sample_row(probs: Tensor, p: float, numbers: Tensor) -> Tensor | None:
    """The token of one row (vocab,); None if others are as likely: a sort of the whole row says which of them it is."""
    outside = probs <= (1 - p) / (2 * len(probs))  # all of these together weigh half of 1 - p at most
    likely = outside.logical_not_().nonzero().squeeze(-1)
    probs_sort, order = probs[likely].sort(descending=True)
    winner = (_truncate(probs_sort, p) / _race(numbers[: len(likely)])).argmax()
    return likely[order[winner]] if (probs_sort == probs_sort[winner]).sum() == 1 else None


def sample_top_p(probs: Tensor, p: float, *, race: Tensor | None = None) -> Tensor:
    """Draws from the smallest set of likeliest tokens whose mass exceeds `p`.

    A token stays while the mass before it is at most `p`. The draw is what `torch.multinomial(..., 1)` computes
    inside, without its device sync: each token runs for an exponential time over its probability, the first one wins.

    Args:
        probs: (bsz, vocab) float32.
        p: 0 to 1.
        race: (bsz, vocab) exponentials for the tokens in descending order of probability; None draws them from
            torch's default generator.

    Returns:
        (bsz, 1) int64.
    """
    probs_sort, probs_idx = probs.sort(dim=-1, descending=True)
    weights = _truncate(probs_sort, p)
    if race is None:
        race = torch.empty_like(weights).exponential_()
    winner = (weights / race).argmax(dim=-1, keepdim=True)
    return probs_idx.gather(-1, winner)


def _truncate(probs_sort: Tensor, p: float) -> Tensor:
    """Descending probabilities (..., n) with those outside the set zeroed, and renormalized."""
    mass_before = probs_sort.cumsum(dim=-1) - probs_sort
    kept = probs_sort.masked_fill(mass_before > p, 0.0)
    return kept / kept.sum(dim=-1, keepdim=True)
