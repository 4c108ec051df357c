"""Fixtures: a checkpoint so small that thousands of calls take seconds."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.support import oracle


@pytest.fixture(scope="session")
def small_checkpoint(write_checkpoint: Callable[..., Path], params: dict[str, Any]) -> Path:
    small = params | {"dim": 16, "n_layers": 1, "n_heads": 2, "n_kv_heads": 1}
    return write_checkpoint(small, oracle.random_state(small, seed=2))
