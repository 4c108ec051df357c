"""Completes, streams and scores checked prompts with the engine, distributing them over the network's replicas."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing
from typing import Any, TypeVar

import torch
from torch import Tensor

from llama.distributed import groups
from llama.distributed.device import default_generator
from llama.engine.constraints import make_constraint
from llama.engine.engine import Engine
from llama.engine.output import Completion, Piece, TokenScore, TopLogprobs
from llama.engine.processors import make_process
from llama.engine.runner import device_of
from llama.engine.sampling import Sampler
from llama.engine.sequence import Call, TokenResult
from llama.engine.sequence import Sequence as EngineSequence
from llama.errors import NonFiniteLogitsError
from llama.inputs import SamplingParams, n_usable_ids, vocab_size_of
from llama.tokenizer import IncrementalDetokenizer

T = TypeVar("T")
_stream_numbers = itertools.count()  # the same on all ranks, which open the same streams
_SEED_STEP = 0x9E3779B97F4A7C15  # between the seeds of a call's prompts; 2**64 divided by the golden ratio


class Completer:
    """Completes, streams and scores prompts, given as token ids. Each replica computes a share of them.

    Args:
        draw: called instead of `sampling.sample_top_p`; None for the built-in sampling.
    """

    def __init__(self, engine: Engine, tokenizer: Any, draw: Callable[[Tensor, float], Tensor] | None) -> None:
        self._engine = engine
        self._tokenizer = tokenizer
        self._draw = draw

    def complete(self, prompts: list[list[int]], params: SamplingParams) -> list[Completion]:
        """Returns the completions of prompts, in their order."""
        model, tokenizer, (replica, n_replicas) = self._engine.model, self._tokenizer, groups.replica()
        with groups.rank_errors():
            shared, samplers = _call_samplers(model, params, len(prompts), (replica, n_replicas), self._draw)
            request = Request(self._engine, tokenizer, prompts[replica::n_replicas], params, samplers=samplers)
            if params.max_gen_len or (params.echo and params.logprobs):
                for result in self._engine.run(request.call, whole=True):
                    request.add(result)
            for row in request.completions:
                row.finish()
            rows = _gathered(request.completions, len(prompts))
            # The stream of all replicas goes on from where the one that drew the most has left it.
            n_steps = max(groups.gather_replicas(shared.steps))
            shared.skip_to(n_steps, n_usable_ids(model, tokenizer))
            return rows

    def stream(self, prompt: list[int], params: SamplingParams) -> Generator[str, None, None]:
        """Completes one prompt, yielding its text as it becomes final. Every replica computes it."""
        pieces = self._pieces(prompt, params)
        next(pieces)  # enters its `with`, so that the other ranks learn of a stream closed before its first piece
        return pieces

    def _pieces(self, prompt: list[int], params: SamplingParams) -> Generator[str, None, None]:
        _, samplers = _call_samplers(self._engine.model, params, 1, (0, 1), self._draw)
        request = Request(self._engine, self._tokenizer, [prompt], params, samplers=samplers)
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
        """Returns the log-probability of each id given those before it; 0.0 for the first of each row."""
        replica, n_replicas = groups.replica()
        with groups.rank_errors():
            share = rows[replica::n_replicas]
            scorers = [PromptScores(row, i) for i, row in enumerate(share)]
            observe_logits(self._engine, share, scorers)
            return _gathered([[logprob or 0.0 for logprob, _ in scorer.scores] for scorer in scorers], len(rows))


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
        samplers: the sampler and noise row of each completion; None for samplers that depend on no other.

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
        samplers: Sequence[tuple[Sampler, int]] | None = None,
    ) -> None:
        self.completions: list[Completion] = []
        stop_ids = params.ends(tokenizer)
        vocab_size, n_words = vocab_size_of(engine.model, tokenizer), n_usable_ids(engine.model, tokenizer)
        is_scored = params.echo and params.logprobs
        sequences = []
        for index, prompt in enumerate(prompt for prompt in prompts for _ in range(n)):
            echoed = prompt if params.echo else []
            prefix = prompt if continues else echoed
            text = IncrementalDetokenizer(tokenizer, params.stop, prefix, at_start=not params.keep_space)
            scorer = PromptScores(prompt, index // n, top_logprobs, n_words) if is_scored else None
            scores = scorer.scores if scorer else ()
            completion = Completion(text, index=index, prompt=echoed, scores=scores, with_tokens=params.logprobs)
            self.completions.append(completion)
            process = None
            if params.options() and params.max_gen_len:
                keeps_space = continues or params.echo or params.keep_space
                constraint = make_constraint(tokenizer, vocab_size, params, len(prompt), keeps_space=keeps_space)
                process = make_process(params, len(prompt), stop_ids, constraint)
            if samplers is None:
                generator = _generator(engine.model, params.seed, index % n)
                sampler, noise_row = Sampler(params.temperature, params.top_p, 1, generator), 0
            else:
                sampler, noise_row = samplers[index]
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
                    on_logits=scorer,
                    process=process,
                )
            )
        self.call = Call(sequences)

    def add(self, result: TokenResult) -> list[Piece]:
        """Adds a result of the call; returns the pieces that it makes final, with echo first the one of the prompt."""
        return self.completions[result.sequence].add(result, self.call.sequences[result.sequence].n_reused)

    def new_pieces(self) -> Iterator[Piece]:
        """The pieces of the results that the engine has made since the last time."""
        while self.call.results:
            yield from self.add(self.call.results.popleft())


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
        self._prompt, self._index, self._n_top, self._n_words = prompt, index, n_top, n_words

    def __call__(self, position: int, logits: Tensor) -> None:
        """Takes the logits (n, vocab) after the tokens from `position` on; a position may come again."""
        following = self._prompt[position + 1 : position + 1 + len(logits)]
        targets = torch.tensor(following, dtype=torch.int64, device=logits.device)
        logprobs = logits[: len(targets)].log_softmax(-1)
        found = logprobs.gather(-1, targets.unsqueeze(-1)).squeeze(-1).tolist()
        if not all(map(math.isfinite, found)):
            raise NonFiniteLogitsError(f"in text {self._index}")
        top: list[TopLogprobs] = [()] * len(found)
        if self._n_top:
            of_words = logprobs[:, : self._n_words]
            values, ids = of_words.topk(min(self._n_top, of_words.size(-1)))
            top = [tuple(zip(*both, strict=True)) for both in zip(ids.tolist(), values.tolist(), strict=True)]
        self.scores[position + 1 : position + 1 + len(found)] = zip(found, top, strict=True)


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


def _generator(model: Any, seed: int | None, offset: int = 0) -> torch.Generator:
    """A generator on the model's device with the seed `seed + offset`; torch's default one if the seed is None."""
    device = device_of(model)
    return default_generator(device) if seed is None else torch.Generator(device).manual_seed((seed + offset) % 2**64)


def _call_samplers(
    model: Any,
    params: SamplingParams,
    n_prompts: int,
    replica: tuple[int, int],
    draw: Callable[[Tensor, float], Tensor] | None,
) -> tuple[Sampler, list[tuple[Sampler, int]]]:
    """The sampler that prompts of a call share, and the sampler and noise row of each prompt in a replica's share.

    The first prompts, as many as all replicas together have slots, share one sampler, as the rows of a batch do in
    Meta's code. Each further prompt has its own sampler, seeded by its index in the call, so that its random numbers
    depend neither on when it gets a slot nor on the number of replicas.

    Args:
        n_prompts: number of prompts on all replicas together.
        replica: index of the replica among those that share the prompts, and their number.
    """
    index, n_replicas = replica
    temperature = params.temperature if params.max_gen_len else 0.0  # which draws nothing
    n_shared = min(n_prompts, model.params.max_batch_size * n_replicas)
    shared = Sampler(temperature, params.top_p, n_shared, _generator(model, params.seed), draw)
    if shared.is_greedy or n_prompts == n_shared:
        return shared, [(shared, i) for i in range(index, n_prompts, n_replicas)]
    seed = params.seed
    if seed is None:
        generator = shared.generator
        seed = int(torch.randint(2**62, (1,), generator=generator, device=generator.device))
    samplers = [(shared, i) for i in range(index, n_shared, n_replicas)]
    for i in range(index + n_replicas * len(samplers), n_prompts, n_replicas):
        samplers.append((Sampler(temperature, params.top_p, 1, _generator(model, seed, i * _SEED_STEP), draw), 0))
    return shared, samplers


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
        if groups.model_parallel_rank() == 0 and not self._is_finished:
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
        scores = list(logprobs[i]) if logprobs else []
        row = Completion(
            IncrementalDetokenizer(tokenizer, params.stop, ids[:n_echoed], at_start=not params.keep_space),
            prompt=ids[:n_echoed],
            scores=[(logprob, ()) for logprob in scores[:n_echoed]],
        )
        limit = min(params.max_gen_len, max_seq_len - len(prompt))
        row.finish_reason = "stop" if len(ids) - n_echoed < limit else "length"
        for n, (token, logprob) in enumerate(itertools.zip_longest(ids[n_echoed:], scores[n_echoed:])):
            stopped = row.ends(token, n)
            row.add(TokenResult(i, token, logprob, "stop" if stopped else None))
            if stopped:
                break
        row.finish()
        rows.append(row)
    return rows
