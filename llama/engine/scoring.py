"""Computes the log-probabilities of given texts."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from llama.engine.output import TokenScore, TopLogprobs
from llama.engine.runner import ModelRunner
from llama.engine.sampling import logprobs_of
from llama.errors import NonFiniteLogitsError

_LOGIT_POSITIONS = 512  # maximum number of positions whose logits are in memory at a time


def logits_in_slices(runner: ModelRunner, rows: Sequence[Sequence[int]]) -> Iterator[tuple[list[int], int, Tensor]]:
    """Runs the network over given rows, which are grouped by length and right-padded. Overwrites the KV cache.

    Causal attention hides the padding from the tokens before it.

    Yields:
        The indices of a group's rows, a position, and the logits (bsz, n, vocab) after the n tokens from there on.
    """
    for start in range(0, len(rows), runner.max_batch_size):
        batch = rows[start : start + runner.max_batch_size]
        for group in runner.groups([len(row) for row in batch]):
            tokens = runner.pad([batch[i] for i in group])
            n_positions = max(1, _LOGIT_POSITIONS // len(group))
            for position in range(0, tokens.size(1), n_positions):
                yield (
                    [start + i for i in group],
                    position,
                    runner.run(tokens[:, position : position + n_positions], position),
                )


@torch.inference_mode()
def score(model: Any, texts: Sequence[Sequence[int]]) -> list[list[float]]:
    """Returns the log-probability of each token given those before it; 0.0 for the first token of each text.

    Overwrites the KV cache.
    """
    return [[logprob or 0.0 for logprob, _ in scores] for scores in score_top(model, texts, 0)]


@torch.inference_mode()
def score_top(
    model: Any, texts: Sequence[Sequence[int]], n_top: int, n_words: int | None = None
) -> list[list[TokenScore]]:
    """Returns each token's log-probability given those before it, and the `n_top` most likely tokens in its place.

    The first token of each text gets (None, ()). Overwrites the KV cache.

    Args:
        n_words: number of leading ids that are tokens; None for all.
    """
    scores: list[list[TokenScore]] = [[(None, ())] for _ in texts]
    for group, position, logits in logits_in_slices(ModelRunner(model), [text[:-1] or text for text in texts]):
        for i, row in zip(group, logits, strict=True):
            targets = texts[i][position + 1 : position + 1 + len(row)]
            row = row[: len(targets)]
            if targets:
                logprobs = logprobs_of(row, torch.tensor(targets, device=row.device)).tolist()
                if not all(map(math.isfinite, logprobs)):
                    raise NonFiniteLogitsError(f"in text {i}")
                scores[i] += zip(logprobs, _top(row, n_top, n_words), strict=True)
    return scores


def _top(logits: Tensor, n: int, n_words: int | None) -> list[TopLogprobs]:
    """The `n` most likely tokens at each position, and their log-probabilities, from logits (seqlen, vocab)."""
    if n == 0:
        return [()] * len(logits)
    of_words = logits.log_softmax(-1)[:, :n_words]
    values, ids = of_words.topk(min(n, of_words.size(-1)))
    return [tuple(zip(*both, strict=True)) for both in zip(ids.tolist(), values.tolist(), strict=True)]
