"""Answers in a given form: a JSON schema, a regular expression, one of several texts, or a grammar (by llguidance).

A compiled grammar is kept, and copied for each sequence. At each token it gives a mask of the tokens that may follow.
"""

from __future__ import annotations

import json
import math
import threading
from collections import OrderedDict
from functools import cached_property
from typing import Any
from weakref import WeakKeyDictionary, ref

import torch
from torch import Tensor

from llama.errors import PromptError, missing_extra, printable
from llama.inputs import AnswerForm, SamplingParams

_KEPT_GRAMMARS = 64
_MAX_GRAMMAR_CHARS = 200_000
# Separators of `json.dumps`, and no other whitespace, with which a model could go on for ever. Escapes that could write
# a key in two ways are left out.
_JSON_OPTIONS = {
    "whitespace_flexible": False,
    "item_separator": ", ",
    "key_separator": ": ",
    "lenient": False,
    "coerce_one_of": False,
    "json_allowed_escapes": 'nrt"\\',
    "json_allow_general_unicode_escapes": False,
}
_NO_OPS: dict[str, Any] = {"uniqueItems": False, "nullable": False, "deprecated": False, "readOnly": False}

_vocabularies: WeakKeyDictionary[Any, dict[int, Vocabulary]] = WeakKeyDictionary()
_lock = threading.Lock()


def vocabulary_of(tokenizer: Any, vocab_size: int) -> Vocabulary:
    """Returns the tokenizer's `Vocabulary`, always the same one."""
    with _lock:
        by_size = _vocabularies.setdefault(tokenizer, {})
        if vocab_size not in by_size:
            by_size[vocab_size] = Vocabulary(tokenizer, vocab_size)
        return by_size[vocab_size]


class Vocabulary:
    """The bytes of each token, and the grammars compiled for them. Safe for use from several threads.

    Args:
        tokenizer: an object with `token_bytes`, `encode_part` and `eos_id`.
        vocab_size: number of logits; those that no token has are excluded.
    """

    def __init__(self, tokenizer: Any, vocab_size: int) -> None:
        self._special = {tokenizer.bos_id, tokenizer.eos_id, *tokenizer.special_tokens.values()}
        self._tokenizer = ref(tokenizer)  # it is a key of `_vocabularies`
        self._eos_id: int = tokenizer.eos_id
        self._bos_id: int = tokenizer.bos_id
        n_words = min(tokenizer.n_words, vocab_size)
        self._bytes = [b"" if t in self._special else tokenizer.token_bytes(t) or b"" for t in range(n_words)]
        self._bytes += [b""] * (vocab_size - n_words)
        # Of two tokens with the same bytes, one piece of text and one byte, only the first may be sampled.
        self._id_of: dict[bytes, int] = {}
        by_length = sorted(range(n_words), key=lambda t: (self._is_byte(tokenizer, t), t))
        for token in by_length:
            if self._bytes[token] and self._id_of.setdefault(self._bytes[token], token) != token:
                self._bytes[token] = b""
        self._ll_tokenizers: dict[frozenset[int], Any] = {}  # some 19 MB each, by the ids that end an answer
        self._grammars: OrderedDict[tuple[AnswerForm, bool, frozenset[int]], Any] = OrderedDict()
        self._lock = threading.Lock()

    @staticmethod
    def _is_byte(tokenizer: Any, token: int) -> bool:
        sp_model = getattr(tokenizer, "sp_model", None)
        return sp_model is not None and token < sp_model.vocab_size() and bool(sp_model.is_byte(token))

    def encode(self, text: str | bytes) -> list[int]:
        """Ids whose bytes are exactly those of a text: of the tokenizer where it gives such, else the longest ones."""
        data = text.encode() if isinstance(text, str) else text
        tokenizer = self._tokenizer()
        try:
            ids: list[int] = tokenizer.encode_part(data.decode()) if tokenizer is not None else []
        except (UnicodeDecodeError, ValueError):
            ids = []
        if ids and b"".join(self._bytes[token] for token in ids) == data:
            return ids
        ids = []
        while data:
            length = next(n for n in range(len(data), 0, -1) if data[:n] in self._id_of or n == 1)
            ids.append(self._id_of.get(data[:length], self._eos_id))
            data = data[length:]
        return ids

    @cached_property
    def _wrapper(self) -> Any:
        llguidance = _llguidance()

        class Tokens:
            eos_token_id = self._eos_id
            bos_token_id = self._bos_id
            tokens = self._bytes
            special_token_ids = sorted(self._special)

            def __call__(_, text: str | bytes) -> list[int]:
                return self.encode(text)

        return llguidance.TokenizerWrapper(Tokens())

    def matcher(self, form: AnswerForm, *, leading_space: bool, stop_ids: frozenset[int]) -> Any:
        """Returns a matcher at the start of an answer, compiled at the first call for a form.

        Args:
            leading_space: whether the answer has exactly one space in front, which decoding drops.
            stop_ids: the ids that end the answer.

        Raises:
            PromptError: the form is wrong, or not supported.
        """
        key = form, leading_space, stop_ids
        with self._lock:
            if key not in self._grammars:
                self._grammars[key] = self._compile(form, leading_space, stop_ids)
                if len(self._grammars) > _KEPT_GRAMMARS:
                    self._grammars.popitem(last=False)
            self._grammars.move_to_end(key)
            return self._grammars[key].deep_copy()

    def _compile(self, form: AnswerForm, leading_space: bool, stop_ids: frozenset[int]) -> Any:
        llguidance = _llguidance()
        if stop_ids not in self._ll_tokenizers:
            ends = sorted(stop_ids) or [self._eos_id]
            self._ll_tokenizers[stop_ids] = llguidance.LLTokenizer(
                self._wrapper, n_vocab=len(self._bytes), eos_token=ends
            )
        answer = _grammar(form)
        grammar = {"grammars": [answer]}
        if leading_space:
            grammar = {"grammars": [{"name": "spaced", "lark_grammar": 'start: " " @answer'}, answer]}
        matcher = llguidance.LLMatcher(self._ll_tokenizers[stop_ids], json.dumps(grammar), log_level=0)
        if matcher.is_error():
            raise PromptError(
                f"{form.kind} must be one that llguidance supports, got: {printable(matcher.get_error(), 300)}"
            )
        return matcher


class Constraint:
    """Restricts one sequence's logits to what its grammar allows.

    Args:
        matcher: at the start of the answer.
        n_prompt: number of tokens before the answer.
    """

    def __init__(self, matcher: Any, n_prompt: int) -> None:
        self._matcher = matcher
        self._n_prompt = self._n_consumed = n_prompt
        self._is_consuming = False  # stays True where Ctrl-C came between

    def __call__(self, tokens: list[int], logits: Tensor) -> Tensor:
        """Returns the logits (vocab,), with -inf for each token that cannot follow.

        Raises:
            ValueError: the grammar is too complex.
        """
        if self._is_consuming:
            self._matcher.reset()
            self._n_consumed = self._n_prompt
        self._is_consuming = True
        for token in tokens[self._n_consumed :]:
            self._matcher.consume_token(token)
        self._n_consumed = len(tokens)
        self._is_consuming = False
        allowed = torch.frombuffer(bytearray(self._matcher.compute_logit_bias()), dtype=torch.uint8)
        if self._matcher.is_error():  # it would allow EOS alone, which looks like an end
            raise ValueError(f"the answer's grammar failed: {printable(self._matcher.get_error(), 300)}")
        return logits.masked_fill(allowed.to(logits.device) == 0, -math.inf)


def check_form(tokenizer: Any, vocab_size: int, params: SamplingParams) -> None:
    """Raises PromptError if the form of the answer is not supported; compiles and keeps it otherwise."""
    make_constraint(tokenizer, vocab_size, params, 0, keeps_space=False)


def make_constraint(
    tokenizer: Any, vocab_size: int, params: SamplingParams, n_prompt: int, *, keeps_space: bool
) -> Constraint | None:
    """Returns what holds a sequence to the form of the answer; None for any text.

    Args:
        keeps_space: whether the answer's text has the space that decoding drops in front of a whole text.
    """
    if params.form is None:
        return None
    vocabulary = vocabulary_of(tokenizer, vocab_size)
    matcher = vocabulary.matcher(params.form, leading_space=not keeps_space, stop_ids=params.ends(tokenizer))
    return Constraint(matcher, n_prompt)


def _grammar(form: AnswerForm) -> dict[str, Any]:
    """A form in llguidance's format."""
    if len(form.text) > _MAX_GRAMMAR_CHARS:
        raise PromptError(f"{form.kind} must have at most {_MAX_GRAMMAR_CHARS} characters, got {len(form.text)}")
    if form.kind == "json_schema":
        schema = _without_no_ops(json.loads(form.text))
        if not isinstance(schema, dict):
            schema = {"allOf": [schema]}
        return {"name": "answer", "json_schema": schema | {"x-guidance": _JSON_OPTIONS}}
    lark = {
        "regex": lambda: f"start: TEXT\nTEXT: /{form.text.replace('/', chr(92) + '/')}/",
        "choice": lambda: "start: " + " | ".join(map(json.dumps, json.loads(form.text))),
        "grammar": lambda: form.text,
    }[form.kind]()
    return {"name": "answer", "lark_grammar": lark}


def _without_no_ops(schema: Any) -> Any:
    """A schema without keywords that say nothing, and without options of llguidance's."""
    if isinstance(schema, list):
        return [_without_no_ops(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    return {
        name: value if name in ("const", "enum", "default", "examples") else _without_no_ops(value)
        for name, value in schema.items()
        if name != "x-guidance" and not (name in _NO_OPS and value is _NO_OPS[name])
    }


def _llguidance() -> Any:
    try:
        import llguidance
    except ImportError as error:
        raise missing_extra("structured", error) from error
    return llguidance
