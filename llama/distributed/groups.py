"""Process groups: the processes that the launcher started, the model-parallel group, and what ranks send each other.

This is the only module that reads the launcher's environment variables or names a communication backend.
"""

from __future__ import annotations

import atexit
import ctypes
import itertools
import os
import sys
import threading
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from datetime import timedelta
from typing import Any, TypeVar, cast
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from fairscale.nn.model_parallel import initialize as parallel
from torch import Tensor
from torch.distributed.distributed_c10d import PrefixStore, Store
from torch.distributed.elastic.multiprocessing.errors import get_error_handler

from llama.distributed.lockstep import TIMEOUT_VARIABLE, Lockstep
from llama.errors import RankError

T = TypeVar("T")
_LAUNCHER_VARIABLES = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
_groups_lock = threading.Lock()
_locksteps: WeakKeyDictionary[Any, Lockstep] = WeakKeyDictionary()  # of all ranks, by their group
_lockstep_numbers = itertools.count()  # give each lockstep its own keys in the store


def world_size() -> int:
    """Return the number of processes that run this program, from the process group if there is one, else WORLD_SIZE."""
    if dist.is_initialized():
        return dist.get_world_size()
    return _number_from_environment("WORLD_SIZE", 1)


def _number_from_environment(name: str, default: int, *, minimum: int = 1) -> int:
    """Return the whole number in an environment variable, or `default` if the variable is not set."""
    text = os.environ.get(name)
    if text is None:
        return default
    try:
        number = int(text)
    except ValueError:
        number = minimum - 1
    if number < minimum:
        raise ValueError(
            f"the environment variable {name} must be a whole number of at least {minimum}, got {text[:40]!r}; "
            "unset it, or start with torchrun, which sets it"
        )
    return number


def local_rank() -> int:
    """Return this process's index among the program's processes on this machine."""
    return _number_from_environment("LOCAL_RANK", 0, minimum=0)


def local_world_size() -> int:
    """Return the number of this program's processes on this machine."""
    return _number_from_environment("LOCAL_WORLD_SIZE", 1)


def resolve_model_parallel_size(requested: int | None) -> int:
    """Return the model-parallel size to use: the requested one, else the initialized one, else the world size.

    Raises:
        ValueError: the world size is not a multiple of it, or a group of another size is already initialized.
    """
    current = parallel.get_model_parallel_world_size() if parallel.model_parallel_is_initialized() else None
    world = world_size()
    size = requested if requested is not None else current if current is not None else world
    if not isinstance(size, int) or isinstance(size, bool) or size < 1:
        raise ValueError(f"model_parallel_size must be a positive integer or None, got {size!r}")
    if world % size:
        raise ValueError(
            f"the world size must be a multiple of model_parallel_size, got a world size of {world} and "
            f"model_parallel_size={size}; start the program with torchrun --nproc_per_node {size}"
        )
    if current is not None and current != size:
        raise ValueError(
            f"model_parallel_size must be {current}, the size of the model-parallel group that this process has "
            f"joined, got {size}; pass {current}, or start a new process"
        )
    return size


def init_process_groups(model_parallel_size: int, device: torch.device) -> None:
    """Join the process group and fairscale's model-parallel group, unless this process has joined them already.

    Thread-safe. A process forked afterwards must not use the groups, but can exit normally.

    Raises:
        RankError: a rank did not start in time, or the ranks have failed before.
    """
    with _groups_lock:
        if not dist.is_initialized():
            _init_process_group(device)
            atexit.register(_leave)
            os.register_at_fork(after_in_child=_keep_groups_of_parent)
        if lockstep := _ranks_in_lockstep():
            lockstep.check()
        if not parallel.model_parallel_is_initialized():
            _init_model_parallel(model_parallel_size)


def _init_process_group(device: torch.device) -> None:
    nccl = device.type == "cuda" and dist.is_nccl_available()
    backend = "cpu:gloo,cuda:nccl" if nccl else "gloo"  # NCCL for tensors on the GPU, gloo for objects on the host
    missing = [name for name in _LAUNCHER_VARIABLES if name not in os.environ]
    if not missing:
        store, rank, size, lockstep = _join_launched_ranks()
        device_id = device if nccl else None
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, device_id=device_id)
        if lockstep:
            _locksteps[dist.group.WORLD] = lockstep
    elif world_size() == 1:  # a plain script or notebook: a group of one process, which needs no address
        hook = sys.excepthook
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)  # type: ignore[attr-defined]
        sys.excepthook = hook  # torch's puts "[rank0]:" in front of each line of a traceback
    else:
        raise ValueError(
            f"with WORLD_SIZE={world_size()}, {', '.join(_LAUNCHER_VARIABLES)} must all be set, got no "
            f"{', '.join(missing)}; start with torchrun, which sets them"
        )


def _join_launched_ranks() -> tuple[Store, int, int, Lockstep | None]:
    """Wait for all ranks that the launcher started; return their store, this process's rank, and the world size."""
    rank, size = _number_from_environment("RANK", 0, minimum=0), world_size()
    if rank >= size:
        raise ValueError(f"the environment variable RANK must be below WORLD_SIZE={size}, got {rank}; use torchrun")
    timeout = timedelta(seconds=_rank_timeout())
    try:
        store, rank, size = next(dist.rendezvous("env://", timeout=timeout))  # type: ignore[attr-defined]
    except dist.DistError as error:
        address = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        raise RankError(
            f"all {size} ranks must meet at {address} within {_rank_timeout():g} seconds (set by {TIMEOUT_VARIABLE}), "
            f"got: {str(error).splitlines()[0]}"
        ) from error
    attempt = _number_from_environment("TORCHELASTIC_RESTART_COUNT", 0, minimum=0)
    store = PrefixStore(f"attempt/{attempt}", store)  # torchrun's store outlives ranks that it starts again
    store.set_timeout(dist.default_pg_timeout)
    lockstep = _new_lockstep(store, rank, size) if size > 1 else None
    return store, rank, size, lockstep


def _init_model_parallel(size: int) -> None:
    """Create fairscale's groups and suppress the lines that it prints, but not the output of other threads."""
    parallel.print = lambda *args: None  # shadows the built-in function, in fairscale's module only
    try:
        parallel.initialize_model_parallel(size)
    finally:
        del parallel.print


def _leave() -> None:
    """Destroy the groups at exit; the threads of a group that still exists can abort the interpreter's shutdown."""
    if dist.is_initialized() and (lockstep := _locksteps.pop(dist.group.WORLD, None)):
        lockstep.leave()
    parallel.destroy_model_parallel()
    if dist.is_initialized():
        dist.destroy_process_group()


def _keep_groups_of_parent() -> None:
    """In a forked child, never destroy the groups: that would wait for threads that exist only in the parent."""
    atexit.unregister(_leave)
    for group in dist.distributed_c10d._world.pg_map:
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(group))


def _close_model_parallel_groups() -> None:
    """Close the connections to the other ranks, so that no rank keeps waiting for this one."""
    if not parallel.model_parallel_is_initialized():
        return
    groups = [
        parallel.get_model_parallel_group(),
        parallel.get_data_parallel_group(),
        parallel.get_pipeline_parallel_group(),
    ]
    parallel.destroy_model_parallel()
    while groups:
        group = groups.pop()
        if "nccl" in dist.get_backend_config(group):
            group.abort()
        dist.destroy_process_group(group)


# ---- lockstep of the ranks ----


def _new_lockstep(store: Store, rank: int, size: int) -> Lockstep:
    """Join the lockstep of all ranks; wait until all of them have."""
    return Lockstep(PrefixStore(f"llama/{next(_lockstep_numbers)}", store), rank, size, _rank_timeout())


def _ranks_in_lockstep() -> Lockstep | None:
    """Return the lockstep with the other ranks, joining it if needed; None for a single process."""
    if not has_several_ranks():
        return None
    group = dist.group.WORLD
    if group not in _locksteps:
        store = dist.distributed_c10d._get_default_store()
        _locksteps[group] = _new_lockstep(store, dist.get_rank(), dist.get_world_size())
    return _locksteps[group]


def _rank_timeout() -> float:
    """Return the number of seconds to wait for the other ranks to start, or to make the same call."""
    return float(_number_from_environment(TIMEOUT_VARIABLE, 300))


def has_several_ranks() -> bool:
    """Return whether there are other processes, which hold shards or replicas of the same network."""
    return dist.is_initialized() and dist.get_world_size() > 1


def compare_calls(call: object, *, timeout_s: float | None = None) -> None:
    """Raise RankError on all ranks unless all of them make the same call. Every rank must do this before it computes.

    Args:
        call: the call's name and its checked arguments, compared by `repr`; None if this rank refused the arguments.
        timeout_s: maximum time to wait for the others; None for `LLAMA_RANK_TIMEOUT` seconds, or 300 if not set.
    """
    if lockstep := _ranks_in_lockstep():
        groups = [_group_ranks()]
        if replica()[1] > 1:
            groups.append(dist.get_process_group_ranks(parallel.get_data_parallel_group()))
        lockstep.compare_calls(call, [ranks for ranks in groups if len(ranks) > 1], timeout_s)


def _group_ranks() -> list[int]:
    """Return the ranks in this process's model-parallel group."""
    group = parallel.get_model_parallel_group() if parallel.model_parallel_is_initialized() else dist.group.WORLD
    return dist.get_process_group_ranks(group)


def rank_errors() -> AbstractContextManager[None]:
    """Context manager for work in which ranks communicate: an error on one rank stops all ranks within seconds.

    The other ranks raise RankError, which names the failed rank. The model-parallel groups are then closed, and the
    program must be restarted. If all ranks raise the same error at the same place, the groups stay usable.

    With NCCL, a rank that waits for the GPU stops only when torchrun or NCCL's own timeout ends it.
    """
    lockstep = _ranks_in_lockstep()
    return lockstep.guard(_close_model_parallel_groups) if lockstep else nullcontext()


def report_to_launcher(error: Exception) -> bool:
    """Record the exception that is being handled for torchrun's report; return False if torchrun does not run this."""
    if "TORCHELASTIC_ERROR_FILE" not in os.environ:
        return False
    get_error_handler().record_exception(error)
    return True


def is_first_rank() -> bool:
    """Return whether this process is rank 0, the one that should print."""
    return not dist.is_initialized() or dist.get_rank() == 0


def model_parallel_size() -> int:
    """Return the number of ranks that one network is sharded over; 1 if there is no model-parallel group."""
    return parallel.get_model_parallel_world_size() if parallel.model_parallel_is_initialized() else 1


def model_parallel_rank() -> int:
    """Return this process's rank in its model-parallel group; 0 if there is none."""
    return int(parallel.get_model_parallel_rank()) if parallel.model_parallel_is_initialized() else 0


def broadcast_from_first(tensor: Tensor) -> Tensor:
    """Broadcast `tensor` in place from the first rank of the model-parallel group, and return it."""
    if model_parallel_size() > 1:
        dist.broadcast(tensor, parallel.get_model_parallel_src_rank(), group=parallel.get_model_parallel_group())
    return tensor


def broadcast_number(number: int, device: torch.device) -> int:
    """Return the number that the first rank of the model-parallel group passes."""
    return int(broadcast_from_first(torch.tensor(number, device=device))) if model_parallel_size() > 1 else number


def on_any_rank(flags: Sequence[bool], device: torch.device) -> list[bool]:
    """Return for each flag whether it is true on any rank of the model-parallel group, which all call this together."""
    if model_parallel_size() == 1:
        return list(flags)
    counts = sum_over_ranks(torch.tensor([int(flag) for flag in flags], device=device))
    return [count > 0 for count in counts.tolist()]


def sum_over_ranks(tensor: Tensor) -> Tensor:
    """Add up the tensors of the model-parallel group's ranks, in place, and return the sum."""
    dist.all_reduce(tensor, group=parallel.get_model_parallel_group())
    return tensor


def broadcast_flag(flag: bool, *, stream: int = 0) -> bool:
    """Return the flag that the first rank of the model-parallel group passes. All ranks must call this at one point.

    False, without communication, if the ranks have failed before; RankError if another rank makes a different call.

    Args:
        stream: number of the stream that calls, the same on all ranks.
    """
    lockstep = _ranks_in_lockstep()
    if lockstep and lockstep.failure is not None:
        return False
    if not lockstep or model_parallel_size() == 1:
        return flag
    return lockstep.broadcast_flag(flag, _group_ranks(), stream)


def broadcast_object(value: T | None = None) -> T:
    """Broadcast an object from rank 0 to all ranks; `value` is ignored on the others."""
    box = [value]
    if dist.get_world_size() > 1:
        dist.broadcast_object_list(box, src=0)
    return cast(T, box[0])


def replica() -> tuple[int, int]:
    """Return the index of this process's replica of the network, and the number of replicas (world size / MP)."""
    if not parallel.model_parallel_is_initialized():
        return 0, 1
    return parallel.get_data_parallel_rank(), parallel.get_data_parallel_world_size()


def gather_replicas(value: T) -> list[T]:
    """Return the objects that all replicas pass, in order, on every replica."""
    _, n_replicas = replica()
    if n_replicas == 1:
        return [value]
    gathered: list[T | None] = [None] * n_replicas
    dist.all_gather_object(gathered, value, group=parallel.get_data_parallel_group())
    return cast(list[T], gathered)
