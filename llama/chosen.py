"""The tokens that a pass chose: sampled on the device, checked against the drafted ones, copied to the host."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from collections.abc import Sequence as Listed
from dataclasses import dataclass

import torch
from torch import Tensor

from llama.runtime import broadcast_from_first, model_parallel_size, to_device, to_host
from llama.sampling import Sampler, logprobs_of
from llama.sequence import Sequence, Step


@dataclass(frozen=True)
class ChosenTokens:
    """The tokens that a pass chose. Their values may still be on their way to the host.

    Attributes:
        sequences: those of the pass, in the order of their slots.
        drafts: for each of them, the drafted tokens that were fed behind its newest one.
        chosen: (n,) int64 on the device, the same on all ranks of a model-parallel group: for each sequence, the
            token after its newest one, then those after each drafted one.
        values: waits for the tokens, and returns them; under model parallelism followed by 1 if the first rank
            announces changes.
        announces: whether it does so, without model parallelism.
        logprobs: likewise their log-probabilities; None if no sequence asked for them.
        top: likewise, for each token, the most likely tokens and their log-probabilities.
    """

    sequences: list[Sequence]
    drafts: Listed[Listed[int]]
    chosen: Tensor
    values: Callable[[], list[int]]
    announces: bool
    logprobs: Callable[[], list[float]] | None
    top: tuple[Callable[[], list[list[int]]], Callable[[], list[list[float]]]] | None

    @classmethod
    def choose(
        cls, logits: Tensor, sequences: Listed[Sequence], announces: bool, drafts: Listed[Listed[int]] = ()
    ) -> ChosenTokens:
        """Samples from logits (bsz, width, vocab), of which a sequence needs one position more than it has a draft."""
        drafts = drafts or [()] * len(sequences)
        n_positions = [1 + len(draft) for draft in drafts]
        if min(n_positions) == logits.size(1):
            logits = logits.flatten(0, 1)
        else:
            logits = torch.cat([row[:n] for row, n in zip(logits, n_positions, strict=True)])
        places = [(s, s.next_step + i) for s, n in zip(sequences, n_positions, strict=True) for i in range(n)]
        chosen = sample(logits, places)
        for sequence in sequences:
            sequence.next_step += 1
        values = to_host(chosen) if model_parallel_size() == 1 else None
        if values is None:  # one message has both: followers learn of changes with the tokens that they get anyway
            message = broadcast_from_first(torch.cat((chosen, to_device([int(announces)], chosen.device))))
            chosen, values, announces = message[:-1], to_host(message), False
        n_top = max(sequence.top_logprobs for sequence in sequences)
        logprobs = top = None
        if any(sequence.logprobs for sequence in sequences):
            logprobs = to_host(logprobs_of(logits, chosen))
        if n_top:
            likely = logits.log_softmax(-1).topk(min(n_top, logits.size(-1)))
            top = to_host(likely.indices), to_host(likely.values)
        return cls(list(sequences), drafts, chosen, values, announces, logprobs, top)

    def on_host(self) -> tuple[list[tuple[Sequence, list[Step]]], bool]:
        """The steps of each sequence, without reasons to finish; and whether changes were announced.

        A sequence has a step for each drafted token that equals the one chosen in its place, and one more.
        """
        tokens = self.values()
        n_tokens = sum(1 + len(draft) for draft in self.drafts)
        announced = self.announces or any(tokens[n_tokens:])
        logprobs = self.logprobs() if self.logprobs else None
        top = [list(zip(*row, strict=True)) for row in zip(*(f() for f in self.top), strict=True)] if self.top else None
        found, first = [], 0
        for sequence, draft in zip(self.sequences, self.drafts, strict=True):
            end = first + 1 + common_length(draft, tokens[first:])
            steps = [
                Step(
                    sequence.index,
                    tokens[i],
                    logprobs[i] if logprobs and sequence.logprobs else None,
                    None,
                    tuple(top[i][: sequence.top_logprobs]) if top else (),
                )
                for i in range(first, end)
            ]
            found.append((sequence, steps))
            first += 1 + len(draft)
        return found, announced

    def rewind(self) -> None:
        """Gives back what was drawn ahead for samplers that have no running sequence any more."""
        for sampler, sequences in by_sampler(self.sequences):
            if all(sequence.is_over for sequence in sequences):
                sampler.rewind()


def by_sampler(sequences: Iterable[Sequence]) -> list[tuple[Sampler, list[Sequence]]]:
    """The sequences grouped by the sampler that they share."""
    groups: dict[int, tuple[Sampler, list[Sequence]]] = {}
    for sequence in sequences:
        groups.setdefault(id(sequence.sampler), (sequence.sampler, []))[1].append(sequence)
    return list(groups.values())


def sample(logits: Tensor, places: Listed[tuple[Sequence, int]]) -> Tensor:
    """Draws a token for each place.

    Args:
        logits: (n, vocab) float32.
        places: n sequences, each with the step of its sampler.

    Returns:
        (n,) int64.
    """
    if all(sequence.sampler.is_greedy for sequence, _ in places):
        return logits.argmax(-1)
    groups: dict[int, list[int]] = {}
    for i, (sequence, _) in enumerate(places):
        groups.setdefault(0 if sequence.sampler.is_greedy else id(sequence.sampler), []).append(i)
    chosen = torch.empty(len(places), dtype=torch.int64, device=logits.device)
    for indices in groups.values():
        sampler = places[indices[0]][0].sampler
        rows = [places[i][0].noise_row for i in indices]
        steps = [places[i][1] for i in indices]
        if len(groups) == 1:
            return sampler(logits, rows, steps)
        index = to_device(indices, logits.device)
        chosen[index] = sampler(logits[index], rows, steps)
    return chosen


def common_length(a: Listed[int], b: Listed[int]) -> int:
    """Number of tokens that two sequences begin with in common."""
    pairs = zip(a, b, strict=False)
    return next((i for i, (x, y) in enumerate(pairs) if x != y), min(len(a), len(b)))
