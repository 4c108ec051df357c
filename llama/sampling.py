"""From one step's logits to the next token ids."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import cast

import torch
from torch import Tensor

GREEDY_BELOW = 1e-30


@dataclass
class Sampler:
    """Draws the tokens of sequences that share one random stream, as the rows of a batch do in Meta's code.

    Each step takes the same amount from the stream, whichever sequences take part: one exponential per row and
    vocabulary entry. A row that ends, or that was never there, therefore does not shift the noise of the others. The
    noise of a row belongs to its step: rows may stand at different steps, and a step may be asked for again.

    Attributes:
        temperature: the logits are divided by it; 0, or so little that they would overflow, for greedy sampling.
        top_p: 0 to 1; the draw is from the smallest set of tokens whose mass exceeds it (nucleus
            sampling; Holtzman et al., 2020).
        n_rows: number of rows that a full step has.
        generator: the stream, on the logits' device.
        draw: replaces `sample_top_p`, and is called as `draw(probs, top_p)`; None for the built-in sampling.
        steps: number of steps that were drawn from the stream.
        used: number of steps whose tokens were kept; less than `steps` where drafted tokens were rejected.
    """

    temperature: float
    top_p: float
    n_rows: int
    generator: torch.Generator
    draw: Callable[[Tensor, float], Tensor] | None = None
    steps: int = field(default=0, init=False)
    used: int = field(default=0, init=False)
    _noise: dict[int, Tensor] = field(default_factory=dict, init=False, repr=False)  # by step
    _states: dict[int, Tensor] = field(default_factory=dict, init=False, repr=False)  # of the stream, before each step
    _newest_state: Tensor | None = field(default=None, init=False, repr=False)  # after the last step

    @property
    def is_greedy(self) -> bool:
        """Whether it takes the most likely token, without random numbers."""
        return self.temperature < GREEDY_BELOW

    def __call__(self, logits: Tensor, rows: Sequence[int], steps: Sequence[int]) -> Tensor:
        """Draws the next tokens.

        Args:
            logits: (n, vocab) float32.
            rows: n numbers, which of the `n_rows` each is.
            steps: n numbers, at which step each is, from 0.

        Returns:
            (n,) int64.
        """
        if self.is_greedy:
            return logits.argmax(-1)
        probs = torch.softmax(logits / self.temperature, dim=-1)
        if self.draw is not None:
            return self.draw(probs, self.top_p).reshape(-1)
        noise = [self._noise_of(step, logits.size(-1))[row] for row, step in zip(rows, steps, strict=True)]
        if logits.device.type == "cpu":
            return _sample_rows(probs, self.top_p, noise)
        return sample_top_p(probs, self.top_p, noise=_exponentials(torch.stack(noise))).squeeze(-1)

    def mark_used(self, steps: int) -> None:
        """Notes that a row kept its tokens of the first `steps` steps."""
        self.used = max(self.used, steps)

    def release(self, step: int) -> None:
        """Frees the noise of all steps before `step`, which no row will ask for again."""
        for old in [old for old in self._noise if old < step]:
            del self._noise[old], self._states[old]

    def rewind(self) -> None:
        """Gives back what was drawn beyond the used steps, unless others have drawn from the stream since.

        To be called when no row will ask for noise any more.
        """
        if self.steps > self.used and self.used in self._states:
            assert self._newest_state is not None
            if torch.equal(self.generator.get_state(), self._newest_state):
                self.generator.set_state(self._states[self.used])
                self.steps = self.used
        self.release(self.steps)

    def skip_to(self, steps: int, vocab_size: int) -> None:
        """Draws, for no row, until `steps` steps were drawn."""
        if self.steps < steps:
            self._noise_of(steps - 1, vocab_size)
            self.release(steps)

    def _noise_of(self, step: int, vocab_size: int) -> Tensor:
        """What a step takes from the stream, (n_rows, vocab_size): see `_exponentials`."""
        while self.steps <= step:
            self._states[self.steps] = self.generator.get_state()
            shape, device = (self.n_rows, vocab_size), self.generator.device
            if device.type == "cpu" and _exponentials_are_logarithms():
                noise = torch.empty(shape, dtype=torch.float64).uniform_(generator=self.generator)
            else:
                noise = torch.empty(shape, device=device).exponential_(generator=self.generator)
            self._noise[self.steps] = noise
            self.steps += 1
            self._newest_state = self.generator.get_state()
        return self._noise[step]


def _exponentials(numbers: Tensor) -> Tensor:
    """Exponential noise, float32, of the numbers taken from the stream.

    Those that are float64 are the uniform numbers that `exponential_` would have taken the logarithm of; it costs more
    than all else in a step's sampling, and only the likeliest tokens need it.
    """
    return -torch.log1p(-numbers).float() if numbers.dtype == torch.float64 else numbers


@cache
def _exponentials_are_logarithms() -> bool:
    """Whether `exponential_` is that on this CPU. On an Intel one, torch leaves it to MKL, which is fast by itself."""
    uniform = torch.empty(256, dtype=torch.float64).uniform_(generator=torch.Generator().manual_seed(0))
    exponentials = torch.empty(256).exponential_(generator=torch.Generator().manual_seed(0))
    return torch.equal(_exponentials(uniform), exponentials)


def _sample_rows(probs: Tensor, p: float, numbers: Sequence[Tensor]) -> Tensor:
    """`sample_top_p` (bsz,), mostly with no more of a row sorted than can be in the set."""
    tokens = [_sample_row(row, p, mine) for row, mine in zip(probs, numbers, strict=True)]
    rest = [i for i, token in enumerate(tokens) if token is None]
    if rest:
        whole = sample_top_p(probs[rest], p, noise=_exponentials(torch.stack([numbers[i] for i in rest]))).squeeze(-1)
        for i, token in zip(rest, whole, strict=True):
            tokens[i] = token
    return torch.stack(cast(list[Tensor], tokens))


def _sample_row(probs: Tensor, p: float, numbers: Tensor) -> Tensor | None:
    """The token of one row (vocab,); None if others are as likely: a sort of the whole row says which of them it is."""
    outside = probs <= (1 - p) / (2 * len(probs))  # all of these together weigh half of 1 - p at most
    likely = outside.logical_not_().nonzero().squeeze(-1)
    probs_sort, order = probs[likely].sort(descending=True)
    winner = (_truncate(probs_sort, p) / _exponentials(numbers[: len(likely)])).argmax()
    return likely[order[winner]] if (probs_sort == probs_sort[winner]).sum() == 1 else None


def sample_top_p(probs: Tensor, p: float, *, noise: Tensor | None = None) -> Tensor:
    """Draws from the smallest set of likeliest tokens whose mass exceeds `p`.

    A token stays while the mass before it is at most `p`. The draw is what `torch.multinomial(..., 1)` computes
    inside, without its device sync: the token with the largest quotient of probability and exponential noise.

    Args:
        probs: (bsz, vocab) float32.
        p: 0 to 1.
        noise: (bsz, vocab) exponentials for the tokens in descending order of probability; None draws them from
            torch's default generator.

    Returns:
        (bsz, 1) int64.
    """
    probs_sort, probs_idx = probs.sort(dim=-1, descending=True)
    weights = _truncate(probs_sort, p)
    if noise is None:
        noise = torch.empty_like(weights).exponential_()
    winner = (weights / noise).argmax(dim=-1, keepdim=True)
    return probs_idx.gather(-1, winner)


def _truncate(probs_sort: Tensor, p: float) -> Tensor:
    """Descending probabilities (..., n) with those outside the set zeroed, and renormalized."""
    mass_before = probs_sort.cumsum(dim=-1) - probs_sort
    kept = probs_sort.masked_fill(mass_before > p, 0.0)
    return kept / kept.sum(dim=-1, keepdim=True)


def logprobs_of(logits: Tensor, tokens: Tensor) -> Tensor:
    """log softmax(logits)[token]: (..., vocab) and (...) -> (...)."""
    return logits.log_softmax(-1).gather(-1, tokens.unsqueeze(-1)).squeeze(-1)
