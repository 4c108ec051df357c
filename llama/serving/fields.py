"""Which fields of requests have no effect, and what is refused: of bodies, their messages, and the parts of these.

A field is supported, or has a row in one of the tables here, or is unknown. null is a field left out.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from llama.errors import printable, quote
from llama.serving.errors import ApiError

ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}
ANY = None
Table: TypeAlias = Mapping[str, tuple[Any, ...] | None]
# The values that are taken because they ask for what happens anyway, and ANY for labels and hints, which cannot change
# the text. Other values are errors, which name fields in this order.
NEUTRAL: Table = {
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "modalities": (["text"],),
    "length_penalty": (1,),
    "bad_words": ([],),
    "include_stop_str_in_output": (False,),
    "skip_special_tokens": (True,),
    "spaces_between_special_tokens": (True, False),
    "use_beam_search": (False,),
    "best_of": (1,),  # and the value of n
    "suffix": ("",),
    "echo": (False,),
    "prompt_logprobs": (),
    "chat_template_kwargs": ({},),
    "priority": (0,),
    "service_tier": ("auto", "default"),
    "return_tokens_as_token_ids": (False,),
    "return_token_ids": (False,),
    "cache_prompt": ANY,
    "metadata": ANY,
    "parallel_tool_calls": ANY,
    "prompt_cache_key": ANY,
    "prompt_cache_retention": ANY,
    "reasoning_effort": ANY,
    "request_id": ANY,
    "safety_identifier": ANY,
    "store": ANY,
    "user": ANY,
    "verbosity": ANY,
}
# Clients that send an answer back unchanged send these in messages and their parts.
MESSAGE_NEUTRAL: Table = {
    "tool_calls": ([],),
    "annotations": ([],),
    "reasoning_content": ("",),
    "reasoning": ("",),
    "refusal": ("",),
    "name": ANY,
    "id": ANY,
}
PART_NEUTRAL: Table = {"annotations": ([],), "logprobs": ([],), "cache_control": ANY, "id": ANY}


@dataclass
class Unknown:
    """What becomes of fields that no table has."""

    ignore: bool = False  # whether they are left out, instead of refused
    ignored: list[str] = field(default_factory=list)  # names of those left out
    refused: list[str] = field(default_factory=list)  # names of those that are errors, and of unsupported fields

    def select(
        self, values: Mapping[str, Any], supported: Collection[str], neutral: Table, *, prefix: str = ""
    ) -> dict[str, Any]:
        """The supported fields of an object; notes what else it has. `prefix` goes before names in errors."""
        known = [name for name in values if name in supported or name in neutral]
        self.refused += [
            prefix + name
            for name, allowed in neutral.items()
            if name in values and name not in supported and not _is_neutral(values[name], allowed)
        ]
        unknown = [prefix + printable(name) for name in values if name not in known and values[name] is not None]
        (self.ignored if self.ignore else self.refused).extend(unknown)
        return {name: values[name] for name in known if name in supported and values[name] is not None}

    def check(self) -> None:
        """Raises ApiError if there are fields to refuse; it names them."""
        if self.refused:
            names, several = self.refused, len(self.refused) > 1
            more = f" and {len(names) - 8} more" if len(names) > 8 else ""
            raise ApiError(
                f"{', '.join(names[:8])}{more} {'are' if several else 'is'} not supported; leave "
                f"{'them' if several else 'it'} out",
                param=names[0],
                code="unsupported_parameter",
            )


def _is_neutral(value: Any, allowed: tuple[Any, ...] | None) -> bool:
    if isinstance(value, dict):
        value = {name: inner for name, inner in value.items() if inner is not None}
    is_null = value is None or allowed is ANY
    return is_null or any(value == v and isinstance(value, bool) == isinstance(v, bool) for v in allowed or ())


def check_messages(
    messages: Any, unknown: Unknown, name: str = "messages", kinds: Collection[str] = ("text",)
) -> list[dict[str, str]]:
    """The messages of a dialog, each with its content as one text.

    Args:
        name: of the messages in errors.
        kinds: types that parts of a content may have.
    """
    if not isinstance(messages, list) or not messages:
        raise ApiError(f"{name} must be a list of at least one message, got {quote(messages)}", param=name)
    return [_message(message, f"{name}[{i}]", unknown, kinds) for i, message in enumerate(messages)]


def _message(message: Any, name: str, unknown: Unknown, kinds: Collection[str]) -> dict[str, str]:
    if not isinstance(message, dict):
        raise ApiError(f"{name} must be an object with role and content, got {quote(message)}", param=name)
    role = message.get("role")
    if not isinstance(role, str) or role not in ROLES:
        raise ApiError(f"{name}.role must be one of {', '.join(ROLES)}, got {quote(role)}", param=f"{name}.role")
    fields = unknown.select(message, ("role", "content"), MESSAGE_NEUTRAL, prefix=f"{name}.")
    if f"{name}.tool_calls" in unknown.refused:  # which is why such a message has no content
        unknown.check()
    return {"role": ROLES[role], "content": _text_of(fields.get("content"), f"{name}.content", unknown, kinds)}


def _text_of(content: Any, name: str, unknown: Unknown, kinds: Collection[str]) -> str:
    """The text of a content, which is a string or a list of parts of one of the given types."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list) or not content:
        raise ApiError(
            f"{name} must be a string or a list of parts of type {' or '.join(kinds)}, got {quote(content)}", param=name
        )
    texts = []
    for i, part in enumerate(content):
        if not isinstance(part, dict) or part.get("type") not in kinds or not isinstance(part.get("text"), str):
            expected = f'{{"type": "{next(iter(kinds))}", "text": "..."}}'
            raise ApiError(f"{name}[{i}] must be {expected}, got {quote(part)}", param=f"{name}[{i}]")
        unknown.select(part, ("type", "text"), PART_NEUTRAL, prefix=f"{name}[{i}].")
        texts.append(part["text"])
    return "".join(texts)
