"""Every Python snippet of two pages runs, in order and in one namespace, and prints what the page shows.

The API reference is what the docstrings say.
"""

from __future__ import annotations

import contextlib
import io
import json
import re
import runpy
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest

import llama

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "inspecting.md"
PAGES = {PAGE: 10, ROOT / "docs" / "sampling.md": 3}  # with the least number of snippets
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", flags=re.MULTILINE | re.DOTALL)


def snippets(page: str) -> list[tuple[int, str, str]]:
    """Each Python snippet of a page: its first line's number, its code, and the output that is shown behind it."""
    blocks = [(page[: m.start()].count("\n") + 2, m[1], m[2]) for m in BLOCK.finditer(page)]
    found = []
    for (line, language, code), (_, next_language, output) in zip(blocks, [*blocks[1:], (0, "", "")], strict=True):
        if language == "python":
            found.append((line, code, output if next_language == "text" else ""))
    return found


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_snippets_run_in_order_and_print_what_is_shown(page: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    namespace: dict[str, Any] = {"__name__": "inspecting"}
    found = snippets(page.read_text(encoding="utf-8"))
    for line, code, expected in found:
        out = io.StringIO()
        with contextlib.redirect_stdout(out):
            exec(compile("\n" * (line - 1) + code, str(page), "exec"), namespace)  # errors name the page's lines
        assert out.getvalue() == expected, f"the output of the snippet at {page.name}:{line} is another one"
    assert len(found) >= PAGES[page]


def test_the_notebook_has_the_page_and_its_snippets() -> None:
    made = runpy.run_path(str(ROOT / "docs" / "make_notebook.py"))["as_json"]()
    path = ROOT / "examples" / "inspecting.ipynb"
    assert path.read_text(encoding="utf-8") == made, "inspecting.md has changed: run python docs/make_notebook.py"
    codes = ["".join(cell["source"]) + "\n" for cell in json.loads(made)["cells"] if cell["cell_type"] == "code"]
    assert codes[1:] == [code for _, code, _ in snippets(PAGE.read_text(encoding="utf-8"))]


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


def test_output_behind_a_snippet_belongs_to_it() -> None:
    page = "a\n```python\nx\n```\n\n```text\n1\n```\n```python\ny\n```\n```sh\nz\n```\n"
    assert snippets(page) == [(3, "x\n", "1\n"), (10, "y\n", "")]


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
            else target.startswith("https://") or (path.parent / target).exists()
        ), target


def test_the_api_reference_is_what_the_docstrings_say() -> None:
    made = runpy.run_path(str(ROOT / "docs" / "make_api.py"))["page"]()
    written = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
    assert made == written, "a docstring or signature has changed: run python docs/make_api.py"
    public = {*llama.__all__} - {"Dialog"}  # an alias
    methods = {f"Llama.{name}" for name in vars(llama.Llama) if callable(getattr(llama.Llama, name)) and name[0] != "_"}
    assert public | methods <= set(re.findall(r"^#+ `([\w.]+)`$", written, flags=re.MULTILINE))
