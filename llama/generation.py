"""Llama: a network and its tokenizer, and the calls that complete prompts and dialogs with them.

All of these calls are sequences of one engine.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Generator, Iterable, Sequence
from dataclasses import fields
from functools import partial
from pathlib import Path
from textwrap import indent
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from llama import inputs
from llama.chat import (
    B_INST,
    B_SYS,
    E_INST,
    E_SYS,
    SPECIAL_TAGS,
    UNSAFE_ERROR,
    ChatFormat,
    Dialog,
    Message,
    Role,
    built_in_format,
    dialog_prompt_tokens,
)
from llama.checkpoint.loading import load_networks
from llama.distributed import groups
from llama.distributed.device import pause_workers
from llama.engine import output
from llama.engine.calls import Completer, complete_by_generate
from llama.engine.compiled import compiled_stepper
from llama.engine.constraints import check_form
from llama.engine.cuda_graphs import choose_stepper
from llama.engine.engine import Engine, engine_of
from llama.engine.lock import lock_of
from llama.engine.output import ChatPrediction, CompletionPrediction, InfillingPrediction, Score
from llama.engine.runner import ModelRunner, Stepper
from llama.engine.sampled import common_length
from llama.engine.sampling import sample_top_p
from llama.errors import PromptError, quote
from llama.inputs import SamplingOptions, SamplingParams, checked, infilling_prompt_tokens
from llama.model import Transformer
from llama.text.chat_format import read_chat_format
from llama.tokenizer import Tokenizer, pieces

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = ["LLaMA", "Llama", "dialog_prompt_tokens", "infilling_prompt_tokens", "sample_top_p"]
__all__ += ["ChatPrediction", "CompletionPrediction", "Dialog", "InfillingPrediction", "Message", "Role"]
__all__ += ["B_INST", "B_SYS", "E_INST", "E_SYS", "SPECIAL_TAGS", "UNSAFE_ERROR"]

Result = TypeVar("Result")

logger = logging.getLogger(__name__)
_built_in_sample_top_p = sample_top_p
_SAMPLING = {field.name for field in fields(SamplingParams)}


class Llama:
    """Completes prompts and dialogs. `Llama.build` makes one from a checkpoint.

    Calls from several threads, streams among them, run in one batch (continuous batching), and each returns what it
    would return alone; outside of float32 another number of rows may round differently. Calls without `seed` draw from
    one random stream, in an order that then depends on the threads. After direct calls of the model, a call that is
    running recomputes its part of the KV cache. Training, edits and direct calls of the model in another thread must
    not run at the same time as a call.

    Under torchrun every rank makes the same calls with the same arguments, from one thread, and gets the same results.
    Ranks whose calls differ all raise RuntimeError.

    Args:
        model: a loaded `Transformer`, or any object with `forward(tokens, start_pos)`, which returns logits (bsz,
            seqlen, vocab), and `params` with `max_batch_size`, `max_seq_len` and `vocab_size`.
        tokenizer: the one that it was trained with.
        seed, cuda_graphs, reuse_prefixes: as in `build`; with None as `seed`, torch's generators stay as they are.
        draft_model: a smaller `Transformer` with the same vocabulary and cache sizes, for `speculative="draft"`.

    Attributes:
        chat_format: how dialogs become ids; None for the tokenizer's built-in one, such as Llama 2's.
    """

    model: Transformer
    tokenizer: Tokenizer
    stepper: Stepper | None = None  # this and what follows: here for subclasses that do not call `__init__`
    draft_model: Any = None
    chat_format: ChatFormat | None = None
    reuse_prefixes: bool = False
    _cuda_graphs: bool = True
    _draft: ModelRunner | None = None
    _engine: Engine | None = None

    def __init__(
        self,
        model: Any,
        tokenizer: Tokenizer,
        *,
        seed: int | None = None,
        cuda_graphs: bool = True,
        draft_model: Any = None,
        reuse_prefixes: bool = False,
    ) -> None:
        if seed is not None:
            torch.manual_seed(checked("seed", seed))
        self.model = model
        self.tokenizer = tokenizer
        self.stepper = choose_stepper(model, cuda_graphs=cuda_graphs)
        self.draft_model = draft_model
        self.reuse_prefixes = reuse_prefixes
        self._cuda_graphs = cuda_graphs
        if draft_model is not None and draft_model is model:
            raise ValueError("draft_model must be another network than model")
        for name in ("max_batch_size", "max_seq_len") if draft_model is not None else ():
            got, expected = (getattr(each.params, name, None) for each in (draft_model, model))
            if got != expected:
                raise ValueError(f"draft_model must have the model's {name}, {expected}, got {got}")

    @staticmethod
    @torch.inference_mode(False)  # what is made in inference mode could not be used outside of it
    def build(
        ckpt_dir: str | Path,
        tokenizer_path: str | Path,
        max_seq_len: int,
        max_batch_size: int,
        model_parallel_size: int | None = None,
        seed: int | None = 1,
        *,
        device: str | torch.device | None = None,
        dtype: str | torch.dtype | None = None,
        cuda_graphs: bool = True,
        quantize: str | None = None,
        draft_ckpt_dir: str | Path | None = None,
        compile: bool | str = False,
        reuse_prefixes: bool = False,
        threads: int | None = None,
    ) -> Llama:
        """Sets up the processes, under torchrun or without, and loads this rank's shard of a checkpoint.

        Args:
            ckpt_dir: folder of `params.json` and `consolidated.NN.pth`, one file per model-parallel rank.
            tokenizer_path: the `tokenizer.model` file.
            max_seq_len: maximum number of tokens of a prompt and its completion; the KV cache has room for
                `max_batch_size` times as many.
            max_batch_size: maximum number of prompts that run at a time.
            model_parallel_size: number of ranks that share the network; None: all processes (`WORLD_SIZE`, else 1).
            seed: for torch's default generators, which calls without `seed` draw from; None leaves
                them as they are.
            device: "cpu", "cuda", "cuda:N" or "mps"; None: the fastest available, by `LOCAL_RANK` among several.
            dtype: "float16", "bfloat16" or "float32", of weights and cache; None: bfloat16 on CPU, else float16.
            cuda_graphs: whether steps on CUDA are captured once and replayed; without effect elsewhere.
            quantize: "int8" rounds weights and inputs of the linear layers to int8, on CPUs with VNNI: faster, in half
                the memory, and not faithful to the checkpoint. On CUDA, it rounds weights alone. None loads the weights
                as they are in the checkpoint.
            draft_ckpt_dir: folder of a smaller checkpoint with the same vocabulary and number of files, which drafts
                tokens for calls with `speculative="draft"`; its KV cache has the same sizes.
            compile: whether decode steps run through blocks compiled by inductor, torch's compiler, on a CPU with a C++
                compiler, or on CUDA in one process. The first steps wait for the compiler, whose result is cached on
                disk. With "background", on a CPU, steps run uncompiled until it is done. Rounds differently outside of
                float32.
            reuse_prefixes: whether a prompt reuses the keys and values of a prefix of 16 tokens or more that the KV
                cache still holds, such as earlier turns of a chat or a shared system prompt. Only while the network has
                no hooks and is unchanged.
            threads: fixed number of CPU threads; None for the process's share of the cores, but one thread for small
                networks and while other programs keep the cores busy.

        Raises:
            AssertionError: `ckpt_dir` holds no `*.pth` file, or not `model_parallel_size` of them.
            FileNotFoundError: `params.json` or the tokenizer is missing.
            ValueError: an argument, the tokenizer, `params.json` or a tensor is wrong; the message says which.
            MemoryError: weights, cache and activations do not fit on the device.
        """
        checked("seed", seed)
        if compile not in (False, True, "background"):
            raise ValueError(f"compile must be False, True or 'background', got {quote(compile)}")
        started = time.perf_counter()
        tokenizer, models = load_networks(
            ckpt_dir,
            tokenizer_path,
            draft_ckpt_dir,
            max_seq_len=max_seq_len,
            max_batch_size=max_batch_size,
            model_parallel_size=model_parallel_size,
            device=device,
            dtype=dtype,
            quantize=quantize,
            threads=threads,
            tokenizer_class=Tokenizer,
            network_class=Transformer,
        )
        seconds = time.perf_counter() - started
        draft_model = models[1] if len(models) > 1 else None
        generator = Llama(
            models[0],
            tokenizer,
            seed=seed,
            cuda_graphs=cuda_graphs,
            draft_model=draft_model,
            reuse_prefixes=reuse_prefixes,
        )
        generator.chat_format = read_chat_format(ckpt_dir)
        if compile:
            compiled = compiled_stepper(models[0], cuda_graphs=cuda_graphs, background=compile == "background")
            generator.stepper = compiled or generator.stepper
        pause_workers()
        if groups.is_first_rank():
            logger.info("Loaded in %.2f seconds", seconds)
        return generator

    @property
    def engine(self) -> Engine:
        """What runs the network. Calls from all threads, on every `Llama` of the network, share its batch."""
        if self.draft_model is not None and self._draft is None:
            stepper = choose_stepper(self.draft_model, cuda_graphs=self._cuda_graphs)
            self._draft = ModelRunner(self.draft_model, stepper)
        self._engine = engine_of(self.model, self.stepper, self._draft, reuse_prefixes=self.reuse_prefixes)
        return self._engine

    def __repr__(self) -> str:
        return f"{type(self).__name__}(\n{indent(f'model={self.model!r},', '  ')}\n  tokenizer={self.tokenizer!r},\n)"

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name not in ("_engine", "_draft")}

    def generate(
        self,
        prompt_tokens: Iterable[Iterable[int]],
        max_gen_len: int,
        temperature: float = 0.6,
        top_p: float = 0.9,
        logprobs: bool = False,
        echo: bool = False,
        stop_token: int | None = None,
        *,
        seed: int | None = None,
        speculative: str | None = None,
        **options: Unpack[SamplingOptions],
    ) -> tuple[list[list[int]], list[list[float]] | None]:
        """Completes prompts, given and returned as token ids.

        Args:
            prompt_tokens: any number of prompts, each of 1 to `max_seq_len` ids; lists, arrays or tensors.
                `max_batch_size` of them run at a time (continuous batching).
            max_gen_len: maximum number of new tokens per prompt; a row of the cache may have room for fewer. With 0,
                nothing is generated, and `echo` and `logprobs` together score the prompts.
            temperature: 0 for greedy decoding; otherwise the logits are divided by it before the softmax.
            top_p: tokens are drawn from the smallest set whose probability mass exceeds it (nucleus sampling).
            logprobs: whether to return log-probabilities too: log-softmax of the raw logits of each returned token
                given what precedes it; 0.0 for the first token of an echoed prompt.
            echo: whether the prompt is returned in front.
            stop_token: the only id that ends a row, in place of EOS; -1 for none.
            seed: of this call alone; None draws from torch's default generator of the device, which `build` and
                `torch.manual_seed` seed.
            speculative: verifies several drafted tokens per pass, which gives the same text, often in less time:
                "prompt_lookup" drafts the continuation of the longest earlier match, "draft" drafts with the model of
                `draft_ckpt_dir`. None for one token per pass.
            options: further sampling parameters: top_k, min_p, typical_p, repetition_penalty, presence_penalty,
                frequency_penalty, logit_bias, min_tokens, ignore_eos, stop_token_ids, logits_processors,
                response_format and structured_outputs (see `SamplingOptions`; `docs/sampling.md` has their order).

        Returns:
            The ids of each row, up to its first generated EOS or `stop_token`, and their log-probabilities or None.

        Raises:
            PromptError: an argument is out of its range; nothing was computed. It is a ValueError, and an
                AssertionError as Meta's package raises.
        """
        prompts, params = self._checked("generate", locals(), partial(self._check_prompts, prompt_tokens))
        rows = self._completer().complete(prompts, params)
        return [row.tokens for row in rows], [row.logprobs for row in rows] if logprobs else None

    def text_completion(
        self,
        prompts: Iterable[str],
        temperature: float = 0.6,
        top_p: float = 0.9,
        max_gen_len: int | None = None,
        logprobs: bool = False,
        echo: bool = False,
        *,
        stop: Sequence[str] = (),
        seed: int | None = None,
        speculative: str | None = None,
        **options: Unpack[SamplingOptions],
    ) -> list[CompletionPrediction]:
        """Completes texts; arguments as in `generate`.

        Args:
            max_gen_len: None for as many as `max_seq_len` has room for.
            stop: strings; a completion ends before the first of them in its text.

        Returns:
            For each prompt `{"generation": text, "finish_reason": "stop" or "length"}`; with logprobs also "tokens",
            the strings that joined give the text, and their "logprobs".
        """
        ids, params = self._checked("text_completion", locals(), partial(inputs.encode_texts, prompts, "prompts"))
        return [output.completion_prediction(row, params) for row in self._complete(ids, params)]

    def chat_completion(
        self,
        dialogs: Iterable[Dialog],
        temperature: float = 0.6,
        top_p: float = 0.9,
        max_gen_len: int | None = None,
        logprobs: bool = False,
        *,
        stop: Sequence[str] = (),
        seed: int | None = None,
        speculative: str | None = None,
        **options: Unpack[SamplingOptions],
    ) -> list[ChatPrediction]:
        """Answers dialogs; arguments as in `text_completion`.

        A dialog that contains one of the template's own tags, such as `[INST]`, is not run; its answer says so.

        Args:
            dialogs: each a list of messages `{"role": ..., "content": ...}`: an optional "system" message, then
                "user" and "assistant" in turn, "user" last.

        Returns:
            For each dialog `{"generation": {"role": "assistant", "content": text}, "finish_reason": ...}`; with
            logprobs also "tokens" and "logprobs".
        """
        chat_format = self._chat_format()
        encode = partial(inputs.encode_dialogs, dialogs, chat_format=chat_format)
        stop_ids = chat_format.stop_ids(self.tokenizer)
        prompts, params = self._checked("chat_completion", locals(), encode, stop_ids=stop_ids)
        rows = iter(self._complete([prompt for prompt in prompts if prompt is not None], params))
        return [
            output.chat_prediction(None if prompt is None else next(rows), params, chat_format) for prompt in prompts
        ]

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
        speculative: str | None = None,
        **options: Unpack[SamplingOptions],
    ) -> Generator[str, None, None]:
        """Completes one text, yielding pieces as they become final; joined, they are what `text_completion` returns.

        The iterator may be closed early. Other calls may be made between its pieces, also from other threads; the
        stream then recomputes its part of the KV cache, which costs a prefill and may round differently outside of
        float32.
        """
        ids, params = self._checked("stream_text_completion", locals(), partial(inputs.encode_text, prompt, "prompt"))
        return self._completer().stream(ids, params)

    def stream_chat_completion(
        self,
        dialog: Dialog,
        temperature: float = 0.6,
        top_p: float = 0.9,
        max_gen_len: int | None = None,
        *,
        stop: Sequence[str] = (),
        seed: int | None = None,
        speculative: str | None = None,
        **options: Unpack[SamplingOptions],
    ) -> Generator[str, None, None]:
        """Answers one dialog, yielding the answer's pieces; otherwise as `stream_text_completion`."""
        chat_format = self._chat_format()
        encode = partial(inputs.encode_dialog, dialog, "dialog", chat_format=chat_format)
        stop_ids = chat_format.stop_ids(self.tokenizer)
        prompt, params = self._checked("stream_chat_completion", locals(), encode, stop_ids=stop_ids)
        return (text for text in [UNSAFE_ERROR]) if prompt is None else self._completer().stream(prompt, params)

    def text_infilling(
        self,
        prefixes: Iterable[str],
        suffixes: Iterable[str],
        temperature: float = 0.6,
        top_p: float = 0.9,
        max_gen_len: int | None = None,
        logprobs: bool = False,
        suffix_first: bool = False,
        *,
        stop: Sequence[str] = (),
        seed: int | None = None,
        speculative: str | None = None,
        **options: Unpack[SamplingOptions],
    ) -> list[InfillingPrediction]:
        """Writes what goes between each prefix and its suffix, with Code Llama 7B or 13B; arguments as in `generate`.

        Args:
            suffix_first: whether the suffix comes first in the prompt, so that the answer continues the prefix.
            stop: strings; an answer ends before the first of them in its text, as it does at `<EOT>`.

        Returns:
            For each pair `{"generation": text, "full_text": prefix + text + suffix, "finish_reason": ...}`; with
            logprobs also "tokens" and "logprobs".
        """
        encode = partial(inputs.encode_infillings, prefixes, suffixes, suffix_first=suffix_first)
        prompts, params = self._checked("text_infilling", locals(), encode, **inputs.infilling_ends(self.tokenizer))
        rows = self._complete([ids for _, _, ids in prompts], params)
        return [
            output.infilling_prediction(row, params, prefix, suffix)
            for row, (prefix, suffix, _) in zip(rows, prompts, strict=True)
        ]

    def stream_text_infilling(
        self,
        prefix: str,
        suffix: str,
        temperature: float = 0.6,
        top_p: float = 0.9,
        max_gen_len: int | None = None,
        *,
        suffix_first: bool = False,
        stop: Sequence[str] = (),
        seed: int | None = None,
        speculative: str | None = None,
        **options: Unpack[SamplingOptions],
    ) -> Generator[str, None, None]:
        """Writes what goes between two texts, yielding its pieces; otherwise as `stream_text_completion`."""
        encode = partial(inputs.encode_infilling, prefix, suffix, ("prefix", "suffix"), suffix_first=suffix_first)
        ends = inputs.infilling_ends(self.tokenizer)
        ids, params = self._checked("stream_text_infilling", locals(), encode, **ends)
        return self._completer().stream(ids, params)

    def score(self, texts: Iterable[str], contexts: Iterable[str] | None = None) -> list[Score]:
        """The log-probability of texts, or of completions given their contexts, without generating.

        Args:
            contexts: one per text, which the text continues; they are not scored themselves. A context and its text
                are encoded as one string, and the tokens after the context's own are scored.

        Returns:
            For each text `{"logprob": the sum, "tokens": strings, "logprobs": floats}` of its scored tokens. BOS
            precedes the first token and is not scored.
        """
        known, whole = self._same_on_all_ranks("score", partial(inputs.encode_continuations, contexts, texts))
        results = []
        for context, ids, logprobs in zip(known, whole, self._completer().score(whole), strict=True):
            n = common_length(context, ids)
            scored = logprobs[n:]
            results.append(Score(logprob=sum(scored, 0.0), tokens=pieces(self.tokenizer, ids)[n:], logprobs=scored))
        return results

    def score_tokens(self, prompt_tokens: Iterable[Iterable[int]]) -> list[list[float]]:
        """The log-probability of each id given the ids before it; 0.0 for the first of each row.

        Args:
            prompt_tokens: any number of rows, each of 1 to `max_seq_len` ids.
        """
        rows = self._same_on_all_ranks("score_tokens", partial(self._check_prompts, prompt_tokens))
        return self._completer().score(rows)

    def _complete(self, prompts: list[list[int]], params: SamplingParams) -> list[output.Completion]:
        """Completes prompts, through `generate` if a subclass or an assignment replaced that."""
        if not prompts:  # dialogs that are all unsafe
            return []
        if type(self).generate is not _built_in_generate or "generate" in vars(self):
            return complete_by_generate(self.generate, prompts, params, self.tokenizer, self.model.params.max_seq_len)
        return self._completer().complete(prompts, params)

    def _completer(self) -> Completer:
        draw = None if sample_top_p is _built_in_sample_top_p else sample_top_p
        return Completer(self.engine, self.tokenizer, draw)

    def _same_on_all_ranks(self, name: str, encode: Callable[[Tokenizer, int], Result]) -> Result:
        """What `encode` makes of a call's arguments; raises RuntimeError on all ranks if they differ in it."""
        lock_of(self.model).check_thread(several_ranks=groups.has_several_ranks())
        try:
            encoded = encode(self.tokenizer, self.model.params.max_seq_len)
        except Exception:
            groups.compare_calls(None)
            raise
        groups.compare_calls((name, encoded))
        return encoded

    def _checked(
        self, name: str, arguments: dict[str, Any], encode: Callable[[Tokenizer, int], Result], **more: Any
    ) -> tuple[Result, SamplingParams]:
        """A call's encoded prompts, and its `SamplingParams`.

        Args:
            arguments: its `locals()`; what has the name of a sampling parameter is one, as are `options` and `more`.
        """

        def check(tokenizer: Tokenizer, max_seq_len: int) -> tuple[Result, SamplingParams]:
            given = {key: arguments[key] for key in _SAMPLING & arguments.keys()} | arguments["options"] | more
            if (stop_token := arguments.get("stop_token")) is not None:
                given["stop_ids"] = inputs.check_stop_token(stop_token, inputs.n_usable_ids(self.model, tokenizer))
            if given["max_gen_len"] is None and name != "generate":  # where Meta's code has no default
                given["max_gen_len"] = max(1, int(max_seq_len) - 1)
            if unknown := sorted(given.keys() - _SAMPLING):
                takes = sorted(_SAMPLING & arguments.keys() - more.keys() | SamplingOptions.__annotations__.keys())
                got = f"{name}() got an unexpected keyword argument {unknown[0]!r}"
                raise TypeError(f"{got}; it takes {', '.join(takes)}")
            params = SamplingParams(**given)
            vocab_size = inputs.vocab_size_of(self.model, tokenizer)
            params.check_ids(vocab_size)
            if params.form is not None:
                check_form(tokenizer, vocab_size, params)
            if params.speculative == "draft" and self.draft_model is None:
                raise PromptError(
                    "speculative='draft' must have a draft model, got none; give draft_ckpt_dir to Llama.build"
                )
            return encode(tokenizer, max_seq_len), params

        return self._same_on_all_ranks(name, check)

    def _chat_format(self) -> ChatFormat:
        return self.chat_format or built_in_format(self.tokenizer)

    def _check_prompts(
        self, prompts: Iterable[Iterable[int]], tokenizer: Tokenizer, max_seq_len: int
    ) -> list[list[int]]:
        return inputs.check_prompts(prompts, inputs.n_usable_ids(self.model, tokenizer), max_seq_len)


_built_in_generate = Llama.generate


class LLaMA:
    """The interface of Llama 1's package: whole texts, each with its prompt. See `Llama` for its arguments."""

    def __init__(self, model: Any, tokenizer: Tokenizer) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self._llama = Llama(model, tokenizer)

    def generate(
        self, prompts: list[str], max_gen_len: int, temperature: float = 0.8, top_p: float = 0.95
    ) -> list[str]:
        """Completes texts by at most `max_gen_len` tokens; each result starts with its prompt."""
        rows = self._llama.text_completion(prompts, temperature, top_p, max_gen_len, echo=True)
        return [row["generation"] for row in rows]
