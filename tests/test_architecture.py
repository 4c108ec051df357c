"""docs/architecture.md: the floors are those of the imports, and what it names is where it says."""

from __future__ import annotations

import ast
import functools
import re
from pathlib import Path

import pytest

from tests.conftest import ROOT

LIBRARY = ROOT / "llama"
PAGE = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
FLOOR = re.compile(r"^\| (\d+) \| (.*) \|$", re.MULTILINE)
# What `from llama import X` is an import of.
EXPORTED = {
    "Dialog": "chat.py",
    "LLaMA": "generation.py",
    "Llama": "generation.py",
    "Message": "chat.py",
    "ModelArgs": "model.py",
    "Tokenizer": "tokenizer.py",
    "Transformer": "model.py",
}


def unit(path: Path) -> str:
    """What a file is in the table: itself, or its folder."""
    relative = path.relative_to(LIBRARY)
    return relative.name if len(relative.parts) == 1 else f"{relative.parts[0]}/"


UNITS = {unit(path) for path in LIBRARY.rglob("*.py")} - {"__init__.py"}


def floors() -> dict[str, int]:
    return {name: int(floor) for floor, names in FLOOR.findall(PAGE) for name in re.findall(r"`([^`]+)`", names)}


def imported_units(path: Path) -> set[str]:
    """The table's units that a file imports, those within functions included."""
    modules = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0 and node.module
            modules |= {f"{node.module}.{alias.name}" for alias in node.names}
    found = set()
    for first, *rest in (module.split(".") for module in modules):
        if first == "llama" and rest:
            found.add(EXPORTED.get(rest[0]) or next(name for name in (f"{rest[0]}.py", f"{rest[0]}/") if name in UNITS))
    return found


def test_every_file_has_a_floor() -> None:
    assert set(floors()) == UNITS
    assert len(floors()) == sum(len(re.findall(r"`([^`]+)`", names)) for _, names in FLOOR.findall(PAGE))


@pytest.mark.parametrize("name", sorted(UNITS))
def test_a_file_imports_from_lower_floors_alone(name: str) -> None:
    files = (LIBRARY / name).rglob("*.py") if name.endswith("/") else [LIBRARY / name]
    imported = set().union(*map(imported_units, files)) - {name}
    assert {other for other in imported if floors()[other] >= floors()[name]} == set()


def within(path: Path) -> set[Path]:
    """The files of the same folder that a file imports."""
    text = path.read_text(encoding="utf-8")
    package = "llama." + path.parent.name
    names = re.findall(rf"^\s*from {package}\.(\w+) import", text, re.MULTILINE)
    names += [
        name
        for line in re.findall(rf"^\s*from {package} import (.*)$", text, re.MULTILINE)
        for name in line.split(", ")
    ]
    return {path.parent / f"{name.split(' as ')[0]}.py" for name in names} - {path}


@pytest.mark.parametrize("folder", sorted(name for name in UNITS if name.endswith("/")))
def test_the_files_of_a_folder_import_each_other_without_circles(folder: str) -> None:
    imports = {path: {p for p in within(path) if p.is_file()} for path in (LIBRARY / folder).glob("*.py")}
    while free := [path for path, others in imports.items() if not others & imports.keys()]:
        imports = {path: others for path, others in imports.items() if path not in free}
    assert not imports


def test_the_library_imports_no_benchmark_no_test_and_no_recipe() -> None:
    for path in LIBRARY.rglob("*.py"):
        assert not re.search(r"^\s*(from|import) (benchmarks|tests|recipe)\b", path.read_text(), re.MULTILINE), path


@functools.cache
def definitions(path: Path) -> set[str]:
    """The qualified names of a file's functions, classes and constants."""

    def names(node: ast.AST, prefix: str) -> set[str]:
        found = set()
        for child in ast.iter_child_nodes(node):
            if isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
                found |= {prefix + child.name} | names(child, f"{prefix}{child.name}.")
            elif isinstance(child, ast.Assign):
                found |= {prefix + target.id for target in child.targets if isinstance(target, ast.Name)}
        return found

    return names(ast.parse(path.read_text(encoding="utf-8")), "")


def test_what_the_page_names_is_there() -> None:
    """The tables name it as `file.name`, without the suffix .py."""
    found = {pair for pair in re.findall(r"`([a-z]\w*)\.([A-Za-z_][\w.]*)`", PAGE) if pair[1] not in ("py", "json")}
    assert len(found) >= 30
    for file, name in found:
        assert any(name in definitions(path) for path in LIBRARY.rglob(f"{file}.py")), f"{file}.{name}"


def test_the_drawing_names_what_is_in_its_files() -> None:
    drawing = PAGE.split("```text\n")[1].split("```")[0]
    assert all((LIBRARY / name).is_file() for name in re.findall(r"[\w/]+\.py", drawing))
    everything = {name for path in LIBRARY.rglob("*.py") for name in definitions(path)}
    calls = re.findall(r"\b[A-Z]\w+\.\w+", drawing)
    assert len(calls) >= 6
    assert set(calls) <= everything
