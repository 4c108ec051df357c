"""docs/deploying.md and its files: their commands are understood, and what the Dockerfile copies exists."""

from __future__ import annotations

import json
import re
import shlex
from dataclasses import replace
from pathlib import Path

import torch

from llama.checkpoint.memory import GIB, MemoryPlan
from llama.checkpoint.releases import RELEASES
from tests.conftest import ROOT
from tests.test_readme import check_command, check_pip, rows_of


def text_of(name: str) -> str:
    return (ROOT / "examples" / "deploying" / name).read_text(encoding="utf-8").replace("\\\n", " ")


def test_the_unit_starts_a_server() -> None:
    (line,) = re.findall(r"^ExecStart=(.*)$", text_of("llama.service"), flags=re.MULTILINE)
    program, *rest = shlex.split(line)
    check_command([Path(program).name, *rest])


def test_the_image_installs_and_starts_a_server() -> None:
    steps = [tuple(line.split(" ", 1)) for line in text_of("Dockerfile").splitlines()]
    copied = [name for step, rest in steps if step == "COPY" for name in rest.split()[:-1]]
    assert all((ROOT / name).exists() for name in copied)
    (pip,) = [shlex.split(rest) for step, rest in steps if step == "RUN" and rest.startswith("pip")]
    check_pip([word for word in pip[1:] if word != "--no-cache-dir"])
    assert set(re.findall(r"[\w-]+\.txt", " ".join(pip))) <= set(copied)
    (command,) = [json.loads(rest) for step, rest in steps if step == "ENTRYPOINT"]
    check_command(command)


def test_the_table_of_cards_is_what_llama_memory_says() -> None:
    """With 1 GiB of each card left to CUDA."""
    rows = rows_of(ROOT / "docs" / "deploying.md")
    head = next(row for row in rows if row[0] == "model")
    cards = [int(title.removesuffix(" GiB")) for title in head[2:]]
    found = [row for row in rows if row[0] in RELEASES]
    for model, ranks, *batches in found:
        args = replace(RELEASES[model].args, max_seq_len=4096)
        plan = MemoryPlan(args, int(ranks), torch.float16)
        for card, batch in zip(cards, batches, strict=True):
            n = plan.largest("max_batch_size", 2**12, (card - 1) * GIB)
            assert batch == (str(n) if n else "-"), (model, card)
    assert len(found) >= 8


def test_the_pipeline_of_the_repository_runs_ci() -> None:
    workflow = (ROOT / ".github" / "workflows" / "ci.yml").read_text(encoding="utf-8")
    assert "run: .ci/run" in workflow
