"""Speculative decoding (Leviathan et al., 2023): drafted tokens are verified together, in one pass over the weights.

A pass that reads all weights for one position can compute several almost for free. Drafts come from earlier text that
ends alike (prompt lookup), or from a smaller network. The network samples at every drafted position with the noise
that plain decoding would use there, and drafted tokens count as far as they equal the sampled ones: whatever is
drafted, the text is that of plain decoding, up to the rounding that another number of rows causes outside of float32.
"""

from __future__ import annotations

import math
import time
from bisect import bisect_left
from collections.abc import Callable
from collections.abc import Sequence as Listed
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from llama.chosen import by_sampler, common_length, sample
from llama.model import CachePositions
from llama.runner import ModelRunner, device_of
from llama.runtime import broadcast_from_first, to_device
from llama.sequence import Sequence
from llama.stepping import MAX_WIDTH

_WIDTHS = (1, 2, 3, 4, 6, 8, 12, MAX_WIDTH)  # tokens per row of a pass; few of them, since each needs kernels
_GRAM_SIZES = (4, 2, 1)  # of the n-grams that earlier text is searched for, the longest first
_MOST_PLACES = 16  # of an n-gram that are compared
_MOST_MATCHED = 16  # tokens
_MOST_AHEAD = 64  # steps that a sequence may be ahead of others with the same sampler, whose noise is held for them
_PRIORS = {0: 0.7, 1: 0.2, 2: 0.4, 4: 0.65, 8: 0.85}  # of acceptance, by the matched tokens; 0: a draft model's
_PRIOR_WEIGHT = 2.0  # drafts
_EVIDENCE_KEPT = 0.9  # with each draft
_MEASURED = (1, 2, 4, 8, 16, 32, 64, 128)  # positions of the passes that are timed
_MEASURED_LAYERS = 4
_ROUNDS = 4
_CLEARLY = 1.01  # times the plain speed that drafting must promise


@dataclass
class Counts:
    """What speculative decoding did so far.

    Attributes:
        passes: number of passes with drafted tokens, counted per sequence.
        drafted: number of drafted tokens.
        accepted: number of those that were kept.
    """

    passes: int = 0
    drafted: int = 0
    accepted: int = 0


class PromptLookup:
    """Drafts what followed the longest earlier occurrence of a text's last tokens (Saxena, 2023)."""

    def __init__(self) -> None:
        self._ends: dict[tuple[int, ...], list[int]] = {}  # of each n-gram: where it ended, with a token behind it
        self._n_indexed = 1

    def propose(self, tokens: list[int], n: int) -> tuple[list[int], int]:
        """Up to `n` drafted tokens, and how many of the last tokens were found; none if nothing was found.

        Args:
            tokens: at least those of earlier calls.
        """
        for end in range(self._n_indexed, len(tokens)):
            for size in _GRAM_SIZES:
                if end >= size:
                    self._ends.setdefault(tuple(tokens[end - size : end]), []).append(end)
        self._n_indexed = max(self._n_indexed, len(tokens))
        for size in _GRAM_SIZES:
            ends = self._ends.get(tuple(tokens[-size:]), [])[-_MOST_PLACES:]
            if ends:
                matched, end = max((self._matched(tokens, end), end) for end in ends)
                draft: list[int] = []
                while len(draft) < n:  # the draft may run on into itself, where a text repeats with a short period
                    at = end + len(draft)
                    draft.append(tokens[at] if at < len(tokens) else draft[at - len(tokens)])
                return draft, matched
        return [], 0

    @staticmethod
    def _matched(tokens: list[int], end: int) -> int:
        """Number of tokens before `end` that equal the last ones, up to `_MOST_MATCHED`."""
        most = min(_MOST_MATCHED, end)
        return next((i for i in range(most) if tokens[end - 1 - i] != tokens[-1 - i]), most)


class Acceptance:
    """How probable it is that the next drafted token is accepted, by how it was found; learned from what was lately."""

    def __init__(self) -> None:
        self._seen = dict.fromkeys(_PRIORS, (0.0, 0.0))  # accepted, rejected

    def _level(self, matched: int) -> int:
        return max(level for level in _PRIORS if level <= matched)

    def rate(self, matched: int) -> float:
        """The probability after so many matched tokens."""
        level = self._level(matched)
        accepted, rejected = self._seen[level]
        weight = _PRIOR_WEIGHT
        return (_PRIORS[level] * weight + accepted) / (weight + accepted + rejected)

    def observe(self, matched: int, n_drafted: int, n_accepted: int) -> None:
        """Learns from a draft. With none drafted, what was learned fades, so that drafting is tried again some time."""
        level = self._level(matched)
        accepted, rejected = (_EVIDENCE_KEPT ** (1.0 if n_drafted else 0.1) * n for n in self._seen[level])
        self._seen[level] = accepted + n_accepted, rejected + (n_accepted < n_drafted)


class PassCosts:
    """Seconds that a pass takes by its number of positions; between measured ones interpolated."""

    def __init__(self, seconds: Listed[float]) -> None:
        """
        Args:
            seconds: for each of `_MEASURED`.
        """
        # Disturbed timings are too long: a pass takes no longer than one of more positions.
        self._seconds = [min(seconds[i:]) for i in range(len(seconds))]

    def __call__(self, n_positions: int) -> float:
        i = bisect_left(_MEASURED, n_positions)
        if i == len(_MEASURED):
            return self._seconds[-1] * n_positions / _MEASURED[-1]
        if _MEASURED[i] == n_positions:
            return self._seconds[i]
        (x0, x1), (y0, y1) = _MEASURED[i - 1 : i + 1], self._seconds[i - 1 : i + 1]
        return y0 + (y1 - y0) * (n_positions - x0) / (x1 - x0)

    @classmethod
    @torch.inference_mode()
    def measure(cls, model: Any) -> PassCosts:
        """Times passes of the network's first layers, without its hooks and beside its KV cache.

        Under model parallelism all ranks call it together, and get the times of the first one.
        """
        n_layers = min(len(model.layers), _MEASURED_LAYERS)
        part = _without_hooks(model, n_layers, max(_MEASURED))
        device = device_of(model)
        passes, outputs = [], []
        for n in _MEASURED:
            tokens = torch.zeros((1, n), dtype=torch.int64, device=device)
            positions = CachePositions(torch.zeros(1, dtype=torch.int64, device=device), kv_len=n)
            passes.append(partial(part, tokens, positions))
            outputs.append(partial(part.output, part.norm(part.tok_embeddings(tokens))))
        n_whole = len(model.layers) / n_layers
        seconds = [
            outside + max(0.0, whole - outside) * n_whole
            for whole, outside in zip(_least_seconds(passes, device), _least_seconds(outputs, device), strict=True)
        ]
        times = torch.tensor(seconds, dtype=torch.float32, device=device)
        return cls(broadcast_from_first(times).tolist())


def _least_seconds(works: Listed[Callable[[], object]], device: torch.device) -> list[float]:
    """The least time that each takes, of several rounds."""
    times = [math.inf] * len(works)
    for i in range(_ROUNDS + 1):
        for place, work in enumerate(works):
            started = time.perf_counter()
            work()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            if i:  # first calls choose kernels
                times[place] = min(times[place], time.perf_counter() - started)
    return times


def _without_hooks(model: nn.Module, n_layers: int, max_seq_len: int) -> Any:
    """The network's first layers with its own weights, without hooks, and with a cache of one row of their own."""
    shadow = object.__new__(type(model))
    state = dict(vars(model))
    for name, value in state.items():
        if "hooks" in name and isinstance(value, dict):
            state[name] = type(value)()
    children = [(name, child) for name, child in model._modules.items() if child is not None]
    if isinstance(model, nn.ModuleList):
        children = children[:n_layers]
    state["_modules"] = {name: _without_hooks(child, n_layers, max_seq_len) for name, child in children}
    state["_buffers"] = buffers = dict(model._buffers)
    for name in ("keys", "values"):
        if isinstance(cache := buffers.get(name), Tensor):
            _, n_heads, _, head_dim = cache.shape
            buffers[name] = cache.new_zeros((1, n_heads, max_seq_len, head_dim))
    shadow.__dict__.update(state)
    return shadow


class DraftModel:
    """Drafts by a smaller network with the same vocabulary, which keeps a KV cache with the same slots.

    Args:
        runner: runs it.
    """

    def __init__(self, runner: ModelRunner) -> None:
        self._runner = runner
        self._cached: list[list[int]] = [[] for _ in range(runner.max_batch_size)]  # tokens that each slot holds

    def propose(self, sequences: Listed[Sequence], n: int) -> list[list[int]]:
        """Drafts `n` tokens for each sequence that asks for it, none for the others. All have room for `n` more."""
        tokens = [s.tokens if s.speculative == "draft" else [0] for s in sequences]
        lengths = self._fill(tokens)
        width = max(len(t) - length for t, length in zip(tokens, lengths, strict=True))
        pending = [t[length:] for t, length in zip(tokens, lengths, strict=True)]
        device = self._runner.device
        logits = self._runner.step(to_device(pad(pending, width), device).view(len(tokens), width), lengths)
        last = to_device([len(p) - 1 for p in pending], device)
        logits = logits[torch.arange(len(tokens), device=device), last]
        drafts = [self._sample(logits, sequences, 0)]
        for i in range(1, n):
            logits = self._runner.step(drafts[-1].unsqueeze(1), [len(t) + i - 1 for t in tokens])
            drafts.append(self._sample(logits[:, 0], sequences, i))
        rows: list[list[int]] = broadcast_from_first(torch.stack(drafts, 1)).tolist()
        for slot, (t, row) in enumerate(zip(tokens, rows, strict=True)):
            self._cached[slot] = t + row[:-1]
        return [row if s.speculative == "draft" else [] for s, row in zip(sequences, rows, strict=True)]

    def _fill(self, tokens: Listed[list[int]]) -> list[int]:
        """Brings all but a few of the tokens into the cache; returns how many of each slot's it holds then."""
        if self._runner.has_lost_cache():
            self._cached = [[] for _ in self._cached]
        lengths = [common_length(self._cached[i], t[:-1]) for i, t in enumerate(tokens)]
        width = max(len(t) - length for t, length in zip(tokens, lengths, strict=True))
        most = MAX_WIDTH if max(lengths) + width <= self._runner.max_seq_len else 1
        behind = [i for i, t in enumerate(tokens) if len(t) - lengths[i] > most]
        if behind:
            self._runner.prefill([tokens[i][:-1] for i in behind], behind)
            for i in behind:
                lengths[i] = len(tokens[i]) - 1
        return lengths

    def _sample(self, logits: Tensor, sequences: Listed[Sequence], ahead: int) -> Tensor:
        """Draws with the noise that the network's own tokens will be drawn with: likely the same ones."""
        return sample(logits, [(sequence, sequence.next_step + ahead) for sequence in sequences])

    def move_row(self, source: int, target: int) -> None:
        """Follows a sequence to another slot."""
        cached = self._cached[source]
        if cached and not self._runner.has_lost_cache():
            self._runner.move_row(source, target, len(cached))
            self._cached[target], self._cached[source] = cached, []


@dataclass
class _Drafting:
    """What is known of one sequence's drafts."""

    lookup: PromptLookup = field(default_factory=PromptLookup)
    acceptance: Acceptance = field(default_factory=Acceptance)
    matched: int = 0  # how the newest draft was found


class Speculator:
    """Drafts tokens for the running sequences, as many as promise to pay.

    Args:
        model: the network that verifies.
        draft: the runner of a draft model; None without one.

    Attributes:
        counts: what it did so far.
    """

    def __init__(self, model: Any, draft: ModelRunner | None = None) -> None:
        self._costs = PassCosts.measure(model)
        self._draft_costs: PassCosts | None = None
        self._draft = DraftModel(draft) if draft else None
        if draft:
            self._draft_costs = PassCosts.measure(draft.model)
        self.counts = Counts()

    def propose(self, sequences: Listed[Sequence], room: int) -> list[list[int]]:
        """Drafts for each sequence, possibly none; called once before each pass.

        Args:
            sequences: all running ones, in the order of their slots.
            room: number of tokens that still fit behind the newest one of every row.
        """
        most = self._most(sequences, room)
        drafts: list[list[int]] = []
        for sequence, n in zip(sequences, most, strict=True):
            sequence.drafting = drafting = sequence.drafting or _Drafting()
            draft, drafting.matched = [], 0
            if sequence.speculative == "prompt_lookup" and n > 0:
                draft, drafting.matched = drafting.lookup.propose(sequence.tokens, n)
            drafts.append(draft)
        width = self._best_width(sequences, drafts, most)
        if width > 1 and any(s.speculative == "draft" and n for s, n in zip(sequences, most, strict=True)):
            assert self._draft is not None
            by_model = self._draft.propose(sequences, width - 1)
            drafts = [a or b[:n] for a, b, n in zip(drafts, by_model, most, strict=True)]
        return [draft[: width - 1] for draft in drafts]

    def _most(self, sequences: Listed[Sequence], room: int) -> list[int]:
        """The largest number of tokens to draft for each sequence."""
        most = [min(s.left - 1, room, MAX_WIDTH - 1) if s.speculative else 0 for s in sequences]
        slowest = {id(sampler): min(s.next_step for s in group) for sampler, group in by_sampler(sequences)}
        ahead = [slowest[id(s.sampler)] + _MOST_AHEAD - s.next_step for s in sequences]
        return [max(0, n if s.sampler.is_greedy else min(n, a)) for s, n, a in zip(sequences, most, ahead, strict=True)]

    def _best_width(self, sequences: Listed[Sequence], drafts: Listed[list[int]], most: Listed[int]) -> int:
        """The number of tokens per row that promises the most tokens per second; 1 for plain decoding."""
        rates = [s.drafting.acceptance.rate(s.drafting.matched) for s in sequences]
        by_model = [s.speculative == "draft" and n > 0 for s, n in zip(sequences, most, strict=True)]
        longest = [n if model else len(draft) for model, n, draft in zip(by_model, most, drafts, strict=True)]
        bsz = len(sequences)
        best, best_speed = 1, _CLEARLY * bsz / self._costs(bsz)
        for width in _WIDTHS[1:]:
            if width > 1 + max(longest):
                break
            tokens = sum(_expected(rate, min(n, width - 1)) for rate, n in zip(rates, longest, strict=True))
            seconds = self._costs(bsz * width)
            if any(by_model):
                assert self._draft_costs is not None
                seconds += self._draft_costs(bsz * 2) + (width - 2) * self._draft_costs(bsz)
            if tokens / seconds > best_speed:
                best, best_speed = width, tokens / seconds
        return best

    def observe(self, sequence: Sequence, n_drafted: int, n_accepted: int) -> None:
        """Learns what became of a sequence's draft."""
        if sequence.speculative:
            sequence.drafting.acceptance.observe(sequence.drafting.matched, n_drafted, n_accepted)
            self.counts.passes += n_drafted > 0
            self.counts.drafted += n_drafted
            self.counts.accepted += n_accepted

    def move_row(self, source: int, target: int) -> None:
        """Follows a sequence to another slot."""
        if self._draft:
            self._draft.move_row(source, target)


def _expected(rate: float, n: int) -> float:
    """The mean number of tokens that a pass brings with `n` drafted ones, each accepted with this probability."""
    return 1.0 + n if math.isclose(rate, 1) else (1 - rate ** (n + 1)) / (1 - rate)


def pad(rows: Listed[Listed[int]], width: int) -> list[int]:
    """The rows right-padded with 0, one behind the other."""
    return [token for row in rows for token in (*row, *[0] * (width - len(row)))]
