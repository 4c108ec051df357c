"""Llama: a network and its tokenizer, driven to complete prompts and dialogs.

Every public call drains one generator of steps, `decoding.decode`. Knows nothing of shard axes or the cache's layout.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import AbstractContextManager, closing
from pathlib import Path
from typing import TypeVar

import torch

from llama import runtime
from llama.args import ModelArgs
from llama.chat import UNSAFE_ERROR, Dialog
from llama.checkpoint import find_shards, load_shard, model_args, move, page_release
from llama.decoding import Step, StepsInStep, decode, score
from llama.memory import available_memory, check_memory, out_of_memory_explained
from llama.model import Transformer
from llama.projection import can_pack
from llama.prompts import (
    check_prompts,
    encode_checked_dialog,
    encode_continuations,
    encode_dialogs,
    encode_text,
    encode_texts,
)
from llama.request import (
    ChatPrediction,
    Completion,
    CompletionPrediction,
    Request,
    Score,
    chat_prediction,
    check_seed,
    completion_prediction,
)
from llama.sampling import Sampler
from llama.stepping import choose_stepper
from llama.text import GrowingText
from llama.tokenizer import Tokenizer

Result = TypeVar("Result")

logger = logging.getLogger(__name__)


class Llama:
    """Completes prompts and dialogs. `Llama.build` makes one from a checkpoint.

    Under torchrun every rank makes the same calls with the same arguments, and gets the same results.

    Args:
        model: the network, loaded.
        tokenizer: the one that it was trained with.
        seed: starts the stream of random numbers that calls without a seed of their own draw from.
        cuda_graphs: as in `build`.
    """

    def __init__(self, model: Transformer, tokenizer: Tokenizer, *, seed: int = 1, cuda_graphs: bool = True) -> None:
        check_seed(seed)
        self.model = model
        self.tokenizer = tokenizer
        self.stepper = choose_stepper(model, cuda_graphs=cuda_graphs)
        self._generator = self._new_generator(seed)
        self._calls = 0  # a call takes the cache over; a stream from before it cannot go on

    @staticmethod
    def build(
        ckpt_dir: str | Path,
        tokenizer_path: str | Path,
        max_seq_len: int,
        max_batch_size: int,
        model_parallel_size: int | None = None,
        seed: int = 1,
        *,
        device: str | torch.device | None = None,
        dtype: str | torch.dtype | None = None,
        cuda_graphs: bool = True,
    ) -> Llama:
        """Sets up the processes, under torchrun or without, and loads this rank's shard of a checkpoint.

        Args:
            ckpt_dir: folder of `params.json` and `consolidated.NN.pth`, one file a model-parallel rank.
            tokenizer_path: the `tokenizer.model` file.
            max_seq_len: most tokens of a prompt and its completion; with `max_batch_size` it sizes the KV cache.
            max_batch_size: most prompts that are worked on at a time.
            model_parallel_size: number of ranks that share the network; None: all processes (`WORLD_SIZE`, else 1).
            seed: of sampling.
            device: "cpu", "cuda", "cuda:N" or "mps"; None: the fastest there is, by `LOCAL_RANK` among several.
            dtype: "float16", "bfloat16" or "float32", of weights and cache; None: bfloat16 on CPU, else float16.
            cuda_graphs: whether steps on CUDA are captured once and replayed; elsewhere it makes no difference.

        Raises:
            AssertionError: `ckpt_dir` holds no `*.pth` file, or not `model_parallel_size` of them.
            FileNotFoundError: `params.json` or the tokenizer is missing.
            ValueError: an argument, `params.json` or a tensor is not what it should be.
            MemoryError: weights, cache and activations do not fit on the device.
        """
        laps = _Laps()
        check_seed(seed)
        mp = runtime.resolve_model_parallel_size(model_parallel_size)
        shards = find_shards(ckpt_dir, mp)
        tokenizer = Tokenizer(tokenizer_path)
        args = model_args(ckpt_dir, tokenizer.n_words, max_batch_size=max_batch_size, max_seq_len=max_seq_len)
        args.check_shards(mp)
        device = runtime.select_device(device)
        dtype = runtime.select_dtype(dtype, device)
        check_memory(args, mp, dtype, available_memory(device) // runtime.processes_on(device), str(device))
        laps("checks")
        runtime.share_cores()
        runtime.init_process_groups(mp, device)
        laps("process group")
        with out_of_memory_explained(args, mp, dtype, str(device)):
            model = _load_model(shards[runtime.model_parallel_rank()], args, mp, device, dtype, laps)
        generator = Llama(model, tokenizer, seed=seed, cuda_graphs=cuda_graphs)
        if runtime.is_first_rank():
            parts = ", ".join(f"{name} {seconds:.2f}" for name, seconds in laps.seconds.items())
            total = sum(laps.seconds.values())
            logger.info("Loaded in %.2f seconds (%s)", total, parts, extra={"parts": laps.seconds})
        return generator

    def generate(
        self,
        prompt_tokens: Sequence[Sequence[int]],
        max_gen_len: int,
        temperature: float = 0.6,
        top_p: float = 0.9,
        logprobs: bool = False,
        echo: bool = False,
        *,
        seed: int | None = None,
    ) -> tuple[list[list[int]], list[list[float]] | None]:
        """Completes prompts of token ids.

        Args:
            prompt_tokens: any number of prompts, each of 1 to `max_seq_len` ids; `max_batch_size` of them are worked
                on at a time.
            max_gen_len: most tokens a prompt brings; `max_seq_len` less its own may be fewer.
            temperature: 0 takes the likeliest token; otherwise the logits are divided by it before the softmax.
            top_p: draws from the smallest set of tokens whose mass exceeds it.
            logprobs: whether to return log-probabilities too: log-softmax of the raw logits of each returned token
                given what precedes it; 0.0 for the first token of an echoed prompt.
            echo: whether the prompt is returned in front.
            seed: of this call alone; None goes on in the stream that `build` seeded.

        Returns:
            The ids of each row, up to its first generated EOS, and their log-probabilities or None.

        Raises:
            ValueError: an argument is out of its range, said with what was got; nothing was computed.
        """
        request = Request(temperature, top_p, max_gen_len, logprobs, echo, seed=seed)
        args = self.model.params
        rows = self._complete(check_prompts(prompt_tokens, args.vocab_size, args.max_seq_len), request)
        return [row.tokens for row in rows], [row.logprobs for row in rows] if logprobs else None

    def text_completion(
        self,
        prompts: Sequence[str],
        temperature: float = 0.6,
        top_p: float = 0.9,
        max_gen_len: int | None = None,
        logprobs: bool = False,
        echo: bool = False,
        *,
        stop: Sequence[str] = (),
        seed: int | None = None,
    ) -> list[CompletionPrediction]:
        """Completes texts; arguments as in `generate`.

        Args:
            max_gen_len: None for as many as `max_seq_len` has room for.
            stop: strings at the first of which a completion ends; it is not part of the text.

        Returns:
            For each prompt `{"generation": text, "finish_reason": "stop" or "length"}`; with logprobs also "tokens",
            strings that joined give the text, and their "logprobs".
        """
        request = Request(temperature, top_p, self._max_gen_len(max_gen_len), logprobs, echo, stop, seed)
        rows = self._complete(self._encode(prompts, "prompts"), request)
        return [completion_prediction(row, request) for row in rows]

    def chat_completion(
        self,
        dialogs: Sequence[Dialog],
        temperature: float = 0.6,
        top_p: float = 0.9,
        max_gen_len: int | None = None,
        logprobs: bool = False,
        *,
        stop: Sequence[str] = (),
        seed: int | None = None,
    ) -> list[ChatPrediction]:
        """Answers dialogs; arguments as in `text_completion`.

        A dialog with one of the template's own tags in it is not run; its answer says so.

        Args:
            dialogs: each a list of messages `{"role": ..., "content": ...}`: an optional "system" message, then
                "user" and "assistant" in turn, "user" last.

        Returns:
            For each dialog `{"generation": {"role": "assistant", "content": text}, "finish_reason": ...}`; with
            logprobs also "tokens" and "logprobs".
        """
        request = Request(temperature, top_p, self._max_gen_len(max_gen_len), logprobs, stop=stop, seed=seed)
        prompts = encode_dialogs(dialogs, self.tokenizer, self.model.params.max_seq_len)
        rows = iter(self._complete([prompt for prompt in prompts if prompt is not None], request))
        return [chat_prediction(None if prompt is None else next(rows), request) for prompt in prompts]

    def stream_text_completion(
        self,
        prompt: str,
        temperature: float = 0.6,
        top_p: float = 0.9,
        max_gen_len: int | None = None,
        *,
        echo: bool = False,
        stop: Sequence[str] = (),
        seed: int | None = None,
    ) -> Generator[str, None, None]:
        """Completes one text, yielding it as it settles; the pieces joined are what `text_completion` returns.

        The iterator may be closed early. A later call on this object ends it: its next piece is a RuntimeError.
        """
        request = Request(temperature, top_p, self._max_gen_len(max_gen_len), echo=echo, stop=stop, seed=seed)
        return self._stream(encode_text(prompt, "prompt", self.tokenizer, self.model.params.max_seq_len), request)

    def stream_chat_completion(
        self,
        dialog: Dialog,
        temperature: float = 0.6,
        top_p: float = 0.9,
        max_gen_len: int | None = None,
        *,
        stop: Sequence[str] = (),
        seed: int | None = None,
    ) -> Generator[str, None, None]:
        """Answers one dialog, yielding the answer as it settles; otherwise as `stream_text_completion`."""
        request = Request(temperature, top_p, self._max_gen_len(max_gen_len), stop=stop, seed=seed)
        prompt = encode_checked_dialog(dialog, "dialog", self.tokenizer, self.model.params.max_seq_len)
        return _refusal() if prompt is None else self._stream(prompt, request)

    def score(self, texts: Sequence[str], contexts: Sequence[str] | None = None) -> list[Score]:
        """The log-probability of texts, or of completions given their contexts, without generating.

        Args:
            contexts: one a text, which the text continues; they are not scored themselves. A context and its text are
                encoded as one string, and the tokens after the context's own are scored.

        Returns:
            For each text `{"logprob": the sum, "tokens": strings, "logprobs": floats}` over its scored tokens. BOS
            stands before the first token and is not scored.
        """
        if contexts is None:
            whole = self._encode(texts, "texts")
            known = [1] * len(whole)  # BOS
        else:
            whole, known = encode_continuations(contexts, texts, self.tokenizer, self.model.params.max_seq_len)
        scores = self.score_tokens(whole)
        scored = [
            (self.tokenizer.pieces(tokens)[n:], logprobs[n:])
            for tokens, logprobs, n in zip(whole, scores, known, strict=True)
        ]
        return [Score(logprob=sum(logprobs, 0.0), tokens=tokens, logprobs=logprobs) for tokens, logprobs in scored]

    def score_tokens(self, prompt_tokens: Sequence[Sequence[int]]) -> list[list[float]]:
        """The log-probability of each id given those before it; 0.0 for the first of each row, which has none before.

        Args:
            prompt_tokens: any number of rows, each of 1 to `max_seq_len` ids.
        """
        args = self.model.params
        rows = check_prompts(prompt_tokens, args.vocab_size, args.max_seq_len)
        self._calls += 1
        return self._spread(rows, self._score)

    def _complete(self, prompts: list[list[int]], request: Request) -> list[Completion]:
        """Completions of checked prompts, in their order; each replica works on its share."""
        self._calls += 1
        replica, n_replicas = runtime.replica()
        n_lanes = min(len(prompts), self.model.params.max_batch_size * n_replicas)
        sampler = Sampler(request.temperature, request.top_p, n_lanes, self._generator_for(request))
        lanes = range(replica, n_lanes, n_replicas)
        rows = self._spread(prompts, lambda mine: self._complete_share(mine, request, sampler, lanes))
        most_steps = max(runtime.gather_replicas(sampler.steps))
        sampler.skip_to(most_steps, self.model.params.vocab_size)  # all replicas go on at the same place
        return rows

    def _complete_share(
        self, prompts: list[list[int]], request: Request, sampler: Sampler, lanes: Sequence[int]
    ) -> list[Completion]:
        texts = [GrowingText(self.tokenizer, request.stop, prompt if request.echo else ()) for prompt in prompts]

        def ends(prompt: int, token: int) -> bool:
            texts[prompt].push(token)
            return texts[prompt].stopped

        rows = [Completion(tokens=list(prompt) if request.echo else []) for prompt in prompts]
        if request.logprobs and request.echo:
            for row, logprobs in zip(rows, self._score(prompts), strict=True):
                row.logprobs = logprobs
        for step in self._decode(prompts, request, sampler, lanes, ends):
            row = rows[step.prompt]
            if step.token is not None:
                row.tokens.append(step.token)
            if step.logprob is not None:
                row.logprobs.append(step.logprob)
            row.finish_reason = step.finish_reason or row.finish_reason
        for row, text in zip(rows, texts, strict=True):
            text.finish()
            if text.stopped:
                row.finish_reason = "stop"
            row.pieces = text.prefix_pieces + text.pieces
            row.logprobs = row.logprobs[: len(row.pieces)]
        return rows

    def _stream(self, prompt: list[int], request: Request) -> Generator[str, None, None]:
        pieces = self._pieces(prompt, request)
        next(pieces)  # into its `with`: closed before the first piece, it still tells the other ranks
        return pieces

    def _pieces(self, prompt: list[int], request: Request) -> Generator[str, None, None]:
        self._calls += 1
        call = self._calls
        text = GrowingText(self.tokenizer, request.stop, prompt if request.echo else ())
        settled = deque(text.prefix_pieces)

        def ends(_: int, token: int) -> bool:
            settled.append(text.push(token))
            return text.stopped

        sampler = Sampler(request.temperature, request.top_p, 1, self._generator_for(request))
        steps = self._decode([prompt], request, sampler, [0], ends)
        with closing(StepsInStep(steps)) as steps_in_step:
            yield ""
            self._check_current(call)
            for _ in steps_in_step:
                while settled:
                    if piece := settled.popleft():
                        yield piece
                    self._check_current(call)
        if rest := text.finish():
            yield rest

    def _check_current(self, call: int) -> None:
        if call != self._calls:
            raise RuntimeError("this stream ended when another call was made on the same Llama")

    def _decode(
        self,
        prompts: list[list[int]],
        request: Request,
        sampler: Sampler,
        lanes: Sequence[int],
        ends: Callable[[int, int], bool],
    ) -> Iterator[Step]:
        with self._out_of_memory_explained():
            yield from decode(
                self.model,
                prompts,
                sampler,
                lanes=lanes,
                max_gen_len=request.max_gen_len,
                eos_id=self.tokenizer.eos_id,
                logprobs=request.logprobs,
                ends=ends,
                stepper=self.stepper,
            )

    def _score(self, prompts: Sequence[list[int]]) -> list[list[float]]:
        with self._out_of_memory_explained():
            return score(self.model, prompts)

    def _out_of_memory_explained(self) -> AbstractContextManager[None]:
        cached = self.model.caches[0].k
        mp = runtime.model_parallel_size()
        return out_of_memory_explained(self.model.params, mp, cached.dtype, str(cached.device))

    def _spread(self, prompts: list[list[int]], work: Callable[[list[list[int]]], list[Result]]) -> list[Result]:
        """Has each replica do its share of the prompts; all get the results of all, in the prompts' order."""
        replica, n_replicas = runtime.replica()
        shares = runtime.gather_replicas(work(prompts[replica::n_replicas]))
        return [shares[i % n_replicas][i // n_replicas] for i in range(len(prompts))]

    def _encode(self, texts: Sequence[str], name: str) -> list[list[int]]:
        return encode_texts(texts, name, self.tokenizer, self.model.params.max_seq_len)

    def _max_gen_len(self, requested: int | None) -> int:
        return max(1, self.model.params.max_seq_len - 1) if requested is None else requested

    def _generator_for(self, request: Request) -> torch.Generator:
        return self._generator if request.seed is None else self._new_generator(request.seed)

    def _new_generator(self, seed: int) -> torch.Generator:
        return torch.Generator(self.model.norm.weight.device).manual_seed(seed)


class _Laps:
    """Seconds of each part of a job, by the name given at its end."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._since = time.perf_counter()

    def __call__(self, name: str) -> None:
        now = time.perf_counter()
        self.seconds[name], self._since = now - self._since, now


def _load_model(
    path: Path, args: ModelArgs, mp: int, device: torch.device, dtype: torch.dtype, laps: _Laps
) -> Transformer:
    """The network with one file's weights, held once: packed, with the file left mapped behind them, or moved."""
    state = load_shard(path, args, mp)
    packs = args.max_batch_size > 1 and can_pack(device, dtype)
    if not packs:
        move(state, path, device=device, dtype=dtype)
    model = Transformer.from_state(args, state, cache_dtype=dtype)
    laps("weights")
    if packs:
        model.pack(dtype, page_release(path))
        laps("packing")
    elif device.type == "cuda":
        model.join()
        laps("joining")
    return model


def _refusal() -> Generator[str, None, None]:
    yield UNSAFE_ERROR
