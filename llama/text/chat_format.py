"""Chats in a checkpoint's own template, a Jinja text, and the tokens that end a turn, as its folder names them.

These are in the files of Hugging Face's folders. `from_hf` records a template in `chat_format.json`, which has the
fields of `tokenizer_config.json` and goes before it.

Names of special tokens become these tokens where the template writes them, and never where a message has them: in
messages, a mark breaks each such name before the template is rendered, and is taken out again before encoding.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from llama.chat import ChatFormat, Dialog
from llama.errors import PromptError, read_json_object
from llama.tokenizer import split_at, stop_ids

CHAT_FORMAT_FILE = "chat_format.json"
_GENERATION = "generation_config.json"
_MARKS = [chr(code) for code in range(0xFDD0, 0xFDF0)]  # characters that Unicode keeps for uses inside of a program
# Llama 2's chat template as one text: see `chat.ChatFormat.encode`.
LLAMA2 = (
    "{% if messages[0].role == 'system' %}"
    "{% set system, turns = '<<SYS>>\\n' + messages[0].content + '\\n<</SYS>>\\n\\n', messages[1:] %}"
    "{% else %}{% set system, turns = '', messages %}{% endif %}"
    "{% for turn in turns %}{% set text = ((system if loop.first else '') + turn.content) | trim %}"
    "{{ bos_token ~ '[INST] ' ~ text ~ ' [/INST]' if turn.role == 'user' else ' ' ~ text ~ ' ' ~ eos_token }}"
    "{% endfor %}"
)
_ANSWER = "In the Andes."
_TURN: Dialog = [{"role": "user", "content": "Where do llamas live?"}]
_TURNS: Dialog = [*_TURN, {"role": "assistant", "content": _ANSWER}, *_TURN]


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
            text = self.render(_TURNS, tokenizer)
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


def read_chat_format(ckpt_dir: str | Path) -> ChatFormat | None:
    """The chat template next to a checkpoint; None if there is none, or if it is Llama 2's.

    The template is that of chat_format.json, chat_template.jinja, chat_template.json or tokenizer_config.json, of the
    first that has one.
    """
    settings = read_settings(ckpt_dir)
    template = _template(settings)
    if template is None or _is_llama2(template):
        return None
    return TemplateChatFormat(template, token_names(settings), spaces=settings.get("legacy") is True)


def read_stop_ids(folders: Iterable[str | Path], special_tokens: Mapping[str, int]) -> frozenset[int]:
    """The ids that end an answer by generation_config.json, and by the name of EOS in tokenizer_config.json.

    Args:
        folders: where these files may be: the checkpoint's folder and the tokenizer's.
        special_tokens: names and ids of the tokenizer's special tokens.
    """
    ids: set[int] = set()
    for folder in folders:
        listed = _read(Path(folder) / _GENERATION).get("eos_token_id")
        ids |= {i for i in (listed if isinstance(listed, list) else [listed]) if isinstance(i, int)}
        named = special_tokens.get(token_names(read_settings(folder)).get("eos_token", ""))
        ids |= set() if named is None else {named}
    return frozenset(ids)


def copy_chat_format(hf_dir: Path, folder: Path) -> bool:
    """Records a Hugging Face folder's end-of-turn tokens, and its chat template unless that is Llama 2's.

    Returns:
        Whether the template was recorded.
    """
    eos = _read(hf_dir / _GENERATION).get("eos_token_id")
    if eos is not None:
        (folder / _GENERATION).write_text(json.dumps({"eos_token_id": eos}) + "\n", encoding="utf-8")
    settings = read_settings(hf_dir)
    template = _template(settings)
    if template is None or _is_llama2(template):
        return False
    content = {"chat_template": template, **token_names(settings), "legacy": settings.get("legacy") is True}
    (folder / CHAT_FORMAT_FILE).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    return True


def read_settings(folder: str | Path) -> dict[str, Any]:
    """What the files of a folder say of its chats, in the fields of `tokenizer_config.json`."""
    folder = Path(folder)
    settings = _read(folder / "special_tokens_map.json") | _read(folder / "tokenizer_config.json")
    settings |= _read(folder / "chat_template.json")
    if (text := folder / "chat_template.jinja").is_file():
        settings["chat_template"] = text.read_text(encoding="utf-8")
    return settings | _read(folder / CHAT_FORMAT_FILE)


def token_names(settings: Mapping[str, Any]) -> dict[str, str]:
    """The texts of special tokens by these settings, such as `eos_token`; a token may have separate settings."""
    found = {name: value for name, value in settings.items() if name.endswith("_token")}
    texts = {name: token.get("content") if isinstance(token, Mapping) else token for name, token in found.items()}
    return {name: text for name, text in texts.items() if isinstance(text, str)}


def _read(path: Path) -> dict[str, Any]:
    return read_json_object(path) if path.is_file() else {}


def _template(settings: Mapping[str, Any]) -> str | None:
    template = settings.get("chat_template")
    if isinstance(template, list):  # several, by name
        named = {entry.get("name"): entry.get("template") for entry in template if isinstance(entry, Mapping)}
        template = named.get("default")
    return template if isinstance(template, str) else None


def _is_llama2(template: str) -> bool:
    """Whether example dialogs have the same texts in both templates. A template that cannot be rendered is another."""
    dialogs: list[Dialog] = [_TURN, [{"role": "system", "content": "Be brief."}, *_TURN], _TURNS]
    settings = {"add_generation_prompt": True, "bos_token": "<s>", "eos_token": "</s>"}
    try:
        ours, theirs = ([compiled(of).render(messages=d, **settings) for d in dialogs] for of in (LLAMA2, template))
    except (ImportError, PromptError):
        return False
    return ours == theirs
