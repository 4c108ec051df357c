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
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any

import pytest

import llama

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "inspecting.md"
PAGES = {PAGE: 10, ROOT / "docs" / "sampling.md": 3}  # with the least number of snippets
PACKAGES = ("transformers", "peft", "captum", "nnsight")  # that a snippet needs, by a comment in front of it
BLOCK = re.compile(r"(?:^<!-- needs: ([\w ]+) -->\n)?^```(\w+)\n(.*?)^```$", flags=re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Snippet:
    """A Python snippet of a page, its first line's number there, and the output that is shown after it."""

    line: int
    code: str
    output: str
    needs: str | None

    def run(self, page: Path, names: dict[str, Any]) -> None:
        out = io.StringIO()
        with contextlib.redirect_stdout(out):
            exec(compile("\n" * (self.line - 1) + self.code, str(page), "exec"), names)  # errors name the page's lines
        assert out.getvalue() == self.output, f"the output of the snippet at {page.name}:{self.line} is another one"


def snippets(page: str) -> list[Snippet]:
    blocks = list(BLOCK.finditer(page))
    found = []
    for block, following in zip_longest(blocks, blocks[1:]):
        needs, language, code = block.groups()
        if language == "python":
            output = following[3] if following and following[2] == "text" else ""
            found.append(Snippet(page[: block.start(3)].count("\n") + 1, code, output, needs))
    return found


def run_in_order(page: Path) -> dict[str, Any]:
    """Run the snippets of a page that need no other package; return their names."""
    names: dict[str, Any] = {"__name__": "inspecting"}
    for snippet in snippets(page.read_text(encoding="utf-8")):
        if snippet.needs is None:
            snippet.run(page, names)
    return names


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_snippets_run_in_order_and_print_what_is_shown(page: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    run_in_order(page)
    found = snippets(page.read_text(encoding="utf-8"))
    assert len(found) >= PAGES[page]
    assert {snippet.needs for snippet in found} <= {None, *PACKAGES}


def test_the_notebook_has_the_page_and_its_snippets() -> None:
    made = runpy.run_path(str(ROOT / "docs" / "make_notebook.py"))["as_json"]()
    path = ROOT / "examples" / "inspecting.ipynb"
    assert path.read_text(encoding="utf-8") == made, "inspecting.md has changed: run python docs/make_notebook.py"
    codes = ["".join(cell["source"]) + "\n" for cell in json.loads(made)["cells"] if cell["cell_type"] == "code"]
    assert codes[1:] == [found.code for found in snippets(PAGE.read_text(encoding="utf-8")) if found.needs is None]


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
    found = [snippet for snippet in snippets(PAGE.read_text(encoding="utf-8")) if snippet.needs == package]
    assert found
    for snippet in found:
        source = tmp_path / "snippet.py"  # nnsight reads it
        source.write_text("\n" * (snippet.line - 1) + snippet.code, encoding="utf-8")
        snippet.run(source, names)


@pytest.mark.skipif(shutil.which("pyright") is None, reason="needs pyright: pip install pyright")
def test_pyright_finds_no_wrong_type_in_the_snippets(tmp_path: Path) -> None:
    pages = [ROOT / "README.md", *sorted(path for path in (ROOT / "docs").glob("*.md") if path.name != "api.md")]
    for page in pages:
        found = snippets(page.read_text(encoding="utf-8"))
        together = "\n".join(snippet.code for snippet in found if snippet.needs is None)
        others = [snippet.code for snippet in found if snippet.needs == "a running server"]
        for i, code in enumerate([together, *others]):
            (tmp_path / f"{page.stem}_{i}.py").write_text(code, encoding="utf-8")
    (tmp_path / "llama").symlink_to(ROOT / "llama")
    command = ["pyright", "--pythonpath", sys.executable, *map(str, tmp_path.glob("*.py"))]
    checked = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert checked.returncode == 0, checked.stdout


def test_output_after_a_snippet_belongs_to_it() -> None:
    page = "a\n```python\nx\n```\n\n```text\n1\n```\n<!-- needs: z -->\n```python\ny\n```\n```sh\nz\n```\n"
    assert snippets(page) == [Snippet(3, "x\n", "1\n", None), Snippet(11, "y\n", "", "z")]


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_links_within_the_page_lead_somewhere(path: Path) -> None:
    page = path.read_text(encoding="utf-8")
    headings = {
        re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in re.findall(r"^#+ (.*)$", page, re.M)
    }
    targets = re.findall(r"\]\(([^)]+)\)", page)
    assert targets
    for target in targets:
        assert (
            target[1:] in headings
            if target.startswith("#")
            else target.startswith("https://") or (path.parent / target.partition("#")[0]).exists()
        ), target


def test_the_api_reference_is_what_the_docstrings_say() -> None:
    made = runpy.run_path(str(ROOT / "docs" / "make_api.py"))["page"]()
    written = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
    assert made == written, "a docstring or signature has changed: run python docs/make_api.py"
    public = {*llama.__all__} - {"Dialog"}  # an alias
    methods = {f"Llama.{name}" for name in vars(llama.Llama) if callable(getattr(llama.Llama, name)) and name[0] != "_"}
    assert public | methods <= set(re.findall(r"^#+ `([\w.]+)`$", written, flags=re.MULTILINE))
