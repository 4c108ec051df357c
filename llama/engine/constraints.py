"""Answers in a given form: a JSON schema, a regular expression, one of several texts, or a grammar (by llguidance).

A compiled grammar is kept, and copied for each sequence. At each token it gives a mask of the tokens that may follow.
"""

from __future__ import annotations

import json
import math
import threading
from functools import cache, lru_cache
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

    It has the attributes, and can be called, as llguidance expects of a tokenizer.

    Args:
        tokenizer: an object with `token_bytes`, `encode_part` and `eos_id`.
        vocab_size: number of logits; those that no token has are excluded.
    """

    def __init__(self, tokenizer: Any, vocab_size: int) -> None:
        self._tokenizer = ref(tokenizer)  # it is a key of `_vocabularies`
        self.eos_token_id: int = tokenizer.eos_id
        self.bos_token_id: int = tokenizer.bos_id
        special = {self.bos_token_id, self.eos_token_id, *tokenizer.special_tokens.values()}
        self.special_token_ids = sorted(special)
        n_words = min(tokenizer.n_words, vocab_size)
        self.tokens = [b"" if t in special else tokenizer.token_bytes(t) or b"" for t in range(n_words)]
        self.tokens += [b""] * (vocab_size - n_words)
        # Of two tokens with the same bytes, one piece of text and one byte, only the first may be sampled.
        self._id_of: dict[bytes, int] = {}
        for token in sorted(range(n_words), key=lambda t: (_is_byte(tokenizer, t), t)):
            if self.tokens[token] and self._id_of.setdefault(self.tokens[token], token) != token:
                self.tokens[token] = b""
        self._ll_tokenizer = cache(self._load)  # some 19 MB each
        self._compiled = lru_cache(_KEPT_GRAMMARS)(self._compile)

    def __call__(self, text: str | bytes) -> list[int]:
        """Ids of a text: the tokenizer's if their bytes are exactly the text, else the longest tokens that match."""
        data = text.encode() if isinstance(text, str) else text
        tokenizer = self._tokenizer()
        try:
            ids: list[int] = tokenizer.encode_part(data.decode()) if tokenizer is not None else []
        except (UnicodeDecodeError, ValueError):
            ids = []
        if ids and b"".join(self.tokens[token] for token in ids) == data:
            return ids
        ids = []
        while data:
            length = next(n for n in range(len(data), 0, -1) if data[:n] in self._id_of or n == 1)
            ids.append(self._id_of.get(data[:length], self.eos_token_id))
            data = data[length:]
        return ids

    def matcher(self, form: AnswerForm, *, leading_space: bool, stop_ids: frozenset[int]) -> Any:
        """Returns a matcher at the start of an answer, compiled at the first call for a form.

        Args:
            leading_space: whether the answer has exactly one space in front, which decoding drops.
            stop_ids: the ids that end the answer.

        Raises:
            PromptError: the form is wrong, or not supported.
        """
        with _lock:
            return self._compiled(form, leading_space, stop_ids).deep_copy()

    def _load(self, stop_ids: frozenset[int]) -> Any:
        llguidance = _llguidance()
        ends = sorted(stop_ids) or [self.eos_token_id]
        return llguidance.LLTokenizer(llguidance.TokenizerWrapper(self), n_vocab=len(self.tokens), eos_token=ends)

    def _compile(self, form: AnswerForm, leading_space: bool, stop_ids: frozenset[int]) -> Any:
        answer = _grammar(form)
        grammar = {"grammars": [answer]}
        if leading_space:
            grammar = {"grammars": [{"name": "spaced", "lark_grammar": 'start: " " @answer'}, answer]}
        matcher = _llguidance().LLMatcher(self._ll_tokenizer(stop_ids), json.dumps(grammar), log_level=0)
        if matcher.is_error():
            raise PromptError(
                f"{form.kind} must be one that llguidance supports, got: {printable(matcher.get_error(), 300)}"
            )
        return matcher


def _is_byte(tokenizer: Any, token: int) -> bool:
    sp_model = getattr(tokenizer, "sp_model", None)
    return sp_model is not None and token < sp_model.vocab_size() and bool(sp_model.is_byte(token))


class Constraint:
    """Restricts one sequence's logits to what its grammar allows. The matcher is at the start of the answer."""

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
