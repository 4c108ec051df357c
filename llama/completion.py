"""From checked prompts to completions: calls of the engine, whole or streamed, spread over the network's replicas."""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import AbstractContextManager, closing
from typing import Any, TypeVar

import torch
from torch import Tensor

from llama import runtime
from llama.args import ModelArgs
from llama.engine import Engine
from llama.inputs import SamplingParams
from llama.memory import out_of_memory_explained
from llama.results import Completion
from llama.runner import device_of, dtype_of, lock_of
from llama.sampling import Sampler
from llama.scoring import score
from llama.sequence import Call, Step
from llama.sequence import Sequence as EngineSequence
from llama.tokenizer import IncrementalDetokenizer, Tokenizer

Result = TypeVar("Result")
_stream_numbers = itertools.count()  # alike on all ranks, which open the same streams
_GOLDEN = 0x9E3779B97F4A7C15  # spreads the seeds of one call's prompts


class Completer:
    """Completes, streams and scores prompts of ids with one network and its tokenizer.

    Args:
        engine: runs the network.
        tokenizer: of the network.
        draw: replaces `sampling.sample_top_p`; None for the built-in sampling.
    """

    def __init__(self, engine: Engine, tokenizer: Tokenizer, draw: Callable[[Tensor, float], Tensor] | None) -> None:
        self._engine = engine
        self._model = engine.model
        self._tokenizer = tokenizer
        self._draw = draw

    def complete(self, prompts: list[list[int]], params: SamplingParams) -> list[Completion]:
        """Completions in the prompts' order; each replica computes its share."""
        with runtime.rank_errors():
            sampling = _Sampling(self._model, params, len(prompts), runtime.replica(), self._draw)
            rows = self._spread(prompts, lambda mine: self._complete_share(mine, params, sampling))
            sampling.end()
            return rows

    def _complete_share(
        self, prompts: list[list[int]], params: SamplingParams, sampling: _Sampling
    ) -> list[Completion]:
        texts = [
            IncrementalDetokenizer(self._tokenizer, params.stop, prompt if params.echo else ()) for prompt in prompts
        ]
        rows = [Completion(tokens=list(prompt) if params.echo else []) for prompt in prompts]
        if params.logprobs and params.echo:
            for row, logprobs in zip(rows, self._score_share(prompts), strict=True):
                row.logprobs = logprobs
        for step in self._steps(prompts, params, sampling, [_push(text) for text in texts]):
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
        next(pieces)  # enters its `with`, so that a stream closed before its first piece ends on the other ranks too
        return pieces

    def _pieces(self, prompt: list[int], params: SamplingParams) -> Generator[str, None, None]:
        text = IncrementalDetokenizer(self._tokenizer, params.stop, prompt if params.echo else ())
        settled = deque(text.prefix_pieces)

        def ends(token: int) -> bool:
            settled.append(text.push(token))
            return text.stopped

        sampling = _Sampling(self._model, params, 1, (0, 1), self._draw)  # every replica draws the whole stream
        with closing(_InLockstep(self._steps([prompt], params, sampling, [ends]))) as steps:
            yield ""
            for _ in steps:
                yield from _drain(settled)
        settled.append(text.finish())
        yield from _drain(settled)

    def score(self, rows: list[list[int]]) -> list[list[float]]:
        """The log-probability of each id given those before it; each replica computes its share."""
        with runtime.rank_errors():
            return self._spread(rows, self._score_share)

    def _score_share(self, rows: list[list[int]]) -> list[list[float]]:
        with self._out_of_memory_explained(), lock_of(self._model):
            return score(self._model, rows)

    def _steps(
        self,
        prompts: list[list[int]],
        params: SamplingParams,
        sampling: _Sampling,
        ends: Sequence[Callable[[int], bool]],
    ) -> Generator[Step, None, None]:
        if params.max_gen_len == 0:
            return
        call = Call(
            EngineSequence(
                list(prompt),
                *sampling.sampler_and_noise_row(place),
                params.max_gen_len,
                self._tokenizer.eos_id,
                logprobs=params.logprobs,
                ends=end,
                speculative=params.speculative,
            )
            for place, (prompt, end) in enumerate(zip(prompts, ends, strict=True))
        )
        with self._out_of_memory_explained():
            yield from self._engine.run(call)

    def _out_of_memory_explained(self) -> AbstractContextManager[None]:
        args, mp = ModelArgs.of(self._model.params), runtime.model_parallel_size()
        return out_of_memory_explained(args, mp, dtype_of(self._model), str(device_of(self._model)))

    def _spread(self, prompts: list[list[int]], work: Callable[[list[list[int]]], list[Result]]) -> list[Result]:
        """Has each replica do its share of the prompts; returns the results for all, in the prompts' order."""
        replica, n_replicas = runtime.replica()
        shares = runtime.gather_replicas(work(prompts[replica::n_replicas]))
        return [shares[i % n_replicas][i // n_replicas] for i in range(len(prompts))]


class _Sampling:
    """The random numbers of one call's prompts.

    As many prompts as there are slots, on all replicas together, share one sampler, as the rows of a batch do in Meta's
    code. Each prompt beyond has one of its own, seeded by its place in the call: what is drawn for it depends neither
    on when it gets a slot nor on the number of replicas.
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
            n_prompts: of all replicas together.
            replica: this one's place among the replicas that share the prompts, and how many they are.
        """
        self._params = params
        self._draw = draw
        self._device = device_of(model)
        self._vocab_size: int = model.params.vocab_size
        self._replica, self._n_replicas = replica
        self._n_shared = min(n_prompts, model.params.max_batch_size * self._n_replicas)
        generator = runtime.default_generator(self._device)
        if params.seed is not None:
            generator = torch.Generator(self._device).manual_seed(params.seed)
        self._shared = self._sampler(self._n_shared, generator)
        self._seed = params.seed
        if n_prompts > self._n_shared and params.seed is None and not self._shared.is_greedy:
            self._seed = int(torch.randint(2**62, (1,), generator=generator, device=self._device))

    def _sampler(self, n_rows: int, generator: torch.Generator) -> Sampler:
        return Sampler(self._params.temperature, self._params.top_p, n_rows, generator, self._draw)

    def sampler_and_noise_row(self, place: int) -> tuple[Sampler, int]:
        """Those of the prompt at that place of this replica's share."""
        index = self._replica + place * self._n_replicas  # in the call
        if index < self._n_shared or self._seed is None:
            return self._shared, index
        seed = (self._seed + index * _GOLDEN) % 2**64
        return self._sampler(1, torch.Generator(self._device).manual_seed(seed)), 0

    def end(self) -> None:
        """Leaves the default generators of all replicas in the same state."""
        most_steps = max(runtime.gather_replicas(self._shared.steps))
        self._shared.skip_to(most_steps, self._vocab_size)


class _InLockstep:
    """Steps of a stream, of which the ranks of a model-parallel group take equally many when a consumer leaves early.

    The first rank decides: where its consumer closes the stream, the other ranks' streams end too; where another rank's
    does, that rank goes on computing, unseen, until the first one is through.
    """

    def __init__(self, steps: Generator[Step, None, None]) -> None:
        self._steps = steps
        self._number = next(_stream_numbers)
        self._is_over = False

    def __iter__(self) -> Iterator[Step]:
        while not self._is_over:
            if (step := self._advance()) is not None:
                yield step

    def close(self) -> None:
        if runtime.is_first_of_group() and not self._is_over:
            with runtime.rank_errors():
                self._is_over = not runtime.broadcast_flag(False, stream=self._number)
        while not self._is_over:
            self._advance()
        self._steps.close()

    def _advance(self) -> Step | None:
        self._is_over = True  # should the step fail, this rank leaves and waits for no other
        with runtime.rank_errors():
            step = next(self._steps, None) if runtime.broadcast_flag(True, stream=self._number) else None
        self._is_over = step is None or step.finish_reason is not None
        return step


def complete_by_generate(
    generate: Callable[..., Any],
    prompts: list[list[int]],
    params: SamplingParams,
    tokenizer: Tokenizer,
    max_seq_len: int,
) -> list[Completion]:
    """The completions by a replaced `generate`, called with the arguments that Meta's code passes."""
    asked = {name: getattr(params, name) for name in ("max_gen_len", "temperature", "top_p", "logprobs", "echo")}
    if params.seed is not None:
        asked["seed"] = params.seed
    tokens, logprobs = generate(prompt_tokens=prompts, **asked)
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
    """The row with the pieces of its finished text, cut at a stop string."""
    text.finish()
    if text.stopped:
        row.finish_reason = "stop"
    row.pieces = text.prefix_pieces + text.pieces
    row.logprobs = row.logprobs[: len(row.pieces)]
    return row


def _push(text: IncrementalDetokenizer) -> Callable[[int], bool]:
    def ends(token: int) -> bool:
        text.push(token)
        return text.stopped

    return ends


def _drain(pieces: deque[str]) -> Iterator[str]:
    """Removes the pieces, and yields those that are not empty."""
    while pieces:
        if piece := pieces.popleft():
            yield piece
