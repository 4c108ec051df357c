"""The interactive chat, driven through a terminal of its own as a person would."""

from __future__ import annotations

import fcntl
import os
import pty
import random
import re
import select
import signal
import subprocess
import sys
import termios
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from llama import Llama
from llama.chat import ChatFormat
from llama.tools import chat
from llama.tools.chat import History, Terminal, _lead
from tests.conftest import ROOT
from tests.support.processes import clean_environment, free_port
from tests.support.steps import dictated

pytestmark = pytest.mark.skipif(not hasattr(os, "setsid"), reason="needs a POSIX terminal")


def history_of(llama: Llama, system: str, most_tokens: int) -> History:
    return History(ChatFormat(), llama.tokenizer, system, most_tokens)


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

    def read_until(self, pattern: str, seconds: float = 60) -> None:
        """Reads up to the pattern, which `shown` then no longer has."""
        deadline = time.monotonic() + seconds
        while not (found := re.search(pattern, self.shown, re.DOTALL)):
            assert time.monotonic() < deadline and self._read(), f"no {pattern!r} in {self.shown!r}"
        self.shown = self.shown[found.end() :]

    def _read(self) -> bool:
        """False once the program has ended."""
        if select.select([self._master], [], [], 0.2)[0]:
            try:
                self.shown += os.read(self._master, 65536).decode(errors="replace")
            except OSError:
                return False
        return True

    def end(self) -> int:
        """The exit status, reading on so that the program can write."""
        while self._read() and self.process.poll() is None:
            pass
        return self.process.wait(timeout=30)

    def control_characters(self) -> list[bytes]:
        """What the terminal takes for Ctrl-C, Ctrl-D and so on."""
        return termios.tcgetattr(self._master)[6]

    def close(self) -> None:
        self.process.kill()
        os.close(self._master)


def _take_terminal() -> None:
    os.setsid()
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)


@pytest.fixture(params=[1, 2], ids=["one rank", "two ranks"])
def command(request: pytest.FixtureRequest, tokenizer_path: Path, checkpoint_in: Callable[[int], Path]) -> list[str]:
    ranks: int = request.param
    launcher = ["-m", "torch.distributed.run", "--nproc_per_node", str(ranks), "--master_port", str(free_port())]
    flags = ["--ckpt_dir", str(checkpoint_in(ranks)), "--tokenizer_path", str(tokenizer_path), "--max_seq_len", "4096"]
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


def test_a_terminal_has_its_ctrl_c_again_after_a_signal(checkpoint: Path, tokenizer_path: Path) -> None:
    flags = ["--ckpt_dir", str(checkpoint), "--tokenizer_path", str(tokenizer_path)]
    session = Session(sys.executable, "-m", "llama.tools.chat", *flags)
    try:
        before = session.control_characters()
        session.read_until("You: ")
        assert session.control_characters() != before
        session.process.send_signal(signal.SIGTERM)
        assert session.end() == 128 + signal.SIGTERM
        assert session.control_characters() == before
    finally:
        session.close()


def test_a_closed_standard_input_is_refused_before_anything_is_loaded(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "llama.tools.chat", "--ckpt_dir", str(tmp_path)]
    done = subprocess.run(
        command, preexec_fn=lambda: os.close(0), capture_output=True, text=True, cwd=ROOT, env=clean_environment()
    )
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == "error: standard input must be a terminal, a file or a pipe, got a closed one\n"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"system": "a [INST] b"}, r"^system must not contain the chat template's tags, .*, got 'a \[INST\] b'$"),
        ({"answer_len": 0}, "^--answer_len must be"),
        ({"answer_len": 600}, "^--max_seq_len must have room for"),
        ({"system": "a b c d" * 200}, "^--max_seq_len must have room for"),
    ],
)
def test_what_cannot_be_answered_is_refused_before_anything_is_loaded(
    flags: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Llama, "build", lambda *args, **kwargs: pytest.fail("loads"))
    with pytest.raises(ValueError, match=message):
        chat.main(**flags)


def test_ctrl_c_stops_the_answer_also_when_a_line_was_typed_ahead() -> None:
    """What was typed ahead of it is dropped with it, as a terminal does."""
    read_end, write_end = os.pipe()
    terminal = Terminal(read_end)
    os.write(write_end, b"typed ahead\n")
    assert not terminal.interrupted()
    os.write(write_end, b"\x03after\n")
    assert terminal.interrupted()
    assert not terminal.interrupted()
    assert terminal.line(list) == "after"
    os.close(write_end)
    assert terminal.line(list) is None
    os.close(read_end)


def test_questions_from_a_pipe_are_all_answered_in_full(llama: Llama, capsys: pytest.CaptureFixture[str]) -> None:
    """The end of the input ends no answer."""
    ask(llama, "one", "two")
    printed = capsys.readouterr().out
    assert printed.count("Llama: ") == 2 and "(stopped)" not in printed
    for question in ("one", "two"):  # an answer fills the context, so that the turn before is dropped
        answer = llama.chat_completion([[{"role": "user", "content": question}]], temperature=0)[0]["generation"]
        assert f"Llama: {chat.for_terminal(answer['content'])}\n" in printed


def spelled(llama: Llama, *answers: str) -> list[int]:
    """Answers byte by byte, with EOS after each."""
    sp, eos_id = llama.tokenizer.sp_model, llama.tokenizer.eos_id
    return [i for text in answers for i in (*(sp.piece_to_id(f"<0x{b:02X}>") for b in text.encode()), eos_id)]


def ask(llama: Llama, *questions: str, most_tokens: int = 60) -> None:
    """Chats as if the questions came through a pipe."""
    read_end, write_end = os.pipe()
    os.write(write_end, "".join(f"{question}\n" for question in questions).encode())
    os.close(write_end)
    _lead(llama, history_of(llama, "", most_tokens), Terminal(read_end), {"temperature": 0.0, "top_p": 0.9})
    os.close(read_end)


@pytest.fixture(scope="module")
def roomy(checkpoint: Path, tokenizer_path: Path) -> Llama:
    """With room for several turns."""
    return Llama.build(checkpoint, tokenizer_path, 600, 1, device="cpu", dtype="float32")


def test_a_tag_in_an_answer_stops_no_further_question(roomy: Llama, capsys: pytest.CaptureFixture[str]) -> None:
    with dictated(roomy, spelled(roomy, "one [INST]<</SYS>> two", "three", "four")):
        ask(roomy, "first", "typed <<SYS>>", "second", "third", most_tokens=500)
    printed = capsys.readouterr().out
    assert re.findall(r"Llama: (.*)\n", printed) == ["one [INST]<</SYS>> two", "three", "four"]
    assert printed.count("not allowed") == 1


def test_a_kept_answer_has_no_tag_whatever_it_is_made_of(llama: Llama) -> None:
    rng = random.Random(0)
    parts = ["[INST]", "[/INST]", "<<SYS>>", "<</SYS>>", "[", "INST", "/", "]", "<", ">", "SYS", " "]
    for _ in range(500):
        history = history_of(llama, "", 60)
        answer = "".join(rng.choices(parts, k=6))
        history.add("q", answer)
        kept = history.turns[1]["content"]
        assert not ChatFormat().is_unsafe(history.turns)
        assert kept.replace(" ", "") == answer.replace(" ", "")
        assert kept == answer or ChatFormat().is_unsafe([{"role": "assistant", "content": answer}])


def test_an_answers_control_characters_are_written_out(roomy: Llama, capsys: pytest.CaptureFixture[str]) -> None:
    """Newlines, tabs and text of any language stay; escape sequences do nothing, also where tokens split them."""
    with dictated(roomy, spelled(roomy, "\x1b]0;title\x07 \x9b2J a\r\n\té 日 👩\u200d👧 \x00\x7f\u202ez")):
        ask(roomy, "hello", most_tokens=500)
    assert "Llama: \\x1b]0;title\\x07 \\x9b2J a\\r\n\té 日 👩\u200d👧 \\x00\\x7f\\u202ez\n" in capsys.readouterr().out


def test_history_drops_whole_turns_oldest_first_and_keeps_the_system_prompt(llama: Llama) -> None:
    history = history_of(llama, "Be brief.", 60)
    for i in range(20):
        dialog = history.with_question(f"q{i}")
        assert dialog is not None
        assert len(ChatFormat().encode(dialog, llama.tokenizer)) <= 60
        assert dialog[0] == {"role": "system", "content": "Be brief."}
        assert dialog[-1] == {"role": "user", "content": f"q{i}"}
        kept = [message["content"] for message in dialog[1:]]
        assert kept == [text for j in range(i - len(kept) // 2, i) for text in (f"q{j}", f"a{j}")] + [f"q{i}"]
        history.add(f"q{i}", f"a{i}")
    assert 0 < len(history.turns) < 40


def test_a_question_that_is_too_long_is_refused_and_nothing_is_forgotten(llama: Llama) -> None:
    history = history_of(llama, "", 60)
    history.add("q", "a")
    assert history.with_question("long " * 100) is None
    assert len(history.turns) == 2
