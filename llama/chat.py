"""Dialogs and their ids: the Llama 2 chat template and Code Llama 70B's, in the forms that these models were tuned on.

Templates of other fine-tunes are Jinja texts: see `text/chat_format.py`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, TypedDict

from llama.errors import PromptError, quote

Role = Literal["system", "user", "assistant"]


class _Message(TypedDict):
    role: Role
    content: str


class Message(_Message, total=False):
    """A message of a dialog: `{"role": "system", "user" or "assistant", "content": text}`."""

    destination: str  # Code Llama 70B: whom the message is for


Dialog = Sequence[Message | Mapping[str, str]]

B_INST, E_INST = "[INST]", "[/INST]"
B_SYS, E_SYS = "<<SYS>>\n", "\n<</SYS>>\n\n"
SPECIAL_TAGS = (B_INST, E_INST, "<<SYS>>", "<</SYS>>")
UNSAFE_ERROR = "Error: special tags are not allowed as part of the prompt."
STEP = "<step>"  # ends a message of Code Llama 70B


class ChatFormat:
    """How a checkpoint's dialogs become ids, and how its answers end: here as in Llama 2.

    Attributes:
        tags: texts of the template that a message must not contain, as it could fake another turn with them.
        in_turn: whether the roles must alternate.
    """

    tags: tuple[str, ...] = SPECIAL_TAGS
    in_turn = True

    def check_usable(self) -> None:
        """Raises ImportError or PromptError if no dialog can be encoded, as the template is damaged."""

    def check(self, dialog: Dialog, name: str) -> None:
        """Raises PromptError unless the dialog has the form of the template: see `check_dialog`."""
        check_dialog(dialog, name, in_turn=self.in_turn)

    def tag_in(self, text: str) -> str | None:
        """The first of the tags that a text contains."""
        return next((tag for tag in self.tags if tag in text), None)

    def is_unsafe(self, dialog: Dialog) -> bool:
        """Whether a message contains a tag."""
        return any(self.tag_in(message["content"]) for message in dialog)

    def encode(self, dialog: Dialog, tokenizer: Any) -> list[int]:
        """Encodes a checked dialog as the prompt for the assistant's next answer.

        Here, each pair of a user message and its answer is encoded separately, with BOS and EOS; the last user message
        has only BOS. A system message is folded into the first user message.
        """
        texts = [message["content"] for message in dialog]
        if dialog[0]["role"] == "system":
            texts = [B_SYS + texts[0] + E_SYS + texts[1], *texts[2:]]
        *turns, last = [text.strip() for text in texts]
        tokens: list[int] = []
        for user, answer in zip(turns[::2], turns[1::2], strict=True):
            tokens += tokenizer.encode(f"{B_INST} {user} {E_INST} {answer} ", bos=True, eos=True)
        return [*tokens, *tokenizer.encode(f"{B_INST} {last} {E_INST}", bos=True, eos=False)]

    def encode_beginning(self, answer: str, tokenizer: Any) -> list[int]:
        """Encodes the beginning of an answer, which follows the prompt."""
        return list(tokenizer.encode(answer, bos=False, eos=False))

    def stop_ids(self, tokenizer: Any) -> frozenset[int] | None:
        """Ids that end an answer; None for those that end any text."""
        return None

    def answer(self, text: str) -> Message:
        """The message that an answer is returned as."""
        return {"role": "assistant", "content": text}


class StepChatFormat(ChatFormat):
    """Code Llama 70B Instruct's: each message is a header, a body and the token `<step>`, at which answers end too."""

    tags = (*SPECIAL_TAGS, STEP)

    def check(self, dialog: Dialog, name: str) -> None:
        super().check(dialog, name)
        for i, message in enumerate(dialog):
            destination = message.get("destination")
            if destination is not None and (not isinstance(destination, str) or self.tag_in(destination)):
                raise PromptError(
                    f"{name}[{i}] must have a destination of type str, without tags of the format, "
                    f"got {quote(destination)}"
                )

    def encode(self, dialog: Dialog, tokenizer: Any) -> list[int]:
        return dialog_prompt_tokens(tokenizer, dialog)

    def stop_ids(self, tokenizer: Any) -> frozenset[int] | None:
        return frozenset({tokenizer.step_id})

    def answer(self, text: str) -> Message:
        return {"role": "assistant", "destination": "user", "content": text}


def built_in_format(tokenizer: Any) -> ChatFormat:
    """The format of a checkpoint that brings no template: Code Llama 70B's where there is a `<step>`, or Llama 2's."""
    return ChatFormat() if getattr(tokenizer, "step_id", None) is None else StepChatFormat()


def dialog_prompt_tokens(tokenizer: Any, dialog: Dialog) -> list[int]:
    """Encodes a dialog as Code Llama 70B Instruct was tuned on it: header and body of each message are separate texts.

    Raises:
        PromptError: the tokenizer has no piece `<step>`, or the dialog has another form (see `check_dialog`).
    """
    if tokenizer.step_id is None:
        raise PromptError(f"tokenizer must have a piece {STEP}, as Code Llama 70B Instruct's has, got one without it")
    check_dialog(dialog, "dialog")
    system: Message = {"role": "system", "content": ""}
    tokens = [tokenizer.bos_id]
    for message in dialog if dialog[0]["role"] == "system" else [system, *dialog]:
        tokens += _step_header(tokenizer, message["role"], message.get("destination"))
        if message["content"]:
            tokens += tokenizer.encode(f"\n\n {message['content'].strip()}", bos=False, eos=False)
        tokens.append(tokenizer.step_id)
    answer = tokenizer.encode("\n\n ", bos=False, eos=False)
    return [*tokens, *_step_header(tokenizer, "assistant", "user"), *answer]


def _step_header(tokenizer: Any, role: str, destination: str | None) -> list[int]:
    lines = [f" Source: {role}"] + ([] if destination is None else [f"Destination: {destination.strip()}"])
    return list(tokenizer.encode("\n".join(lines), bos=False, eos=False))


def check_dialog(dialog: Dialog, name: str, *, in_turn: bool = True) -> None:
    """Raises PromptError unless a dialog is an optional system message, then messages of user, assistant, ..., user.

    Args:
        name: name of the dialog in error messages, such as "dialogs[3]".
        in_turn: False for any order, with the user's message last.
    """
    if not isinstance(dialog, Sequence) or isinstance(dialog, str):
        raise PromptError(f"{name} must be a list of messages, got {type(dialog).__name__}")
    if not dialog:
        raise PromptError(f"{name} must have at least one message from the user, got none")
    for i, message in enumerate(dialog):
        _check_message(message, f"{name}[{i}]")
    with_system = dialog[0]["role"] == "system"
    for i, message in enumerate(dialog if in_turn else ()):
        role = "assistant" if (i - with_system) % 2 else "user"
        if message["role"] != role and not (i == 0 and with_system):
            raise PromptError(
                f"{name}[{i}] must have role {role!r}, got {message['role']!r}; a dialog is an optional system "
                "message, then user and assistant messages that alternate"
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
