"""The Llama 2 chat template, which turns a dialog into token ids in the form that the chat models were tuned on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal, TypedDict

from llama.errors import PromptError, quote
from llama.tokenizer import Tokenizer

Role = Literal["system", "user", "assistant"]


class Message(TypedDict):
    role: Role
    content: str


Dialog = Sequence[Message]

B_INST, E_INST = "[INST]", "[/INST]"
B_SYS, E_SYS = "<<SYS>>\n", "\n<</SYS>>\n\n"
SPECIAL_TAGS = (B_INST, E_INST, "<<SYS>>", "<</SYS>>")
UNSAFE_ERROR = "Error: special tags are not allowed as part of the prompt."
CHAT_FORMAT_FILE = "chat_format.json"  # of a checkpoint whose chats have another template


def is_unsafe(dialog: Dialog) -> bool:
    """Whether a message contains a tag of the template, with which it could fake another turn."""
    return any(has_special_tags(message["content"]) for message in dialog)


def has_special_tags(text: str) -> bool:
    """Whether a text contains a tag of the template."""
    return any(tag in text for tag in SPECIAL_TAGS)


def encode_dialog(dialog: Dialog, tokenizer: Tokenizer) -> list[int]:
    """Encodes a checked dialog as the prompt for the assistant's next answer.

    Each pair of a user message and its answer is encoded separately, with BOS and EOS; the last user message has only
    BOS.
    """
    texts = _turns(dialog)
    tokens: list[int] = []
    for user, answer in zip(texts[0:-1:2], texts[1::2], strict=True):
        tokens += tokenizer.encode(f"{B_INST} {user} {E_INST} {answer} ", bos=True, eos=True)
    return tokens + tokenizer.encode(f"{B_INST} {texts[-1]} {E_INST}", bos=True, eos=False)


def _turns(dialog: Dialog) -> list[str]:
    """The stripped texts of user, assistant, ..., user, with any system message folded into the first one."""
    texts = [message["content"] for message in dialog]
    if dialog[0]["role"] == "system":
        texts = [B_SYS + texts[0] + E_SYS + texts[1], *texts[2:]]
    return [text.strip() for text in texts]


def check_dialog(dialog: Dialog, name: str) -> None:
    """Checks that the turns are an optional system message, then user, assistant, ..., user.

    Args:
        name: name of the dialog in error messages, such as "dialogs[3]".

    Raises:
        PromptError: they are not; the error names the first message that is wrong.
    """
    if not isinstance(dialog, Sequence) or isinstance(dialog, str):
        raise PromptError(f"{name} must be a list of messages, got {type(dialog).__name__}")
    if not dialog:
        raise PromptError(f"{name} must have at least one message from the user, got none")
    dialog = list(dialog)
    for i, message in enumerate(dialog):
        _check_message(message, f"{name}[{i}]")
    with_system = dialog[0]["role"] == "system"
    for i, message in enumerate(dialog[with_system:]):
        role = "assistant" if i % 2 else "user"
        if message["role"] != role:
            raise PromptError(
                f"{name}[{i + with_system}] must have role {role!r}, got {message['role']!r}; a dialog is an optional "
                "system message, then user and assistant messages that alternate"
            )
    if dialog[-1]["role"] != "user":
        raise PromptError(
            f"{name}[{len(dialog) - 1}], the last message, must have role 'user', got {dialog[-1]['role']!r}; the "
            "model answers the last message"
        )


def _check_message(message: object, name: str) -> None:
    if not isinstance(message, Mapping) or not {"role", "content"} <= message.keys():
        raise PromptError(f"{name} must be a dict with the keys 'role' and 'content', got {quote(message)}")
    role, content = message["role"], message["content"]
    if not isinstance(role, str) or role not in ("system", "user", "assistant"):
        raise PromptError(f"{name} must have role 'system', 'user' or 'assistant', got {quote(role)}")
    if not isinstance(content, str):
        raise PromptError(f"{name} must have content of type str, got {type(content).__name__}")


def chat_error(ckpt_dir: str | Path) -> str | None:
    """Why a checkpoint cannot answer chats; None if it can, or if nothing is known of its chat format."""
    path = Path(ckpt_dir) / CHAT_FORMAT_FILE
    if not path.is_file():
        return None
    return (
        f"chats must be in the checkpoint's own format, which is not the Llama 2 chat template that this library has "
        f"({path} has the template); write prompts in that format as plain texts, or remove the file if it is wrong"
    )
