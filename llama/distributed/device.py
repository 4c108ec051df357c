"""Device, dtype and threads of this process."""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llama.distributed.groups import local_rank, local_world_size, world_size

DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
_PROCESS = os.getpid()
_SOFT_PAUSE = 1  # omp_pause_soft: what the program has set, such as the number of threads, is kept


def default_generator(device: torch.device) -> torch.Generator:
    """Return torch's default generator of a device, which `torch.manual_seed` seeds."""
    if device.type == "cuda":
        torch.cuda.init()
        index = torch.cuda.current_device() if device.index is None else device.index
        return torch.cuda.default_generators[index]
    if device.type == "mps":
        return torch.mps._get_default_mps_generator()
    return torch.default_generator


def select_device(requested: str | torch.device | None) -> torch.device:
    """Return this process's device: the requested one, else the first available of CUDA, MPS and CPU.

    `LOCAL_RANK` gives the index of a CUDA device if `requested` has none.
    """
    if requested is None:
        if torch.cuda.is_available():
            requested = "cuda"
        else:  # several processes would communicate through gloo, which does not support MPS tensors
            requested = "mps" if torch.backends.mps.is_available() and world_size() == 1 else "cpu"
    try:
        device = torch.device(requested)
    except (RuntimeError, TypeError) as error:
        raise ValueError(f"device must be 'cpu', 'cuda', 'cuda:N' or 'mps', got {requested!r}") from error
    if device.type == "cuda":
        return _cuda_device(device)
    if device.type not in ("cpu", "mps"):
        raise ValueError(f"device must be 'cpu', 'cuda', 'cuda:N' or 'mps', got {requested!r}")
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise ValueError(
            "device must be available on this machine and in this build of torch, got 'mps'; use device='cpu'"
        )
    return device


def _cuda_device(device: torch.device) -> torch.device:
    if not torch.cuda.is_available():
        raise ValueError(f"device must be available, got '{device}', but torch finds no CUDA device; use device='cpu'")
    index = device.index if device.index is not None else local_rank()
    if index >= torch.cuda.device_count():
        raise ValueError(
            f"the index of the CUDA device must be below the number of devices ({torch.cuda.device_count()}), got "
            f"{index}; start at most one process per GPU (torchrun --nproc_per_node), or use device='cpu'"
        )
    return torch.device("cuda", index)


def to_device(values: Sequence[int], device: torch.device) -> Tensor:
    """Return the values as an int64 tensor on `device`; the copy to a CUDA device is asynchronous."""
    tensor = torch.tensor(values)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def to_host(tensor: Tensor) -> Callable[[], list[Any]]:
    """Start copying a tensor to the host; return a function that waits for the copy and returns its values.

    The values are those at the time of this call, even if the tensor changes later.
    """
    if tensor.device.type != "cuda":
        values: list[Any] = tensor.tolist()
        return lambda: values
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    host.copy_(tensor, non_blocking=True)
    copied = torch.cuda.Event()
    copied.record(torch.cuda.current_stream(tensor.device))

    def wait() -> list[Any]:
        copied.synchronize()
        return host.tolist()

    return wait


def select_dtype(requested: str | torch.dtype | None, device: torch.device) -> torch.dtype:
    """Return the dtype of weights and KV cache: the requested one, else bfloat16 on CPU and float16 elsewhere."""
    if requested is None:
        return torch.bfloat16 if device.type == "cpu" else torch.float16
    dtype = DTYPES.get(requested) if isinstance(requested, str) else requested
    if dtype is None or dtype not in DTYPES.values():
        raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {requested!r}")
    return dtype


def processes_on(device: torch.device) -> int:
    """Return the number of this program's processes that share the memory of `device`; 1 for a CUDA device."""
    return 1 if device.type == "cuda" else local_world_size()


def share_cores() -> None:
    """Set the number of torch's threads to this process's share of the machine's cores.

    Only if `OMP_NUM_THREADS` is 1, which torchrun sets when it starts several processes and the user has not set it.
    Any other value was set by the user and is kept.
    """
    if local_world_size() > 1 and os.environ.get("OMP_NUM_THREADS") == "1":
        torch.set_num_threads(max(1, available_cores() // local_world_size()))


def available_cores() -> int:
    """Return the number of cores that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def pause_workers() -> None:
    """Ends the calling thread's workers. Its next operation of torch starts new ones, in some 0.1 ms.

    Without effect where torch runs on another library than GNU OpenMP, and in forked processes, where the parent's
    workers are not there to be ended.
    """
    if os.getpid() != _PROCESS:
        return
    if (pause := _omp_pause_resource_all()) is not None:
        pause(_SOFT_PAUSE)


@cache
def _omp_pause_resource_all() -> Callable[[int], int] | None:
    """The function of that name in the library that torch brings along; None if there is none."""
    if sys.platform != "linux":
        return None
    for path in (Path(torch.__file__).parent / "lib").glob("libgomp*.so*"):
        try:
            function: Callable[[int], int] = ctypes.CDLL(str(path)).omp_pause_resource_all
        except (OSError, AttributeError):  # before OpenMP 5.0
            continue
        return function
    return None
