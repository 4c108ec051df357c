"""Every Python snippet of two pages runs, in order and in one namespace, and prints what the page shows.

The API reference is what the docstrings say.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
import re
import runpy
import shutil
import subprocess
import sys
from copy import deepcopy
from itertools import zip_longest
from pathlib import Path
from typing import Any

import pytest

import llama
from tests.conftest import ROOT
from tests.test_readme import Block, blocks_of

PAGE = ROOT / "docs" / "inspecting.md"
PAGES = {PAGE: 10, ROOT / "docs" / "sampling.md": 3}  # with the least number of snippets
PACKAGES = ("peft", "captum", "nnsight")  # that a snippet needs, by a comment in front of it


def snippets(page: Path) -> list[tuple[Block, str]]:
    """The Python snippets of a page, each with the output that is shown after it."""
    blocks = blocks_of(page)
    following = [block.text if block.language == "text" else "" for block in blocks[1:]]
    return [pair for pair in zip_longest(blocks, following, fillvalue="") if pair[0].language == "python"]


def run(block: Block, output: str, names: dict[str, Any], source: Path | None = None) -> None:
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        code = "\n" * (block.line - 1) + block.text  # errors name the page's lines
        exec(compile(code, str(source or block.page), "exec"), names)
    assert out.getvalue() == output, f"the output of the snippet at {block.page.name}:{block.line} is another one"


def run_in_order(page: Path) -> dict[str, Any]:
    """Run the snippets of a page that need no other package; return their names."""
    names: dict[str, Any] = {"__name__": "inspecting"}
    for block, output in snippets(page):
        if block.needs is None:
            run(block, output, names)
    return names


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_snippets_run_in_order_and_print_what_is_shown(page: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    run_in_order(page)
    found = snippets(page)
    assert len(found) >= PAGES[page]
    assert {block.needs for block, _ in found} <= {None, *PACKAGES}


def test_the_notebook_has_the_page_and_its_snippets() -> None:
    made = runpy.run_path(str(ROOT / "docs" / "make_notebook.py"))["as_json"]()
    path = ROOT / "examples" / "inspecting.ipynb"
    assert path.read_text(encoding="utf-8") == made, "inspecting.md has changed: run python docs/make_notebook.py"
    codes = ["".join(cell["source"]) + "\n" for cell in json.loads(made)["cells"] if cell["cell_type"] == "code"]
    assert codes[1:] == [block.text for block, _ in snippets(PAGE) if block.needs is None]


def test_the_notebook_runs_in_its_folder_and_prints_what_it_shows() -> None:
    nbformat = pytest.importorskip("nbformat", reason="running the notebook needs nbformat, nbclient and ipykernel")
    nbclient = pytest.importorskip("nbclient", reason="running the notebook needs nbformat, nbclient and ipykernel")
    pytest.importorskip("ipykernel", reason="running the notebook needs nbformat, nbclient and ipykernel")
    written = nbformat.read(ROOT / "examples" / "inspecting.ipynb", as_version=4)
    run = nbclient.NotebookClient(deepcopy(written), resources={"metadata": {"path": ROOT / "examples"}}).execute()
    for before, after in zip(written.cells, run.cells, strict=True):
        if before.cell_type == "code":
            shown, printed = ("".join(output.text for output in cell.outputs) for cell in (before, after))
            assert printed == shown, before.source


@pytest.mark.parametrize("package", PACKAGES)
@pytest.mark.filterwarnings("ignore")  # of the packages
def test_a_snippet_of_another_package_runs_where_it_is_installed(
    package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if importlib.util.find_spec(package) is None:  # not imported before the other snippets: nnsight patches torch
        pytest.skip(f"needs {package}: pip install {package}")
    monkeypatch.chdir(ROOT)
    names = run_in_order(PAGE)
    found = [(block, output) for block, output in snippets(PAGE) if block.needs == package]
    assert found
    for block, output in found:
        source = tmp_path / "snippet.py"  # nnsight reads it
        source.write_text("\n" * (block.line - 1) + block.text, encoding="utf-8")
        run(block, output, names, source)


@pytest.mark.skipif(shutil.which("pyright") is None, reason="needs pyright: pip install pyright")
def test_pyright_finds_no_wrong_type_in_the_snippets(tmp_path: Path) -> None:
    pages = [ROOT / "README.md", *sorted(path for path in (ROOT / "docs").glob("*.md") if path.name != "api.md")]
    for page in pages:
        found = [block for block in blocks_of(page) if block.language == "python"]
        together = "\n".join(block.text for block in found if block.needs is None)
        others = [block.text for block in found if block.needs == "a running server"]
        for i, code in enumerate([together, *others]):
            (tmp_path / f"{page.stem}_{i}.py").write_text(code, encoding="utf-8")
    (tmp_path / "llama").symlink_to(ROOT / "llama")
    command = ["pyright", "--pythonpath", sys.executable, *map(str, tmp_path.glob("*.py"))]
    checked = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert checked.returncode == 0, checked.stdout


def test_the_api_reference_is_what_the_docstrings_say() -> None:
    made = runpy.run_path(str(ROOT / "docs" / "make_api.py"))["page"]()
    written = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
    assert made == written, "a docstring or signature has changed: run python docs/make_api.py"
    public = {*llama.__all__} - {"Dialog"}  # an alias
    methods = {f"Llama.{name}" for name in vars(llama.Llama) if callable(getattr(llama.Llama, name)) and name[0] != "_"}
    assert public | methods <= set(re.findall(r"^#+ `([\w.]+)`$", written, flags=re.MULTILINE))
