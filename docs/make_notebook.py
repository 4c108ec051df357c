"""Writes examples/inspecting.ipynb, the notebook of docs/inspecting.md: `python docs/make_notebook.py`."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "inspecting.md"
NOTEBOOK = ROOT / "examples" / "inspecting.ipynb"
# Snippets that need another package stay text.
BLOCK = re.compile(r"(?<!-->\n)^```python\n(.*?)^```\n(?:\n```text\n(.*?)^```\n)?", flags=re.MULTILINE | re.DOTALL)
START = """\
import os
from pathlib import Path

if not Path("tiny-llama").exists():
    os.chdir("..")  # from examples/ to the root of the repository
"""


def notebook() -> dict[str, Any]:
    """The page's text and snippets as cells, with the outputs that it shows."""
    page = PAGE.read_text(encoding="utf-8")
    page = re.sub(r"^(- \[.*?\]\(#.*?\)\n)+\n", "", page, flags=re.MULTILINE)  # the list of contents
    page = re.sub(r"\]\((?=[\w-]+\.md)", "](../docs/", page)
    cells = [code(START, "")]
    end = 0
    for block in BLOCK.finditer(page):
        cells += [text(page[end : block.start()]), code(block[1], block[2] or "")]
        end = block.end()
    cells.append(text(page[end:]))
    cells = [{"id": f"cell-{i}"} | cell for i, cell in enumerate(cell for cell in cells if cell["source"])]
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    return {"cells": cells, "metadata": {"kernelspec": kernel}, "nbformat": 4, "nbformat_minor": 5}


def text(source: str) -> dict[str, Any]:
    return {"cell_type": "markdown", "metadata": {}, "source": source.strip().splitlines(keepends=True)}


def code(source: str, printed: str) -> dict[str, Any]:
    output = {"output_type": "stream", "name": "stdout", "text": printed.splitlines(keepends=True)}
    lines = source.strip().splitlines(keepends=True)
    return {
        "cell_type": "code",
        "metadata": {},
        "execution_count": None,
        "source": lines,
        "outputs": [output] * bool(printed),
    }


def as_json() -> str:
    return json.dumps(notebook(), indent=1, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    NOTEBOOK.write_text(as_json(), encoding="utf-8")
