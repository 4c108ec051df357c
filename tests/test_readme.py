"""README.md and docs/: their commands parse or run, their snippets run, their links and named tests are there.

A block of code that a test cannot run has a comment in front of it, `<!-- needs: ... -->`, which says why. Its commands
are parsed all the same: files, modules, flags and extras must exist.
"""

from __future__ import annotations

import ast
import functools
import importlib
import inspect
import json
import os
import re
import runpy
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from torch.distributed.run import get_args_parser

import example_chat_completion
from llama import Llama
from llama.checkpoint.memory import GIB, MemoryPlan
from llama.checkpoint.releases import RELEASES
from llama.distributed.device import DTYPES
from llama.serving.settings import ServerSettings
from llama.tools.cli import COMMANDS as COMMANDS_OF_LLAMA
from tests.conftest import ROOT
from tests.support.processes import clean_environment, free_port, run_python
from tests.support.serving import ServerProcesses

pytestmark = pytest.mark.filterwarnings("ignore:.*found in sys.modules:RuntimeWarning")  # a module that is run anew
README = ROOT / "README.md"
# test_docs.py tests the other two
PAGES = [
    README,
    ROOT / "CONTRIBUTING.md",
    *sorted(path for path in (ROOT / "docs").glob("*.md") if path.name not in ("api.md", "inspecting.md")),
]
NEEDS = ("a network", "the released weights", "a GPU", "minutes", "a running server")
SERVER = "http://127.0.0.1:8000"  # of the pages
TINY_LLAMA = ("tiny-llama/", "tiny-llama/tokenizer.model")


@dataclass(frozen=True)
class Block:
    """A block of code.

    Attributes:
        line: number of its first line.
    """

    page: Path
    line: int
    language: str
    text: str
    needs: str | None

    @property
    def commands(self) -> list[list[str]]:
        """The words of each command; environment variables in front of it are words, too."""
        lines = self.text.replace("\\\n", " ").splitlines()
        whole = [command for line in lines if line.strip() for command in line.split("&&")]
        return [shlex.split(command, comments=True) for command in whole]


def blocks_of(page: Path) -> list[Block]:
    pattern = r"(?:^<!-- needs: (?P<needs>.*?) -->\n)?^```(?P<language>\w*)\n(?P<text>.*?)^```$"
    text = page.read_text(encoding="utf-8")
    found = re.finditer(pattern, text, flags=re.MULTILINE | re.DOTALL)
    return [Block(page, text[: m.start("text")].count("\n") + 1, m["language"], m["text"], m["needs"]) for m in found]


BLOCKS = [block for page in PAGES for block in blocks_of(page)]
COMMANDS = [(block, words) for block in BLOCKS if block.language == "sh" for words in block.commands]


def named(words: list[str]) -> str:
    return " ".join(words)[:70]


@functools.cache
def entry_point(target: str) -> dict[str, Callable[..., Any]]:
    """The functions that a script or module makes commands of, by their subcommands; "" for the only one."""
    module = target.removesuffix(".py").replace("/", ".")
    source = inspect.getsource(importlib.import_module(module))
    calls = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call) and node.args]
    run = [node for node in calls if ast.unparse(node.func) in ("run", "commandline.run")][-1]
    if not isinstance(run.args[0], ast.Dict):
        return {"": getattr(sys.modules[module], ast.unparse(run.args[0]))}
    pairs = zip(run.args[0].keys, run.args[0].values, strict=True)
    return {ast.literal_eval(key): getattr(sys.modules[module], ast.unparse(value)) for key, value in pairs if key}


def check_python(words: list[str]) -> None:
    """A script or `-m` module and its flags."""
    target, *arguments = words[1:] if words[0] == "-m" else words
    assert words[0] == "-m" or (ROOT / target).is_file(), f"no file {target}"
    functions = entry_point(target)
    function = functions[""] if "" in functions else functions[arguments.pop(0)]
    parameters = inspect.signature(function).parameters
    flags = [word.removeprefix("--") for word in arguments if word.startswith("--")]
    assert set(flags) <= set(parameters), f"{target} has no flag {set(flags) - set(parameters)}"
    takes_none = {name for name in flags if "bool" in str(parameters[name].annotation)}
    n_values = len(arguments) - len(flags)
    assert n_values == len(flags) - len(takes_none), "a flag without value, or a value without flag"
    required = [name for name, parameter in parameters.items() if parameter.default is inspect.Parameter.empty]
    assert set(required) <= set(flags), f"{target} needs {required}"


def torchrun_target(words: list[str]) -> list[str]:
    """What torchrun runs, as words of `python`'s; raises SystemExit where torchrun has no such option."""
    parsed = get_args_parser().parse_args(words)
    return [*(["-m"] if parsed.module else []), parsed.training_script, *parsed.training_script_args]


def tool_of(words: list[str]) -> list[str]:
    """What the console script `llama` runs, as words of `python`'s."""
    assert words[0] in COMMANDS_OF_LLAMA
    return ["-m", f"llama.tools.{words[0]}", *words[1:]]


def check_pip(words: list[str]) -> None:
    setup = (ROOT / "setup.py").read_text() + (ROOT / "pyproject.toml").read_text()
    assert words[0] == "install"
    if "-c" in words:
        assert (ROOT / words[words.index("-c") + 1]).is_file()
    for extra in re.findall(r"\[(\w+)\]", " ".join(words)):
        assert re.search(rf"^\s*\"?{extra}\"? ?[:=] ", setup, flags=re.MULTILINE), f"no extra {extra}"


def check_ray(words: list[str]) -> None:
    """An application and its arguments."""
    action, target, *arguments = words
    module, _, function = target.partition(":")
    source = ast.parse((ROOT / f"{module.replace('.', '/')}.py").read_text(encoding="utf-8"))
    assert action == "run" and any(isinstance(node, ast.FunctionDef) and node.name == function for node in source.body)
    known = {*inspect.signature(Llama.build).parameters, *inspect.signature(ServerSettings).parameters}
    assert {word.partition("=")[0] for word in arguments} <= known | {"num_replicas", "num_cpus", "num_gpus"}


def check_command(words: list[str]) -> None:
    variables = [word.partition("=")[0] for word in words if re.match(r"[A-Z_]+=", word)]
    program, *rest = words[len(variables) :]
    if program == "./download.sh":
        assert os.access(ROOT / "download.sh", os.X_OK)
        assert all(name in (ROOT / "download.sh").read_text() for name in variables)
    elif program == "pip":
        check_pip(rest)
    elif program == "torchrun":
        check_python(torchrun_target(rest))
    elif program == "python":
        check_python(rest)
    elif program == "llama":
        check_python(tool_of(rest))
    elif program == "serve":  # Ray Serve's
        check_ray(rest)
    elif program == "curl":
        assert rest[0].startswith(SERVER) and json.loads(rest[rest.index("-d") + 1])
    else:
        assert program == "pytest", f"{program}: no program of this repository"
        assert not rest or (rest[0] == "-m" and rest[1] in ("gpu", "fuzz", "soak", "faults"))
        assert rest[2:] == ["-n", "0"] or all((ROOT / path).is_file() for path in rest[2:])


@pytest.mark.parametrize(("block", "words"), COMMANDS, ids=[named(words) for _, words in COMMANDS])
def test_every_command_is_understood(block: Block, words: list[str]) -> None:
    check_command(words)


@pytest.mark.parametrize(
    "command",
    [
        "torchrun --nproc_per_node 1 example_chat_completion.py --ckpt_folder x",
        "torchrun --nproc_per_nodes 1 example_chat_completion.py",
        "python -m llama.tools.reshard --ckpt_dir x",
        "python -m llama.tools.convert of_hf --hf_dir x --output_dir y",
        'pip install -c constraints.txt -e ".[everything]"',
        "llama reshard --ckpt_dir x",
    ],
)
def test_a_command_that_is_wrong_is_not_understood(command: str) -> None:
    """The check above can fail."""
    with pytest.raises((AssertionError, SystemExit, KeyError)):
        check_command(shlex.split(command))


def test_what_is_not_run_says_why() -> None:
    assert {block.needs for block in BLOCKS} <= {None, *NEEDS}
    assert {block.language for block in BLOCKS} == {"sh", "python", "text"}
    for block in BLOCKS:
        if block.language != "sh":
            assert block.needs in (None, "a running server"), "other snippets in Python run on the toy"
        elif re.search(r"llama-2-|\./download\.sh|pip install|pytest", block.text):
            assert block.needs is not None, block.text


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_snippets_run_one_after_another(
    page: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(ROOT)
    names: dict[str, Any] = {"__name__": "snippet"}
    for block in blocks_of(page):
        if block.language == "python" and block.needs is None:
            exec(compile(block.text, f"{page.name}: {block.text[:40]!r}", "exec"), names)
    if page == README:
        assert "mayonnaise" in capsys.readouterr().out
        prompt, *steps = names["shapes"]
        assert prompt[1] > 1 and {shape[1] for shape in steps} == {1}


def test_what_needs_a_running_server_runs_with_one(capfd: pytest.CaptureFixture[str]) -> None:
    blocks = [block for block in BLOCKS if block.needs == "a running server"]
    server = ServerProcesses(ROOT / "tiny-llama", ROOT / "tiny-llama" / "tokenizer.model")
    for block in blocks:
        text = block.text.replace(SERVER, server.url)
        if block.language == "python":
            exec(compile(text, f"{block.page.name}: {text[:40]!r}", "exec"), {"__name__": "snippet"})
        elif shutil.which("curl"):
            subprocess.run(["bash", "-ec", text], check=True)
        assert re.search("mayonnaise|llama", capfd.readouterr().out, re.IGNORECASE), text
    assert server.terminate() == [0]
    assert len(blocks) >= 2


@pytest.fixture
def clone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder as the repository's, which commands may write to."""
    for name in ("README.md", "tiny-llama", "example_chat_completion.py", "example_text_completion.py", "benchmarks"):
        (tmp_path / name).symlink_to(ROOT / name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run_here(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs a script or module as `python` would, in this process; torchrun's with one process is the same."""
    program, *rest = words
    rest = {"torchrun": torchrun_target, "llama": tool_of}.get(program, list)(rest)
    target, arguments = (rest[1], rest[2:]) if rest[0] == "-m" else (rest[0], rest[1:])
    monkeypatch.setattr(sys, "argv", [target, *arguments])
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    execute = runpy.run_module if rest[0] == "-m" else runpy.run_path
    with pytest.raises(SystemExit) as ended:
        execute(target, run_name="__main__")
    assert not ended.value.code, ended.value.code


def is_run_here(block: Block, words: list[str]) -> bool:
    """Whether one process runs it offline, on its own, in a second or so."""
    has_own_test = words[:2] == ["llama", "chat"] or "tiny-llama-mp2/" in words or "benchmarks/bench.py" in words
    return block.needs is None and not has_own_test


RUN_HERE = [words for block, words in COMMANDS if is_run_here(block, words)]


@pytest.mark.parametrize("words", RUN_HERE, ids=map(named, RUN_HERE))
def test_a_command_on_the_toy_runs(words: list[str], clone: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if words[:2] == ["llama", "convert"]:
        pytest.importorskip("safetensors", reason="the conversion needs the extra [convert]")
    run_here(words, monkeypatch)


def test_the_printed_memory_is_what_the_command_prints(
    clone: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    printed = next(block.text for block in BLOCKS if block.text.startswith("70B: "))
    words = next(words for words in RUN_HERE if "70B" in words)
    run_here(words, monkeypatch)
    assert capsys.readouterr().out == printed


def test_a_resharded_toy_runs_on_two_processes(clone: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reshard, run = (words for _, words in COMMANDS if "tiny-llama-mp2/" in words)
    run_here(reshard, monkeypatch)
    assert run[0] == "torchrun"
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--master_port", str(free_port())]
    ended = subprocess.run(
        [*torchrun, *run[1:]], capture_output=True, text=True, env=clean_environment(), timeout=120, check=False
    )
    assert ended.returncode == 0, ended.stderr
    assert "User: How do I make mayonnaise?" in ended.stdout


@pytest.fixture(scope="module")
def toy() -> Llama:
    return Llama.build(*(ROOT / name for name in TINY_LLAMA), 512, 8, device="cpu", dtype="float32")


def text_after(command: str) -> str:
    """The output that README.md shows for a command."""
    blocks = blocks_of(README)
    at = next(i for i, block in enumerate(blocks) if command in block.text)
    assert blocks[at + 1].language == "text"
    return blocks[at + 1].text


def test_the_first_answer_shown_is_the_toys(toy: Llama) -> None:
    shown = text_after("example_chat_completion.py")
    dialog = example_chat_completion.DIALOGS[0]
    answer = toy.chat_completion([dialog], temperature=0)[0]["generation"]["content"]
    assert shown.startswith(f"User: {dialog[0]['content']}\n\n> Assistant: {answer.strip()}\n\n====")


def test_the_chat_command_answers(clone: Path) -> None:
    assert "`llama chat`" in README.read_text(encoding="utf-8")
    question = "What is the MP value of 13B?\n"
    ended = run_python(*tool_of(["chat"]), input=question, env=clean_environment(), cwd=clone)
    assert ended.returncode == 0, ended.stderr
    assert "Llama: " in ended.stdout


def rows_of(page: Path) -> list[list[str]]:
    """The cells of every row of the page's tables."""
    lines = page.read_text(encoding="utf-8").splitlines()
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("| ")]


def test_the_two_commands_stand_by_themselves() -> None:
    """Word for word, each alone in its block: that of a first run, and that of the tests."""
    blocks = [block.text for block in blocks_of(README)]
    for command in (
        "pip install -c constraints.txt -e . && torchrun --nproc_per_node 1 example_chat_completion.py\n",
        'pip install -c constraints.txt -e ".[test]" && pytest\n',
    ):
        assert blocks.count(command) == 1


def test_the_released_sizes_are_those_that_are_computed() -> None:
    for name in ("7B", "13B", "70B"):
        mp = RELEASES[name].model_parallel_size
        plan = MemoryPlan(RELEASES[name].args, mp, DTYPES["float16"])
        assert [f"{name}, {name}-chat", str(mp), f"{mp * plan.weights / GIB:.1f} GiB"] in rows_of(README)


def test_every_difference_links_to_a_test_that_is_there() -> None:
    page = ROOT / "docs" / "differences.md"
    rows = [row[-1] for row in rows_of(page) if row[-1] not in ("here", "---")]
    assert len(rows) > 30
    for row in rows:
        link = re.search(r"\[test\]\((\S+?\.py)#(test_\w+)\)\)$", row)
        assert link is not None, row
        assert f"def {link[2]}(" in (page.parent / link[1]).read_text(encoding="utf-8"), f"{link[0]} is not there"


def anchors(page: Path) -> set[str]:
    """As GitHub makes them of headings."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", [*PAGES, ROOT / "docs" / "inspecting.md"], ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    links = re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8"))
    for link in links:
        if not link.startswith("https://"):
            path, _, anchor = link.partition("#")
            target = page.parent / path if path else page
            assert target.exists(), link
            assert not anchor or target.suffix == ".py" or anchor in anchors(target), link
