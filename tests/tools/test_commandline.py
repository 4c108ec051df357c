"""From a function to a command: what a flag may be, how a mistake and a signal end it."""

from __future__ import annotations

import ast
import inspect
import os
import re
import runpy
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from llama import Llama
from llama.inputs import check_speculative
from llama.tools import commandline
from llama.tools.cli import COMMANDS
from llama.tools.commandline import run, with_build_flags
from tests.conftest import ROOT
from tests.support.processes import run_python


def echo(folder: str, name: str | None = None, *, count: int = 1, quiet: bool = False) -> str:
    """Shows what it was called with."""
    return repr((folder, name, count, quiet))


def fails(message: str) -> None:
    raise ValueError(message)


def command(monkeypatch: pytest.MonkeyPatch, function: Any, *arguments: object) -> int | str | None:
    """The command's exit status."""
    monkeypatch.setattr(sys, "argv", ["command", *map(str, arguments)])
    monkeypatch.setattr(signal, "signal", lambda *args: None)
    with pytest.raises(SystemExit) as stop:
        run(function, name="llama command")
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
    ("arguments", "value"),
    [(["--compile", "False"], False), (["--nocompile"], False), (["--compile"], True), (["--compile=later"], "later")],
)
def test_a_flag_that_is_a_bool_or_a_text_can_be_either(
    arguments: list[str], value: bool | str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """`--compile False` was refused, as a text."""

    def show(compile: bool | str = "background") -> str:
        return repr(compile)

    assert command(monkeypatch, show, *arguments) == 0
    assert capsys.readouterr().out == f"{value!r}\n"


@pytest.mark.parametrize(
    ("arguments", "flag"),
    [
        (["--folder"], "folder"),
        (["--folder", "--quiet"], "folder"),
        (["--folder", "x", "--name"], "name"),
        (["--nofolder"], "folder"),
    ],
)
def test_a_text_without_its_value_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], arguments: list[str], flag: str
) -> None:
    """fire passes the text "True" for it, which would name a folder."""
    assert command(monkeypatch, echo, *arguments) == 1
    assert capsys.readouterr().err == f"error: --{flag} must have a value, got none; write --{flag} VALUE\n"


@pytest.mark.parametrize("flag", ["--noreuse_prefixes", "--noreuse-prefixes"])
def test_a_flag_is_turned_off_by_underscores_and_hyphens(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], flag: str
) -> None:
    assert command(monkeypatch, lambda reuse_prefixes=True: repr(reuse_prefixes), flag) == 0
    assert capsys.readouterr().out == "False\n"


def test_an_error_is_one_printable_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert command(monkeypatch, fails, "a\nb\x1b[2J" + "x" * 100_000) == 1
    shown = capsys.readouterr().err
    assert shown.startswith(r"error: a; b\x1b[2J") and shown.rstrip("\n").isprintable()
    assert len(shown) < 5000


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["x", "--quiett"], "there is no flag --quiett; did you mean --quiet?"),
        (["x", "--coutn=2"], "there is no flag --coutn; did you mean --count?"),
        (["x", "--zzz", "2"], "there is no flag --zzz; llama command --help lists the flags"),
        (["x", "y", "3"], "flags must be written as --NAME VALUE, got '3'; llama command --help lists the flags"),
        ([], "--folder must be given; llama command --help lists the flags"),
    ],
)
def test_a_mistaken_command_line_is_one_line_that_says_the_nearest_flag(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert command(monkeypatch, echo, *arguments) == 2
    assert capsys.readouterr() == ("", f"error: {message}\n")


def test_one_of_several_functions_is_chosen_by_name(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    functions = {"echo": echo, "fails": fails}
    assert command(monkeypatch, functions, "echo", "x") == 0
    assert capsys.readouterr().out == "('x', None, 1, False)\n"
    for arguments, got in (([], "; see llama command --help"), (["ehco", "x"], ", got 'ehco'; did you mean echo?")):
        assert command(monkeypatch, functions, *arguments) == 2
        assert capsys.readouterr().err.startswith(f"error: one of echo, fails must be given{got}")
    assert command(monkeypatch, functions, "echo", "x", "--quite") == 2
    assert "did you mean --quiet?" in capsys.readouterr().err


def test_an_output_that_cannot_show_a_character_gets_its_number() -> None:
    """An emoji in an answer must not end the program on a cp1252 terminal."""
    script = "from llama.tools.commandline import run\ndef say(): return 'caf\\xe9 \\U0001f600'\nrun(say)"
    for encoding, shown in (("cp1252", b"caf\xe9 \\U0001f600"), ("utf-8", "caf\xe9 \U0001f600".encode())):
        done = run_python("-c", script, env=os.environ | {"PYTHONIOENCODING": encoding})
        assert (done.returncode, done.stderr) == (0, "")
        assert done.stdout.strip().encode(errors="surrogateescape") == shown


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


def test_flags_are_those_of_the_build_and_others_are_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    added = list(inspect.signature(with_build_flags(lambda ckpt_dir, **build: None)).parameters)[1:]
    assert added == [n for n, p in inspect.signature(Llama.build).parameters.items() if p.default is not p.empty]
    assert command(monkeypatch, with_build_flags(load), "x", "--no_such_flag=1") == 2
    assert capsys.readouterr().err.startswith("error: there is no flag --no_such_flag")


def test_every_command_takes_a_number_of_threads(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before = torch.get_num_threads()
    try:
        assert command(monkeypatch, lambda: torch.get_num_threads() + 10, "--threads", "1") == 11
    finally:
        torch.set_num_threads(before)
    assert command(monkeypatch, lambda: 0, "--threads", "0") == 1
    assert capsys.readouterr().err.startswith("error: threads must be a whole number of at least 1")


def documented(function: Any) -> dict[str, str]:
    """The text of each argument in a docstring, by indentation alone."""
    lines = inspect.cleandoc(function.__doc__).partition("Args:\n")[2].splitlines()
    texts: dict[str, str] = {}
    name = ""
    for line in lines:
        if line and not line.startswith("    "):
            break
        if line.startswith("        "):
            texts[name] += " " + line.strip()
        elif line.strip():
            name, _, texts[name] = line.strip().partition(": ")
    return texts


@pytest.mark.parametrize("name", [*COMMANDS, "example_chat_completion", "example_text_completion"])
def test_a_help_shows_every_text_to_its_last_full_stop_and_each_flag_once(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    """fire ends a description at a colon, and has -s for `--stride` and again for `--seed`."""
    ran: list[Any] = []
    with monkeypatch.context() as patched:
        patched.setattr(commandline, "run", lambda commands, **options: ran.append(commands))
        runpy.run_path(
            str(ROOT / (f"llama/tools/{name}.py" if name in COMMANDS else f"{name}.py")), run_name="__main__"
        )
    for function in ran[0].values() if isinstance(ran[0], dict) else ran:
        texts, of_build = documented(function), documented(Llama.build)
        parameters = inspect.signature(function).parameters
        texts |= {flag: of_build[flag] for flag in parameters if flag in of_build and flag not in texts}
        assert set(texts) == set(parameters)
        assert command(monkeypatch, function, "--help") == 0
        shown = capsys.readouterr().out
        flags = re.findall(r"^  (-.*?)(?: |$)", shown, re.MULTILINE)
        assert sorted(flags) == sorted(f"--{flag}" for flag in {*parameters, "threads"})
        for text in texts.values():
            assert " ".join(text.split()) in " ".join(shown.split())


def test_a_help_whose_reader_leaves_ends_without_a_traceback() -> None:
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run(
        [sys.executable, "-m", "llama.tools.memory", "--help"], stdout=writing, stderr=subprocess.PIPE, cwd=ROOT
    )
    os.close(writing)
    assert (done.returncode, done.stderr) == (0, b"")


_WITHOUT = """
import runpy, sys
sys.modules[sys.argv[1]] = None  # as if it were not installed
for name in [name for name in sys.modules if name.startswith("llama.serving")]:
    del sys.modules[name]  # which an earlier test's process may have imported
how, *sys.argv = sys.argv[2:]
if how == "llama":
    from llama.tools import cli
    cli.main()
runpy.run_module(f"llama.tools.{sys.argv[1]}", run_name="__main__")
"""


@pytest.mark.parametrize(
    ("how", "tool", "package"),
    [("llama", "serve", "pydantic"), ("-m", "batch", "pydantic"), ("-m", "serve", "uvicorn")],
)
def test_a_missing_extra_is_one_line_that_says_what_to_install(how: str, tool: str, package: str) -> None:
    done = run_python("-c", _WITHOUT, package, how, "llama", tool)
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr.startswith(f"error: the extra [{tool}] must be installed, got: ")
    assert "pip install " in done.stderr and package in done.stderr and done.stderr.count("\n") == 1


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
import os
from pathlib import Path
from llama.tools.commandline import run

def work(folder: str, number: int):
    try:
        os.kill(os.getpid(), number)
        Path(folder, "went on").touch()
    finally:
        os.kill(os.getpid(), number)
        Path(folder, "cleaned up").touch()

run(work)
"""


def end_by(folder: Path, number: int, before: str = "") -> tuple[int, list[str]]:
    """Runs a command that sends itself the signal while it works and while it cleans up: its status and traces."""
    status = run_python("-c", before + SIGNALLED, folder, int(number)).returncode
    return status, sorted(os.listdir(folder))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_ends_a_command_after_it_has_cleaned_up(tmp_path: Path, number: signal.Signals) -> None:
    """Once: a second signal, such as a shell sends with the first, does not interrupt the cleaning up."""
    assert end_by(tmp_path, number) == (128 + number, ["cleaned up"])


def test_under_nohup_the_closing_of_the_terminal_is_ignored(tmp_path: Path) -> None:
    nohup = "import signal; signal.signal(signal.SIGHUP, signal.SIG_IGN)\n"
    assert end_by(tmp_path, signal.SIGHUP, before=nohup) == (0, ["cleaned up", "went on"])
