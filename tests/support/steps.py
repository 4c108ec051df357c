"""Calls of the engine in one line, for tests of the loop."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from llama.engine.cuda_graphs import Stepper
from llama.engine.engine import engine_of
from llama.engine.sampling import Sampler
from llama.engine.sequence import Call, TokenResult
from llama.engine.sequence import Sequence as EngineSequence


def decode(
    model: Any,
    prompts: Sequence[Sequence[int]],
    sampler: Sampler,
    *,
    rows: Sequence[int],
    max_gen_len: int,
    eos_id: int,
    logprobs: bool = False,
    ends: Callable[[int, int], bool] = lambda prompt, token: False,
    stepper: Stepper | None = None,
) -> Iterator[TokenResult]:
    """The steps of one call. The first prompts share `sampler`; those beyond have samplers of their own.

    Args:
        ends: called with a prompt's place and its newest token.
    """

    def sequence(place: int, prompt: Sequence[int]) -> EngineSequence:
        mine, row = sampler, rows[place % len(rows)]
        if place >= len(rows) and not sampler.is_greedy:
            generator = torch.Generator(sampler.generator.device).manual_seed(1000 + place)
            mine, row = Sampler(sampler.temperature, sampler.top_p, 1, generator), 0
        return EngineSequence(
            list(prompt),
            mine,
            row,
            max_gen_len,
            frozenset({eos_id}),
            logprobs,
            ends=lambda token, _: ends(place, token),
        )

    engine = engine_of(model, stepper)
    yield from engine.run(Call(sequence(place, prompt) for place, prompt in enumerate(prompts)))
