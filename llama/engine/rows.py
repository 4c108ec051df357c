"""The rows of the KV cache: running sequences in the first ones, and in the others what ended sequences left there."""

from __future__ import annotations

import itertools
from collections import abc

from llama.engine.runner import ModelRunner
from llama.engine.sampled import common_length
from llama.engine.sequence import Sequence

MIN_REUSED = 16  # tokens; copying fewer would save no time


class Rows:
    """The sequences in a KV cache, row by row, and the prefixes that a new one can take from it.

    Running sequences occupy the first rows without gaps, those that are level before the others as far as possible.
    The row of a sequence that has ended keeps its keys and values until another sequence needs it. All decisions depend
    on tokens alone, so the ranks of a model-parallel group make the same ones.

    Attributes:
        running: the running sequences; the index of each is its row.
    """

    def __init__(self, runner: ModelRunner) -> None:
        self.runner = runner
        self.running: list[Sequence] = []
        # By row, tokens left by a sequence that has ended, and when they were last used.
        self._kept: list[list[int]] = [[] for _ in range(runner.max_batch_size)]
        self._used = [0] * runner.max_batch_size
        self._clock = itertools.count(1)
        self._shared: set[int] = set()  # ids of the running sequences whose keys others may take

    def forget(self) -> None:
        """Lets no later sequence take anything that is in the cache now, as after a change of the network."""
        self._kept = [[] for _ in self._kept]
        self._shared.clear()

    def lose(self) -> None:
        """Notes that the cache was overwritten: all running sequences are computed again."""
        self._kept = [[] for _ in self._kept]
        self._shared.intersection_update(map(id, self.running))
        for sequence in self.running:
            sequence.n_cached = 0

    @property
    def n_level(self) -> int:
        """The number of sequences in the first rows that are all level."""
        return next((row for row, sequence in enumerate(self.running) if not sequence.is_level), len(self.running))

    def must_wait(self, tokens: abc.Sequence[int]) -> bool:
        """Whether a running sequence will soon hold much more of a prompt than any row does now."""
        now = self._match(tokens)[1]
        return any(
            _shared_length(sequence.tokens, tokens) >= now + MIN_REUSED
            for sequence in self.running
            if id(sequence) in self._shared and not (sequence.is_level or sequence.is_finished)
        )

    def add(self, sequence: Sequence, *, reuse: bool) -> None:
        """Gives a sequence the row after the running ones, with the longest prefix of its prompt that a row holds.

        Args:
            reuse: whether to look for a prefix, and to let others take this sequence's.
        """
        row = len(self.running)
        source, length = self._match(sequence.tokens) if reuse else (row, 0)
        victim = min(range(row, len(self._kept)), key=lambda free: (bool(self._kept[free]), self._used[free]))
        if length and source >= row and (length == len(self._kept[source]) or source == victim):
            self._move(source, row)
        else:
            self._kept[victim] = []
            self._move(row, victim)
            if length and source != row:
                self._used[source] = next(self._clock)
                self.runner.copy_row(source, row, length)
        self._kept[row] = []
        sequence.n_cached = sequence.n_reused = length
        if reuse:
            self._shared.add(id(sequence))
        self.running.append(sequence)

    def remove_finished(self, *, keep: bool) -> None:
        """Removes sequences that have ended, and closes the gaps.

        A gap is filled with the last one of the level sequences in front, and that one's row with the last sequence.

        Args:
            keep: whether later sequences may take what the removed ones leave.
        """
        for row in reversed(range(len(self.running))):
            sequence = self.running[row]
            if not sequence.is_finished:
                continue
            sequence.sampler.end_row(sequence.noise_row)
            if keep and id(sequence) in self._shared:
                self._kept[row] = sequence.tokens[: sequence.n_cached]
                self._used[row] = next(self._clock)
            self._shared.discard(id(sequence))
            for source in (self.n_level - 1, len(self.running) - 1):
                if source > row:
                    self._move(source, row)
                    row = source
            assert row == len(self.running) - 1
            self.running.pop()

    def _match(self, tokens: abc.Sequence[int]) -> tuple[int, int]:
        """The row that holds the longest prefix of a prompt, without its last token, and the prefix's length or 0."""
        best, row = 0, 0
        for i, kept in enumerate(self._kept):
            length = _shared_length(kept, tokens)
            if i < len(self.running):
                sequence = self.running[i]
                known = _shared_length(sequence.tokens, tokens) if id(sequence) in self._shared else 0
                length = min(known, sequence.n_cached)
            if length > best:
                best, row = length, i
        return (row, best) if best >= MIN_REUSED else (0, 0)

    def _move(self, source: int, target: int) -> None:
        """Moves a running sequence, or what an ended one left, to a row; what had been left there takes its place."""
        if source == target:
            return
        is_running, left = source < len(self.running), self._kept[target]
        length = self.running[source].n_cached if is_running else len(self._kept[source])
        if left:
            self.runner.swap_rows(source, target, max(length, len(left)))
        elif length:
            self.runner.copy_row(source, target, length)
        self._kept[source], self._kept[target] = left, self._kept[source]
        self._used[source], self._used[target] = self._used[target], self._used[source]
        if is_running:
            self.running[target], self.running[source] = self.running[source], self.running[target]


def _shared_length(cached: abc.Sequence[int], tokens: abc.Sequence[int]) -> int:
    """Length of the common prefix of cached tokens and a prompt, whose last token does not count."""
    if cached[:MIN_REUSED] != tokens[:MIN_REUSED]:
        return 0
    return min(common_length(cached, tokens), len(tokens) - 1)
