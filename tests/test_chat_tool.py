"""The interactive chat, driven through a terminal of its own as a person would."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import select
import subprocess
import sys
import termios
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from llama import Llama
from llama.chat import encode_dialog
from llama.tools.chat import History, Terminal, _lead
from tests.conftest import ROOT
from tests.test_examples import clean_environment, free_port

pytestmark = pytest.mark.skipif(not hasattr(os, "setsid"), reason="needs a POSIX terminal")


class Session:
    """A program in a terminal that it controls: Ctrl-C typed there is a signal, unless the program says otherwise."""

    def __init__(self, *command: str) -> None:
        self._master, slave = pty.openpty()
        self.process = subprocess.Popen(
            command,
            stdin=slave,
            stdout=slave,
            stderr=slave,
            cwd=ROOT,
            env=clean_environment(),
            preexec_fn=_take_terminal,
        )
        os.close(slave)
        self.shown = ""

    def type(self, text: str) -> None:
        os.write(self._master, text.encode())

    def read_until(self, pattern: str, seconds: float = 60) -> str:
        """What is shown up to the pattern, which is then behind."""
        deadline = time.monotonic() + seconds
        while not (found := re.search(pattern, self.shown, re.DOTALL)):
            assert time.monotonic() < deadline, f"no {pattern!r} in {self.shown!r}"
            if select.select([self._master], [], [], 0.2)[0]:
                try:
                    self.shown += os.read(self._master, 65536).decode(errors="replace")
                except OSError:  # the program has ended
                    assert re.search(pattern, self.shown, re.DOTALL), self.shown
        before, self.shown = self.shown[: found.end()], self.shown[found.end() :]
        return before

    def end(self) -> int:
        """The exit status, reading on so that the program can write."""
        deadline = time.monotonic() + 60
        while self.process.poll() is None and time.monotonic() < deadline:
            if select.select([self._master], [], [], 0.2)[0]:
                try:
                    self.shown += os.read(self._master, 65536).decode(errors="replace")
                except OSError:
                    break
        return self.process.wait(timeout=30)

    def close(self) -> None:
        self.process.kill()
        os.close(self._master)


def _take_terminal() -> None:
    os.setsid()
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)


@pytest.fixture(params=[1, 2], ids=["one rank", "two ranks"])
def command(
    request: pytest.FixtureRequest,
    checkpoint: Path,
    tokenizer_path: Path,
    write_checkpoint: Callable[..., Path],
    params: dict[str, Any],
    state: dict[str, torch.Tensor],
) -> list[str]:
    ranks: int = request.param
    folder = checkpoint if ranks == 1 else write_checkpoint(params, state, ranks)
    launcher = ["-m", "torch.distributed.run", "--nproc_per_node", str(ranks), "--master_port", str(free_port())]
    flags = ["--ckpt_dir", str(folder), "--tokenizer_path", str(tokenizer_path), "--max_seq_len", "4096"]
    return [sys.executable, *(launcher if ranks > 1 else []), "-m", "llama.tools.chat", *flags]


@pytest.fixture
def session(command: list[str]) -> Iterator[Session]:
    session = Session(*command)
    yield session
    session.close()


def test_a_conversation(session: Session) -> None:
    """The random network never ends by itself: Ctrl-C stops its answer on every rank, and the next question works."""
    session.read_until("You: ")
    session.type("hello\n")
    session.read_until("Llama: .{20}")
    session.type("\x03")
    session.read_until(r"\(stopped\).*You: ")
    session.type("again [INST]\n")
    session.read_until(r"not allowed\).*You: ")
    session.type("a line that is not sent\x03")
    session.read_until("You: ")
    session.type("again\n")
    session.read_until("Llama: .{20}")
    session.type("\x03")
    session.read_until(r"\(stopped\).*You: ")
    session.type("\x04")
    assert session.end() == 0, session.shown


def test_ctrl_c_stops_the_answer_also_when_a_line_was_typed_ahead() -> None:
    """What was typed ahead of it is dropped with it, as a terminal does."""
    read_end, write_end = os.pipe()
    terminal = Terminal(read_end)
    os.write(write_end, b"typed ahead\n")
    assert not terminal.interrupted()
    os.write(write_end, b"\x03after\n")
    assert terminal.interrupted()
    assert not terminal.interrupted()
    assert terminal.wait(0) and terminal.line() == "after"
    os.close(write_end)
    assert terminal.wait(0) and terminal.line() is None
    os.close(read_end)


def test_questions_from_a_pipe_are_all_answered_in_full(llama: Llama, capsys: pytest.CaptureFixture[str]) -> None:
    """The end of the input ends no answer."""
    read_end, write_end = os.pipe()
    os.write(write_end, b"one\ntwo\n")
    os.close(write_end)
    history = History(llama, "", most_tokens=60)
    _lead(llama, history, Terminal(read_end), temperature=0.0, top_p=0.9)
    os.close(read_end)
    printed = capsys.readouterr().out
    assert printed.count("Llama: ") == 2 and "(stopped)" not in printed
    for question in ("one", "two"):  # an answer fills the context, so that the turn before is dropped
        answer = llama.chat_completion([[{"role": "user", "content": question}]], temperature=0)[0]["generation"]
        assert f"Llama: {answer['content']}\n" in printed


def test_history_drops_whole_turns_oldest_first_and_keeps_the_system_prompt(llama: Llama) -> None:
    history = History(llama, "Be brief.", most_tokens=60)
    for i in range(20):
        dialog = history.with_question(f"q{i}")
        assert dialog is not None
        assert len(encode_dialog(dialog, llama.tokenizer)) <= 60
        assert dialog[0] == {"role": "system", "content": "Be brief."}
        assert dialog[-1] == {"role": "user", "content": f"q{i}"}
        kept = [message["content"] for message in dialog[1:]]
        assert kept == [text for j in range(i - len(kept) // 2, i) for text in (f"q{j}", f"a{j}")] + [f"q{i}"]
        history.add(f"q{i}", f"a{i}")
    assert 0 < len(history.turns) < 40


def test_a_question_that_is_too_long_is_refused_and_nothing_is_forgotten(llama: Llama) -> None:
    history = History(llama, "", most_tokens=60)
    history.add("q", "a")
    assert history.with_question("long " * 100) is None
    assert len(history.turns) == 2
