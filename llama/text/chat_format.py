"""The chat format and the end-of-turn tokens that a checkpoint's folder names, in the files of Hugging Face's folders.

`from_hf` records a template in `chat_format.json`, which has the fields of `tokenizer_config.json` and goes before it.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from llama.chat import B_INST, B_SYS, E_INST, E_SYS, ChatFormat
from llama.errors import PromptError, read_json_object
from llama.text.chat_template import TemplateChatFormat, compiled

CHAT_FORMAT_FILE = "chat_format.json"
_GENERATION = "generation_config.json"
_BOS, _EOS = "<s>", "</s>"
_SYSTEM, _USER, _ANSWER = "Be brief.", "Where do llamas live?", "In the Andes."
# Dialogs, and their texts in the Llama 2 chat template.
_EXAMPLES: list[tuple[list[tuple[str, str]], str]] = [
    ([("user", _USER)], f"{_BOS}{B_INST} {_USER} {E_INST}"),
    ([("system", _SYSTEM), ("user", _USER)], f"{_BOS}{B_INST} {B_SYS}{_SYSTEM}{E_SYS}{_USER} {E_INST}"),
    (
        [("user", _USER), ("assistant", _ANSWER), ("user", _USER)],
        f"{_BOS}{B_INST} {_USER} {E_INST} {_ANSWER} {_EOS}{_BOS}{B_INST} {_USER} {E_INST}",
    ),
]


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
    try:
        return all(_render(template, dialog) == text for dialog, text in _EXAMPLES)
    except (ImportError, PromptError):
        return False


def _render(template: str, dialog: list[tuple[str, str]]) -> str:
    messages = [{"role": role, "content": content} for role, content in dialog]
    tokens = {"bos_token": _BOS, "eos_token": _EOS}
    return str(compiled(template).render(messages=messages, add_generation_prompt=True, **tokens))
