"""A machine and a launcher that tests pretend to have."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist
from fairscale.nn.model_parallel import initialize


@pytest.fixture
def nothing_initialized(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Makes this process look as if no group had been made; its arguments are the environment's variables."""
    monkeypatch.setattr(dist, "is_initialized", lambda: False)
    monkeypatch.setattr(initialize, "model_parallel_is_initialized", lambda: False)
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)

    def launch(**variables: str) -> None:
        for name, value in variables.items():
            monkeypatch.setenv(name, value)

    return launch


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, bool], None]:
    """Makes torch see that many CUDA devices, and MPS or not."""

    def machine(n_cuda: int, mps: bool) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: n_cuda > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: n_cuda)
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)

    return machine
