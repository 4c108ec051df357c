"""Validation of what callers pass: sampling parameters, and prompts as texts, dialogs or token ids.

Errors name a prompt by its argument and index, such as `prompts[3]`.
"""

from __future__ import annotations

import json
import math
import numbers
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields
from operator import index
from typing import Any, TypedDict

from llama.chat import ChatFormat, Dialog, built_in_format
from llama.errors import PromptError, quote
from llama.tokenizer import stop_ids

SPECULATIVE = ("prompt_lookup", "draft")  # ways to draft tokens: see `speculative.py`


def check_speculative(speculative: str | None, build: Mapping[str, Any]) -> None:
    """Raises ValueError unless `--speculative` is a way to draft tokens, with `--draft_ckpt_dir` if it needs one."""
    if speculative not in (None, *SPECULATIVE):
        raise ValueError(f"--speculative must be {' or '.join(SPECULATIVE)}, got {quote(speculative)}")
    if (speculative == "draft") != (build.get("draft_ckpt_dir") is not None):
        got = "no --draft_ckpt_dir" if speculative == "draft" else f"--draft_ckpt_dir and --speculative {speculative}"
        raise ValueError(f"--speculative draft and --draft_ckpt_dir must be given together, got {got}")


@dataclass(frozen=True)
class AnswerForm:
    """What every answer must be.

    Attributes:
        kind: "json_schema", "regex", "choice" (a JSON list of texts) or "grammar" (Lark).
        text: its definition.
    """

    kind: str
    text: str


class SamplingOptions(TypedDict, total=False):
    """Sampling parameters that all calls take by keyword; `docs/sampling.md` has their definitions and order."""

    top_k: int  # tokens are drawn from the k most probable ones; 0 or -1 for all
    min_p: float  # excludes tokens less probable than this times the most probable one; 0 for none
    typical_p: float  # keeps the tokens of most typical information up to this mass; 1 for all
    repetition_penalty: float  # divides positive logits of tokens of prompt and completion; 1 for none
    presence_penalty: float  # subtracted from the logits of generated tokens; 0 for none
    frequency_penalty: float  # subtracted per occurrence; 0 for none
    logit_bias: Mapping[int, float]  # added to the logits of these ids
    min_tokens: int  # before that many tokens, no EOS or stop token is sampled
    ignore_eos: bool  # whether the completion goes on after EOS
    stop_token_ids: Iterable[int]  # further ids before which the completion ends
    logits_processors: Iterable[Callable[..., Any]]  # f(input_ids (1, n), scores (1, vocab)) -> scores
    response_format: Mapping[str, Any] | None  # {"type": "json_object"}, or "json_schema" in OpenAI's form
    structured_outputs: Mapping[str, Any] | None  # one of "json", "regex", "choice" and "grammar", as in vLLM


@dataclass(frozen=True)
class SamplingParams:
    """The parameters of a call, apart from its prompts. Numbers may be Python's, numpy's or torch's.

    Attributes:
        temperature: divides the logits; 0 for greedy decoding.
        top_p: 0 to 1; tokens are drawn from the smallest set whose probability mass exceeds it (nucleus sampling).
        max_gen_len: maximum number of new tokens per prompt.
        logprobs: whether to return the log-probability of each token.
        echo: whether the result starts with the prompt.
        stop: stop strings, before which a completion ends.
        seed: seeds a generator for this call; None to use torch's default generator.
        speculative: how to draft tokens, one of `SPECULATIVE`; None for plain decoding.
        stop_ids: ids before which a completion ends; None for the tokenizer's (see `tokenizer.stop_ids`).
        keep_space: whether the leading space of the first piece is kept, as in text that continues another.
        top_k, min_p, typical_p, repetition_penalty, presence_penalty, frequency_penalty, logit_bias, min_tokens,
            ignore_eos, stop_token_ids, logits_processors, response_format, structured_outputs: see `SamplingOptions`.
        form: what the answer must be, by `response_format` or `structured_outputs`; None for any text.

    Raises:
        PromptError: a value has the wrong type or is out of range.
    """

    temperature: float
    top_p: float
    max_gen_len: int
    logprobs: bool = False
    echo: bool = False
    stop: Sequence[str] = ()
    seed: int | None = None
    speculative: str | None = None
    stop_ids: frozenset[int] | None = None
    keep_space: bool = False
    top_k: int = 0
    min_p: float = 0.0
    typical_p: float = 1.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    min_tokens: int = 0
    ignore_eos: bool = False
    stop_token_ids: Sequence[int] = ()
    logits_processors: Sequence[Callable[..., Any]] = field(default=(), repr=False)  # differs between ranks
    response_format: Mapping[str, Any] | None = None
    structured_outputs: Mapping[str, Any] | None = None
    form: AnswerForm | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        temperature, top_p = _number(self.temperature), _number(self.top_p)
        if temperature is None or not 0 <= temperature < math.inf:
            raise PromptError(
                f"temperature must be 0 (greedy) or a finite number above 0, got {quote(self.temperature)}"
            )
        if top_p is None or not 0 <= top_p <= 1:
            raise PromptError(f"top_p must be a number from 0 to 1, got {quote(self.top_p)}")
        max_gen_len = _integer(self.max_gen_len)
        if max_gen_len is None or max_gen_len < 0:
            raise PromptError(f"max_gen_len must be an integer of at least 0, got {quote(self.max_gen_len)}")
        seed = None if self.seed is None else check_seed(self.seed)
        if self.speculative not in (None, *SPECULATIVE):
            choices = " or ".join(map(repr, SPECULATIVE))
            raise PromptError(f"speculative must be None, {choices}, got {quote(self.speculative)}")
        checked = {"temperature": temperature, "top_p": top_p, "max_gen_len": max_gen_len, "seed": seed}
        flags = {name: check_flag(getattr(self, name), name) for name in ("logprobs", "echo")}
        options = {name: check(getattr(self, name), name) for name, check in _OPTIONS.items()}
        for name, value in (checked | flags | options | {"stop": _check_stop(self.stop)}).items():
            object.__setattr__(self, name, value)
        forms = [_form_of_response(self.response_format), _form_of_outputs(self.structured_outputs)]
        if None not in forms:
            raise PromptError("response_format and structured_outputs must not both be given")
        object.__setattr__(self, "form", forms[0] or forms[1])
        if self.form is not None and self.ignore_eos:
            raise PromptError("ignore_eos must be False with response_format or structured_outputs, whose answers end")

    def options(self) -> dict[str, Any]:
        """The `SamplingOptions` that are not neutral."""
        defaults = {f.name: f.default if f.default is not MISSING else {} for f in fields(self)}
        return {name: getattr(self, name) for name in _OPTIONS if getattr(self, name) != defaults[name]}

    def check_ids(self, vocab_size: int) -> None:
        """Raises PromptError if an id in `logit_bias` or `stop_token_ids` is outside the vocabulary."""
        for name, ids in (("logit_bias", self.logit_bias), ("stop_token_ids", self.stop_token_ids)):
            for token in ids:
                if token >= vocab_size:
                    raise PromptError(f"{name} must have ids from 0 to {vocab_size - 1}, got {quote(token)}")

    def ends(self, tokenizer: Any) -> frozenset[int]:
        """The ids that end a completion."""
        if self.ignore_eos:
            return frozenset(self.stop_token_ids)
        return (stop_ids(tokenizer) if self.stop_ids is None else self.stop_ids).union(self.stop_token_ids)


def _form_of_response(value: Any) -> AnswerForm | None:
    """The form that a `response_format` of OpenAI's API asks for."""
    kind = value.get("type") if isinstance(value, Mapping) else None
    if value is None or kind == "text":
        return None
    if kind == "json_object":
        return AnswerForm("json_schema", '{"type": "object"}')
    inner = value.get("json_schema") if kind == "json_schema" else None
    schema = inner.get("schema") if isinstance(inner, Mapping) else None
    if not isinstance(schema, (Mapping, bool)):
        expected = '{"type": "json_object"} or {"type": "json_schema", "json_schema": {"schema": {...}}}'
        raise PromptError(f"response_format must be {expected}, got {quote(value)}")
    return AnswerForm("json_schema", _as_json(schema, "response_format"))


def _form_of_outputs(value: Any) -> AnswerForm | None:
    """The form that vLLM's `structured_outputs` asks for."""
    if value is None:
        return None
    given = {name: inner for name, inner in value.items() if inner is not None} if isinstance(value, Mapping) else {}
    if len(given) != 1 or not given.keys() <= {"json", "regex", "choice", "grammar"}:
        raise PromptError(f"structured_outputs must have one of json, regex, choice and grammar, got {quote(value)}")
    ((kind, content),) = given.items()
    if kind == "json":
        if isinstance(content, str):
            try:
                content = json.loads(content)
            except ValueError as error:
                raise PromptError(f"structured_outputs.json must be a JSON schema, got {quote(content)}") from error
        if not isinstance(content, (Mapping, bool)):
            raise PromptError(f"structured_outputs.json must be a JSON schema, got {quote(content)}")
        return AnswerForm("json_schema", _as_json(content, "structured_outputs.json"))
    if kind == "choice":
        choices = list(content) if isinstance(content, Iterable) and not isinstance(content, str) else []
        if not choices or not all(isinstance(choice, str) and choice for choice in choices):
            raise PromptError(f"structured_outputs.choice must be a list of texts, none empty, got {quote(content)}")
        return AnswerForm(kind, json.dumps(choices))
    if not isinstance(content, str) or not content:
        raise PromptError(f"structured_outputs.{kind} must be a str, not empty, got {quote(content)}")
    return AnswerForm(kind, content)


def _as_json(schema: Any, name: str) -> str:
    try:
        return json.dumps(schema, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise PromptError(f"{name} must be a JSON schema, got {quote(schema)} ({error})") from error


def _number_from(low: float, high: float, *, above: bool = False) -> Callable[[Any, str], float]:
    """A check of a number from `low` (or above it) to `high`."""

    def check(value: Any, name: str) -> float:
        number = _number(value)
        if number is None or not low <= number <= high or (above and number == low):
            limits = f"from {low:g} to {high:g}" if not above else f"above {low:g}"
            limits += f", up to {high:g}" if above and high < math.inf else ""
            raise PromptError(f"{name} must be a number {limits}, got {quote(value)}")
        return number

    return check


def _count_from(low: int) -> Callable[[Any, str], int]:
    """A check of an integer of at least `low`."""

    def check(value: Any, name: str) -> int:
        number = _integer(value)
        if number is None or number < low:
            raise PromptError(f"{name} must be an integer of at least {low}, got {quote(value)}")
        return number

    return check


def _check_bias(value: Any, name: str) -> dict[int, float]:
    if not isinstance(value, Mapping):
        raise PromptError(f"{name} must be a mapping from token ids to numbers, got {quote(value)}")
    bias = {_integer(token): _number(amount) for token, amount in value.items()}
    for token, amount in bias.items():
        if token is None or token < 0 or amount is None or not math.isfinite(amount):
            raise PromptError(f"{name} must map token ids to finite numbers, got {quote(value)}")
    return {token: amount for token, amount in bias.items() if token is not None and amount is not None}


def _check_token_ids(value: Any, name: str) -> tuple[int, ...]:
    try:
        ids = [_integer(token) for token in value]
    except TypeError:
        ids = [None]
    if any(token is None or token < 0 for token in ids):
        raise PromptError(f"{name} must be a list of token ids, got {quote(value)}")
    return tuple(token for token in ids if token is not None)


def _check_processors(value: Any, name: str) -> tuple[Callable[..., Any], ...]:
    processors = tuple(value) if isinstance(value, Iterable) else (value,)
    if not all(map(callable, processors)):
        raise PromptError(f"{name} must be a list of functions of input_ids and scores, got {quote(value)}")
    return processors


_OPTIONS: dict[str, Callable[[Any, str], Any]] = {
    "top_k": _count_from(-1),
    "min_p": _number_from(0, 1),
    "typical_p": _number_from(0, 1, above=True),
    "repetition_penalty": _number_from(0, math.inf, above=True),
    "presence_penalty": _number_from(-2, 2),
    "frequency_penalty": _number_from(-2, 2),
    "logit_bias": _check_bias,
    "min_tokens": _count_from(0),
    "ignore_eos": lambda value, name: check_flag(value, name),
    "stop_token_ids": _check_token_ids,
    "logits_processors": _check_processors,
    "response_format": lambda value, name: value,
    "structured_outputs": lambda value, name: value,
}


def n_words_of(tokenizer: Any) -> int | None:
    """The number of ids that a tokenizer of any class has texts for; None if it does not say."""
    n_words = getattr(tokenizer, "n_words", None)
    return n_words if isinstance(n_words, int) else None


def vocab_size_of(model: Any, tokenizer: Any) -> int:
    """The number of ids that a model has logits for; the tokenizer's if the model's `params` lacks it."""
    size: Any = getattr(model.params, "vocab_size", None)
    return index(size) if size is not None else index(tokenizer.n_words)


def n_usable_ids(vocab_size: int, tokenizer: Any) -> int:
    """The number of leading ids that are tokens; a network's embedding may have more rows."""
    n_words = n_words_of(tokenizer)
    return vocab_size if n_words is None else min(vocab_size, n_words)


def check_prompts(prompts: Iterable[Iterable[int]], vocab_size: int, max_seq_len: int) -> list[list[int]]:
    """Checks prompts of token ids, and returns them as lists of int.

    Args:
        prompts: tensors, arrays or any other iterables of ids, in any of these.

    Raises:
        PromptError: there are no prompts, or one is empty, too long, or has an id outside the vocabulary.
    """
    return [
        _check_ids(prompt, f"prompt_tokens[{i}]", vocab_size, max_seq_len)
        for i, prompt in enumerate(_as_list(prompts, "prompt_tokens", "prompts"))
    ]


def _check_ids(prompt: Iterable[int], name: str, vocab_size: int, max_seq_len: int) -> list[int]:
    try:
        ids = [index(token) for token in _as_list(prompt, name, "token ids", may_be_empty=True)]
    except (TypeError, ValueError, RuntimeError) as error:
        raise PromptError(f"{name} must be a list of token ids, got {quote(prompt)}") from error
    _check_length(ids, name, max_seq_len)
    if not 0 <= min(ids) <= max(ids) < vocab_size:
        invalid = next(token for token in ids if not 0 <= token < vocab_size)
        raise PromptError(f"{name} must have ids from 0 to {vocab_size - 1}, got {quote(invalid)}")
    return ids


def _encoded(encode: Callable[[], list[int]], name: str, max_seq_len: int) -> list[int]:
    """What `encode` returns; its errors, and an unfit length, name this prompt."""
    try:
        ids = encode()
    except ValueError as error:
        raise PromptError(f"{name}: {error}") from error
    _check_length(ids, name, max_seq_len)
    return ids


def encode_text(text: str, name: str, tokenizer: Any, max_seq_len: int) -> list[int]:
    """Checks and encodes a text, with BOS in front. `name` is the text's name in errors."""
    if not isinstance(text, str):
        raise PromptError(f"{name} must be a str, got {type(text).__name__}")
    return _encoded(lambda: list(tokenizer.encode(text, bos=True, eos=False)), name, max_seq_len)


def encode_texts(texts: Iterable[str], name: str, tokenizer: Any, max_seq_len: int) -> list[list[int]]:
    """Checks and encodes texts, each with BOS in front. `name` is the argument's name in errors."""
    return [
        encode_text(text, f"{name}[{i}]", tokenizer, max_seq_len) for i, text in enumerate(_as_list(texts, name, "str"))
    ]


def encode_dialog(
    dialog: Dialog, name: str, tokenizer: Any, max_seq_len: int, chat_format: ChatFormat | None = None
) -> list[int] | None:
    """Checks and encodes a dialog; returns None if it must not be run because it contains the template's tags.

    Args:
        chat_format: of the checkpoint; None for the tokenizer's built-in one.
    """
    form = chat_format or built_in_format(tokenizer)
    messages = _as_list(dialog, name, "messages")
    form.check(messages, name)
    if form.is_unsafe(messages):
        return None
    return _encoded(lambda: form.encode(messages, tokenizer), name, max_seq_len)


def encode_dialogs(
    dialogs: Iterable[Dialog], tokenizer: Any, max_seq_len: int, chat_format: ChatFormat | None = None
) -> list[list[int] | None]:
    """Checks and encodes dialogs; None for each one that must not be run."""
    return [
        encode_dialog(dialog, f"dialogs[{i}]", tokenizer, max_seq_len, chat_format)
        for i, dialog in enumerate(_as_list(dialogs, "dialogs", "dialogs"))
    ]


def infilling_prompt_tokens(tokenizer: Any, pre: str, suf: str, suffix_first: bool = False) -> list[int]:
    """The prompt to which Code Llama answers with the text between `pre` and `suf`, in one of its two orders.

    Args:
        suffix_first: whether the suffix stands before the prefix, which then runs on into the answer.

    Raises:
        PromptError: the tokenizer has no infilling pieces.
    """
    prefix_id, middle_id, suffix_id = _infilling_ids(tokenizer)
    before = list(tokenizer.encode(pre, bos=False, eos=False))
    after = list(tokenizer.encode_infilling(suf))
    if suffix_first:
        return [tokenizer.bos_id, prefix_id, suffix_id, *after, middle_id, *before]
    return [tokenizer.bos_id, prefix_id, *before, suffix_id, *after, middle_id]


def _infilling_ids(tokenizer: Any) -> list[int]:
    ids = [getattr(tokenizer, name, None) for name in ("prefix_id", "middle_id", "suffix_id")]
    known = [token for token in ids if token is not None]
    if len(known) < len(ids):
        raise PromptError(
            "tokenizer must have Code Llama's infilling pieces, <PRE>, <MID> and <SUF>, got one without; infill with "
            "Code Llama 7B or 13B, base or Instruct"
        )
    return known


def infilling_stop_ids(tokenizer: Any) -> frozenset[int] | None:
    """The ids that end what fills a gap; None for the tokenizer's own."""
    eot_id = getattr(tokenizer, "eot_id", None)
    return None if eot_id is None else frozenset({eot_id})


def encode_infilling(
    prefix: str, suffix: str, names: tuple[str, str], tokenizer: Any, max_seq_len: int, *, suffix_first: bool
) -> list[int]:
    """Checks and encodes an infilling prompt. `names` are what errors call the two texts."""
    suffix_first = check_flag(suffix_first, "suffix_first")
    for text, name in zip((prefix, suffix), names, strict=True):
        if not isinstance(text, str):
            raise PromptError(f"{name} must be a str, got {type(text).__name__}")
    _infilling_ids(tokenizer)
    return _encoded(
        lambda: infilling_prompt_tokens(tokenizer, prefix, suffix, suffix_first), " + ".join(names), max_seq_len
    )


def encode_infillings(
    prefixes: Iterable[str], suffixes: Iterable[str], tokenizer: Any, max_seq_len: int, *, suffix_first: bool
) -> list[tuple[str, str, list[int]]]:
    """Checks and encodes infilling prompts; returns prefix, suffix and ids of each."""
    before, after = _as_list(prefixes, "prefixes", "str"), _as_list(suffixes, "suffixes", "str")
    if len(before) != len(after):
        raise PromptError(
            f"suffixes must have one element per prefix, got {len(before)} prefixes and {len(after)} suffixes"
        )
    encoded = []
    for i, (prefix, suffix) in enumerate(zip(before, after, strict=True)):
        names = f"prefixes[{i}]", f"suffixes[{i}]"
        ids = encode_infilling(prefix, suffix, names, tokenizer, max_seq_len, suffix_first=suffix_first)
        encoded.append((prefix, suffix, ids))
    return encoded


def check_stop_token(stop_token: object, vocab_size: int) -> frozenset[int] | None:
    """The ids that `generate(stop_token=)` stops at: None for the tokenizer's; -1 for none."""
    if stop_token is None:
        return None
    value = _integer(stop_token)
    if value is None or not -1 <= value < vocab_size:
        raise PromptError(f"stop_token must be None or an id from -1 to {vocab_size - 1}, got {quote(stop_token)}")
    return frozenset({value} - {-1})


def encode_continuations(
    contexts: Iterable[str], texts: Iterable[str], tokenizer: Any, max_seq_len: int
) -> tuple[list[list[int]], list[int]]:
    """Encodes each context and its text as one string.

    Returns:
        The ids of each such string, and for each the number of leading ids that belong to the context.
    """
    contexts, texts = _as_list(contexts, "contexts", "str"), _as_list(texts, "texts", "str")
    if len(contexts) != len(texts):
        raise PromptError(
            f"contexts must have one element per text, got {len(contexts)} contexts and {len(texts)} texts"
        )
    prefixes = encode_texts(contexts, "contexts", tokenizer, max_seq_len)
    encode_texts(texts, "texts", tokenizer, max_seq_len)
    joined = [context + text for context, text in zip(contexts, texts, strict=True)]
    whole = encode_texts(joined, "contexts + texts", tokenizer, max_seq_len)
    return whole, [_common_length(prefix, ids) for prefix, ids in zip(prefixes, whole, strict=True)]


def _common_length(a: Sequence[int], b: Sequence[int]) -> int:
    """Length of the longest common prefix of two sequences."""
    pairs = zip(a, b, strict=False)
    return next((i for i, (x, y) in enumerate(pairs) if x != y), min(len(a), len(b)))


def _as_list(values: Any, name: str, of: str, *, may_be_empty: bool = False) -> list[Any]:
    """Converts any iterable except texts and mappings to a list; `of` names the elements in errors."""
    if hasattr(values, "tolist"):
        try:
            values = values.tolist()
        except (TypeError, ValueError, RuntimeError) as error:  # such as a tensor on the meta device
            raise PromptError(f"{name} must be a list of {of}, got {quote(values)}, which holds no values") from error
    if isinstance(values, (str, bytes, bytearray, Mapping)) or not isinstance(values, Iterable):
        raise PromptError(f"{name} must be a list of {of}, got {type(values).__name__}")
    listed = list(values)
    if not listed and not may_be_empty:
        raise PromptError(f"{name} must have at least one element, got none")
    return listed


def _check_length(ids: Sequence[int], name: str, max_seq_len: int) -> None:
    if not ids:
        raise PromptError(f"{name} must have at least one token, such as BOS, got none")
    if len(ids) > max_seq_len:
        raise PromptError(f"{name} must have at most max_seq_len={max_seq_len} tokens, got {len(ids)}")


def _check_stop(stop: Any) -> tuple[str, ...]:
    try:
        texts = (None,) if isinstance(stop, (str, bytes)) else tuple(stop)
    except (TypeError, RuntimeError):  # not iterable, such as a zero-dimensional array
        texts = (None,)
    if not all(isinstance(text, str) and text for text in texts):
        raise PromptError(f"stop must be a list of non-empty strings, got {quote(stop)}")
    return texts


def check_flag(value: Any, name: str) -> bool:
    """Returns the flag as a bool; `name` is its name in errors."""
    try:
        return bool(value)
    except (TypeError, ValueError, RuntimeError) as error:  # such as an array of several values
        raise PromptError(f"{name} must be True or False, got {quote(value)}") from error


def check_seed(seed: object) -> int:
    """Returns the seed as an int; raises PromptError if `torch.Generator` would not accept it."""
    value = _integer(seed)
    if value is None or not -(2**63) <= value < 2**64:
        raise PromptError(f"seed must be None or an integer from -2**63 to 2**64 - 1, got {quote(seed)}")
    return value


def _number(value: Any) -> float | None:
    """Converts a Python, numpy or torch number to a float; None for anything else, and for numbers too large."""
    try:
        value = value.item() if hasattr(value, "item") else value
        return float(value) if isinstance(value, numbers.Real) and not isinstance(value, bool) else None
    except (TypeError, ValueError, OverflowError, RuntimeError):
        return None


def _integer(value: Any) -> int | None:
    """Converts a Python, numpy or torch integer to an int; None for anything else."""
    try:
        return None if isinstance(value, bool) else index(value)
    except (TypeError, ValueError, RuntimeError):
        return None
