"""Calls of the engine in one line, and the passes that they make, for tests of the loop."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import one_hot

from llama import Llama
from llama.engine.compiler import Compiled, Job, export_job
from llama.engine.engine import engine_of
from llama.engine.runner import Stepper
from llama.engine.sampling import Sampler
from llama.engine.sequence import Call, TokenResult
from llama.engine.sequence import Sequence as EngineSequence


def greedy(prompt: Sequence[int], max_gen_len: int) -> EngineSequence:
    return EngineSequence(list(prompt), Sampler(0.0, 1.0, 1, torch.Generator()), 0, max_gen_len, frozenset())


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


@contextmanager
def seen_tokens(model: Any) -> Iterator[list[Tensor]]:
    """What goes into the network meanwhile: the (bsz, seqlen) ids of each pass."""
    passes: list[Tensor] = []
    handle = model.tok_embeddings.register_forward_pre_hook(lambda _, args: passes.append(args[0].clone()))
    yield passes
    handle.remove()


@contextmanager
def dictated(llama: Llama, ids: Sequence[int]) -> Iterator[None]:
    """The network finds these ids the likeliest, one after the other, and then EOS."""
    script = iter([*ids, llama.tokenizer.eos_id])
    handle = llama.model.output.register_forward_hook(
        lambda _, args, out: 9.0 * one_hot(torch.full(out.shape[:-1], next(script)), out.shape[-1])
    )
    yield
    handle.remove()


class Traced:
    """In place of a `Compiler`: graphs that run as they are traced, since compiling one takes long."""

    traced: ClassVar[dict[str, dict[str, nn.Module]]] = {}  # by key, which says all that they depend on

    def __init__(self, key: str, jobs: Sequence[Job]) -> None:
        if key not in self.traced:
            self.traced[key] = {
                job.name: export_job(job, torch.device("cpu")).module(check_guards=False) for job in jobs
            }
        self.graphs = self.traced[key]

    def result(self, name: str, *, wait: bool) -> Compiled:
        return lambda inputs: [self.graphs[name](*inputs)]
