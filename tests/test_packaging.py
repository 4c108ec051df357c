"""What an installation gets: its version, requirements, files, commands and toy checkpoint.

`.ci/run` builds a wheel and runs it. These tests say, without building one, which line of pyproject.toml is wrong.
"""

from __future__ import annotations

import functools
import inspect
import re
import runpy
import subprocess
import sys
from collections.abc import Callable
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import llama
from llama.tools import commandline, scripts, toy
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


def test_the_version_is_that_of_the_newest_change_and_of_the_citation() -> None:
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
        if requirement.name == "llama":
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


def test_every_tool_has_a_console_script() -> None:
    expected = {f"llama-{name}": f"llama.tools.scripts:{name}" for name in TOOLS}
    assert pyproject()["project"]["scripts"] == expected
    assert len(TOOLS) >= 9


def described(commands: Callable[..., Any] | dict[str, Callable[..., Any]], **options: Any) -> tuple[Any, ...]:
    """What a command is, equal for two imports of its module."""
    functions = commands if isinstance(commands, dict) else {"": commands}
    return {name: (f.__qualname__, inspect.signature(f), f.__doc__) for name, f in functions.items()}, options


@pytest.mark.filterwarnings("ignore:.*found in sys.modules:RuntimeWarning")
@pytest.mark.parametrize("name", TOOLS)
def test_a_console_script_does_what_python_m_does(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    ran: list[tuple[Any, ...]] = []

    def record(commands: Any, **options: Any) -> None:
        ran.append(described(commands, **options))

    monkeypatch.setattr(commandline, "run", record)
    monkeypatch.setattr(scripts, "run", record)
    runpy.run_module(f"llama.tools.{name}", run_name="__main__")
    getattr(scripts, name)()
    assert len(ran) == 2
    assert ran[0] == ran[1]


def test_the_scripts_import_no_tool_before_one_starts() -> None:
    """Others may need extras that are not installed."""
    shown = "import sys, llama.tools.scripts; print(*(n for n in sys.modules if n.startswith('llama.tools.')))"
    done = subprocess.run([sys.executable, "-c", shown], cwd=ROOT, capture_output=True, text=True, check=True)
    assert not {f"llama.tools.{name}" for name in TOOLS} & set(done.stdout.split())


def test_an_installed_toy_is_found_before_that_of_a_repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package, repository = tmp_path / "llama", tmp_path
    monkeypatch.setattr(toy, "_PACKAGE", package)
    monkeypatch.setattr(toy, "_REPOSITORY", repository)
    with pytest.raises(FileNotFoundError, match=rf"^--ckpt_dir must be given: .* neither in {package} nor in"):
        toy.toy_checkpoint()
    for place in (repository, package):
        (place / "tiny-llama").mkdir(parents=True)
        (place / "tiny-llama" / "params.json").touch()
        assert toy.toy_checkpoint() == str(place / "tiny-llama")
