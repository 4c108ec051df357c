"""A model class of the Language Model Evaluation Harness, under the name "llama-meta".

Importing this module registers it, for `lm_eval --model llama-meta`. It computes what the harness's own "hf" class
computes on the same weights, with the same encoding, truncation (from the left) and stop strings.

https://github.com/EleutherAI/lm-evaluation-harness
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from torch import Tensor

from llama import Llama, Message
from llama.chat import StepChatFormat, built_in_format
from llama.checkpoint.reading import find_tokenizer
from llama.distributed import groups
from llama.engine.calls import PromptScores, observe_logits
from llama.errors import missing_extra, quote
from llama.inputs import SamplingParams
from llama.serving.jobs import Job, as_completed
from llama.text.chat_format import LLAMA2, TemplateChatFormat

try:
    import lm_eval.models  # noqa: F401 (registers the harness's own classes, as it does only before any other)
    from lm_eval import utils
    from lm_eval.api.model import TemplateLM
    from lm_eval.api.registry import register_model
    from tqdm import tqdm
except ImportError as error:
    raise missing_extra("eval", error) from error

T = TypeVar("T")
Work = TypeVar("Work")
Score = tuple[float, bool]  # a continuation's log-probability, and whether greedy decoding gives it
Row = tuple[list[int], list[list[int]]]  # ids, and the continuations that end them, whose last token is not in them
_ROUNDS = 16  # batches of each replica between two exchanges of results
_MAX_GEN_TOKS = 256  # the harness's default
# Other generation arguments of a task are refused, except with a value that has no effect.
_GENERATION = ("until", "max_gen_toks", "do_sample", "temperature", "top_p")
_ALIASES = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
_NEUTRAL = {"num_beams": 1, "num_return_sequences": 1, "repetition_penalty": 1.0, "top_k": 0}


@register_model("llama-meta")
class LlamaLM(TemplateLM):  # type: ignore[misc]
    """A checkpoint in Meta's format.

    Under torchrun every rank makes the same calls; replicas of the network share the requests, and all ranks get all
    results.

    Args:
        ckpt_dir: folder of params.json and consolidated.NN.pth.
        tokenizer_path: its tokenizer.model; by default the one in `ckpt_dir` or in its parent folder.
        max_seq_len: maximum number of tokens of a context and its continuation.
        batch_size: number of rows that are computed at a time.
        add_bos_token: whether texts begin with BOS, as in "hf" with the tokenizer of a converted Llama 2.
        seed: of sampled generations.
        llama: a loaded model, instead of the arguments above.
        device: as in `Llama.build`, but "cuda:0", which `lm_eval` passes by default, means None.
        max_batch_size: without effect; `lm_eval` passes it for its search for a batch size.
        build: further arguments of `Llama.build`.
    """

    def __init__(
        self,
        ckpt_dir: str | None = None,
        tokenizer_path: str | None = None,
        max_seq_len: int = 2048,
        batch_size: int | str = 8,
        *,
        device: str | None = None,
        seed: int = 1,
        add_bos_token: bool = True,
        llama: Llama | None = None,
        max_batch_size: int | None = None,
        **build: Any,
    ) -> None:
        super().__init__()
        if llama is None:
            if not isinstance(batch_size, int) and not str(batch_size).isdigit():
                raise ValueError(f"batch_size must be a number, got {quote(batch_size)}")
            if ckpt_dir is None:
                raise ValueError("ckpt_dir must be given: the folder of params.json and consolidated.NN.pth")
            llama = Llama.build(
                ckpt_dir,
                tokenizer_path or find_tokenizer(ckpt_dir),
                int(max_seq_len),
                int(batch_size),
                seed=seed,
                device=None if device == "cuda:0" else device,
                **build,
            )
        self.llama = llama
        self.max_length: int = llama.model.params.max_seq_len
        self.batch_size: int = llama.model.params.max_batch_size
        self.max_gen_toks = _MAX_GEN_TOKS
        self._name = Path(ckpt_dir or "llama").resolve().name
        self._format = llama.chat_format or built_in_format(llama.tokenizer)  # checks dialogs
        own = llama.chat_format
        self._template = own if isinstance(own, TemplateChatFormat) else TemplateChatFormat(LLAMA2, spaces=True)
        self._is_rendered = False  # whether texts have been rendered by the template
        self._seed = seed
        self._add_bos_token = add_bos_token
        self._bos, self._eos = map(llama.tokenizer.token_piece, (self.prefix_token_id, self.eot_token_id))

    # ---- what the harness asks about the model ----

    @property
    def eot_token_id(self) -> int:
        return self.llama.tokenizer.eos_id

    @property
    def prefix_token_id(self) -> int:
        return self.llama.tokenizer.bos_id

    @property
    def tokenizer_name(self) -> str:
        return f"llama-meta-{self.llama.tokenizer.n_words}"

    def get_model_info(self) -> dict[str, Any]:
        """For the file of results."""
        weight = next(self.llama.model.parameters())
        return {
            "model_name": self._name,
            "model_dtype": str(weight.dtype),
            "model_parallel_size": groups.model_parallel_size(),
            "replicas": groups.replica()[1],
            "max_length": self.max_length,
        }

    # ---- texts ----

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """The ids of a text. Names of special tokens in it, which `apply_chat_template` writes, become those tokens.

        Args:
            add_special_tokens: whether BOS goes in front; None: as the model was told, for a text that is not rendered
                and does not begin with it.
        """
        if add_special_tokens is None:
            add_special_tokens = self._add_bos_token and not self._is_rendered and not string.startswith(self._bos)
        ids = self._template.encode_text(string, self.llama.tokenizer)
        return [self.prefix_token_id] * add_special_tokens + ids

    def apply_chat_template(self, chat_history: Sequence[Message], add_generation_prompt: bool = True) -> str:
        """The text of a dialog in the checkpoint's chat template, which `tok_encode` turns into the ids of a chat.

        Args:
            add_generation_prompt: False for a dialog whose last message is the beginning of the answer.
        """
        if isinstance(self._format, StepChatFormat):
            raise ValueError("the chat template must be one text, got that of Code Llama 70B Instruct")
        history = list(chat_history)
        answer = "" if add_generation_prompt else history.pop()["content"].strip()
        space = " " if answer and self._template is not self._format else ""  # Llama 2's answers begin with one
        self._is_rendered = True
        self._format.check(history, "chat_history")
        return self._template.render(history, self.llama.tokenizer) + space + answer

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """The checkpoint's template or its name, for the file of results."""
        if isinstance(chat_template, str):
            raise ValueError(f"the chat template must be the checkpoint's, without a name, got {quote(chat_template)}")
        name = self._template.source if self._template is self._format else "Llama 2 chat"
        return name if chat_template else None

    # ---- log-likelihoods ----

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """The log-likelihood of whole texts, in windows of `max_seq_len` that do not overlap but for one token."""
        windows, owners = [], []
        for i, request in enumerate(requests):
            pairs = utils.get_rolling_token_windows(
                token_list=self.tok_encode(request.args[0]),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            for pair in pairs:
                windows.append((None, *utils.make_disjoint_window(pair)))
                owners.append(i)
        totals = [0.0] * len(requests)
        for i, (logprob, _) in zip(owners, self._loglikelihood_tokens(windows, disable_tqdm), strict=True):
            totals[i] += logprob
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], disable_tqdm: bool = False, **_: Any
    ) -> list[Score]:
        """The log-probability of each continuation, and whether it is what greedy decoding gives."""
        # Continuations of one token, such as the letters of choices, share a row.
        by_tokens: dict[tuple[int, ...], list[int]] = {}
        for i, (_, context, continuation) in enumerate(requests):
            if not 1 <= len(continuation) <= self.max_length:
                raise ValueError(
                    f"a continuation must have 1 to max_seq_len={self.max_length} tokens, got {len(continuation)}"
                )
            fed = (context + continuation)[-(self.max_length + 1) :][:-1]  # truncated from the left
            by_tokens.setdefault(tuple(fed), []).append(i)
        order = sorted(by_tokens.items(), key=lambda item: -len(item[0]))
        asked: list[Row] = [(list(tokens), [requests[i][2] for i in of]) for tokens, of in order]
        results: list[Score] = [(0.0, False)] * len(requests)
        for number, scores in self._share("loglikelihood", asked, self._score, disable_tqdm=disable_tqdm):
            for i, score in zip(order[number][1], scores, strict=True):
                results[i] = score
                if requests[i][0] is not None:
                    self.cache_hook.add_partial("loglikelihood", requests[i][0], score)
        return results

    def _score(self, asked: Sequence[Row]) -> list[list[Score]]:
        """For each row, the scores of the continuations that end it."""
        rows = [(row, [PromptScores([0, *ids], i, 1) for ids in row[1]]) for i, row in enumerate(asked)]
        observe_logits(self.llama.engine, [tokens for tokens, _ in asked], [partial(_observe, *row) for row in rows])
        return [[_sum(*pair) for pair in zip(continuations, of, strict=True)] for (_, continuations), of in rows]

    # ---- generation ----

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Completions of contexts, each up to its first stop string or EOS."""
        jobs = [(i, self._job(i, *request.args)) for i, request in enumerate(requests)]
        results = [""] * len(requests)
        for number, text in self._share("generate_until", jobs, self._complete, disable_tqdm=disable_tqdm):
            results[number] = text
            self.cache_hook.add_partial("generate_until", requests[number].args, text)
        return results

    def _job(self, number: int, context: str, kwargs: Mapping[str, Any]) -> Job:
        params = sampling_params(kwargs, self.max_length)
        digest = hashlib.sha256(f"{self._seed}:{number}:{context}".encode(errors="replace")).digest()
        params = replace(
            params,
            stop=[text for text in [*params.stop, self._eos] if text],
            stop_ids=self._format.stop_ids(self.llama.tokenizer) if self._is_rendered else None,
            seed=int.from_bytes(digest[:7], "big"),
        )
        return Job([self.tok_encode(context)[params.max_gen_len - self.max_length :]], params)

    def _complete(self, jobs: Sequence[tuple[int, Job]]) -> list[str]:
        """The texts of this replica's numbered jobs, as many of which run at a time as the cache has rows."""
        texts = {}
        for number, pieces in as_completed(self.llama, jobs):
            if isinstance(pieces, Exception):
                raise pieces
            texts[number] = pieces[0].text
        return [texts[number] for number, _ in jobs]

    # ---- replicas ----

    def _share(
        self, name: str, work: Sequence[Work], do: Callable[[Sequence[Work]], list[T]], *, disable_tqdm: bool
    ) -> Iterator[tuple[int, T]]:
        """Does the work, each replica its share; yields the number of each piece of work and its result, on all ranks.

        It yields after each round, so that the harness's cache has the results, and a kill loses little.

        Raises:
            RankError: the ranks have different work, as with caches that differ.
        """
        groups.compare_calls((name, list(work)))
        replica, n_replicas = groups.replica()
        size = _ROUNDS * self.batch_size * n_replicas
        is_quiet = disable_tqdm or not groups.is_first_rank()
        with tqdm(total=len(work), desc=f"Running {name} requests", disable=is_quiet) as bar:
            for start in range(0, len(work), size):
                part = work[start : start + size]
                shares = groups.gather_replicas(do(part[replica::n_replicas]))
                for i in range(len(part)):
                    yield start + i, shares[i % n_replicas][i // n_replicas]
                bar.update(len(part))


def sampling_params(kwargs: Mapping[str, Any], max_seq_len: int) -> SamplingParams:
    """The parameters by a task's generation arguments; raises ValueError for those that cannot be met."""
    given = dict(kwargs)
    lengths = [length for name in _ALIASES if (length := given.pop(name, None)) is not None]
    max_gen_toks = _as_number("max_gen_toks", (lengths or [_MAX_GEN_TOKS])[0], int)
    if max_gen_toks >= max_seq_len:
        raise ValueError(
            f"max_seq_len must be more than the {max_gen_toks} tokens that the task generates, got "
            f"{max_seq_len}; raise it, or lower max_gen_toks"
        )
    temperature = _as_number("temperature", given.get("temperature") or 0.0, float)
    samples = temperature > 0 if given.get("do_sample") is None else bool(given["do_sample"])
    for name, value in given.items():
        if samples and name not in _GENERATION and value is not None and value != _NEUTRAL.get(name):
            raise ValueError(f"the generation argument {quote(name)} is not supported, got {quote(value)}")
        if name in ("num_beams", "num_return_sequences", "repetition_penalty") and value != _NEUTRAL[name]:
            raise ValueError(f"the generation argument {name} must be {_NEUTRAL[name]}, got {quote(value)}")
    until = given.get("until") or []
    return SamplingParams(
        temperature=temperature if samples else 0.0,
        top_p=given.get("top_p", 1.0) if samples else 1.0,
        max_gen_len=max_gen_toks,
        stop=[text for text in (until if isinstance(until, (list, tuple)) else [until]) if text],
    )


def _as_number(name: str, value: Any, kind: Callable[[Any], T]) -> T:
    try:
        return kind(value)
    except (TypeError, ValueError, OverflowError) as error:
        raise ValueError(f"the generation argument {name} must be a number, got {quote(value)}") from error


def _observe(row: Row, scorers: Sequence[PromptScores], position: int, logits: Tensor) -> None:
    """Gives the scorer of each continuation at the end of a row its logits, from those before its first token."""
    tokens, continuations = row
    for ids, scorer in zip(continuations, scorers, strict=True):
        first = len(tokens) - len(ids)
        scorer(max(0, position - first), logits[max(0, first - position) :])


def _sum(ids: list[int], scorer: PromptScores) -> Score:
    logprobs, tops = zip(*scorer.scores[1:], strict=True)
    return sum(logprobs), all(top[0][0] == token for top, token in zip(tops, ids, strict=True))
