"""Completes, streams and scores checked prompts with the engine, distributing them over the network's replicas."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import AbstractContextManager, closing
from dataclasses import replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from llama.checkpoint.memory import out_of_memory_explained
from llama.distributed import groups
from llama.distributed.device import default_generator
from llama.engine.constraints import Constraint, vocabulary_of
from llama.engine.engine import Engine
from llama.engine.lock import lock_of
from llama.engine.output import Completion, Piece, TokenScore
from llama.engine.processors import make_process
from llama.engine.runner import device_of, dtype_of
from llama.engine.sampling import Sampler
from llama.engine.scoring import score, score_top
from llama.engine.sequence import Call, TokenResult
from llama.engine.sequence import Sequence as EngineSequence
from llama.inputs import SamplingParams, n_usable_ids, n_words_of, vocab_size_of
from llama.model import ModelArgs
from llama.tokenizer import IncrementalDetokenizer

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

    def __init__(self, engine: Engine, tokenizer: Any, draw: Callable[[Tensor, float], Tensor] | None) -> None:
        self._engine = engine
        self._model = engine.model
        self._tokenizer = tokenizer
        self._draw = draw

    def complete(self, prompts: list[list[int]], params: SamplingParams) -> list[Completion]:
        """Completes prompts; each replica computes a share of them. Returns completions in the order of the prompts."""
        with groups.rank_errors():
            samplers = _CallSamplers(self._model, self._tokenizer, params, len(prompts), groups.replica(), self._draw)
            rows = self._spread(prompts, lambda share: self._complete_share(share, params, samplers))
            samplers.end()
            return rows

    def _complete_share(
        self, prompts: list[list[int]], params: SamplingParams, samplers: _CallSamplers
    ) -> list[Completion]:
        rows = [self._completion(prompt, params) for prompt in prompts]
        if params.logprobs and params.echo:
            for row, logprobs in zip(rows, self._score_share(prompts), strict=True):
                row.echo([(logprob, ()) for logprob in logprobs])
        for result in self._results(prompts, params, samplers, rows, whole=True):
            rows[result.sequence].add(result)
        for row in rows:
            row.finish()
        return rows

    def stream(self, prompt: list[int], params: SamplingParams) -> Generator[str, None, None]:
        """Completes one prompt, yielding its text as it becomes final."""
        pieces = self._pieces(prompt, params)
        next(pieces)  # enters its `with`, so that the other ranks learn of a stream closed before its first piece
        return pieces

    def _pieces(self, prompt: list[int], params: SamplingParams) -> Generator[str, None, None]:
        row = self._completion(prompt, params)
        everywhere = (0, 1)  # every replica computes the stream
        samplers = _CallSamplers(self._model, self._tokenizer, params, 1, everywhere, self._draw)
        with closing(_InLockstep(self._results([prompt], params, samplers, [row]))) as results:
            yield ""
            texts = row.echo_pieces
            for result in results:
                yield from filter(None, [*texts, row.add(result).text])
                texts = []
        yield from filter(None, [*texts, row.finish()])

    def _completion(self, prompt: list[int], params: SamplingParams) -> Completion:
        echoed = prompt if params.echo else []
        return Completion(new_detokenizer(self._tokenizer, params, echoed), prompt=echoed)

    def score(self, rows: list[list[int]]) -> list[list[float]]:
        """Returns the log-probability of each id given those before it; each replica computes a share of the rows."""
        with groups.rank_errors():
            return self._spread(rows, self._score_share)

    def _score_share(self, rows: list[list[int]]) -> list[list[float]]:
        with self._out_of_memory_explained(), lock_of(self._model):
            return score(self._model, rows)

    def _results(
        self,
        prompts: list[list[int]],
        params: SamplingParams,
        samplers: _CallSamplers,
        rows: list[Completion],
        *,
        whole: bool = False,
    ) -> Generator[TokenResult, None, None]:
        if params.max_gen_len == 0:
            return
        call = Call(
            new_sequence(
                self._tokenizer,
                prompt,
                params,
                row,
                *samplers.sampler_and_noise_row(i),
                vocab_size=vocab_size_of(self._model, self._tokenizer),
            )
            for i, (prompt, row) in enumerate(zip(prompts, rows, strict=True))
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


def new_sequence(
    tokenizer: Any,
    prompt: list[int],
    params: SamplingParams,
    completion: Completion,
    sampler: Sampler,
    noise_row: int = 0,
    *,
    vocab_size: int,
    top_logprobs: int = 0,
    continues: bool = False,
) -> EngineSequence:
    """Returns the engine's sequence for a prompt and its completion.

    Args:
        continues: whether the completion continues the prompt's text, and keeps its leading space.
    """
    stop_ids = params.ends(tokenizer)
    constraint = None
    if params.form is not None:
        leading_space = not (continues or params.echo or params.keep_space)
        matcher = vocabulary_of(tokenizer, vocab_size).matcher(
            params.form, leading_space=leading_space, stop_ids=stop_ids
        )
        constraint = Constraint(matcher, len(prompt))
    return EngineSequence(
        list(prompt),
        sampler,
        noise_row,
        params.max_gen_len,
        stop_ids,
        logprobs=params.logprobs,
        top_logprobs=top_logprobs,
        ends=completion.ends,
        n_words=n_words_of(tokenizer),
        speculative=params.speculative,
        process=make_process(params, len(prompt), stop_ids, constraint),
    )


def new_detokenizer(tokenizer: Any, params: SamplingParams, prefix: Sequence[int]) -> IncrementalDetokenizer:
    """The detokenizer of a completion; `prefix` are the ids whose text it continues."""
    return IncrementalDetokenizer(tokenizer, params.stop, prefix, at_start=not params.keep_space)


def check_form(tokenizer: Any, vocab_size: int, params: SamplingParams) -> None:
    """Raises PromptError if the form of the answer is not supported; compiles and keeps it otherwise."""
    if params.form is not None:
        vocabulary_of(tokenizer, vocab_size).matcher(params.form, leading_space=True, stop_ids=params.ends(tokenizer))


class Request:
    """Several completions of several prompts in the engine, each with random numbers that depend on no other.

    Args:
        prompts: token ids; prompt i has the completions `i * n` to `i * n + n - 1`.
        n: number of completions of each prompt. With a seed, the j-th is the one that `n=1` gives with `seed + j`.
        top_logprobs: number of most likely tokens to report at each position.
        continues: whether a completion continues the prompt's text, and keeps its leading space.

    Attributes:
        call: the request's sequences, in the order of the completions.
        completions: what they add up to.
        first_pieces: with echo, the pieces that have the prompts.
    """

    def __init__(
        self,
        engine: Engine,
        tokenizer: Any,
        prompts: Sequence[list[int]],
        params: SamplingParams,
        *,
        n: int = 1,
        top_logprobs: int = 0,
        continues: bool = False,
    ) -> None:
        self.completions: list[Completion] = []
        self.first_pieces: list[Piece] = []
        sequences: list[EngineSequence] = []
        for prompt in prompts:
            scores: list[TokenScore] = []
            if params.echo and params.logprobs:
                with lock_of(engine.model):
                    (scores,) = score_top(engine.model, [prompt], top_logprobs, n_words_of(tokenizer))
            echoed = prompt if params.echo else []
            for i in range(n):
                text = new_detokenizer(tokenizer, params, prompt if continues else echoed)
                index = len(self.completions)
                completion = Completion(text, index=index, prompt=echoed, with_tokens=params.logprobs)
                if params.echo:
                    self.first_pieces.append(completion.echo(scores))
                sampler = _own_sampler(engine.model, params, i)
                self.completions.append(completion)
                sequences.append(
                    new_sequence(
                        tokenizer,
                        prompt,
                        params,
                        completion,
                        sampler,
                        vocab_size=vocab_size_of(engine.model, tokenizer),
                        top_logprobs=top_logprobs,
                        continues=continues,
                    )
                )
        self.call = Call(sequences)
        engine.add(self.call)

    def new_pieces(self) -> Iterator[Piece]:
        """The pieces of the results that the engine has made since the last time."""
        while self.call.results:
            result = self.call.results.popleft()
            piece = self.completions[result.sequence].add(result)
            is_last = piece.finish_reason is not None
            yield replace(piece, n_reused=self.call.sequences[result.sequence].n_reused) if is_last else piece


def _own_sampler(model: Any, params: SamplingParams, index: int) -> Sampler:
    """The sampler of one of a request's completions of a prompt."""
    device = device_of(model)
    if params.seed is None or params.temperature == 0:
        generator = default_generator(device)
    else:
        generator = torch.Generator(device).manual_seed((params.seed + index) % 2**64)
    return Sampler(params.temperature, params.top_p, 1, generator)


class _CallSamplers:
    """The samplers of one call's prompts.

    The first prompts, as many as all replicas together have slots, share one sampler, as the rows of a batch do in
    Meta's code. Each further prompt has its own sampler, seeded by its index in the call, so that its random numbers
    depend neither on when it gets a slot nor on the number of replicas.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
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
        self._n_words = n_usable_ids(vocab_size_of(model, tokenizer), tokenizer)
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
        """Brings the generators of all replicas to the same state, that of the replica that drew the most."""
        max_steps = max(groups.gather_replicas(self._shared.steps))
        self._shared.skip_to(max_steps, self._n_words)


class _InLockstep:
    """Iterates over a stream's results, keeping the ranks of a model-parallel group in lockstep if one is closed early.

    The first rank decides when the stream ends: if it is closed there, it also ends on the other ranks. A stream that
    is closed on another rank keeps computing, discarding the results, until it ends on the first rank.
    """

    def __init__(self, results: Generator[TokenResult, None, None]) -> None:
        self._results = results
        self._number = next(_stream_numbers)
        self._is_finished = False

    def __iter__(self) -> Iterator[TokenResult]:
        while not self._is_finished:
            if (result := self._advance()) is not None:
                yield result

    def close(self) -> None:
        """Ends the stream: on all ranks if called on the first one, else after it has ended there."""
        if groups.is_first_of_group() and not self._is_finished:
            with groups.rank_errors():
                self._is_finished = not groups.broadcast_flag(False, stream=self._number)
        while not self._is_finished:
            self._advance()
        self._results.close()

    def _advance(self) -> TokenResult | None:
        self._is_finished = True  # if the pass fails, `close` must not wait for other ranks
        with groups.rank_errors():
            result = next(self._results, None) if groups.broadcast_flag(True, stream=self._number) else None
        self._is_finished = result is None or result.finish_reason is not None
        return result


def complete_by_generate(
    generate: Callable[..., Any],
    prompts: list[list[int]],
    params: SamplingParams,
    tokenizer: Any,
    max_seq_len: int,
) -> list[Completion]:
    """Completes prompts with a replacement of `generate`, called with the arguments that Meta's code passes."""
    kwargs = {name: getattr(params, name) for name in ("max_gen_len", "temperature", "top_p", "logprobs", "echo")}
    if params.seed is not None:
        kwargs["seed"] = params.seed
    ends = params.ends(tokenizer)
    if params.stop_ids is not None and len(ends) == 1:
        kwargs["stop_token"] = next(iter(ends))
    tokens, logprobs = generate(prompt_tokens=prompts, **kwargs, **params.options())
    rows = []
    for i, (prompt, ids) in enumerate(zip(prompts, tokens, strict=True)):
        n_echoed = len(prompt) if params.echo else 0
        stop = next((n for n, token in enumerate(ids) if n >= n_echoed and token in ends), len(ids))
        ids = list(ids)[:stop]
        row = Completion(new_detokenizer(tokenizer, params, ids[:n_echoed]), prompt=ids[:n_echoed])
        scores = list(logprobs[i]) if logprobs else []
        row.echo([(logprob, ()) for logprob in scores[:n_echoed]])
        limit = min(params.max_gen_len, max_seq_len - len(prompt))
        row.finish_reason = "stop" if len(ids) - n_echoed < limit else "length"
        for token, logprob in itertools.zip_longest(ids[n_echoed:], scores[n_echoed:]):
            stopped = row.ends(token, len(row.tokens) - n_echoed)
            row.add(TokenResult(i, token, logprob, "stop" if stopped else None))
            if stopped:
                break
        row.finish()
        rows.append(row)
    return rows
