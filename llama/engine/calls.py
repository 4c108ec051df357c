"""Completes, streams and scores checked prompts with the engine, distributing them over the network's replicas."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from llama.distributed import groups
from llama.distributed.device import default_generator
from llama.engine.constraints import make_constraint
from llama.engine.engine import Engine
from llama.engine.output import Completion, Piece
from llama.engine.processors import make_process
from llama.engine.runner import device_of
from llama.engine.sampling import Sampler
from llama.engine.scoring import PromptScores, score
from llama.engine.sequence import Call, TokenResult
from llama.engine.sequence import Sequence as EngineSequence
from llama.inputs import SamplingParams, n_usable_ids, n_words_of, vocab_size_of
from llama.tokenizer import IncrementalDetokenizer

T = TypeVar("T")
_stream_numbers = itertools.count()  # the same on all ranks, which open the same streams
_SEED_STEP = 0x9E3779B97F4A7C15  # between the seeds of a call's prompts; 2**64 divided by the golden ratio


class Completer:
    """Completes, streams and scores prompts, given as token ids. Each replica computes a share of them.

    Args:
        engine: runs the network.
        tokenizer: the network's tokenizer.
        draw: called instead of `sampling.sample_top_p`; None for the built-in sampling.
    """

    def __init__(self, engine: Engine, tokenizer: Any, draw: Callable[[Tensor, float], Tensor] | None) -> None:
        self._engine = engine
        self._tokenizer = tokenizer
        self._draw = draw

    def complete(self, prompts: list[list[int]], params: SamplingParams) -> list[Completion]:
        """Returns the completions of prompts, in their order."""
        replica, n_replicas = groups.replica()
        with groups.rank_errors():
            samplers = _CallSamplers(
                self._engine.model, self._tokenizer, params, len(prompts), (replica, n_replicas), self._draw
            )
            share = prompts[replica::n_replicas]
            request = Request(self._engine, self._tokenizer, share, params, sampler_of=samplers.sampler_and_noise_row)
            if params.max_gen_len or (params.echo and params.logprobs):
                for result in self._engine.run(request.call, whole=True):
                    request.add(result)
            for row in request.completions:
                row.finish()
            rows = _gathered(request.completions, len(prompts))
            samplers.end()
            return rows

    def stream(self, prompt: list[int], params: SamplingParams) -> Generator[str, None, None]:
        """Completes one prompt, yielding its text as it becomes final. Every replica computes it."""
        pieces = self._pieces(prompt, params)
        next(pieces)  # enters its `with`, so that the other ranks learn of a stream closed before its first piece
        return pieces

    def _pieces(self, prompt: list[int], params: SamplingParams) -> Generator[str, None, None]:
        samplers = _CallSamplers(self._engine.model, self._tokenizer, params, 1, (0, 1), self._draw)
        request = Request(self._engine, self._tokenizer, [prompt], params, sampler_of=samplers.sampler_and_noise_row)
        if params.max_gen_len == 0:
            yield ""
            (row,) = request.completions
            yield from filter(None, [row.echo().text, row.finish()])
            return
        with closing(_InLockstep(self._engine.run(request.call))) as results:
            yield ""
            for result in results:
                yield from (piece.text for piece in request.add(result) if piece.text)

    def score(self, rows: list[list[int]]) -> list[list[float]]:
        """Returns the log-probability of each id given those before it."""
        replica, n_replicas = groups.replica()
        with groups.rank_errors():
            return _gathered(score(self._engine, rows[replica::n_replicas]), len(rows))


def _gathered(share: list[T], n: int) -> list[T]:
    """The results of all replicas, in the order of the call's n prompts."""
    shares = groups.gather_replicas(share)
    return [shares[i % len(shares)][i // len(shares)] for i in range(n)]


class Request:
    """The sequences that complete prompts, and the completions that their results add up to.

    Args:
        prompts: token ids; prompt i has the completions `i * n` to `i * n + n - 1`.
        n: number of completions of each prompt. With a seed, the j-th is the one that `n=1` gives with `seed + j`.
        top_logprobs: number of most likely tokens to report at each position.
        continues: whether a completion continues the prompt's text, and keeps its leading space.
        sampler_of: returns the sampler and noise row of the i-th completion; None for samplers that depend on no other.

    Attributes:
        call: the request's sequences, in the order of the completions. The caller adds it to the engine.
        completions: what their results add up to.
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
        sampler_of: Callable[[int], tuple[Sampler, int]] | None = None,
    ) -> None:
        self.completions: list[Completion] = []
        self._scores: list[PromptScores | None] = []
        stop_ids = params.ends(tokenizer)
        vocab_size, n_words = vocab_size_of(engine.model, tokenizer), n_words_of(tokenizer)
        sequences = []
        for index, prompt in enumerate(prompt for prompt in prompts for _ in range(n)):
            echoed = prompt if params.echo else []
            text = new_detokenizer(tokenizer, params, prompt if continues else echoed)
            completion = Completion(text, index=index, prompt=echoed, with_tokens=params.logprobs)
            self.completions.append(completion)
            scored = params.echo and params.logprobs
            self._scores.append(PromptScores(prompt, index // n, top_logprobs, n_words) if scored else None)
            process = None
            if params.options() and params.max_gen_len:
                keeps_space = continues or params.echo or params.keep_space
                constraint = make_constraint(tokenizer, vocab_size, params, len(prompt), keeps_space=keeps_space)
                process = make_process(params, len(prompt), stop_ids, constraint)
            sampler, noise_row = sampler_of(index) if sampler_of else (_own_sampler(engine.model, params, index % n), 0)
            sequences.append(
                EngineSequence(
                    list(prompt),
                    sampler,
                    noise_row,
                    params.max_gen_len,
                    stop_ids,
                    logprobs=params.logprobs,
                    top_logprobs=top_logprobs,
                    ends=completion.ends,
                    n_words=n_words,
                    speculative=params.speculative,
                    on_logits=self._scores[-1],
                    process=process,
                )
            )
        self.call = Call(sequences)

    def add(self, result: TokenResult) -> list[Piece]:
        """Adds a result of the call; returns the pieces that it makes final, with echo first the one of the prompt."""
        completion, sequence = self.completions[result.sequence], self.call.sequences[result.sequence]
        pieces = []
        if completion.lacks_echo:
            scores = self._scores[result.sequence]
            pieces.append(completion.echo(scores.scores if scores else ()))
        piece = completion.add(result)
        return [*pieces, replace(piece, n_reused=sequence.n_reused) if piece.finish_reason else piece]

    def new_pieces(self) -> Iterator[Piece]:
        """The pieces of the results that the engine has made since the last time."""
        while self.call.results:
            yield from self.add(self.call.results.popleft())


def new_detokenizer(tokenizer: Any, params: SamplingParams, prefix: Sequence[int]) -> IncrementalDetokenizer:
    """The detokenizer of a completion; `prefix` are the ids whose text it continues."""
    return IncrementalDetokenizer(tokenizer, params.stop, prefix, at_start=not params.keep_space)


def _own_sampler(model: Any, params: SamplingParams, index: int) -> Sampler:
    """The sampler of one of a request's completions of a prompt."""
    generator = default_generator(device_of(model))
    if params.seed is not None and params.temperature > 0:
        generator = torch.Generator(generator.device).manual_seed((params.seed + index) % 2**64)
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
        temperature = self._params.temperature if self._params.max_gen_len else 0.0  # which draws nothing
        return Sampler(temperature, self._params.top_p, n_rows, generator, self._draw)

    def sampler_and_noise_row(self, i: int) -> tuple[Sampler, int]:
        """Returns the sampler and noise row of the i-th prompt in this replica's share."""
        index = self._replica + i * self._n_replicas  # in the call
        if index < self._n_shared or self._seed is None:
            return self._shared, index
        seed = (self._seed + index * _SEED_STEP) % 2**64
        return self._sampler(1, torch.Generator(self._device).manual_seed(seed)), 0

    def end(self) -> None:
        """Brings the generators of all replicas to the state of the replica that drew the most."""
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
