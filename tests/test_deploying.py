"""docs/deploying.md: the commands of its unit and its Dockerfile are understood, and the files that it copies exist."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

from tests.conftest import ROOT
from tests.test_readme import blocks_of, check_command, check_pip

TEXTS = {block.language: block.text.replace("\\\n", " ") for block in blocks_of(ROOT / "docs" / "deploying.md")}


def test_the_unit_starts_a_server() -> None:
    (line,) = re.findall(r"^ExecStart=(.*)$", TEXTS["ini"], flags=re.MULTILINE)
    program, *rest = shlex.split(line)
    check_command([Path(program).name, *rest])


def test_the_image_installs_and_starts_a_server() -> None:
    steps = [tuple(line.split(" ", 1)) for line in TEXTS["dockerfile"].splitlines()]
    copied = [name for step, rest in steps if step == "COPY" for name in rest.split()[:-1]]
    assert all((ROOT / name).exists() for name in copied)
    (pip,) = [shlex.split(rest) for step, rest in steps if step == "RUN" and rest.startswith("pip")]
    check_pip([word for word in pip[1:] if word != "--no-cache-dir"])
    assert set(re.findall(r"[\w-]+\.txt", " ".join(pip))) <= set(copied)
    (command,) = [json.loads(rest) for step, rest in steps if step == "ENTRYPOINT"]
    check_command(command)
