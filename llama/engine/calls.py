"""Completes, streams and scores checked prompts with the engine, distributing them over the network's replicas."""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import AbstractContextManager, closing
from typing import Any, TypeVar

import torch
from torch import Tensor

from llama.args import ModelArgs
from llama.checkpoint.memory import out_of_memory_explained
from llama.distributed import groups
from llama.distributed.device import default_generator
from llama.engine.engine import Engine
from llama.engine.lock import lock_of
from llama.engine.output import Completion
from llama.engine.runner import device_of, dtype_of
from llama.engine.sampling import Sampler
from llama.engine.scoring import score
from llama.engine.sequence import Call, TokenResult
from llama.engine.sequence import Sequence as EngineSequence
from llama.inputs import SamplingParams
from llama.tokenizer import IncrementalDetokenizer, Tokenizer

Result = TypeVar("Result")
_stream_numbers = itertools.count()  # the same on all ranks, which open the same streams
_SEED_STEP = 0x9E3779B97F4A7C15  # between the seeds of a call's prompts; 2**64 divided by the golden ratio


class Completer:
    """Completes, streams and scores prompts, given as token ids.

    Args:
        engine: runs the network.
        tokenizer: the network's tokenizer.
        draw: called instead of `sampling.sample_top_p`; None for the built-in sampling.
    """

    def __init__(self, engine: Engine, tokenizer: Tokenizer, draw: Callable[[Tensor, float], Tensor] | None) -> None:
        self._engine = engine
        self._model = engine.model
        self._tokenizer = tokenizer
        self._draw = draw

    def complete(self, prompts: list[list[int]], params: SamplingParams) -> list[Completion]:
        """Completes prompts; each replica computes a share of them. Returns completions in the order of the prompts."""
        with groups.rank_errors():
            samplers = _CallSamplers(self._model, params, len(prompts), groups.replica(), self._draw)
            rows = self._spread(prompts, lambda share: self._complete_share(share, params, samplers))
            samplers.end()
            return rows

    def _complete_share(
        self, prompts: list[list[int]], params: SamplingParams, samplers: _CallSamplers
    ) -> list[Completion]:
        texts = [
            IncrementalDetokenizer(self._tokenizer, params.stop, prompt if params.echo else ()) for prompt in prompts
        ]
        rows = [Completion(tokens=list(prompt) if params.echo else []) for prompt in prompts]
        if params.logprobs and params.echo:
            for row, logprobs in zip(rows, self._score_share(prompts), strict=True):
                row.logprobs = logprobs
        for step in self._steps(prompts, params, samplers, [_push(text) for text in texts], whole=True):
            row = rows[step.sequence]
            if step.token is not None:
                row.tokens.append(step.token)
            if step.logprob is not None:
                row.logprobs.append(step.logprob)
            row.finish_reason = step.finish_reason or row.finish_reason
        return [with_text(row, text) for row, text in zip(rows, texts, strict=True)]

    def stream(self, prompt: list[int], params: SamplingParams) -> Generator[str, None, None]:
        """Completes one prompt, yielding its text as it becomes final."""
        pieces = self._pieces(prompt, params)
        next(pieces)  # enters its `with`, so that the other ranks learn of a stream closed before its first piece
        return pieces

    def _pieces(self, prompt: list[int], params: SamplingParams) -> Generator[str, None, None]:
        text = IncrementalDetokenizer(self._tokenizer, params.stop, prompt if params.echo else ())
        final = deque(text.prefix_pieces)

        def ends(token: int) -> bool:
            final.append(text.push(token))
            return text.stopped

        samplers = _CallSamplers(self._model, params, 1, (0, 1), self._draw)  # every replica computes the stream
        with closing(_InLockstep(self._steps([prompt], params, samplers, [ends]))) as steps:
            yield ""
            for _ in steps:
                yield from _drain(final)
        final.append(text.finish())
        yield from _drain(final)

    def score(self, rows: list[list[int]]) -> list[list[float]]:
        """Returns the log-probability of each id given those before it; each replica computes a share of the rows."""
        with groups.rank_errors():
            return self._spread(rows, self._score_share)

    def _score_share(self, rows: list[list[int]]) -> list[list[float]]:
        with self._out_of_memory_explained(), lock_of(self._model):
            return score(self._model, rows)

    def _steps(
        self,
        prompts: list[list[int]],
        params: SamplingParams,
        samplers: _CallSamplers,
        ends: Sequence[Callable[[int], bool]],
        *,
        whole: bool = False,
    ) -> Generator[TokenResult, None, None]:
        if params.max_gen_len == 0:
            return
        call = Call(
            EngineSequence(
                list(prompt),
                *samplers.sampler_and_noise_row(i),
                params.max_gen_len,
                frozenset({self._tokenizer.eos_id}),
                logprobs=params.logprobs,
                ends=end,
                speculative=params.speculative,
            )
            for i, (prompt, end) in enumerate(zip(prompts, ends, strict=True))
        )
        with self._out_of_memory_explained():
            yield from self._engine.run(call, whole=whole)

    def _out_of_memory_explained(self) -> AbstractContextManager[None]:
        args, mp = ModelArgs.of(self._model.params), groups.model_parallel_size()
        return out_of_memory_explained(args, mp, dtype_of(self._model), str(device_of(self._model)))

    def _spread(self, prompts: list[list[int]], work: Callable[[list[list[int]]], list[Result]]) -> list[Result]:
        """Calls `work` with this replica's share of the prompts; returns all replicas' results, in prompt order."""
        replica, n_replicas = groups.replica()
        shares = groups.gather_replicas(work(prompts[replica::n_replicas]))
        return [shares[i % n_replicas][i // n_replicas] for i in range(len(prompts))]


class _CallSamplers:
    """The samplers of one call's prompts.

    The first prompts, as many as all replicas together have slots, share one sampler, as the rows of a batch do in
    Meta's code. Each further prompt has its own sampler, seeded by its index in the call, so that its random numbers
    depend neither on when it gets a slot nor on the number of replicas.
    """

    def __init__(
        self,
        model: Any,
        params: SamplingParams,
        n_prompts: int,
        replica: tuple[int, int],
        draw: Callable[[Tensor, float], Tensor] | None,
    ) -> None:
        """
        Args:
            n_prompts: number of prompts on all replicas together.
            replica: index of this replica among those that share the prompts, and their number.
        """
        self._params = params
        self._draw = draw
        self._device = device_of(model)
        self._vocab_size: int = model.params.vocab_size
        self._replica, self._n_replicas = replica
        self._n_shared = min(n_prompts, model.params.max_batch_size * self._n_replicas)
        generator = default_generator(self._device)
        if params.seed is not None:
            generator = torch.Generator(self._device).manual_seed(params.seed)
        self._shared = self._sampler(self._n_shared, generator)
        self._seed = params.seed
        if n_prompts > self._n_shared and params.seed is None and not self._shared.is_greedy:
            self._seed = int(torch.randint(2**62, (1,), generator=generator, device=self._device))

    def _sampler(self, n_rows: int, generator: torch.Generator) -> Sampler:
        return Sampler(self._params.temperature, self._params.top_p, n_rows, generator, self._draw)

    def sampler_and_noise_row(self, i: int) -> tuple[Sampler, int]:
        """Returns the sampler and noise row of the i-th prompt in this replica's share."""
        index = self._replica + i * self._n_replicas  # in the call
        if index < self._n_shared or self._seed is None:
            return self._shared, index
        seed = (self._seed + index * _SEED_STEP) % 2**64
        return self._sampler(1, torch.Generator(self._device).manual_seed(seed)), 0

    def end(self) -> None:
        """Brings the generators of all replicas to the same state, that of the replica that took the most steps."""
        max_steps = max(groups.gather_replicas(self._shared.steps))
        self._shared.skip_to(max_steps, self._vocab_size)


class _InLockstep:
    """Iterates over a stream's steps, keeping the ranks of a model-parallel group in lockstep if one is closed early.

    The first rank decides when the stream ends: if it is closed there, it also ends on the other ranks. A stream that
    is closed on another rank keeps computing, discarding the steps, until it ends on the first rank.
    """

    def __init__(self, steps: Generator[TokenResult, None, None]) -> None:
        self._steps = steps
        self._number = next(_stream_numbers)
        self._is_finished = False

    def __iter__(self) -> Iterator[TokenResult]:
        while not self._is_finished:
            if (step := self._advance()) is not None:
                yield step

    def close(self) -> None:
        """Ends the stream: on all ranks if called on the first one, else after it has ended there."""
        if groups.is_first_of_group() and not self._is_finished:
            with groups.rank_errors():
                self._is_finished = not groups.broadcast_flag(False, stream=self._number)
        while not self._is_finished:
            self._advance()
        self._steps.close()

    def _advance(self) -> TokenResult | None:
        self._is_finished = True  # if the step fails, `close` must not wait for other ranks
        with groups.rank_errors():
            step = next(self._steps, None) if groups.broadcast_flag(True, stream=self._number) else None
        self._is_finished = step is None or step.finish_reason is not None
        return step


def complete_by_generate(
    generate: Callable[..., Any],
    prompts: list[list[int]],
    params: SamplingParams,
    tokenizer: Tokenizer,
    max_seq_len: int,
) -> list[Completion]:
    """Completes prompts with a replacement of `generate`, called with the arguments that Meta's code passes."""
    kwargs = {name: getattr(params, name) for name in ("max_gen_len", "temperature", "top_p", "logprobs", "echo")}
    if params.seed is not None:
        kwargs["seed"] = params.seed
    tokens, logprobs = generate(prompt_tokens=prompts, **kwargs)
    rows = []
    for i, (prompt, ids) in enumerate(zip(prompts, tokens, strict=True)):
        n_echoed = len(prompt) if params.echo else 0
        text = IncrementalDetokenizer(tokenizer, params.stop, ids[:n_echoed])
        for n_new, token in enumerate(ids[n_echoed:], start=1):
            text.push(token)
            if text.stopped:
                ids = ids[: n_echoed + n_new]
        row = Completion(tokens=list(ids), logprobs=list(logprobs[i]) if logprobs else [])
        limit = min(params.max_gen_len, max_seq_len - len(prompt))
        row.finish_reason = "stop" if len(ids) - n_echoed < limit else "length"
        rows.append(with_text(row, text))
    return rows


def with_text(row: Completion, text: IncrementalDetokenizer) -> Completion:
    """Finishes the text, and adds its pieces to the row, cut at a stop string. Returns the row."""
    text.finish()
    if text.stopped:
        row.finish_reason = "stop"
    row.pieces = text.prefix_pieces + text.pieces
    row.logprobs = row.logprobs[: len(row.pieces)]
    return row


def _push(text: IncrementalDetokenizer) -> Callable[[int], bool]:
    """Returns a function that pushes a token, and returns whether it completed a stop string."""

    def ends(token: int) -> bool:
        text.push(token)
        return text.stopped

    return ends


def _drain(pieces: deque[str]) -> Iterator[str]:
    """Removes all pieces, and yields the non-empty ones."""
    while pieces:
        if piece := pieces.popleft():
            yield piece
