"""Validation of what callers pass: sampling parameters, and prompts as texts, dialogs or token ids.

Errors name a prompt by its argument and index, such as `prompts[3]`: the `name` of the functions below.
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
    """What every answer must be."""

    kind: str  # "json_schema", "regex", "choice" (a JSON list of texts) or "grammar" (Lark)
    text: str  # its definition


class SamplingOptions(TypedDict, total=False):
    """Sampling parameters that all calls take by keyword; `docs/sampling.md` has their order."""

    top_k: int  # excludes tokens less probable than the k-th most probable one; 0 or -1 for none
    min_p: float  # excludes tokens less probable than this times the most probable one; 0 for none
    typical_p: float  # keeps the tokens whose information is closest to the entropy, up to this mass; 1 for all
    repetition_penalty: float  # for earlier tokens: divides positive logits, multiplies negative ones; 1 for none
    presence_penalty: float  # subtracted once from the logits of the completion's tokens; 0 for none
    frequency_penalty: float  # subtracted from these per occurrence; 0 for none
    logit_bias: Mapping[int, float]  # added to the logits of these ids
    min_tokens: int  # before that many tokens, no EOS or stop token is sampled
    ignore_eos: bool  # whether the completion goes on after EOS
    stop_token_ids: Iterable[int]  # further ids before which the completion ends
    logits_processors: Iterable[Callable[..., Any]]  # f(input_ids (1, n), scores (1, vocab)) -> scores
    response_format: Mapping[str, Any] | None  # {"type": "json_object"}, or "json_schema" in OpenAI's form
    structured_outputs: Mapping[str, Any] | None  # one of "json", "regex", "choice" and "grammar", as in vLLM


@dataclass(frozen=True)
class SamplingParams:
    """The parameters of a call, apart from its prompts: see `Llama.generate` and `SamplingOptions`.

    Numbers may be Python's, numpy's or torch's.

    Attributes:
        stop: stop strings, before which a completion ends.
        stop_ids: ids before which a completion ends; None for the tokenizer's (see `tokenizer.stop_ids`).
        keep_space: whether the leading space of the first piece is kept, as in text that continues another.
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
        for name, value in list(vars(self).items()):
            if name in _ARGUMENTS:
                object.__setattr__(self, name, checked(name, value))
        forms = [_form_of_response(self.response_format), _form_of_outputs(self.structured_outputs)]
        if None not in forms:
            raise PromptError("response_format and structured_outputs must not both be given")
        object.__setattr__(self, "form", forms[0] or forms[1])
        if self.form is not None and self.ignore_eos:
            raise PromptError("ignore_eos must be False with response_format or structured_outputs, whose answers end")

    def options(self) -> dict[str, Any]:
        """The `SamplingOptions` that are not neutral."""
        defaults = {f.name: f.default if f.default is not MISSING else {} for f in fields(self)}
        values = {name: getattr(self, name) for name in SamplingOptions.__annotations__}
        return {name: value for name, value in values.items() if value != defaults[name]}

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
    match value:
        case None | {"type": "text"}:
            return None
        case {"type": "json_object"}:
            return _schema_form({"type": "object"}, "response_format")
        case {"type": "json_schema", "json_schema": {"schema": Mapping() | bool() as schema}}:
            return _schema_form(schema, "response_format")
    expected = '{"type": "json_object"} or {"type": "json_schema", "json_schema": {"schema": {...}}}'
    raise PromptError(f"response_format must be {expected}, got {quote(value)}")


def _form_of_outputs(value: Any) -> AnswerForm | None:
    """The form that vLLM's `structured_outputs` asks for."""
    if value is None:
        return None
    given = {name: inner for name, inner in value.items() if inner is not None} if isinstance(value, Mapping) else {}
    if len(given) != 1 or not given.keys() <= {"json", "regex", "choice", "grammar"}:
        raise PromptError(f"structured_outputs must have one of json, regex, choice and grammar, got {quote(value)}")
    ((kind, content),) = given.items()
    if kind == "json":
        return _schema_form(content, "structured_outputs.json")
    if kind == "choice":
        choices = list(content) if isinstance(content, Iterable) and not isinstance(content, str) else []
        if not choices or not all(isinstance(choice, str) and choice for choice in choices):
            raise PromptError(f"structured_outputs.choice must be a list of texts, none empty, got {quote(content)}")
        return AnswerForm(kind, json.dumps(choices))
    if not isinstance(content, str) or not content:
        raise PromptError(f"structured_outputs.{kind} must be a str, not empty, got {quote(content)}")
    return AnswerForm(kind, content)


def _schema_form(given: Any, name: str) -> AnswerForm:
    """The form of a JSON schema, given as such or as its text."""
    try:
        schema = json.loads(given) if isinstance(given, str) else given
        if not isinstance(schema, (Mapping, bool)):
            raise TypeError(f"of type {type(schema).__name__}")
        return AnswerForm("json_schema", json.dumps(schema, allow_nan=False))
    except (TypeError, ValueError, RecursionError) as error:
        raise PromptError(f"{name} must be a JSON schema, got {quote(given)} ({error})") from error


def checked(name: str, value: Any, rule: _Rule | None = None) -> Any:
    """Returns an argument in Python's own types; raises PromptError for one that its rule in `_ARGUMENTS` forbids."""
    convert, is_valid, expected = rule or _ARGUMENTS[name]
    try:
        converted = convert(value)
        if is_valid(converted):
            return converted
    except (AttributeError, TypeError, ValueError, OverflowError, RuntimeError):  # such as an array of several values
        pass
    raise PromptError(f"{name} must be {expected}, got {quote(value)}")


def _number(value: Any) -> float:
    """Converts a Python, numpy or torch number to a float."""
    value = value.item() if hasattr(value, "item") else value
    if not isinstance(value, numbers.Real) or isinstance(value, bool):
        raise TypeError
    return float(value)


def _integer(value: Any) -> int:
    """Converts a Python, numpy or torch integer to an int."""
    if isinstance(value, bool):
        raise TypeError
    return index(value)


def _texts(values: Any) -> tuple[Any, ...]:
    if isinstance(values, (str, bytes)):
        raise TypeError
    return tuple(values)


# How a value is converted, whether the result is valid, and what is valid in words.
_Rule = tuple[Callable[[Any], Any], Callable[[Any], bool], str]
_FLAG: _Rule = (bool, lambda flag: True, "True or False")
_ARGUMENTS: dict[str, _Rule] = {
    "temperature": (_number, lambda t: 0 <= t < math.inf, "0 (greedy) or a finite number above 0"),
    "top_p": (_number, lambda p: 0 <= p <= 1, "a number from 0 to 1"),
    "max_gen_len": (_integer, lambda n: n >= 0, "an integer of at least 0"),
    "seed": (
        lambda seed: None if seed is None else _integer(seed),
        lambda seed: seed is None or -(2**63) <= seed < 2**64,  # what `torch.Generator` takes
        "None or an integer from -2**63 to 2**64 - 1",
    ),
    "speculative": (
        lambda kind: kind,
        lambda kind: kind in (None, *SPECULATIVE),
        f"None, {' or '.join(map(repr, SPECULATIVE))}",
    ),
    "logprobs": _FLAG,
    "echo": _FLAG,
    "stop": (_texts, lambda texts: all(isinstance(t, str) and t for t in texts), "a list of non-empty strings"),
    "suffix_first": _FLAG,
    "top_k": (_integer, lambda k: k >= -1, "an integer of at least -1"),
    "min_p": (_number, lambda p: 0 <= p <= 1, "a number from 0 to 1"),
    "typical_p": (_number, lambda p: 0 < p <= 1, "a number above 0, up to 1"),
    "repetition_penalty": (_number, lambda penalty: penalty > 0, "a number above 0"),
    "presence_penalty": (_number, lambda penalty: -2 <= penalty <= 2, "a number from -2 to 2"),
    "frequency_penalty": (_number, lambda penalty: -2 <= penalty <= 2, "a number from -2 to 2"),
    "logit_bias": (
        lambda bias: {_integer(token): _number(amount) for token, amount in bias.items()},
        lambda bias: all(token >= 0 and math.isfinite(amount) for token, amount in bias.items()),
        "a mapping from token ids to finite numbers",
    ),
    "min_tokens": (_integer, lambda n: n >= 0, "an integer of at least 0"),
    "ignore_eos": _FLAG,
    "stop_token_ids": (lambda ids: tuple(map(_integer, ids)), lambda ids: min((0, *ids)) >= 0, "a list of token ids"),
    "logits_processors": (
        lambda given: tuple(given) if isinstance(given, Iterable) else (given,),
        lambda processors: all(map(callable, processors)),
        "a list of functions of input_ids and scores",
    ),
}


def vocab_size_of(model: Any, tokenizer: Any) -> int:
    """The number of ids that a model has logits for; the tokenizer's if the model's `params` lacks it."""
    size: Any = getattr(model.params, "vocab_size", None)
    return index(size) if size is not None else index(tokenizer.n_words)


def n_usable_ids(model: Any, tokenizer: Any) -> int:
    """The number of leading ids that are tokens; a network's embedding may have more rows."""
    vocab_size, n_words = vocab_size_of(model, tokenizer), getattr(tokenizer, "n_words", None)
    return min(vocab_size, n_words) if isinstance(n_words, int) else vocab_size


def check_prompts(prompts: Iterable[Iterable[int]], vocab_size: int, max_seq_len: int) -> list[list[int]]:
    """Checks prompts of token ids, in tensors, arrays or any other iterables, and returns them as lists of int."""
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
    """Checks and encodes a text, with BOS in front."""
    if not isinstance(text, str):
        raise PromptError(f"{name} must be a str, got {type(text).__name__}")
    return _encoded(lambda: list(tokenizer.encode(text, bos=True, eos=False)), name, max_seq_len)


def encode_texts(texts: Iterable[str], name: str, tokenizer: Any, max_seq_len: int) -> list[list[int]]:
    """Checks and encodes texts, each with BOS in front."""
    return [
        encode_text(text, f"{name}[{i}]", tokenizer, max_seq_len) for i, text in enumerate(_as_list(texts, name, "str"))
    ]


def encode_dialog(
    dialog: Dialog, name: str, tokenizer: Any, max_seq_len: int, chat_format: ChatFormat | None = None
) -> list[int] | None:
    """Checks and encodes a dialog; returns None if it must not be run because it contains the template's tags."""
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


def infilling_ends(tokenizer: Any) -> dict[str, Any]:
    """The sampling parameters with which a text fills a gap: it ends at `<EOT>`, and may begin with a space."""
    eot_id = getattr(tokenizer, "eot_id", None)
    return {"stop_ids": None if eot_id is None else frozenset({eot_id}), "keep_space": True}


def encode_infilling(
    prefix: str, suffix: str, names: tuple[str, str], tokenizer: Any, max_seq_len: int, *, suffix_first: bool
) -> list[int]:
    """Checks and encodes an infilling prompt. `names` are what errors call the two texts."""
    suffix_first = checked("suffix_first", suffix_first)
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


def check_stop_token(stop_token: object, vocab_size: int) -> frozenset[int]:
    """The ids that `generate(stop_token=)` stops at; none for -1."""
    rule = _integer, lambda token: -1 <= token < vocab_size, f"None or an id from -1 to {vocab_size - 1}"
    return frozenset({checked("stop_token", stop_token, rule)} - {-1})


def encode_continuations(
    contexts: Iterable[str] | None, texts: Iterable[str], tokenizer: Any, max_seq_len: int
) -> tuple[list[list[int]], list[list[int]]]:
    """Encodes each context, and each context and its text as one string; without contexts, BOS alone and each text."""
    if contexts is None:
        whole = encode_texts(texts, "texts", tokenizer, max_seq_len)
        return [ids[:1] for ids in whole], whole
    contexts, texts = _as_list(contexts, "contexts", "str"), _as_list(texts, "texts", "str")
    if len(contexts) != len(texts):
        raise PromptError(
            f"contexts must have one element per text, got {len(contexts)} contexts and {len(texts)} texts"
        )
    prefixes = encode_texts(contexts, "contexts", tokenizer, max_seq_len)
    encode_texts(texts, "texts", tokenizer, max_seq_len)
    joined = [context + text for context, text in zip(contexts, texts, strict=True)]
    return prefixes, encode_texts(joined, "contexts + texts", tokenizer, max_seq_len)


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
