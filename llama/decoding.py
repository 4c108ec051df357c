"""The one loop that generates: prompts go into rows of the KV cache, each step adds a token to every row.

The prompts at work are the first rows of the cache, without gaps: where one ends, the last moves into its place, and
the next waiting prompt is prefilled behind it while the others stand. Knows nothing of text.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from llama.model import Transformer
from llama.runtime import agree, broadcast_from_first, is_first_of_group, to_device, to_host
from llama.sampling import Sampler
from llama.stepping import PlainStepper, Stepper

FinishReason = Literal["stop", "length"]
# What a prefill pass costs whatever its size, in positions: reading the weights, and on a GPU launching the kernels.
PASS_COST = {"cpu": 32}
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
    length: int  # number of its tokens in the cache
    left: int  # number of tokens that it may still bring
    token: int = -1  # the newest one, which is not in the cache yet
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
    model: Transformer,
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

    Args:
        prompts: token ids, checked by the caller; each at most `max_seq_len` long.
        lanes: those of the sampler's lanes that this replica's rows draw from, one a row of the cache that is used.
        max_gen_len: most tokens a prompt brings; the end of the cache's row may come first.
        ends: asked with a prompt's place and its newest token whether the prompt shall end there.
        stepper: takes the steps; None for a `PlainStepper`.

    Yields:
        The steps of each prompt in order, those of different prompts interleaved.
    """
    stepper = stepper or PlainStepper(model)
    waiting = deque(enumerate(prompts))
    free_lanes = list(lanes)
    heapq.heapify(free_lanes)
    rows: list[_Row] = []
    under_way: _Tokens | None = None  # a step that started before the one in front of it was booked
    try:
        while waiting or rows:
            if tokens := under_way:
                under_way = None
            elif new := _admit(model, waiting, rows, free_lanes, max_gen_len):
                logits = model.logits(_prefill(model, prompts, new, len(rows) - len(new)))
                tokens = _Tokens.choose(logits, new, sampler, logprobs)
            else:
                newest = to_device([row.token for row in rows], model.norm.weight.device)
                tokens = _Tokens.choose(_step(stepper, rows, newest), rows, sampler, logprobs)
            if stepper.looks_ahead and not waiting and len(tokens.rows) == len(rows) and _all_go_on(rows):
                logits = _step(stepper, rows, tokens.chosen)
                under_way = _Tokens.choose(logits, rows, sampler, logprobs)
            for row, token, score in tokens.on_host():
                if not row.ended:
                    yield _advance(row, token, score, eos_id, ends)
            if not under_way or all(row.ended for row in rows):
                for row in _compact(model, rows):
                    heapq.heappush(free_lanes, row.lane)
    finally:
        if under_way:
            sampler.step_back()


class StepsInStep:
    """The same steps, such that the ranks of a model-parallel group take equally many when a consumer leaves early.

    The first rank decides: where its consumer closes the iterator, the other ranks' ends too; where another rank's
    does, that rank goes on computing, unseen, until the first one is through.
    """

    def __init__(self, steps: Iterator[Step]) -> None:
        self._steps = steps
        self._first = is_first_of_group()
        self._over = False

    def __iter__(self) -> Iterator[Step]:
        while not self._over and (step := self._advance()):
            yield step

    def close(self) -> None:
        if self._first and not self._over:
            self._over = not agree(False)
        while not self._over:
            self._advance()

    def _advance(self) -> Step | None:
        self._over = True  # should the step fail, this rank leaves and waits for no other
        step = next(self._steps, None) if agree(True) else None
        self._over = step is None or step.finish_reason is not None
        return step


def _admit(
    model: Transformer,
    waiting: deque[tuple[int, Sequence[int]]],
    rows: list[_Row],
    free_lanes: list[int],
    max_gen_len: int,
) -> list[_Row]:
    """Takes waiting prompts into free rows of the cache, behind those at work; returns the new rows."""
    new = []
    while waiting and free_lanes:
        index, prompt = waiting.popleft()
        room = model.params.max_seq_len - len(prompt)
        new.append(_Row(index, heapq.heappop(free_lanes), len(prompt), left=min(max_gen_len, room)))
    rows += new
    return new


def _prefill(model: Transformer, prompts: Sequence[Sequence[int]], new: list[_Row], first_row: int) -> Tensor:
    """Puts the new rows' prompts into the cache, from `first_row` on; returns their last hidden states (bsz, dim)."""
    last: dict[int, Tensor] = {}
    for group in _groups(model, [prompts[row.prompt] for row in new]):
        h = prefill(model, [prompts[new[i].prompt] for i in group], rows=[first_row + i for i in group])
        for i, states in zip(group, h, strict=True):
            last[i] = states[new[i].length - 1].clone()  # a view would keep the whole pass alive
    return torch.stack([last[i] for i in range(len(new))])


def prefill(model: Transformer, prompts: Sequence[Sequence[int]], rows: Sequence[int]) -> Tensor:
    """One pass over right-padded prompts into those rows of the cache: hidden states (bsz, longest, dim).

    Padding stands behind a row's tokens, where causal attention keeps it from them; what it leaves in the cache is
    overwritten before any later token attends there.
    """
    device = model.norm.weight.device
    width = max(map(len, prompts))
    tokens = torch.tensor([[*prompt, *[0] * (width - len(prompt))] for prompt in prompts], device=device)
    return model.hidden_states(tokens, 0, kv_len=width, rows=torch.tensor(rows, device=device))


def prefill_groups(lengths: Sequence[int], most_positions: int, pass_cost: int) -> list[list[int]]:
    """Splits prompts into passes of like lengths, such that padding and passes together cost least.

    Args:
        lengths: of the prompts.
        most_positions: that a pass may have, padding counted, unless it is of one prompt.
        pass_cost: what each pass costs besides its positions, in positions.

    Returns:
        The places of each pass's prompts.
    """
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    best: list[tuple[int, int]] = [(0, 0)]  # for the first n prompts in order: the least cost, the last pass's start
    for end in range(1, len(order) + 1):
        costs = []
        for start in range(end):
            positions = lengths[order[start]] * (end - start)
            if positions <= most_positions or end - start == 1:
                costs.append((best[start][0] + positions + pass_cost, start))
        best.append(min(costs))
    groups: list[list[int]] = []
    end = len(order)
    while end:
        start = best[end][1]
        groups.append(order[start:end])
        end = start
    return groups[::-1]


def _groups(model: Transformer, prompts: Sequence[Sequence[int]]) -> list[list[int]]:
    device = model.norm.weight.device.type
    return prefill_groups([len(prompt) for prompt in prompts], model.params.prefill_tokens, PASS_COST.get(device, 512))


def _step(stepper: Stepper, rows: list[_Row], newest: Tensor) -> Tensor:
    """Feeds each row's newest token (bsz,); returns the logits (bsz, vocab) that choose the next ones."""
    lengths = [row.length for row in rows]
    for row in rows:
        row.length += 1
    return stepper(newest, lengths)


def _all_go_on(rows: list[_Row]) -> bool:
    """Whether each row has room for a token after the one that is on its way, which may end it all the same."""
    return all(row.left > 1 and not row.ended for row in rows)


def _advance(row: _Row, token: int, logprob: float | None, eos_id: int, ends: Callable[[int, int], bool]) -> Step:
    """Books the token to its row."""
    if row.left == 0 or token == eos_id:
        row.ended = True
        return Step(row.prompt, None, None, "stop" if row.left else "length")
    row.token = token
    row.left -= 1
    stopped = ends(row.prompt, token)
    row.ended = stopped or row.left == 0
    return Step(row.prompt, token, logprob, "stop" if stopped else "length" if row.ended else None)


def _compact(model: Transformer, rows: list[_Row]) -> list[_Row]:
    """Removes the ended rows, moving rows from the end into the gaps; returns those removed."""
    removed = [row for row in rows if row.ended]
    for i in reversed(range(len(rows))):
        if rows[i].ended:
            last = rows.pop()
            if i < len(rows):
                rows[i] = last
                for cache in model.caches:
                    cache.move_row(len(rows), i, last.length)
    return removed


def _logprobs_of(logits: Tensor, tokens: Tensor) -> Tensor:
    """log softmax(logits)[token]: (..., vocab) and (...) -> (...)."""
    return logits.log_softmax(-1).gather(-1, tokens.unsqueeze(-1)).squeeze(-1)


@torch.inference_mode()
def score(model: Transformer, texts: Sequence[Sequence[int]]) -> list[list[float]]:
    """The log-probability of each token given those before it; 0.0 for the first of each text, which has none.

    Uses the cache from its first row on, as many texts at a time as it has rows.
    """
    scores: list[list[float]] = [[] for _ in texts]
    n_rows = model.params.max_batch_size
    for start in range(0, len(texts), n_rows):
        chunk = texts[start : start + n_rows]
        for group in _groups(model, chunk):
            h = prefill(model, [chunk[i] for i in group], rows=range(len(group)))
            for i, states in zip(group, h, strict=True):
                scores[start + i] = [0.0, *_score_text(model, states, chunk[i])]
    return scores


def _score_text(model: Transformer, states: Tensor, text: Sequence[int]) -> list[float]:
    """Log-probabilities of text[1:], from hidden states (at least len(text), dim)."""
    targets = torch.tensor(text[1:], device=states.device)
    parts = zip(states[: len(targets)].split(_LOGPROB_POSITIONS), targets.split(_LOGPROB_POSITIONS), strict=True)
    return [score for h, target in parts for score in _logprobs_of(model.logits(h), target).tolist()]
