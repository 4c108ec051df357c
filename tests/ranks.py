"""Runs a function in several processes of one gloo group on this machine, as torchrun would start them."""

from __future__ import annotations

import os
import socket
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing as mp


def run_ranks(world_size: int, work: Callable[..., Any], *args: Any) -> list[Any]:
    """Calls `work(rank, *args)`, a module-level function, in each process; returns their results in rank order.

    An exception in any of them ends all and is raised here. Starting takes some seconds: do much in one call.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        mp.set_forkserver_preload(["llama", work.__module__])  # imported once, not by each rank
        ranks = (world_size, port, folder, work, args)
        mp.start_processes(_start, args=ranks, nprocs=world_size, start_method="forkserver")
        return [torch.load(Path(folder) / str(rank), weights_only=False) for rank in range(world_size)]


def _start(rank: int, world_size: int, port: int, folder: str, work: Callable[..., Any], args: tuple[Any, ...]) -> None:
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(world_size),
        LOCAL_WORLD_SIZE=str(world_size),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
    )
    torch.set_num_threads(1)
    torch.save(work(rank, *args), Path(folder) / str(rank))
