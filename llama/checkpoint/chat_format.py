"""Whether a checkpoint's chats are in the Llama 2 chat template.

A Hugging Face folder has its template as a Jinja text. `from_hf` writes one that is not Llama 2's into a file beside
`params.json`, by which chats with that checkpoint are refused: in the wrong format, a model answers badly.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

from llama.chat import B_INST, B_SYS, CHAT_FORMAT_FILE, E_INST, E_SYS
from llama.checkpoint.format import read_json_object

_MAX_CHARS = 100_000  # of a template
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


def copy_chat_format(hf_dir: Path, folder: Path) -> bool:
    """Records a Hugging Face folder's chat template in a checkpoint's folder unless it is Llama 2's.

    Returns:
        Whether it was recorded.
    """
    template = _find_template(hf_dir)
    if template is None or _is_llama2(template):
        return False
    content = json.dumps({"chat_template": template}, indent=2) + "\n"
    (folder / CHAT_FORMAT_FILE).write_text(content, encoding="utf-8")
    return True


def _find_template(hf_dir: Path) -> str | None:
    """The chat template, from a file of its own or from the tokenizer's settings."""
    file = hf_dir / "chat_template.jinja"
    if file.is_file():
        return file.read_text(encoding="utf-8")[:_MAX_CHARS]
    settings = hf_dir / "tokenizer_config.json"
    template = read_json_object(settings).get("chat_template") if settings.is_file() else None
    if isinstance(template, list):  # several, by name
        named = {entry.get("name"): entry.get("template") for entry in template if isinstance(entry, Mapping)}
        template = named.get("default")
    return template[:_MAX_CHARS] if isinstance(template, str) else None


def _is_llama2(template: str) -> bool:
    """Whether example dialogs have the same texts in both templates."""
    return all(_render(template, dialog) == text for dialog, text in _EXAMPLES)


def _render(template: str, dialog: list[tuple[str, str]]) -> str | None:
    """The text of a dialog; None if the template fails. It runs in Jinja's sandbox, as it does in transformers."""
    from jinja2.exceptions import TemplateError  # torch depends on jinja2
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    def refuse(message: Any) -> NoReturn:
        raise TemplateError(str(message))

    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    environment.globals["raise_exception"] = refuse
    messages = [{"role": role, "content": content} for role, content in dialog]
    try:
        return environment.from_string(template).render(
            messages=messages, bos_token=_BOS, eos_token=_EOS, add_generation_prompt=True
        )
    except Exception:  # a template is a program: it may fail in any way
        return None
