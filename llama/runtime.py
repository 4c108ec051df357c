"""Where and as what a model runs: processes, the model-parallel group, device, dtype, threads.

The only module that reads environment variables or names a communication backend. Knows nothing of Llama.
"""

from __future__ import annotations

import atexit
import contextlib
import io
import os
from collections.abc import Callable, Sequence
from hashlib import blake2b
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from fairscale.nn.model_parallel.initialize import (
    destroy_model_parallel,
    get_data_parallel_group,
    get_data_parallel_rank,
    get_data_parallel_world_size,
    get_model_parallel_group,
    get_model_parallel_rank,
    get_model_parallel_src_rank,
    get_model_parallel_world_size,
    initialize_model_parallel,
    model_parallel_is_initialized,
)
from torch import Tensor

T = TypeVar("T")
DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
_LAUNCHER_VARIABLES = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def world_size() -> int:
    """Number of processes that run this program: those of the process group, or that the launcher announces."""
    if dist.is_initialized():
        return dist.get_world_size()
    return int(os.environ.get("WORLD_SIZE", 1))


def resolve_model_parallel_size(requested: int | None) -> int:
    """The model-parallel size to use: what is asked for, else what is initialized, else the world size.

    Raises:
        ValueError: the world size is not a multiple of it, or another size is initialized already.
    """
    current = get_model_parallel_world_size() if model_parallel_is_initialized() else None
    world = world_size()
    size = requested if requested is not None else current if current is not None else world
    if not isinstance(size, int) or isinstance(size, bool) or size < 1:
        raise ValueError(f"model_parallel_size is {size!r}; it takes a whole number above zero, or None")
    if world % size:
        raise ValueError(
            f"the world size ({world}) is not a multiple of model_parallel_size={size}; "
            f"start the program with torchrun --nproc_per_node {size}"
        )
    if current is not None and current != size:
        raise ValueError(
            f"model_parallel_size={size}, but this process is part of a model-parallel group of {current} already; "
            "use that size, or a fresh process"
        )
    return size


def init_process_groups(model_parallel_size: int, device: torch.device) -> None:
    """Joins the process group and fairscale's model-parallel group, each unless it is there already."""
    if not dist.is_initialized():
        _init_process_group(device)
        atexit.register(_leave)
    if not model_parallel_is_initialized():
        with contextlib.redirect_stdout(io.StringIO()):  # fairscale prints
            initialize_model_parallel(model_parallel_size)


def _init_process_group(device: torch.device) -> None:
    nccl = device.type == "cuda" and dist.is_nccl_available()
    backend = "cpu:gloo,cuda:nccl" if nccl else "gloo"  # NCCL for tensors; objects and flags stay on the host
    missing = [name for name in _LAUNCHER_VARIABLES if name not in os.environ]
    if not missing:
        dist.init_process_group(backend, device_id=device if nccl else None)
    elif world_size() == 1:  # a plain script or notebook: a group of one, which needs no address
        store = dist.HashStore()  # type: ignore[attr-defined]
        dist.init_process_group(backend, store=store, rank=0, world_size=1)
    else:
        raise ValueError(f"WORLD_SIZE is {world_size()}, but {', '.join(missing)} not set; start with torchrun")


def _leave() -> None:
    """Ends the groups at exit: threads of a group left behind can abort the interpreter's shutdown."""
    destroy_model_parallel()
    if dist.is_initialized():
        dist.destroy_process_group()


def is_first_rank() -> bool:
    """Whether this process is the one of all that should print."""
    return not dist.is_initialized() or dist.get_rank() == 0


def model_parallel_size() -> int:
    """Number of ranks that share a network; 1 where no model-parallel group was made."""
    return get_model_parallel_world_size() if model_parallel_is_initialized() else 1


def model_parallel_rank() -> int:
    rank: int = get_model_parallel_rank()
    return rank


def broadcast_from_first(tensor: Tensor) -> Tensor:
    """Overwrites `tensor`, in place, with that of the model-parallel group's first rank; returns it."""
    if model_parallel_size() > 1:
        dist.broadcast(tensor, get_model_parallel_src_rank(), group=get_model_parallel_group())
    return tensor


def is_first_of_group() -> bool:
    """Whether this process is its model-parallel group's first rank."""
    return model_parallel_size() == 1 or model_parallel_rank() == 0


def broadcast_flag(go_on: bool) -> bool:
    """What the first rank of the model-parallel group says; every rank has to ask at the same point."""
    if model_parallel_size() == 1:
        return go_on
    return bool(broadcast_from_first(torch.tensor([go_on])).item())


def broadcast_object(value: T | None = None) -> T:
    """The object that the first rank of all processes passes; the others pass none, and wait."""
    box = [value]
    if dist.get_world_size() > 1:
        dist.broadcast_object_list(box, src=0)
    return cast(T, box[0])


def replica() -> tuple[int, int]:
    """Which replica of the network this process is part of, and how many there are (world size over MP)."""
    if not model_parallel_is_initialized():
        return 0, 1
    return get_data_parallel_rank(), get_data_parallel_world_size()


def gather_replicas(mine: T) -> list[T]:
    """Every replica's object, in order, on all of them."""
    _, n_replicas = replica()
    if n_replicas == 1:
        return [mine]
    gathered: list[T | None] = [None] * n_replicas
    dist.all_gather_object(gathered, mine, group=get_data_parallel_group())
    return cast(list[T], gathered)


def compare_calls(call: object) -> None:
    """Raises RuntimeError on all ranks unless all of them make the same call; each has to ask, before it works.

    Args:
        call: the name of the call and its checked arguments, alike on all ranks by their `repr`; None if this rank
            refused them.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return
    digest = 0 if call is None else int.from_bytes(blake2b(repr(call).encode(), digest_size=7).digest(), "big") | 1
    device = torch.device("cuda") if dist.get_backend() == "nccl" else torch.device("cpu")
    digests = [torch.zeros(1, dtype=torch.int64, device=device) for _ in range(dist.get_world_size())]
    dist.all_gather(digests, torch.tensor([digest], device=device))
    values = [int(value) for value in digests]
    if call is not None and (refused := [rank for rank, value in enumerate(values) if not value]):
        raise RuntimeError(
            f"all ranks must make the same calls; rank {', '.join(map(str, refused))} refused the arguments of this one"
        )
    if call is not None and len(set(values)) > 1:
        odd = next(rank for rank, value in enumerate(values) if value != values[0])
        raise RuntimeError(
            f"all ranks must make the same calls with the same arguments; those of rank {odd} and rank 0 differ "
            f"(this is rank {dist.get_rank()}, which called {call[0] if isinstance(call, tuple) else call})"
        )


def default_generator(device: torch.device) -> torch.Generator:
    """torch's own generator of a device, which `torch.manual_seed` seeds."""
    if device.type == "cuda":
        torch.cuda.init()
        index = torch.cuda.current_device() if device.index is None else device.index
        return torch.cuda.default_generators[index]
    if device.type == "mps":
        return torch.mps._get_default_mps_generator()
    return torch.default_generator


def select_device(requested: str | torch.device | None) -> torch.device:
    """The device of this process: the one asked for, else CUDA, MPS or CPU, whichever is there first.

    `LOCAL_RANK` gives the index of a CUDA device that is asked for without one.
    """
    if requested is None:
        if torch.cuda.is_available():
            requested = "cuda"
        else:  # gloo, which several processes would need here, does not take MPS tensors
            requested = "mps" if torch.backends.mps.is_available() and world_size() == 1 else "cpu"
    try:
        device = torch.device(requested)
    except (RuntimeError, TypeError) as error:
        raise ValueError(f"device is {requested!r}; it takes 'cpu', 'cuda', 'cuda:N' or 'mps'") from error
    if device.type == "cuda":
        return _cuda_device(device)
    if device.type not in ("cpu", "mps"):
        raise ValueError(f"device is {requested!r}; it takes 'cpu', 'cuda', 'cuda:N' or 'mps'")
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise ValueError("device is 'mps', but this machine or build of torch has none; use device='cpu'")
    return device


def _cuda_device(device: torch.device) -> torch.device:
    if not torch.cuda.is_available():
        raise ValueError(f"device is '{device}', but torch sees no CUDA device; use device='cpu'")
    index = device.index if device.index is not None else int(os.environ.get("LOCAL_RANK", 0))
    if index >= torch.cuda.device_count():
        raise ValueError(
            f"this process needs CUDA device {index}, but there are {torch.cuda.device_count()}; "
            "start no more processes on a machine than it has GPUs (torchrun --nproc_per_node), or use device='cpu'"
        )
    return torch.device("cuda", index)


def to_device(values: Sequence[int], device: torch.device) -> Tensor:
    """int64 numbers on `device`; on CUDA they travel while the host goes on, behind the work that is queued there."""
    tensor = torch.tensor(values)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def to_host(tensor: Tensor) -> Callable[[], list[Any]]:
    """Starts to fetch a tensor's values; the function that it returns waits for them.

    The values are those of now: what is done to the tensor later does not show.
    """
    if tensor.device.type != "cuda":
        values: list[Any] = tensor.tolist()
        return lambda: values
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    host.copy_(tensor, non_blocking=True)
    arrived = torch.cuda.Event()
    arrived.record(torch.cuda.current_stream(tensor.device))

    def wait() -> list[Any]:
        arrived.synchronize()
        return host.tolist()

    return wait


def select_dtype(requested: str | torch.dtype | None, device: torch.device) -> torch.dtype:
    """The dtype of weights and cache: the one asked for, else bfloat16 on CPU and float16 elsewhere."""
    if requested is None:
        return torch.bfloat16 if device.type == "cpu" else torch.float16
    dtype = DTYPES.get(requested) if isinstance(requested, str) else requested
    if dtype is None or dtype not in DTYPES.values():
        raise ValueError(f"dtype is {requested!r}; it takes {', '.join(DTYPES)}")
    return dtype


def processes_on(device: torch.device) -> int:
    """Number of this program's processes that share the memory of `device`: a CUDA device has one."""
    return 1 if device.type == "cuda" else local_world_size()


def local_world_size() -> int:
    """Number of this program's processes on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def share_cores() -> None:
    """Gives each of a machine's processes its share of the cores.

    torchrun sets `OMP_NUM_THREADS=1` when it starts several processes and the user set nothing; any other value is
    the user's, and stays.
    """
    if local_world_size() > 1 and os.environ.get("OMP_NUM_THREADS") == "1":
        torch.set_num_threads(max(1, _available_cores() // local_world_size()))


def _available_cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
