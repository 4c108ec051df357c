"""What changes a sequence's logits before temperature and top-p: penalties, biases, limits, and callers' processors."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection

import torch
from torch import Tensor

from llama.inputs import SamplingParams

Process = Callable[[list[int], Tensor], Tensor]
"""Called with a sequence's tokens so far and its logits (vocab,) float32; returns the logits to sample from."""


def make_process(
    params: SamplingParams, n_prompt: int, stop_ids: Collection[int], constraint: Process | None = None
) -> Process | None:
    """Returns what the constraint, and then the parameters, do to the logits of one sequence; None for nothing."""
    steps: list[Process] = [] if constraint is None else [constraint]
    if params.logit_bias:
        steps.append(_bias(dict(params.logit_bias)))
    if params.repetition_penalty != 1:
        steps.append(lambda tokens, logits: _repetition(tokens, logits, params.repetition_penalty))
    if params.presence_penalty or params.frequency_penalty:
        presence, frequency = params.presence_penalty, params.frequency_penalty
        steps.append(lambda tokens, logits: _count(tokens[n_prompt:], logits, presence, frequency))
    if params.min_tokens and stop_ids:
        steps.append(lambda tokens, logits: _no_end(logits, stop_ids, len(tokens) - n_prompt < params.min_tokens))
    steps += [_of_hugging_face(processor) for processor in params.logits_processors]
    if params.min_p:
        steps.append(lambda tokens, logits: _min_p(logits, params.min_p))
    if params.top_k > 0:
        steps.append(lambda tokens, logits: _top_k(logits, params.top_k))
    if params.typical_p < 1:
        steps.append(lambda tokens, logits: _typical(logits, params.typical_p))
    if not steps:
        return None

    def process(tokens: list[int], logits: Tensor) -> Tensor:
        for step in steps:
            logits = step(tokens, logits)
        return logits

    return process


def _bias(bias: dict[int, float]) -> Process:
    ids, values = torch.tensor(list(bias)), torch.tensor(list(bias.values()))

    def add(tokens: list[int], logits: Tensor) -> Tensor:
        return logits.index_add(0, ids.to(logits.device), values.to(logits))

    return add


def _repetition(tokens: list[int], logits: Tensor, penalty: float) -> Tensor:
    """Divides positive logits of the tokens so far by the penalty, and multiplies negative ones (CTRL, 2019)."""
    seen = torch.tensor(sorted(set(tokens)), device=logits.device)
    found = logits[seen]
    return logits.index_copy(0, seen, torch.where(found < 0, found * penalty, found / penalty))


def _count(generated: list[int], logits: Tensor, presence: float, frequency: float) -> Tensor:
    """Subtracts `presence` from the logits of generated tokens, and `frequency` per occurrence (OpenAI's API)."""
    if not generated:
        return logits
    ids, counts = torch.tensor(generated, device=logits.device).unique(return_counts=True)
    return logits.index_add(0, ids, -(presence + frequency * counts.to(logits)))


def _no_end(logits: Tensor, stop_ids: Collection[int], is_early: bool) -> Tensor:
    """Excludes the tokens that end the sequence while it is too short."""
    if not is_early:
        return logits
    ids = torch.tensor([token for token in stop_ids if token < len(logits)], device=logits.device, dtype=torch.int64)
    return logits.index_fill(0, ids, -math.inf)


def _min_p(logits: Tensor, min_p: float) -> Tensor:
    """Excludes tokens less probable than `min_p` times the most probable one (Nguyen et al., 2024)."""
    return logits.masked_fill(logits < logits.max() + math.log(min_p), -math.inf)


def _top_k(logits: Tensor, k: int) -> Tensor:
    """Excludes tokens less probable than the k-th most probable one."""
    return logits.masked_fill(logits < logits.topk(min(k, len(logits))).values[-1], -math.inf)


def _typical(logits: Tensor, mass: float) -> Tensor:
    """Keeps the tokens whose information is closest to the entropy, up to a probability mass (Meister et al., 2022)."""
    logprobs = logits.log_softmax(-1)
    entropy = -(logprobs.exp() * logprobs).nansum()
    order = ((-logprobs) - entropy).abs().argsort()
    cumulative = logprobs[order].exp().cumsum(0)
    n_kept = int((cumulative < mass).sum()) + 1
    return logits.index_fill(0, order[n_kept:], -math.inf)


def _of_hugging_face(processor: Callable[[Tensor, Tensor], Tensor]) -> Process:
    """A processor in Hugging Face's form, called with `input_ids` (1, n) int64 and `scores` (1, vocab)."""

    def process(tokens: list[int], logits: Tensor) -> Tensor:
        scores = processor(torch.tensor([tokens], device=logits.device), logits.unsqueeze(0))
        if not isinstance(scores, Tensor) or scores.shape != (1, len(logits)):
            got = tuple(scores.shape) if isinstance(scores, Tensor) else type(scores).__name__
            raise ValueError(f"a logits processor must return scores of shape (1, {len(logits)}), got {got}")
        return scores[0]

    return process
