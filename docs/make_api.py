"""Writes docs/api.md from the signatures and docstrings of the public interface: `python docs/make_api.py`."""

from __future__ import annotations

import importlib
import inspect
import re
import runpy
import textwrap
from functools import cached_property
from pathlib import Path
from types import FunctionType
from typing import Any
from unittest import mock

from llama import Llama
from llama.tools.cli import COMMANDS

PAGE = Path(__file__).with_name("api.md")
INTRODUCTION = """\
# API reference

`python docs/make_api.py` writes this page from the docstrings; edit those. What is listed here keeps its meaning
within a minor version; other names may change. [Sampling](sampling.md) has the order of the sampling parameters.
"""
NETWORK = "ModelArgs Transformer TransformerBlock Attention FeedForward RMSNorm KVCache CachePositions attend"
ROTARY = "precompute_freqs_cis apply_rotary_emb reshape_for_broadcast repeat_kv"
RESULTS = "CompletionPrediction ChatPrediction InfillingPrediction Score"
PUBLIC = [  # heading, module, names
    ("Calls", "generation", "Llama LLaMA sample_top_p dialog_prompt_tokens infilling_prompt_tokens"),
    ("Sampling parameters", "inputs", "SamplingOptions"),
    ("Dialogs", "chat", "Message"),
    ("Results", "engine.output", RESULTS),
    ("Network", "model", f"{NETWORK} {ROTARY}"),
    ("Tokenizer", "tokenizer", "Tokenizer TokenizerNotFoundError"),
    ("Errors", "errors", "PromptError RankError NonFiniteLogitsError"),
]
DATA = (property, cached_property)
METHODS = (staticmethod, classmethod, FunctionType)


def signature(function: Any, name: str) -> str:
    """A call as code; one argument per line where it would be too long."""
    whole = inspect.signature(function)
    given = [p for p in whole.parameters.values() if p.name not in ("self", "cls")]
    call = name + str(whole.replace(parameters=given))
    if len(call) > 110:
        named = next((i for i, p in enumerate(given) if p.kind is p.KEYWORD_ONLY), len(given))
        parts = [*map(str, given[:named]), *["*"] * (named < len(given)), *map(str, given[named:])]
        call = f"{name}(\n" + "".join(f"    {part},\n" for part in parts) + ")" + call[call.rfind(" -> ") :]
    unquoted = re.sub(r"(: |-> )(['\"])(.*?)\2", r"\1\3", call)  # annotations are texts
    return f"```python\n{unquoted.removesuffix(' -> None')}\n```\n"


def sections(doc: str | None) -> tuple[str, dict[str, dict[str, str]]]:
    """The text of a docstring, and the entries of its sections by title; a section Returns has one, without a name."""
    text, *rest = re.split(r"^(Args|Attributes|Returns|Raises):\n", inspect.cleandoc(doc or ""), flags=re.MULTILINE)
    found: dict[str, dict[str, str]] = {}
    for title, body in zip(rest[::2], rest[1::2], strict=True):
        items = [" ".join(item.split()) for item in re.split(r"\n(?=\S)", textwrap.dedent(body).strip())]
        pairs = [("", " ".join(items))] if title == "Returns" else [item.split(": ", 1) for item in items]
        found[title] = dict(pairs)  # type: ignore[arg-type]
    return text.strip(), found


def described(doc: str | None) -> str:
    """A docstring in Markdown."""
    text, found = sections(doc)
    parts = [f"{text}\n"] if text else []
    for title, items in found.items():
        lines = [f"- {', '.join(f'`{name}`' for name in names.split(', '))}: {items[names]}\n" for names in items]
        parts.append(f"{title}: {items['']}\n" if "" in items else f"{title}:\n\n{''.join(lines)}")
    return "\n".join(parts)


def fields(cls: type) -> str:
    """The fields of a record, with the comments after them."""
    lines = re.findall(r"^    (\w+: .*?)(?:  # (.*))?$", inspect.getsource(cls).split("\n    def ")[0], re.MULTILINE)
    lines = [(field, text) for field, text in lines if field.partition(":")[0] in cls.__annotations__]
    return "Fields:\n\n" + "".join(f"- `{field}`" + (f": {text}" if text else "") + "\n" for field, text in lines)


def entry(name: str, item: Any) -> str:
    """A class with its fields and members, or a function."""
    is_record = hasattr(item, "__total__") or hasattr(item, "__dataclass_fields__")  # a TypedDict or a dataclass
    is_error = inspect.isclass(item) and issubclass(item, Exception)
    parts = [f"### `{name}`\n", "" if is_record or is_error else signature(item, name), described(item.__doc__)]
    init = vars(item).get("__init__")
    parts.append(fields(item) if is_record else described(init and init.__doc__))
    for member, value in vars(item).items() if inspect.isclass(item) else ():
        shown = value.__doc__ if isinstance(value, DATA) else isinstance(value, METHODS) and member != "extra_repr"
        if shown and not member.startswith("_"):
            call = "" if isinstance(value, DATA) else signature(getattr(item, member), f"{name}.{member}")
            parts += [f"#### `{name}.{member}`\n", call, described(value.__doc__)]
    return "\n".join(filter(None, parts))


def command(name: str) -> str:
    """A command of the console script, with its flags; those of `Llama.build` by name alone."""
    with mock.patch("llama.tools.commandline.run") as run:
        runpy.run_path(str(PAGE.parents[1] / "llama" / "tools" / f"{name}.py"), run_name="__main__")
    function = run.call_args.args[0]
    build = sections(Llama.build.__doc__)[1]["Args"]
    parts = []
    for title, called in (function if isinstance(function, dict) else {"": function}).items():
        text, found = sections(called.__doc__)
        texts = found.get("Args", {})
        lines, shared = [f"### `llama {name} {title}".rstrip() + "`\n", f"{text}\n"], []
        for flag, parameter in inspect.signature(called).parameters.items():
            value = "required" if parameter.default is parameter.empty else f"`{parameter.default}`"
            value = "optional" if parameter.default in (None, "") else value
            if texts[flag] == build.get(flag):
                shared.append(f"`--{flag}` ({value})")
            else:
                lines.append(f"- `--{flag}` ({value}): {texts[flag]}")
        lines += [f"- As in [`Llama.build`](#llamabuild): {', '.join(shared)}"] if shared else []
        parts.append("\n".join(lines) + "\n")
    return "\n".join(parts)


def page() -> str:
    parts = [INTRODUCTION]
    for title, name, names in PUBLIC:
        module = importlib.import_module(f"llama.{name}")
        parts += [f"## {title}\n", f"In `llama.{name}`.\n", *(entry(n, getattr(module, n)) for n in names.split())]
    return "\n".join([*parts, "## Commands\n", *map(command, COMMANDS)])


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
