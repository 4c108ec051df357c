"""Computes the log-probabilities of given texts, as sequences of the engine that generate nothing."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from llama.engine.engine import Engine
from llama.engine.output import TokenScore, TopLogprobs
from llama.engine.sampling import Sampler, logprobs_of
from llama.engine.sequence import Call
from llama.engine.sequence import Sequence as EngineSequence
from llama.errors import NonFiniteLogitsError


class PromptScores:
    """The log-probability of each token of a prompt given those before it, to be called with the prompt's logits.

    Args:
        index: its index in the call, for errors.
        n_top: number of most likely tokens to report in the place of each token.
        n_words: number of leading ids that are tokens; None for all.

    Attributes:
        scores: by position; (None, ()) for the first token.
    """

    def __init__(self, prompt: Sequence[int], index: int, n_top: int = 0, n_words: int | None = None) -> None:
        self.scores: list[TokenScore] = [(None, ())]
        self._index = index
        self._prompt = prompt
        self._n_top = n_top
        self._n_words = n_words

    def __call__(self, position: int, logits: Tensor) -> None:
        """Takes the logits (n, vocab) after the tokens from `position` on; a position may come again."""
        targets = self._prompt[position + 1 : position + 1 + len(logits)]
        logits = logits[: len(targets)]
        logprobs = logprobs_of(logits, torch.tensor(targets, dtype=torch.int64, device=logits.device)).tolist()
        if not all(map(math.isfinite, logprobs)):
            raise NonFiniteLogitsError(f"in text {self._index}")
        top = _top(logits, self._n_top, self._n_words)
        self.scores[position + 1 : position + 1 + len(targets)] = zip(logprobs, top, strict=True)


def score(engine: Engine, texts: Sequence[Sequence[int]]) -> list[list[float]]:
    """Returns the log-probability of each token given those before it; 0.0 for the first token of each text."""
    scorers = [PromptScores(text, i) for i, text in enumerate(texts)]
    observe_logits(engine, texts, scorers)
    return [[logprob or 0.0 for logprob, _ in scorer.scores] for scorer in scorers]


def observe_logits(
    engine: Engine, texts: Sequence[Sequence[int]], observers: Sequence[Callable[[int, Tensor], None]]
) -> None:
    """Runs the network over texts, and calls each one's observer as `Sequence.on_logits`."""
    greedy = Sampler(0.0, 1.0, len(texts), torch.Generator())
    sequences = [
        EngineSequence(list(text), greedy, i, 0, frozenset(), on_logits=observer)
        for i, (text, observer) in enumerate(zip(texts, observers, strict=True))
    ]
    for _ in engine.run(Call(sequences), whole=True):
        pass


def _top(logits: Tensor, n: int, n_words: int | None) -> list[TopLogprobs]:
    """The `n` most likely tokens at each position, and their log-probabilities, from logits (seqlen, vocab)."""
    if n == 0:
        return [()] * len(logits)
    of_words = logits.log_softmax(-1)[:, :n_words]
    values, ids = of_words.topk(min(n, of_words.size(-1)))
    return [tuple(zip(*both, strict=True)) for both in zip(ids.tolist(), values.tolist(), strict=True)]
