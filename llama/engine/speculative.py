"""Speculative decoding (Leviathan et al., 2023): several drafted tokens are verified in one pass of the network.

A pass has to read all weights anyway, so computing a few more positions costs little. Tokens are drafted by prompt
lookup, which repeats what followed similar text before, or by a smaller network. The network samples at each drafted
position with the noise that plain decoding would use there, and drafted tokens are accepted up to the first that
differs from the sampled one. So the output equals plain decoding's, whatever is drafted, except that outside of
float32 the number of rows in a pass can affect rounding.
"""

from __future__ import annotations

import math
import time
from bisect import bisect_right
from collections import abc, deque
from dataclasses import dataclass, field
from statistics import median

import torch
from torch import Tensor

from llama.distributed.groups import broadcast_from_first, broadcast_number
from llama.engine.cuda_graphs import MAX_WIDTH
from llama.engine.lock import lock_of
from llama.engine.runner import ModelRunner
from llama.engine.sampled import common_length, sample
from llama.engine.sequence import Sequence

_WIDTHS = (1, 2, 3, 4, 6, 8, 12, MAX_WIDTH)  # tokens per row of a pass; only a few widths, since each needs kernels
_NGRAM_SIZES = (4, 2, 1)  # n-grams to search for in earlier text, longest first
_MAX_OCCURRENCES = 16  # most recent occurrences of an n-gram that are compared
_MAX_MATCHED = 16  # tokens that are compared at an occurrence
_PRIORS = {0: 0.7, 1: 0.2, 2: 0.4, 4: 0.65, 8: 0.85}  # acceptance rate by number of matched tokens; 0: draft model
_PRIOR_WEIGHT = 2.0  # in drafts
_DECAY = 0.9  # factor for earlier observations with each new draft
_OBSERVED = 9  # newest passes of a size whose durations count
# Expected over plain decoding; below it nothing is drafted. The margin has drafts that are rejected tried rarely.
_MIN_SPEEDUP = 1.05


@dataclass
class Counts:
    """Statistics of speculative decoding, summed over sequences."""

    passes: int = 0  # with drafted tokens
    drafted: int = 0
    accepted: int = 0


class PromptLookup:
    """Drafts the tokens that followed the longest earlier match of the last tokens (Saxena, 2023)."""

    def __init__(self) -> None:
        self._ends: dict[tuple[int, ...], list[int]] = {}  # n-gram -> indices of the tokens that followed it
        self._n_indexed = 1

    def propose(self, tokens: list[int], n: int) -> tuple[list[int], int]:
        """Returns up to `n` drafted tokens and the length of the match; no tokens and 0 if there is no match.

        Args:
            tokens: the prompt and completion so far; must start with the tokens of earlier calls.
        """
        for end in range(self._n_indexed, len(tokens)):
            for size in _NGRAM_SIZES:
                if end >= size:
                    self._ends.setdefault(tuple(tokens[end - size : end]), []).append(end)
        self._n_indexed = max(self._n_indexed, len(tokens))
        for size in _NGRAM_SIZES:
            ends = self._ends.get(tuple(tokens[-size:]), [])[-_MAX_OCCURRENCES:]
            if ends:
                matched, end = max((self._matched(tokens, end), end) for end in ends)
                draft: list[int] = []
                while len(draft) < n:  # past the last token the draft repeats itself, as periodic text does
                    at = end + len(draft)
                    draft.append(tokens[at] if at < len(tokens) else draft[at - len(tokens)])
                return draft, matched
        return [], 0

    @staticmethod
    def _matched(tokens: list[int], end: int) -> int:
        """Number of tokens before `end` that equal the last tokens, up to `_MAX_MATCHED`."""
        limit = min(_MAX_MATCHED, end)
        return next((i for i in range(limit) if tokens[end - 1 - i] != tokens[-1 - i]), limit)


class Acceptance:
    """Estimates the acceptance rate of drafted tokens by match length, from priors and recent drafts."""

    def __init__(self) -> None:
        self._seen = dict.fromkeys(_PRIORS, (0.0, 0.0))  # accepted, rejected

    def _level(self, matched: int) -> int:
        return max(level for level in _PRIORS if level <= matched)

    def rate(self, matched: int) -> float:
        """The estimated probability that a drafted token is accepted; `matched` is 0 for a draft model."""
        level = self._level(matched)
        accepted, rejected = self._seen[level]
        weight = _PRIOR_WEIGHT
        return (_PRIORS[level] * weight + accepted) / (weight + accepted + rejected)

    def observe(self, matched: int, n_drafted: int, n_accepted: int) -> None:
        """Updates the estimate after a pass. Without a draft, it slowly returns to the prior, to try drafting again."""
        level = self._level(matched)
        accepted, rejected = (_DECAY ** (1.0 if n_drafted else 0.1) * n for n in self._seen[level])
        self._seen[level] = accepted + n_accepted, rejected + (n_accepted < n_drafted)


class PassCosts:
    """The duration of a pass by its number of positions, learned from the passes that run."""

    def __init__(self) -> None:
        self._seconds: dict[int, deque[float]] = {}
        self._warm: set[int] = set()  # numbers of positions whose kernels have been set up

    def observe(self, n_positions: int, seconds: float) -> None:
        """Adds the duration of a pass. The first one of a size does not count: it sets up kernels and buffers."""
        if n_positions in self._warm:
            self._seconds.setdefault(n_positions, deque(maxlen=_OBSERVED)).append(seconds)
        self._warm.add(n_positions)

    def __call__(self, n_positions: int) -> float | None:
        """The median duration, interpolated between sizes; None if no pass of so few positions was observed.

        Beyond the largest size observed, its duration: a size is tried before it is known to be slow.
        """
        sizes = sorted(self._seconds)
        if not sizes or n_positions < sizes[0]:
            return None
        medians = [median(self._seconds[n]) for n in sizes]
        # A disturbed pass took too long: no pass takes longer than one with more positions.
        medians = [min(medians[i:]) for i in range(len(medians))]
        i = bisect_right(sizes, n_positions)
        if i == len(sizes):
            return medians[-1]
        (x0, x1), (y0, y1) = sizes[i - 1 : i + 1], medians[i - 1 : i + 1]
        return y0 + (y1 - y0) * (n_positions - x0) / (x1 - x0)


class DraftModel:
    """Drafts with a smaller network, which must have the same vocabulary and whose KV cache has the same slots."""

    def __init__(self, runner: ModelRunner) -> None:
        self._runner = runner
        self._cached: list[list[int]] = [[] for _ in range(runner.max_batch_size)]  # tokens in each slot of the cache

    def propose(self, sequences: abc.Sequence[Sequence], n: int) -> list[list[int]]:
        """Drafts `n` tokens for each sequence with speculative="draft"."""
        tokens = [s.tokens if s.speculative == "draft" else [0] for s in sequences]
        with lock_of(self._runner.model):  # others may use the smaller network too
            lengths = self._fill(tokens)
            pending = [t[length:] for t, length in zip(tokens, lengths, strict=True)]
            logits = self._runner.decode(self._runner.pad(pending), lengths)
            last = torch.stack([row[len(p) - 1] for row, p in zip(logits, pending, strict=True)])
            drafts = [self._sample(last, sequences, 0)]
            for i in range(1, n):
                logits = self._runner.decode(drafts[-1].unsqueeze(1), [len(t) + i - 1 for t in tokens])
                drafts.append(self._sample(logits[:, 0], sequences, i))
            rows: list[list[int]] = broadcast_from_first(torch.stack(drafts, 1)).tolist()
            for slot, (t, row) in enumerate(zip(tokens, rows, strict=True)):
                self._cached[slot] = t + row[:-1]
        return [row if s.speculative == "draft" else [] for s, row in zip(sequences, rows, strict=True)]

    def _fill(self, tokens: abc.Sequence[list[int]]) -> list[int]:
        """Prefills slots that lack more than a few tokens; returns the number of each slot's tokens in the cache."""
        if self._runner.has_lost_cache():
            self._cached = [[] for _ in self._cached]
        known = [t[:-1] for t in tokens]
        lengths = [self._find(slot, known) for slot in range(len(known))]
        while lagging := [i for i, t in enumerate(known) if len(t) - lengths[i] >= MAX_WIDTH]:
            group, width = self._runner.next_group([len(known[i]) - lengths[i] for i in lagging])
            slots = [lagging[j] for j in group]
            starts = [lengths[slot] for slot in slots]
            parts = [known[slot][start : start + width] for slot, start in zip(slots, starts, strict=True)]
            self._runner.prefill(parts, slots, starts)
            for slot, part in zip(slots, parts, strict=True):
                lengths[slot] += len(part)
        return lengths

    def _find(self, slot: int, known: abc.Sequence[list[int]]) -> int:
        """The number of a slot's tokens in the cache, of those in another slot if it lacks more than a few."""
        tokens, cached = known[slot], self._cached
        length = common_length(cached[slot], tokens)
        if len(tokens) - length < MAX_WIDTH:
            return length
        longest, source = max((common_length(other, tokens), i) for i, other in enumerate(cached))
        if longest < length + MAX_WIDTH:
            return length
        if source < len(known):
            self._runner.copy_row(source, slot, longest)
            cached[slot] = cached[source][:longest]
        else:  # nobody runs there, and what was left here may be asked for
            self._runner.swap_rows(source, slot, max(len(cached[source]), len(cached[slot])))
            cached[slot], cached[source] = cached[source], cached[slot]
        return longest

    def _sample(self, logits: Tensor, sequences: abc.Sequence[Sequence], ahead: int) -> Tensor:
        """Samples with the noise that the large network will use, which makes equal tokens more likely."""
        return sample(logits, [(sequence, sequence.n_generated + ahead) for sequence in sequences])


@dataclass
class _DraftState:
    """The state of one sequence for drafting."""

    lookup: PromptLookup = field(default_factory=PromptLookup)
    acceptance: Acceptance = field(default_factory=Acceptance)
    matched: int = 0  # length of the match that gave the newest draft; 0 for a draft model
    n_drafted: int = 0  # length of the newest draft


class Speculator:
    """Drafts tokens for the running sequences, choosing the number of tokens that promises the highest speed.

    Attributes:
        costs: of the network's decode passes, with the sampling of their tokens.
        draft_costs: of the draft model's.
    """

    def __init__(self, device: torch.device, draft: ModelRunner | None = None) -> None:
        self._device = device
        self._draft = DraftModel(draft) if draft else None
        self.counts = Counts()
        self.costs, self.draft_costs = PassCosts(), PassCosts()

    def propose(self, sequences: abc.Sequence[Sequence]) -> list[list[int]]:
        """Returns each sequence's drafted tokens, maybe none. To be called before each pass, with its sequences."""
        rooms = [s.n_remaining - 1 if s.speculative and not s.process else 0 for s in sequences]
        limits = [max(0, min(room, MAX_WIDTH - 1)) for room in rooms]
        drafts: list[list[int]] = []
        for sequence, n in zip(sequences, limits, strict=True):
            sequence.draft_state = state = sequence.draft_state or _DraftState()
            draft, state.matched = [], 0
            if sequence.speculative == "prompt_lookup" and n > 0:
                draft, state.matched = state.lookup.propose(sequence.tokens, n)
            drafts.append(draft)
        by_model = [n if s.speculative == "draft" else 0 for s, n in zip(sequences, limits, strict=True)]
        width = self._best_width(sequences, [n or len(draft) for n, draft in zip(by_model, drafts, strict=True)])
        if width > 1 and any(by_model):
            assert self._draft is not None
            started = time.perf_counter()
            drafted = self._draft.propose(sequences, width - 1)
            self.draft_costs.observe(len(sequences), (time.perf_counter() - started) / (width - 1))
            drafts = [a or b[:n] for a, b, n in zip(drafts, drafted, limits, strict=True)]
        drafts = [draft[: width - 1] for draft in drafts]
        for sequence, draft in zip(sequences, drafts, strict=True):
            sequence.draft_state.n_drafted = len(draft)
        return drafts

    def _best_width(self, sequences: abc.Sequence[Sequence], longest: abc.Sequence[int]) -> int:
        """The number of tokens per row with the highest expected tokens per second; 1 for plain decoding.

        Args:
            longest: for each sequence, the maximum number of drafted tokens.
        """
        rates = [s.draft_state.acceptance.rate(s.draft_state.matched) for s in sequences]
        uses_model = any(s.speculative == "draft" and n for s, n in zip(sequences, longest, strict=True))
        bsz = len(sequences)
        plain = self.costs(bsz)
        best, best_speed = 1, _MIN_SPEEDUP * bsz / plain if plain else math.inf
        for width in _WIDTHS[1:]:
            seconds = self.costs(bsz * width)
            if width > 1 + max(longest) or seconds is None:
                break
            tokens = sum(_expected(rate, min(n, width - 1)) for rate, n in zip(rates, longest, strict=True))
            if uses_model:
                seconds += (width - 1) * (self.draft_costs(bsz) or 0.0)
            if tokens / seconds > best_speed:
                best, best_speed = width, tokens / seconds
        return broadcast_number(best, self._device)  # the ranks' clocks differ

    def observe(self, sequence: Sequence, n_accepted: int) -> None:
        """Updates the statistics after a pass with the sequence's newest draft."""
        state: _DraftState = sequence.draft_state
        state.acceptance.observe(state.matched, state.n_drafted, n_accepted)
        self.counts.passes += state.n_drafted > 0
        self.counts.drafted += state.n_drafted
        self.counts.accepted += n_accepted


def _expected(rate: float, n: int) -> float:
    """The expected number of new tokens from a pass with `n` drafted tokens, each accepted with probability `rate`."""
    return 1.0 + n if math.isclose(rate, 1) else (1 - rate ** (n + 1)) / (1 - rate)
