"""Samples the next token ids from logits."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache

import torch
from torch import Tensor

GREEDY_BELOW = 1e-30  # logits divided by a lower temperature could overflow
_LEFT_OUT = 1 / 32  # twice the probability mass of tokens that are not sorted at first, whatever top_p is
_UNIFORM_BITS = 2**53 - 1  # of a 64-bit random integer: a uniform float64, as a multiple of 2^-53
_KEPT_STEPS = 16  # steps whose noise is kept where rows are at different steps


@dataclass
class Sampler:
    """Samples tokens for sequences that share one random stream, as the rows of a batch do in Meta's code.

    Every step draws the same amount of noise from the stream, one exponential per row and vocabulary entry, no matter
    which rows are still running. So a row's noise does not depend on the other rows. It is determined by the step:
    rows may be at different steps, and a step may be sampled repeatedly.

    Attributes:
        temperature: divides the logits; greedy decoding below `GREEDY_BELOW`.
        top_p: 0 to 1; tokens are drawn from the smallest set whose probability mass exceeds it (nucleus sampling;
            Holtzman et al., 2020).
        n_rows: number of rows that noise is drawn for at each step.
        generator: the random stream, on the logits' device.
        draw: called as `draw(probs, top_p)` instead of `sample_top_p`; None for the built-in sampling.
        steps: number of steps whose noise was drawn from the stream.
        used: number of steps whose tokens were kept; less than `steps` if drafted tokens were rejected.
    """

    temperature: float
    top_p: float
    n_rows: int
    generator: torch.Generator
    draw: Callable[[Tensor, float], Tensor] | None = None
    steps: int = field(default=0, init=False)
    used: int = field(default=0, init=False)
    _running: dict[int, int] = field(default_factory=dict, init=False, repr=False)  # by row, its next step
    _states: dict[int, Tensor] = field(default_factory=dict, init=False, repr=False)  # generator's, before each step
    _newest_state: Tensor | None = field(default=None, init=False, repr=False)  # generator's, after the last step
    _noise: dict[int, Tensor] = field(default_factory=dict, init=False, repr=False)  # of a few steps

    @property
    def is_greedy(self) -> bool:
        """Whether the most likely token is chosen, without random numbers."""
        return self.temperature < GREEDY_BELOW

    def __call__(self, logits: Tensor, rows: Sequence[int], steps: Sequence[int]) -> Tensor:
        """Samples n tokens.

        Args:
            logits: (n, vocab) float32.
            rows: for each token, its row of the noise, 0 to n_rows - 1.
            steps: for each token, its step, from 0.

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
            return torch.stack([_sample_row(row, self.top_p, mine) for row, mine in zip(probs, noise, strict=True)])
        return sample_top_p(probs, self.top_p, noise=_exponentials(torch.stack(noise))).squeeze(-1)

    def add_row(self, row: int) -> None:
        """Declares that a row will sample from step 0 on, until `end_row`."""
        self._running[row] = 0

    def mark_used(self, row: int, steps: int) -> None:
        """Records that a row kept its tokens of the first `steps` steps."""
        self._running[row] = steps
        self.used = max(self.used, steps)

    def end_row(self, row: int) -> None:
        """Records that a row samples no more. With the last one, gives back to the stream what was drawn ahead."""
        if self._running.pop(row, None) is not None and not self._running:
            self.rewind()

    def rewind(self) -> None:
        """Rewinds the generator to the end of the used steps, unless others have drawn from it since."""
        if self.steps > self.used and self.used in self._states:
            assert self._newest_state is not None
            if torch.equal(self.generator.get_state(), self._newest_state):
                self.generator.set_state(self._states[self.used])
                self.steps = self.used
        self._noise.clear()
        self._states.clear()

    def skip_to(self, steps: int, vocab_size: int) -> None:
        """Advances the stream until `steps` steps have been drawn in total."""
        while self.steps < steps:
            self._advance(vocab_size)

    def _noise_of(self, step: int, vocab_size: int) -> Tensor:
        """The random numbers of a step, (n_rows, vocab_size), to be converted by `_exponentials`."""
        while self.steps <= step:
            self._advance(vocab_size)
        if step not in self._noise:
            self._keep(step, self._drawn_from(self._states[step], vocab_size)[0])
        return self._noise[step]

    def _advance(self, vocab_size: int) -> None:
        """Draws the next step's noise from a copy of the stream, and then advances the stream.

        If that is interrupted, the step is drawn again from the same state.
        """
        before = self._states.get(self.steps, self.generator.get_state())
        noise, after = self._drawn_from(before, vocab_size)
        self._keep(self.steps, noise)
        self._states[self.steps] = before
        self._newest_state = after
        self.generator.set_state(after)
        self.steps += 1

    def _drawn_from(self, state: Tensor, vocab_size: int) -> tuple[Tensor, Tensor]:
        """A step's noise from a generator in this state, and the generator's state after it."""
        device = self.generator.device
        generator = torch.Generator(device).set_state(state)
        if device.type == "cpu" and _exponentials_are_logarithms():
            noise = torch.empty((self.n_rows, vocab_size), dtype=torch.int64).random_(generator=generator)
        else:
            noise = torch.empty((self.n_rows, vocab_size), device=device).exponential_(generator=generator)
        return noise, generator.get_state()

    def _keep(self, step: int, noise: Tensor) -> None:
        """Stores a step's noise, and drops what the slowest row is past. Older noise is drawn again from its state."""
        slowest = min(self._running.values(), default=0)
        for kept in (self._noise, self._states):
            for old in [old for old in kept if old < slowest]:
                del kept[old]
        if len(self._noise) == _KEPT_STEPS:
            del self._noise[next(iter(self._noise))]
        self._noise[step] = noise


def _exponentials(numbers: Tensor) -> Tensor:
    """Converts numbers from the stream to float32 exponential noise.

    Integers hold in their low 53 bits the uniform from which `exponential_` would compute a logarithm. That is the most
    expensive part of sampling, and only the most likely tokens need it. Others are exponential already.
    """
    if numbers.dtype != torch.int64:
        return numbers
    return -torch.log1p((numbers & _UNIFORM_BITS).double() * -(2.0**-53)).float()


def _least(numbers: Tensor) -> Tensor:
    """The least value of `_exponentials`."""
    return _exponentials((numbers & _UNIFORM_BITS if numbers.dtype == torch.int64 else numbers).min())


@cache
def _exponentials_are_logarithms() -> bool:
    """Whether `exponential_` on this CPU is `_exponentials` of integers. On Intel, torch may take MKL's generator."""
    one, other = torch.Generator().manual_seed(0), torch.Generator().manual_seed(0)
    exponentials = torch.empty(256).exponential_(generator=one)
    integers = torch.empty(256, dtype=torch.int64).random_(generator=other)
    return torch.equal(_exponentials(integers), exponentials) and torch.equal(one.get_state(), other.get_state())


def _sample_row(probs: Tensor, p: float, numbers: Tensor) -> Tensor:
    """The result of `sample_top_p` for one row (vocab,), sorting no more than it takes."""
    n = len(probs)
    limit = max(1 - p, _LEFT_OUT) / (2 * n)  # the total probability of those below is at most half of 1 - p, or tiny
    likely = (probs <= limit).logical_not_().nonzero().squeeze(-1)
    if len(likely) <= n // 2:
        ranked, order = probs[likely].sort(descending=True)
        noise = _exponentials(numbers[: len(likely)])
        rank = (_truncate(ranked, p) / noise).argmax()
        # Others are outside of the set, or too unlikely to be drawn, whichever noise they would get. Which of several
        # tokens that are equally likely has this rank is up to the sort of the whole row.
        is_certain = ranked.sum() > p or limit < 0.999 * ranked[rank] / noise[rank] * _least(numbers[len(likely) :])
        if is_certain and (ranked == ranked[rank]).sum() == 1:
            return likely[order[rank]]
    ranked, order = probs.sort(descending=True)
    return order[(_truncate(ranked, p) / _exponentials(numbers)).argmax()]


def sample_top_p(probs: Tensor, p: float, *, noise: Tensor | None = None) -> Tensor:
    """Samples from the smallest set of most likely tokens whose probability mass exceeds `p` (top-p sampling).

    A token is in the set if the mass before it is at most `p`. Chooses the token with the largest ratio of probability
    to exponential noise, as `torch.multinomial(..., 1)` does internally, but without its device sync.

    Args:
        probs: (bsz, vocab) float32.
        p: 0 to 1.
        noise: (bsz, vocab) exponential noise for the tokens in descending order of probability; None to draw it from
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
    """Zeroes the descending probabilities (..., n) that are outside the top-p set, and renormalizes the others."""
    mass_before = probs_sort.cumsum(dim=-1) - probs_sort
    kept = probs_sort.masked_fill(mass_before > p, 0.0)
    return kept / kept.sum(dim=-1, keepdim=True)


def logprobs_of(logits: Tensor, tokens: Tensor) -> Tensor:
    """The log-probability of each token: logits (..., vocab) and tokens (...) give (...)."""
    return logits.log_softmax(-1).gather(-1, tokens.unsqueeze(-1)).squeeze(-1)
