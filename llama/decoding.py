"""The one loop that generates: prompts go into rows of the KV cache, each step adds a token to every row.

The running prompts are the first rows of the cache, without gaps: where one ends, the last moves into its place, and
the next waiting prompt is prefilled behind it while the others stand. This is continuous batching.
"""

from __future__ import annotations

import heapq
import itertools
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from llama.runner import ModelRunner
from llama.runtime import broadcast_flag, broadcast_from_first, is_first_of_group, to_device, to_host
from llama.sampling import Sampler
from llama.stepping import Stepper

FinishReason = Literal["stop", "length"]
_stream_numbers = itertools.count()  # alike on all ranks, which open the same streams
_LOGPROB_POSITIONS = 512  # positions whose logits are held at a time when whole prompts are scored


@dataclass(frozen=True)
class Step:
    """What one step brought to one prompt.

    Attributes:
        prompt: the prompt's place in the call.
        token: the new token; None if the row ended without one (at EOS, or with no room for a token).
        logprob: log-probability of the token under the raw logits; only if asked for.
        finish_reason: why this is the prompt's last step; None if it is not.
    """

    prompt: int
    token: int | None
    logprob: float | None
    finish_reason: FinishReason | None


@dataclass
class _Row:
    """A prompt at work. Its place in the list of rows is its row in the cache."""

    prompt: int
    lane: int  # which numbers of the random stream are its own
    tokens: list[int]  # of the prompt and the completion so far
    length: int  # number of its tokens in the cache, from the first one on
    left: int  # number of tokens that it may still bring
    ended: bool = False


@dataclass(frozen=True)
class _Tokens:
    """What a step chose for its rows. The values may still be on their way to the host.

    Attributes:
        rows: those of the step, in their order.
        chosen: (bsz,) int64 on the device, the same on all ranks of a model-parallel group.
        values: waits for them: the tokens.
        scores: likewise their log-probabilities, or None for each.
    """

    rows: list[_Row]
    chosen: Tensor
    values: Callable[[], list[int]]
    scores: Callable[[], list[float] | list[None]]

    @classmethod
    def choose(cls, logits: Tensor, rows: list[_Row], sampler: Sampler, logprobs: bool) -> _Tokens:
        """Samples from logits (bsz, vocab)."""
        lanes = to_device([row.lane for row in rows], logits.device)
        chosen = broadcast_from_first(sampler(logits, lanes))
        nothing: list[None] = [None] * len(rows)
        scores = to_host(_logprobs_of(logits, chosen)) if logprobs else lambda: nothing
        return cls(list(rows), chosen, to_host(chosen), scores)

    def on_host(self) -> Iterator[tuple[_Row, int, float | None]]:
        return zip(self.rows, self.values(), self.scores(), strict=True)


@torch.inference_mode()
def decode(
    model: Any,
    prompts: Sequence[Sequence[int]],
    sampler: Sampler,
    *,
    lanes: Sequence[int],
    max_gen_len: int,
    eos_id: int,
    logprobs: bool = False,
    ends: Callable[[int, int], bool] = lambda prompt, token: False,
    stepper: Stepper | None = None,
) -> Iterator[Step]:
    """Generates for any number of prompts, as many at a time as the cache has rows.

    Between two steps others may use the model: what they overwrote in the cache is computed anew.

    Args:
        prompts: token ids, checked by the caller; each at most `max_seq_len` long.
        lanes: those of the sampler's lanes that this replica's rows draw from, one a row of the cache that is used.
        max_gen_len: most tokens a prompt brings; the end of the cache's row may come first.
        ends: asked with a prompt's place and its newest token whether the prompt shall end there.
        stepper: takes the steps of an unmodified network; None for plain calls.

    Yields:
        The steps of each prompt in order, those of different prompts interleaved.
    """
    runner = ModelRunner(model, stepper)
    waiting = deque(enumerate(prompts))
    free_lanes = list(lanes)
    heapq.heapify(free_lanes)
    rows: list[_Row] = []
    in_flight: _Tokens | None = None  # a step that started before the tokens in front of it were known to the host
    try:
        while waiting or rows:
            if tokens := in_flight:
                in_flight = None
            elif new := _admit(runner, waiting, rows, free_lanes, max_gen_len):
                _restore(runner, rows[: len(rows) - len(new)])
                first = len(rows) - len(new)
                logits = runner.prefill([row.tokens for row in new], range(first, len(rows)))
                tokens = _Tokens.choose(logits, new, sampler, logprobs)
            else:
                newest = to_device([row.tokens[-1] for row in rows], runner.device)
                tokens = _Tokens.choose(_step(runner, rows, newest), rows, sampler, logprobs)
            if runner.looks_ahead and not waiting and len(tokens.rows) == len(rows) and _all_go_on(rows):
                logits = _step(runner, rows, tokens.chosen)
                in_flight = _Tokens.choose(logits, rows, sampler, logprobs)
            for row, token, score in tokens.on_host():
                if not row.ended:
                    yield _advance(row, token, score, eos_id, ends)
            if not in_flight or all(row.ended for row in rows):
                for row in _compact(runner, rows):
                    heapq.heappush(free_lanes, row.lane)
    finally:
        if in_flight:
            sampler.step_back()


class StepsInStep:
    """The same steps, such that the ranks of a model-parallel group take equally many when a consumer leaves early.

    The first rank decides: where its consumer closes the iterator, the other ranks' ends too; where another rank's
    does, that rank goes on computing, unseen, until the first one is through.
    """

    def __init__(self, steps: Iterator[Step]) -> None:
        self._steps = steps
        self._first = is_first_of_group()
        self._number = next(_stream_numbers)
        self._over = False

    def __iter__(self) -> Iterator[Step]:
        while step := self.take():
            yield step

    def take(self) -> Step | None:
        """The next step; None once there are no more."""
        return None if self._over else self._advance()

    def close(self) -> None:
        if self._first and not self._over:
            self._over = not broadcast_flag(False, stream=self._number)
        while not self._over:
            self._advance()

    def _advance(self) -> Step | None:
        self._over = True  # should the step fail, this rank leaves and waits for no other
        step = next(self._steps, None) if broadcast_flag(True, stream=self._number) else None
        self._over = step is None or step.finish_reason is not None
        return step


def _admit(
    runner: ModelRunner,
    waiting: deque[tuple[int, Sequence[int]]],
    rows: list[_Row],
    free_lanes: list[int],
    max_gen_len: int,
) -> list[_Row]:
    """Takes waiting prompts into free rows of the cache, behind the running ones; returns the new rows.

    Where the network takes one position for all rows, only prompts of one length go together.
    """
    if runner.one_position and rows:
        return []
    new: list[_Row] = []
    passed_over: list[tuple[int, Sequence[int]]] = []
    while waiting and free_lanes:
        place, prompt = waiting.popleft()
        if runner.one_position and new and len(prompt) != new[0].length:
            passed_over.append((place, prompt))
            continue
        left = min(max_gen_len, runner.max_seq_len - len(prompt))
        new.append(_Row(place, heapq.heappop(free_lanes), list(prompt), len(prompt), left))
    waiting.extendleft(reversed(passed_over))
    rows += new
    return new


def _step(runner: ModelRunner, rows: list[_Row], newest: Tensor) -> Tensor:
    """Feeds each row's newest token (bsz,); returns the logits (bsz, vocab) that choose the next ones."""
    _restore(runner, rows)
    lengths = [row.length for row in rows]
    for row in rows:
        row.length += 1
    return runner.step(newest, lengths)


def _restore(runner: ModelRunner, rows: list[_Row]) -> None:
    """Computes the rows' keys and values anew if another use of the model has overwritten them."""
    if rows and runner.has_lost_cache():
        runner.prefill([row.tokens[: row.length] for row in rows], range(len(rows)))


def _all_go_on(rows: list[_Row]) -> bool:
    """Whether each row has room for a token after the one that is on its way, which may end it all the same."""
    return all(row.left > 1 and not row.ended for row in rows)


def _advance(row: _Row, token: int, logprob: float | None, eos_id: int, ends: Callable[[int, int], bool]) -> Step:
    """Records the token in its row."""
    row.tokens.append(token)
    if row.left == 0 or token == eos_id:
        row.ended = True
        return Step(row.prompt, None, None, "stop" if row.left else "length")
    row.left -= 1
    stopped = ends(row.prompt, token)
    row.ended = stopped or row.left == 0
    return Step(row.prompt, token, logprob, "stop" if stopped else "length" if row.ended else None)


def _compact(runner: ModelRunner, rows: list[_Row]) -> list[_Row]:
    """Removes the ended rows, moving rows from the end into the gaps; returns those removed.

    Where the network takes one position for all rows, they stay until all have ended.
    """
    if runner.one_position and not all(row.ended for row in rows):
        return []
    removed = [row for row in rows if row.ended]
    for i in reversed(range(len(rows))):
        if rows[i].ended:
            last = rows.pop()
            if i < len(rows):
                rows[i] = last
                runner.move_row(len(rows), i, last.length)
    return removed


def _logprobs_of(logits: Tensor, tokens: Tensor) -> Tensor:
    """log softmax(logits)[token]: (..., vocab) and (...) -> (...)."""
    return logits.log_softmax(-1).gather(-1, tokens.unsqueeze(-1)).squeeze(-1)


@torch.inference_mode()
def score(model: Any, texts: Sequence[Sequence[int]]) -> list[list[float]]:
    """The log-probability of each token given those before it; 0.0 for the first of each text, which has none.

    Uses the cache from its first row on, as many texts at a time as it has rows.
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
    """`score` of texts in one batch, right-padded: causal attention keeps padding from the tokens in front of it."""
    scores = [[0.0] for _ in texts]
    tokens = runner.pad(texts)
    n_positions = max(1, _LOGPROB_POSITIONS // len(texts))
    for start in range(0, tokens.size(1) - 1, n_positions):
        targets = tokens[:, start + 1 : start + 1 + n_positions]
        logits = runner.run(tokens[:, start : start + targets.size(1)], start)
        for text, row, logprobs in zip(texts, scores, _logprobs_of(logits, targets).tolist(), strict=True):
            row += logprobs[: max(0, len(text) - 1 - start)]
    return scores
