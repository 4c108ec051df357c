"""Fixtures: one checkpoint file with changes; and what of a file this process has mapped."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from llama import ModelArgs

MAPS = Path("/proc/self/maps")


@pytest.fixture(scope="module")
def args(params: dict[str, Any]) -> ModelArgs:
    return ModelArgs(**params)


@pytest.fixture
def one_file(tmp_path: Path, params: dict[str, Any], state: dict[str, Tensor]) -> Callable[..., Path]:
    """Writes the random checkpoint's only file with some tensors changed; None leaves one out."""

    def write(changes: dict[str, Any] | None = None, **options: Any) -> Path:
        path = tmp_path / "consolidated.00.pth"
        (tmp_path / "params.json").write_text(json.dumps(params))
        changed = state | (changes or {})
        torch.save({name: value for name, value in changed.items() if value is not None}, path, **options)
        return path

    return write


def mapped_file(address: int) -> str:
    """The file behind an address of this process."""
    for line in MAPS.read_text().splitlines():
        start, end = (int(bound, 16) for bound in line.split()[0].split("-"))
        if start <= address < end:
            return line.split(maxsplit=5)[5] if len(line.split(maxsplit=5)) == 6 else ""
    raise AssertionError("no such address")
