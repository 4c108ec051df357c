"""Runs a function in several processes of one gloo group on this machine, as torchrun would start them."""

from __future__ import annotations

import atexit
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing import connection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from tests.support.processes import free_port, rank_environment

FAULT = "fault"  # what a rank yields right before something goes wrong
STARTUP_S = 120.0  # the most that starting, building and what comes before the fault may take on a busy machine


def run_ranks(world_size: int, work: Callable[..., Any], *args: Any) -> list[Any]:
    """Calls `work(rank, *args)`, a module-level function, in each process; returns their results in rank order.

    An exception in any of them ends all and is raised here. Starting takes some seconds: do much in one call.
    """
    port = free_port()
    with tempfile.TemporaryDirectory() as folder:
        mp.set_forkserver_preload(["llama", "tests.conftest", work.__module__])  # imported once, not by each rank
        ranks = (world_size, port, folder, work, args)
        mp.start_processes(_start, args=ranks, nprocs=world_size, start_method="forkserver")
        return [torch.load(Path(folder) / str(rank), weights_only=False) for rank in range(world_size)]


def _start(rank: int, world_size: int, port: int, folder: str, work: Callable[..., Any], args: tuple[Any, ...]) -> None:
    _set_environment(rank, world_size, port)
    torch.save(work(rank, *args), Path(folder) / str(rank))


def _set_environment(rank: int, world_size: int, port: int) -> None:
    os.environ.update(rank_environment(rank, world_size, port))
    torch.set_num_threads(1)


@dataclass(frozen=True)
class Outcome:
    """How a rank ended.

    Attributes:
        told: what its function yielded until then.
        seconds: from the fault to the last that it told; to its end if it told nothing.
    """

    told: list[Any]
    seconds: float


def run_faulty_ranks(
    world_size: int,
    work: Callable[..., Iterator[Any]],
    *args: Any,
    within_s: float,
    absent: tuple[int, ...] = (),
    agent: bool = False,
) -> list[Outcome]:
    """Iterates over `work(rank, *args)` in each process, in which anything may go wrong, also a rank's death.

    Args:
        work: module-level; yields what the caller shall see of a rank. An exception that leaves it is told too, as
            its type and first line.
        within_s: within which all ranks have to have ended, from the first `FAULT` that one of them yields.
        absent: ranks that are not started.
        agent: whether this process holds the ranks' store, as torchrun does; else rank 0 holds it.
    """
    port = free_port()
    store = dist.TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False) if agent else None
    context = mp.get_context("forkserver")
    context.set_forkserver_preload(["llama", "tests.conftest", work.__module__])
    ranks, processes, pipes = [r for r in range(world_size) if r not in absent], {}, {}
    for rank in ranks:
        pipes[rank], theirs = context.Pipe(duplex=False)
        processes[rank] = context.Process(target=_tell, args=(rank, world_size, port, agent, theirs, work, args))
        processes[rank].start()
        theirs.close()
    told: dict[int, list[Any]] = {rank: [] for rank in ranks}
    ended: dict[int, float] = {}
    fault: float | None = None
    limit = time.monotonic() + STARTUP_S
    try:
        while pipes and time.monotonic() < limit:
            for pipe in connection.wait(list(pipes.values()), timeout=0.1):
                rank = next(r for r, other in pipes.items() if other is pipe)
                try:
                    told[rank].append(pipe.recv())
                except EOFError:
                    ended.setdefault(rank, time.monotonic())
                    del pipes[rank]
                else:
                    if fault is not None and told[rank][-1] != FAULT:
                        ended[rank] = time.monotonic()
                    if told[rank][-1] == FAULT and fault is None:
                        fault = time.monotonic()
                        limit = fault + within_s
        assert not pipes, f"ranks {list(pipes)} hang after {told}"
    finally:
        for process in processes.values():
            process.kill()
            process.join()
        del store
    return [Outcome(told[rank], ended[rank] - (fault or ended[rank])) for rank in ranks]


def _tell(
    rank: int,
    world_size: int,
    port: int,
    agent: bool,
    pipe: connection.Connection,
    work: Callable[..., Any],
    args: tuple[Any, ...],
) -> None:
    _set_environment(rank, world_size, port)
    if agent:
        os.environ.update(TORCHELASTIC_USE_AGENT_STORE="True", TORCHELASTIC_RESTART_COUNT="0")
    try:
        for value in work(rank, *args):
            pipe.send(value)
    except Exception as error:
        pipe.send(f"{type(error).__name__}: {str(error).splitlines()[0]}")
    atexit._run_exitfuncs()  # as at the end of an interpreter, which multiprocessing leaves out
