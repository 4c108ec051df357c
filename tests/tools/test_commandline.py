"""From a function to a command: what a flag may be, how a mistake and a signal end it."""

from __future__ import annotations

import ast
import inspect
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from llama import Llama
from llama.tools.commandline import check_speculative, run, with_build_flags
from tests.conftest import ROOT


def echo(folder: str, name: str | None = None, *, count: int = 1, quiet: bool = False) -> str:
    """Shows what it was called with."""
    return repr((folder, name, count, quiet))


def fails(message: str) -> None:
    raise ValueError(message)


def command(monkeypatch: pytest.MonkeyPatch, function: object, *arguments: str) -> int | str | None:
    """The command's exit status; a text is what it says on stderr."""
    monkeypatch.setattr(sys, "argv", ["command", *arguments])
    monkeypatch.setattr(signal, "signal", lambda *args: None)
    with pytest.raises(SystemExit) as stop:
        run(function)  # type: ignore[arg-type]
    return stop.value.code


def test_a_text_is_taken_as_it_is_and_a_flag_without_value_is_true(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for arguments, shown in (
        (["7"], ("7", None, 1, False)),
        (["--folder", "1e3", "--count", "2", "--quiet"], ("1e3", None, 2, True)),
        (["--folder=True", "--name", "False"], ("True", "False", 1, False)),
        (["--folder", "None", "--name", "[1]"], ("None", "[1]", 1, False)),
    ):
        assert command(monkeypatch, echo, *arguments) == 0
        assert capsys.readouterr().out == f"{shown}\n"


@pytest.mark.parametrize(
    ("arguments", "flag"),
    [
        (["--folder"], "folder"),
        (["--folder", "--quiet"], "folder"),
        (["--folder", "x", "--name"], "name"),
        (["--nofolder"], "folder"),
    ],
)
def test_a_text_without_its_value_is_refused(monkeypatch: pytest.MonkeyPatch, arguments: list[str], flag: str) -> None:
    """fire passes the text "True" for it, which would name a folder."""
    expected = f"error: --{flag} must have a value, got none; write --{flag} VALUE"
    assert command(monkeypatch, echo, *arguments) == expected


def test_an_error_is_one_printable_line(monkeypatch: pytest.MonkeyPatch) -> None:
    shown = command(monkeypatch, fails, "a\nb\x1b[2J" + "x" * 100_000)
    assert isinstance(shown, str) and shown.startswith(r"error: a; b\x1b[2J") and shown.isprintable()
    assert len(shown) < 5000


def load(ckpt_dir: str, *, seed: int = 5, **build: Any) -> str:
    """Loads.

    Args:
        ckpt_dir: folder.
        seed: a text of its own.
    """
    return repr((ckpt_dir, seed, build))


def test_flags_of_the_build_are_passed_on_if_they_are_given(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--dtype", "float16", "--quantize=int8", "--nocuda_graphs", "--model_parallel_size", "2"]
    assert command(monkeypatch, with_build_flags(load), "x", *flags) == 0
    given = {"dtype": "float16", "quantize": "int8", "cuda_graphs": False, "model_parallel_size": 2}
    assert ast.literal_eval(capsys.readouterr().out) == ("x", 5, given)
    assert command(monkeypatch, load, "x", "--seed", "3") == 0
    assert ast.literal_eval(capsys.readouterr().out) == ("x", 3, {})


def test_flags_of_the_build_are_documented_and_others_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    function = with_build_flags(lambda ckpt_dir, **build: None)
    added = list(inspect.signature(function).parameters)[1:]
    assert added == [n for n, p in inspect.signature(Llama.build).parameters.items() if p.default is not p.empty]
    assert command(monkeypatch, with_build_flags(load), "--", "--help") == 0
    shown = capsys.readouterr()
    assert all(f"--{name}" in shown.out + shown.err for name in added)
    assert "a text of its own" in shown.out + shown.err
    assert command(monkeypatch, with_build_flags(load), "x", "--no_such_flag=1") == 2


def test_a_draft_model_is_given_with_the_way_to_use_it_or_not_at_all() -> None:
    check_speculative(None, {})
    check_speculative("prompt_lookup", {"dtype": "float16"})
    check_speculative("draft", {"draft_ckpt_dir": "x"})
    for speculative, build, message in (
        ("guess", {}, "--speculative must be prompt_lookup or draft, got 'guess'"),
        ("draft", {}, "must be given together, got no --draft_ckpt_dir"),
        (None, {"draft_ckpt_dir": "x"}, "got --draft_ckpt_dir and --speculative None"),
    ):
        with pytest.raises(ValueError, match=message):
            check_speculative(speculative, build)


SIGNALLED = """
import os, signal, sys, time
from pathlib import Path
from typing import Any
from llama.tools.commandline import run

def work(folder: str, numbers: str):
    try:
        for number in numbers.split(","):
            os.kill(os.getpid(), int(number))
        Path(folder, "went on").touch()
    finally:
        for number in numbers.split(","):
            os.kill(os.getpid(), int(number))
        Path(folder, "cleaned up").touch()

run(work)
"""


def end_by(folder: Path, *numbers: int, before: str = "") -> tuple[int, list[str]]:
    """Runs a command that sends itself the signals while it works and while it cleans up: its status and traces."""
    arguments = [str(folder), "".join(f"{int(number)}," for number in numbers).rstrip(",")]
    done = subprocess.run([sys.executable, "-c", before + SIGNALLED, *arguments], cwd=ROOT, check=False)
    return done.returncode, sorted(os.listdir(folder))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_ends_a_command_after_it_has_cleaned_up(tmp_path: Path, number: signal.Signals) -> None:
    """Once: a second signal, such as a shell sends with the first, does not interrupt the cleaning up."""
    assert end_by(tmp_path, number) == (128 + number, ["cleaned up"])


def test_under_nohup_the_closing_of_the_terminal_is_ignored(tmp_path: Path) -> None:
    nohup = "import signal; signal.signal(signal.SIGHUP, signal.SIG_IGN)\n"
    assert end_by(tmp_path, signal.SIGHUP, before=nohup) == (0, ["cleaned up", "went on"])
