"""The tokens sampled in a pass: chosen on the device, copied to the host, and compared with drafted tokens."""

from __future__ import annotations

from collections import abc
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from llama.distributed.device import to_device, to_host
from llama.distributed.groups import broadcast_from_first, model_parallel_rank, model_parallel_size
from llama.engine.sampling import logprobs_of
from llama.engine.sequence import Sequence, TokenResult

NOT_FINITE = -1  # in place of a token that cannot be sampled


@dataclass(frozen=True)
class SampledTokens:
    """The tokens sampled in a pass, which may still be on their way to the host.

    Attributes:
        drafts: for each sequence, the drafted tokens that followed its newest token in the pass.
        chosen: (n,) int64 on the device, the same on all ranks of a model-parallel group: for each sequence, the token
            chosen after its newest token, then those chosen after each drafted token; `NOT_FINITE` where logits are NaN
            or infinite.
        copies: functions that wait for copies of `chosen`, of the log-probabilities of these tokens, and of the most
            likely tokens at each position and their log-probabilities, and return them; [] if no sequence asked for it.
    """

    sequences: list[Sequence]
    drafts: abc.Sequence[abc.Sequence[int]]
    chosen: Tensor
    copies: list[Callable[[], list[Any]]]

    @classmethod
    def sample(
        cls,
        logits: Tensor,
        sequences: abc.Sequence[Sequence],
        drafts: abc.Sequence[abc.Sequence[int]] = (),
        *,
        ahead: int = 0,
    ) -> SampledTokens:
        """Samples a token after the newest token of each sequence and after each drafted one.

        Args:
            logits: (bsz, width, vocab), float32; width is at least 1 + the length of the longest draft.
            drafts: drafted tokens of each sequence; empty for none.
            ahead: number of tokens of each sequence that were sampled before but are not recorded yet.
        """
        drafts = drafts or [()] * len(sequences)
        n_positions = [1 + len(draft) for draft in drafts]
        if min(n_positions) == logits.size(1):
            logits = logits.flatten(0, 1)
        else:
            logits = torch.cat([row[:n] for row, n in zip(logits, n_positions, strict=True)])
        steps = [(s, s.n_generated + ahead + i) for s, n in zip(sequences, n_positions, strict=True) for i in range(n)]
        raw = logits
        if any(sequence.process for sequence in sequences) and model_parallel_rank() == 0:
            logits = _processed(logits, sequences, n_positions)
        # The flag travels with the tokens, to save a synchronization. A mask may have put -inf, but not everywhere.
        is_finite = _of_words(logits, sequences).amax(-1).isfinite()
        chosen = broadcast_from_first(sample(logits, steps).where(is_finite, NOT_FINITE))
        copies: list[Callable[[], list[Any]]] = [to_host(chosen), list, list, list]
        if any(sequence.logprobs for sequence in sequences):
            copies[1] = to_host(logprobs_of(raw, chosen.clamp(min=0)))
        if n_top := max(sequence.top_logprobs for sequence in sequences):
            of_words = _of_words(raw.log_softmax(-1), sequences)
            copies[3], copies[2] = map(to_host, of_words.topk(min(n_top, of_words.size(-1))))
        return cls(list(sequences), drafts, chosen, copies)

    def on_host(self) -> dict[Sequence, list[TokenResult]]:
        """Waits for the tokens; returns the results of each sequence, which do not have a finish reason yet.

        A sequence gets a result for each accepted draft token (one that equals the token chosen in its place), and one
        for the token chosen after these.
        """
        tokens, logprobs, likely, likely_logprobs = (copy() for copy in self.copies)
        results, first = {}, 0
        for sequence, draft in zip(self.sequences, self.drafts, strict=True):
            end = first + 1 + common_length(draft, tokens[first : first + len(draft)])
            n_top = sequence.top_logprobs
            results[sequence] = [
                TokenResult(
                    sequence.index,
                    tokens[i],
                    logprobs[i] if sequence.logprobs else None,
                    None,
                    tuple(zip(likely[i][:n_top], likely_logprobs[i][:n_top], strict=True)) if n_top else (),
                )
                for i in range(first, end)
            ]
            first += 1 + len(draft)
        return results


def _processed(logits: Tensor, sequences: abc.Sequence[Sequence], n_positions: abc.Sequence[int]) -> Tensor:
    """The logits (n, vocab) as each sequence's process changes them. Its error ends the sequence's call."""
    logits = logits.clone()
    row = 0
    for sequence, n in zip(sequences, n_positions, strict=True):
        if sequence.process is not None and not sequence.is_finished:
            try:
                logits[row] = sequence.process(sequence.tokens, logits[row].clone())
            except Exception as error:
                if model_parallel_size() > 1:  # the other ranks cannot know
                    raise
                sequence.call.abort(error)
        row += n
    return logits


def sample(logits: Tensor, steps: abc.Sequence[tuple[Sequence, int]]) -> Tensor:
    """Samples a token from each row of logits.

    Args:
        logits: (n, vocab) float32.
        steps: for each row, its sequence and the step of that sequence's sampler.

    Returns:
        (n,) int64.
    """
    logits = _of_words(logits, [sequence for sequence, _ in steps])
    if all(sequence.sampler.is_greedy for sequence, _ in steps):
        return logits.argmax(-1)
    groups: dict[int, list[int]] = {}
    for i, (sequence, _) in enumerate(steps):
        groups.setdefault(0 if sequence.sampler.is_greedy else id(sequence.sampler), []).append(i)
    chosen = torch.empty(len(steps), dtype=torch.int64, device=logits.device)
    for indices in groups.values():
        sampler = steps[indices[0]][0].sampler
        noise_rows = [steps[i][0].noise_row for i in indices]
        sampler_steps = [steps[i][1] for i in indices]
        if len(groups) == 1:
            return sampler(logits, noise_rows, sampler_steps)
        index = to_device(indices, logits.device)
        chosen[index] = sampler(logits[index], noise_rows, sampler_steps)
    return chosen


def _of_words(logits: Tensor, sequences: abc.Sequence[Sequence]) -> Tensor:
    """The part of logits (n, vocab) that belongs to tokens; the sequences of an engine have one tokenizer."""
    n_words = sequences[0].n_words
    return logits if n_words is None else logits[:, :n_words]


def common_length(a: abc.Sequence[int], b: abc.Sequence[int]) -> int:
    """Length of the longest common prefix of two lists of tokens, by bisection over slices."""
    low, high = 0, min(len(a), len(b))
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if a[low:middle] == b[low:middle] else (low, middle - 1)
    return low
