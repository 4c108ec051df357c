"""Computes the log-probabilities of given texts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from llama.engine.runner import ModelRunner
from llama.engine.sampling import logprobs_of

_LOGPROB_POSITIONS = 512  # maximum number of positions whose logits are in memory at a time


@torch.inference_mode()
def score(model: Any, texts: Sequence[Sequence[int]]) -> list[list[float]]:
    """Returns the log-probability of each token given those before it; 0.0 for the first token of each text.

    Overwrites the KV cache.
    """
    runner = ModelRunner(model)
    scores: list[list[float]] = [[] for _ in texts]
    for start in range(0, len(texts), runner.max_batch_size):
        chunk = texts[start : start + runner.max_batch_size]
        for group in runner.groups([len(text) for text in chunk]):
            for i, logprobs in zip(group, _score_group(runner, [chunk[i] for i in group]), strict=True):
                scores[start + i] = logprobs
    return scores


def _score_group(runner: ModelRunner, texts: Sequence[Sequence[int]]) -> list[list[float]]:
    """Scores texts in one right-padded batch; causal attention hides the padding from the tokens before it."""
    scores = [[0.0] for _ in texts]
    tokens = runner.pad(texts)
    n_positions = max(1, _LOGPROB_POSITIONS // len(texts))  # per row
    for start in range(0, tokens.size(1) - 1, n_positions):
        targets = tokens[:, start + 1 : start + 1 + n_positions]
        logits = runner.run(tokens[:, start : start + targets.size(1)], start)
        for text, row, logprobs in zip(texts, scores, logprobs_of(logits, targets).tolist(), strict=True):
            row += logprobs[: max(0, len(text) - 1 - start)]
    return scores
