"""An interactive chat in the terminal: `llama chat --ckpt_dir ...`.

The first rank reads and prints; the other ranks make the same calls.
"""

from __future__ import annotations

import os
import re
import select
import sys
import termios
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from llama import Dialog, Llama, Message
from llama.chat import ChatFormat, built_in_format
from llama.distributed.groups import broadcast_object, is_first_rank
from llama.errors import quote
from llama.text.chat_format import read_chat_format
from llama.tokenizer import Tokenizer
from llama.tools import commandline

PROMPT = "\nYou: "
_CTRL_C = b"\x03"
_LINE = re.compile(rb"([^\n\x03]*)([\n\x03])")
_KEEP_ALIVE_S = 60.0  # between two messages to the waiting ranks, well under any process group's timeout
# Control characters except newline and tab, and those that change the direction of text: with these an answer could
# control the terminal, or look like another text.
_UNPRINTABLE = {*range(32), *range(127, 160), *range(0x202A, 0x202F), *range(0x2066, 0x206A)} - {*b"\n\t"}
_ESCAPES = {code: chr(code).encode("unicode_escape").decode() for code in _UNPRINTABLE}


def for_terminal(text: str) -> str:
    r"""The text with control characters other than newline and tab written out, such as ESC as \x1b."""
    return text.translate(_ESCAPES)


class Terminal:
    """Lines from standard input, where Ctrl-C is read as a character, by the first rank alone.

    As a signal it would reach torchrun too, which would end all ranks.
    """

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._unread = b""
        self._at_end = False

    def line(self, wait: Callable[[], object]) -> str | None:
        """The next line; "" after Ctrl-C; None at the end. Calls `wait` every `_KEEP_ALIVE_S` until it comes."""
        while not (found := _LINE.match(self._unread)):
            if self._at_end:
                return None
            if not self._read(_KEEP_ALIVE_S):
                wait()
        self._unread = self._unread[found.end() :]
        return "" if found[2] == _CTRL_C else found[1].decode(errors="replace")

    def interrupted(self) -> bool:
        """Whether Ctrl-C was typed since the last line. Input before it is dropped."""
        self._read(0)
        _, typed, self._unread = self._unread.rpartition(_CTRL_C)
        return bool(typed)

    def _read(self, seconds: float) -> bool:
        """Reads the input that is there, or its end; returns False if none has come in that time."""
        if self._at_end or not select.select([self._fd], [], [], seconds)[0]:
            return False
        chunk = os.read(self._fd, 65536)
        self._unread += chunk
        self._at_end = not chunk
        return True


@contextmanager
def open_terminal() -> Iterator[Terminal]:
    """Standard input. If it is a terminal, Ctrl-C ends a line instead of raising a signal, until the exit."""
    fd = sys.stdin.fileno()
    if not os.isatty(fd):
        yield Terminal(fd)
        return
    before, changed = termios.tcgetattr(fd), termios.tcgetattr(fd)
    changed[6][termios.VINTR] = b"\x00"  # no signal
    changed[6][termios.VEOL2] = _CTRL_C  # a second end of line
    termios.tcsetattr(fd, termios.TCSANOW, changed)
    try:
        yield Terminal(fd)
    finally:
        with suppress(termios.error):  # the terminal may have been closed
            termios.tcsetattr(fd, termios.TCSADRAIN, before)


@dataclass
class History:
    """The turns so far, trimmed to what the context has room for.

    Attributes:
        most_tokens: maximum number of tokens of the prompt; the rest of the context is kept for the answer.
    """

    chat_format: ChatFormat
    tokenizer: Tokenizer
    system: str
    most_tokens: int
    turns: list[Message] = field(default_factory=list)

    @classmethod
    def empty(
        cls, system: str, answer_len: int | None, template: ChatFormat | None, tokenizer: Tokenizer, max_seq_len: int
    ) -> History:
        """Raises ValueError unless the system prompt, a question and an answer have room in the context."""
        if answer_len is not None and (type(answer_len) is not int or answer_len < 1):
            raise ValueError(f"--answer_len must be an integer of at least 1, got {quote(answer_len)}")
        most = max_seq_len - (max_seq_len // 4 if answer_len is None else answer_len)
        history = cls(template or built_in_format(tokenizer), tokenizer, system, most)
        if history.with_question("?") is None:
            raise ValueError(
                "--max_seq_len must have room for the system prompt, a question and the answer, "
                f"got {max_seq_len}, which leaves {most} in front of the answer"
            )
        return history

    def with_question(self, text: str) -> Dialog | None:
        """The dialog that asks `text`, without the oldest turns if they do not fit; None if `text` is too long."""
        head: list[Message] = [{"role": "system", "content": self.system}] if self.system else []
        for start in range(0, len(self.turns) + 1, 2):
            dialog = [*head, *self.turns[start:], Message(role="user", content=text)]
            if len(self.chat_format.encode(dialog, self.tokenizer)) <= self.most_tokens:
                self.turns = self.turns[start:]
                return dialog
        return None

    def add(self, question: str, answer: str) -> None:
        """Adds a turn. A tag of the chat template in the answer gets a space, so that further questions are allowed."""
        for tag in self.chat_format.tags:
            answer = answer.replace(tag, f"{tag[0]} {tag[1:]}")
        self.turns += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def _ask(terminal: Terminal, history: History) -> Dialog | None:
    """Asks for a question until there is a dialog to answer; None at the end of the input. The other ranks wait."""
    while True:
        print(PROMPT, end="", flush=True)
        if (line := terminal.line(lambda: broadcast_object("wait"))) is None:
            return None
        text = line.strip()
        if not text:
            continue
        if tag := history.chat_format.tag_in(text):
            print(f"(the tags of the chat template, such as {tag}, are not allowed)")
        elif dialog := history.with_question(text):
            return dialog
        else:
            print(f"(too long: question and system prompt must have at most {history.most_tokens} tokens)")


def _lead(
    llama: Llama, history: History, terminal: Terminal, settings: Mapping[str, Any], *, stats: bool = False
) -> None:
    """The part of the first rank."""
    while dialog := _ask(terminal, history):
        broadcast_object(dialog)
        print("Llama: ", end="", flush=True)
        answer = ""
        started, first, n_cached = time.perf_counter(), 0.0, llama.engine.n_reused
        with closing(llama.stream_chat_completion(dialog, **settings)) as pieces:
            for piece in pieces:
                first = first or time.perf_counter()
                answer += piece
                print(for_terminal(piece), end="", flush=True)
                if terminal.interrupted():
                    print(" (stopped)", end="")
                    break
        print()
        if stats and answer:
            n_prompt = len(history.chat_format.encode(dialog, llama.tokenizer))
            print(
                f"({n_prompt} prompt tokens, {llama.engine.n_reused - n_cached} of them cached; "
                f"first text after {first - started:.2f} s, all after {time.perf_counter() - started:.2f} s)"
            )
        if answer:
            history.add(dialog[-1]["content"], answer)
    print()
    broadcast_object("leave")


def _follow(llama: Llama, settings: Mapping[str, Any]) -> None:
    """The part of the other ranks: the calls of the first one."""
    news: Dialog | str
    while (news := broadcast_object()) != "leave":
        if not isinstance(news, str):
            for _ in llama.stream_chat_completion(news, **settings):
                pass


@partial(commandline.with_build_flags, reuse_prefixes=True, compile="background")
def main(
    ckpt_dir: str | None = None,
    tokenizer_path: str | None = None,
    system: str = "",
    temperature: float = 0.6,
    top_p: float = 0.9,
    max_seq_len: int = 512,
    answer_len: int | None = None,
    speculative: str | None = None,
    stats: bool = False,
    **build: Any,
) -> None:
    """Chat in the terminal. Ctrl-C stops an answer, Ctrl-D leaves.

    Args:
        ckpt_dir: folder of params.json and consolidated.NN.pth of a chat model; by default the toy one.
        tokenizer_path: its tokenizer.model; by default the one in ckpt_dir or in its parent folder.
        system: system prompt; it stays when older turns are dropped.
        temperature: of sampling; 0 for greedy decoding.
        top_p: samples from the smallest set of tokens whose probability mass exceeds it (nucleus sampling).
        max_seq_len: maximum number of tokens of the remembered turns and the answer.
        answer_len: number of tokens kept free for the answer; by default a quarter of max_seq_len.
        speculative: prompt_lookup, or draft with draft_ckpt_dir, verifies several drafted tokens per pass: the
            same text, often in less time.
        stats: prints each prompt's number of tokens, how many were cached, and the times of its answer.
    """
    if sys.stdin is None:
        raise ValueError("standard input must be a terminal, a file or a pipe, got a closed one")
    ckpt_dir, tokenizer_path = commandline.checkpoint_paths(ckpt_dir, tokenizer_path)
    template = read_chat_format(ckpt_dir)
    chat_format = template or ChatFormat()
    chat_format.check_usable()
    if chat_format.tag_in(system):
        tags = " ".join(chat_format.tags)
        raise ValueError(f"system must not contain the chat template's tags, {tags}, got {quote(system)}")
    settings = commandline.checked_sampling(build, temperature=temperature, top_p=top_p, speculative=speculative)
    empty = partial(History.empty, system, answer_len, template)
    history = commandline.check_prompts(empty, ckpt_dir, tokenizer_path, max_seq_len)
    llama = Llama.build(ckpt_dir, tokenizer_path, max_seq_len, 1, **build)
    if not is_first_rank():
        return _follow(llama, settings)
    print("Ctrl-C stops an answer, Ctrl-D leaves.")
    with open_terminal() as terminal:
        _lead(llama, history, terminal, settings, stats=stats)


if __name__ == "__main__":
    commandline.run(main, name="llama chat")
