"""What an installation gets: its version, requirements, files, commands and toy checkpoint.

`.ci/run` builds a wheel and runs it. These tests say, without building one, which line of pyproject.toml is wrong.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import re
import runpy
import subprocess
import sys
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import llama
from llama.tools import cli, commandline
from tests.conftest import ROOT

try:
    import tomllib
except ImportError:  # before Python 3.11; pytest depends on tomli there
    import tomli as tomllib

LIBRARY = {"torch", "fairscale", "sentencepiece", "fire"}
TOOLS = sorted(p.stem for p in (ROOT / "llama" / "tools").glob("*.py") if '__name__ == "__main__"' in p.read_text())


@functools.cache
def pyproject() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def requirements() -> list[Requirement]:
    """The library's own, as an installer reads them."""
    return [Requirement(line) for line in (ROOT / "requirements.txt").read_text().splitlines()]


def pins() -> list[Requirement]:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    return [Requirement(line) for line in lines if not line.startswith("#")]


def test_the_version_is_the_newest_changes_and_the_citations() -> None:
    newest = re.search(r"^## \[?(\d+\.\d+\.\d+)", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)
    cited = re.search(r"^version: (.*)$", (ROOT / "CITATION.cff").read_text(encoding="utf-8"), re.MULTILINE)
    assert newest and cited
    assert newest[1] == cited[1] == llama.__version__
    assert pyproject()["tool"]["setuptools"]["dynamic"]["version"] == {"attr": "llama.__version__"}


def test_the_library_needs_four_packages() -> None:
    assert {requirement.name for requirement in requirements()} == LIBRARY
    assert pyproject()["tool"]["setuptools"]["dynamic"]["dependencies"] == {"file": ["requirements.txt"]}


@pytest.mark.parametrize("python", ["3.10", "3.11", "3.12", "3.13"])
def test_whatever_an_extra_or_the_library_needs_is_pinned_within_its_range(python: str) -> None:
    """Once per version of Python."""
    environment = {"python_version": python, "python_full_version": f"{python}.0"}
    pinned = [pin for pin in pins() if pin.marker is None or pin.marker.evaluate(environment)]
    versions = {canonicalize_name(pin.name): str(pin.specifier).removeprefix("==") for pin in pinned}
    assert len(versions) == len(pinned), "a package is pinned twice"
    extras = pyproject()["project"]["optional-dependencies"]
    needed = [*requirements(), *(Requirement(text) for texts in extras.values() for text in texts)]
    for requirement in needed:
        if requirement.name == pyproject()["project"]["name"]:
            assert requirement.extras <= set(extras)
        elif python != "3.10" or requirement.name != "matplotlib":  # the pinned one needs Python 3.11
            assert requirement.specifier.contains(versions[canonicalize_name(requirement.name)]), requirement


def test_every_file_of_the_package_and_of_the_toy_is_installed() -> None:
    """The oracle is git's list of files; the toy's file of requests is for the documentation alone."""
    listed = subprocess.run(["git", "ls-files", "llama", "tiny-llama"], cwd=ROOT, capture_output=True, text=True)
    files = {Path(line) for line in listed.stdout.splitlines()} - {Path("tiny-llama/requests.jsonl")}
    if not files:
        pytest.skip("needs a clone, with git, to know which files belong to the package")
    setuptools = pyproject()["tool"]["setuptools"]
    folders = {
        name: Path(setuptools["package-dir"].get(name, name.replace(".", "/"))) for name in setuptools["packages"]
    }
    for file in sorted(path for path in files if (ROOT / path).exists()):
        if file.suffix == ".py":
            assert file.parent in folders.values(), f"{file}: its folder is not in packages"
            continue
        patterns = [folders[name] / data for name, names in setuptools["package-data"].items() for data in names]
        assert any(fnmatch(str(file), str(pattern)) for pattern in patterns), f"{file} is not in package-data"


def llama_command(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> Any:
    """The status with which `llama ARGUMENTS` ends, or None."""
    monkeypatch.setattr(sys, "argv", ["llama", *arguments])
    try:
        cli.main()
    except SystemExit as ended:
        return ended.code
    return None


def test_one_console_script_has_every_tool() -> None:
    assert pyproject()["project"]["scripts"] == {"llama": "llama.tools.cli:main"}
    assert sorted(cli.COMMANDS) == TOOLS
    assert len(TOOLS) >= 9


@pytest.mark.filterwarnings("ignore:.*found in sys.modules:RuntimeWarning")
@pytest.mark.parametrize("name", TOOLS)
def test_a_command_does_what_python_m_does(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Under its own name, which its help shows."""
    ran: list[tuple[Any, ...]] = []

    def record(commands: Any, **options: Any) -> None:
        functions = commands if isinstance(commands, dict) else {"": commands}
        described = {key: (f.__qualname__, inspect.signature(f), f.__doc__) for key, f in functions.items()}
        ran.append((described, options))

    monkeypatch.setattr(commandline, "run", record)
    tool = importlib.import_module(f"llama.tools.{name}")
    if hasattr(tool, "run"):
        monkeypatch.setattr(tool, "run", record)
    runpy.run_module(f"llama.tools.{name}", run_name="__main__")
    llama_command(monkeypatch, name, "--flag")
    assert len(ran) == 2
    assert ran[0] == ran[1]
    assert ran[0][1]["name"] == f"llama {name}"
    assert sys.argv[1:] == ["--flag"]


def test_llama_imports_the_named_tool_alone() -> None:
    """Others may need extras that are not installed."""
    shown = (
        "import sys; from llama.tools import cli\n"
        "sys.argv = ['llama', 'verify', '--help']\n"
        "try: cli.main()\n"
        "except SystemExit: print(*(n for n in sys.modules if n.startswith('llama.tools.')))"
    )
    done = subprocess.run([sys.executable, "-c", shown], cwd=ROOT, capture_output=True, text=True, check=True)
    assert {f"llama.tools.{name}" for name in TOOLS} & set(done.stdout.split()) <= {"llama.tools.verify"}


def test_llama_lists_its_commands_and_tells_its_version(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for arguments in ([], ["--help"], ["-h"]):
        assert llama_command(monkeypatch, *arguments) is None
        shown = capsys.readouterr().out
        assert [line.split()[0] for line in shown.splitlines() if line.startswith("  ")] == list(cli.COMMANDS)
    assert llama_command(monkeypatch, "--version") is None
    assert capsys.readouterr().out == f"llama {llama.__version__}\n"


def test_an_unknown_command_is_one_line_with_the_nearest(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, hint in {
        "verfy": "did you mean verify?",
        "Chat": "did you mean chat?",
        "zzz": "llama --help lists",
    }.items():
        assert llama_command(monkeypatch, name) == 2
        err = capsys.readouterr().err
        assert err.startswith(f"error: there is no command '{name}'; {hint}") and err.count("\n") == 1


def test_an_installed_toy_is_found_before_a_repositorys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package, repository = tmp_path / "llama", tmp_path
    monkeypatch.setattr(commandline, "_TOY_PLACES", (package, repository))
    with pytest.raises(FileNotFoundError, match=rf"^--ckpt_dir must be given: .* neither in {package} nor in"):
        commandline.toy_checkpoint()
    for place in (repository, package):
        (place / "tiny-llama").mkdir(parents=True)
        (place / "tiny-llama" / "params.json").touch()
        assert commandline.toy_checkpoint() == str(place / "tiny-llama")
