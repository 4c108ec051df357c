"""The Llama 2 chat template: from a dialog to the token ids that the chat models were tuned on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, TypedDict

from llama.tokenizer import PromptError, Tokenizer

Role = Literal["system", "user", "assistant"]


class Message(TypedDict):
    role: Role
    content: str


Dialog = Sequence[Message]

B_INST, E_INST = "[INST]", "[/INST]"
B_SYS, E_SYS = "<<SYS>>\n", "\n<</SYS>>\n\n"
SPECIAL_TAGS = (B_INST, E_INST, "<<SYS>>", "<</SYS>>")
UNSAFE_ERROR = "Error: special tags are not allowed as part of the prompt."


def is_unsafe(dialog: Dialog) -> bool:
    """Whether some message holds one of the template's own tags, which would let it pose as another turn."""
    return any(tag in message["content"] for message in dialog for tag in SPECIAL_TAGS)


def encode_dialog(dialog: Dialog, tokenizer: Tokenizer) -> list[int]:
    """The prompt for a checked dialog's next answer.

    Each finished pair of turns is encoded on its own, between BOS and EOS; the last user turn has BOS and stays open.
    """
    texts = _turns(dialog)
    tokens: list[int] = []
    for user, answer in zip(texts[0:-1:2], texts[1::2], strict=True):
        tokens += tokenizer.encode(f"{B_INST} {user} {E_INST} {answer} ", bos=True, eos=True)
    return tokens + tokenizer.encode(f"{B_INST} {texts[-1]} {E_INST}", bos=True, eos=False)


def _turns(dialog: Dialog) -> list[str]:
    """The stripped texts of user, assistant, ..., user, a system message folded into the first."""
    texts = [message["content"] for message in dialog]
    if dialog[0]["role"] == "system":
        texts = [B_SYS + texts[0] + E_SYS + texts[1], *texts[2:]]
    return [text.strip() for text in texts]


def check_dialog(dialog: Dialog, name: str) -> None:
    """Raises PromptError unless the turns are an optional system message, then user, assistant, ..., user.

    Args:
        name: what the error calls the dialog, such as "dialogs[3]".
    """
    if not isinstance(dialog, Sequence) or isinstance(dialog, str):
        raise PromptError(f"{name} must be a list of messages, got a {type(dialog).__name__}")
    if not dialog:
        raise PromptError(f"{name} is empty; a dialog takes at least one message of the user's")
    dialog = list(dialog)
    for i, message in enumerate(dialog):
        _check_message(message, f"{name}[{i}]")
    with_system = dialog[0]["role"] == "system"
    for i, message in enumerate(dialog[with_system:]):
        takes = "assistant" if i % 2 else "user"
        if message["role"] != takes:
            raise PromptError(
                f"{name}[{i + with_system}] has role {message['role']!r} where {takes!r} is due; a dialog takes an "
                "optional system message, then user and assistant in turn"
            )
    if dialog[-1]["role"] != "user":
        raise PromptError(
            f"{name}[{len(dialog) - 1}], the last message, has role {dialog[-1]['role']!r}; the last one has to be "
            "the user's, which is what the model answers"
        )


def _check_message(message: object, name: str) -> None:
    if not isinstance(message, dict) or not {"role", "content"} <= message.keys():
        raise PromptError(f"{name} is {message!r}; a message takes the keys 'role' and 'content'")
    if message["role"] not in ("system", "user", "assistant"):
        raise PromptError(f"{name} has role {message['role']!r}; it takes 'system', 'user' or 'assistant'")
    if not isinstance(message["content"], str):
        raise PromptError(f"{name} has content of type {type(message['content']).__name__}; it takes a str")
