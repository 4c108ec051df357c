"""Chats in a checkpoint's own template, a Jinja text as Hugging Face's folders have it.

Names of special tokens become these tokens where the template writes them, and never where a message has them: in
messages, a mark breaks each such name before the template is rendered, and is taken out again before encoding.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from functools import lru_cache
from typing import Any

from llama.chat import ChatFormat, Dialog
from llama.errors import PromptError
from llama.tokenizer import split_at, stop_ids

_MARKS = [chr(code) for code in range(0xFDD0, 0xFDF0)]  # characters that Unicode keeps for uses inside of a program
_ANSWER = "In the Andes."
_EXAMPLE: Dialog = [
    {"role": "user", "content": "Where do llamas live?"},
    {"role": "assistant", "content": _ANSWER},
    {"role": "user", "content": "Why?"},
]


class TemplateChatFormat(ChatFormat):
    """The format that a Jinja template gives.

    Args:
        source: the template.
        variables: what it may refer to besides the messages, such as `bos_token`.
        spaces: whether SentencePiece puts a space in front of each text between special tokens, as transformers' older
            tokenizers do (`legacy`), instead of in front of the first text alone.
    """

    tags = ()
    in_turn = False  # the template itself says which roles may follow each other

    def __init__(self, source: str, variables: Mapping[str, Any] | None = None, *, spaces: bool = False) -> None:
        self.source = source
        self.variables = dict(variables or {})
        self.spaces = spaces

    def check_usable(self) -> None:
        compiled(self.source)

    def encode(self, dialog: Dialog, tokenizer: Any) -> list[int]:
        return self.encode_text(self.render(dialog, tokenizer), tokenizer)

    def render(self, dialog: Dialog, tokenizer: Any) -> str:
        """The text of a dialog, with a mark in each name of a special token that a message has."""
        texts = [message["content"] for message in dialog]
        mark = next((mark for mark in _MARKS if not any(mark in text for text in [self.source, *texts])), None)
        if mark is None:
            raise PromptError("messages must not contain all of the characters U+FDD0 to U+FDEF, got all of them")
        messages = [
            {"role": message["role"], "content": _broken(text, _names(tokenizer), mark)}
            for message, text in zip(dialog, texts, strict=True)
        ]
        piece = getattr(tokenizer, "token_piece", None)  # a tokenizer of another class has none
        names = {} if piece is None else {"bos_token": piece(tokenizer.bos_id), "eos_token": piece(tokenizer.eos_id)}
        settings = {"tools": None, "documents": None, "add_generation_prompt": True} | names | self.variables
        text: str = compiled(self.source).render(messages=messages, **settings)
        return text

    def encode_text(self, text: str, tokenizer: Any) -> list[int]:
        """Encodes a rendered text: names of special tokens as these, what lies between them as plain text."""
        ids: list[int] = []
        special: Mapping[str, int] = getattr(tokenizer, "special_tokens", {})
        for i, part in enumerate(split_at(text, _names(tokenizer))):
            if i % 2:
                ids.append(special[part])
                continue
            for j, piece in enumerate(re.split(f"[{_MARKS[0]}-{_MARKS[-1]}]", part)):
                starts = j == 0 and (self.spaces or i == 0) and not piece.startswith((" ", "\u2581"))
                ids += _encode_part(tokenizer, piece, leading_space=starts) if piece else []
        return ids

    def encode_beginning(self, answer: str, tokenizer: Any) -> list[int]:
        return _encode_part(tokenizer, answer, leading_space=False)

    def stop_ids(self, tokenizer: Any) -> frozenset[int] | None:
        """Those that end any text, and the special token that the template writes after an answer."""
        try:
            text = self.render(_EXAMPLE, tokenizer)
        except PromptError:
            return stop_ids(tokenizer)
        after = split_at(text.partition(_ANSWER)[2], _names(tokenizer))
        named = [tokenizer.special_tokens[name] for name in after[1:2] if not after[0].strip()]
        return stop_ids(tokenizer) | frozenset(named)


@lru_cache(maxsize=16)
def compiled(source: str) -> Any:
    """The `Template` of a Jinja text."""
    from llama.text.sandbox import Template  # the extra [chat]; its error names it

    return Template(source)


def _names(tokenizer: Any) -> list[str]:
    """The names of special tokens that a mark can break."""
    return [name for name in getattr(tokenizer, "special_tokens", ()) if len(name) > 1]


def _encode_part(tokenizer: Any, text: str, *, leading_space: bool) -> list[int]:
    encode = getattr(tokenizer, "encode_part", None)
    if encode is None:  # a tokenizer of another class
        return list(tokenizer.encode(text, bos=False, eos=False))
    return list(encode(text, leading_space=leading_space))


def _broken(text: str, names: Iterable[str], mark: str) -> str:
    """The text with a mark in each name, and at each end that could be a part of a name together with what follows."""
    for name in filter(text.__contains__, names):
        text = re.sub(f"{re.escape(name[0])}(?={re.escape(name[1:])})", lambda found: found[0] + mark, text)
    inner = text.strip()
    if not inner:
        return text
    start = text.index(inner)
    before = any(inner.startswith(name[i:]) for name in names for i in range(1, len(name)))
    after = any(inner.endswith(name[:i]) for name in names for i in range(1, len(name)))
    whole = any(inner in name for name in names)
    inner = mark * before + inner + mark * (after or whole)
    return text[:start] + inner + text[start:].removeprefix(text.strip())
