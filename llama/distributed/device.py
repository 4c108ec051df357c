"""Device, dtype and threads of this process."""

from __future__ import annotations

import ctypes
import math
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from llama.distributed.groups import local_rank, local_world_size, world_size
from llama.errors import quote
from llama.layers.kernels import duration

DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
_OWN_CGROUP, _CGROUPS = Path("/proc/self/cgroup"), Path("/sys/fs/cgroup")
_LARGE_WEIGHT = 2**20  # elements; products with so many gain from threads
_WORTHWHILE = 0.7  # of one thread's time is what several may take
_WINDOW_S = 0.05  # of passes, after which their share of the processors' time is judged
_STARVED = 0.75  # of a core's time per thread is what they get if nobody else is busy: they spin where they wait
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 1.0, 8.0  # of several threads, after a window in which they were starved
_threads_are_fixed = False  # the user set a number
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of glibc's mallopt
_KEPT_BYTES = 2**29  # of freed memory
_OWN_PAGES, _MOST_BYTES = 2**21, 2**25  # sizes from which memory is not kept: of weights, and the most of glibc
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
    except (RuntimeError, TypeError):
        device = None
    if device is None or device.type not in ("cpu", "cuda", "mps"):
        raise ValueError(f"device must be 'cpu', 'cuda', 'cuda:N' or 'mps', got {requested!r}")
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise ValueError("device must be available on this machine and in this torch, got 'mps'; use device='cpu'")
    return _cuda_device(device) if device.type == "cuda" else device


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


def set_threads(requested: int | None) -> None:
    """Set the number of torch's threads: the requested one, else this process's share of the cores.

    A number that the user set stays: by `OMP_NUM_THREADS`, or a smaller one by `torch.set_num_threads`. torchrun sets
    `OMP_NUM_THREADS` to 1 when it starts several processes and the user has not set it.
    """
    global _threads_are_fixed
    processes, environment = local_world_size(), os.environ.get("OMP_NUM_THREADS")
    by_launcher = processes > 1 and environment == "1"
    _threads_are_fixed = requested is not None or (environment is not None and not by_launcher)
    share = max(1, available_cores() // processes)
    if requested is not None:
        torch.set_num_threads(requested)
    elif by_launcher or (environment is None and share < torch.get_num_threads()):
        torch.set_num_threads(share)


def check_threads(requested: int | None) -> None:
    """Raise ValueError unless the number of threads is None or a whole number of at least 1."""
    if requested is not None and (type(requested) is not int or requested < 1):
        raise ValueError(f"threads must be a whole number of at least 1, or None, got {quote(requested)}")


def _gains_from_threads(weight: Tensor | None) -> bool:
    """Return whether products with the weight take clearly less time on several threads than on one."""
    if weight is None or weight.numel() >= _LARGE_WEIGHT:
        return True
    x = torch.zeros(1, weight.size(1), dtype=weight.dtype)
    several, n_threads = _fastest_product(x, weight), torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return several < _WORTHWHILE * _fastest_product(x, weight)
    finally:
        torch.set_num_threads(n_threads)


def _fastest_product(x: Tensor, weight: Tensor) -> float:
    """Return the seconds of one product, as the minimum of several."""
    return min(duration(partial(linear, x, weight)) for _ in range(20))


class AdaptiveThreads:
    """Context manager for passes on a CPU: on one thread if the network is small, or other programs use the cores.

    OpenMP's threads meet after every product, hundreds of times per pass. One whose core is in use by another program
    comes milliseconds late, and the others wait; a single thread waits for nobody. Other programs are noticed by how
    little of the processors' time this process gets. After a while more threads are tried again.

    A number of threads that the user set stays. Not thread-safe: the network's lock guards it.

    Args:
        weights: of the network; a product with the largest one is timed if it may be too small for several threads.
    """

    def __init__(self, weights: Iterable[Tensor]) -> None:
        largest = max((weight for weight in weights if weight.dim() == 2), key=Tensor.numel, default=None)
        self._before = torch.get_num_threads()  # outside of the pass
        self._is_lowered = False  # stays True after a pass whose end was interrupted
        may_be_small = not _threads_are_fixed and self._before > 1
        self._one_until = math.inf if may_be_small and not _gains_from_threads(largest) else 0.0
        self._pause_s = _FIRST_PAUSE_S
        self._started = (0.0, 0.0)
        self._wall_s = self._cpu_s = 0.0  # of passes on several threads, since the last decision

    def __enter__(self) -> None:
        if self._is_lowered:
            torch.set_num_threads(self._before)
        self._before = 1 if _threads_are_fixed else torch.get_num_threads()
        if self._before > 1:
            self._started = time.perf_counter(), time.process_time()
            self._is_lowered = self._started[0] < self._one_until
            if self._is_lowered:
                torch.set_num_threads(1)

    def __exit__(self, *_: object) -> None:
        if self._before == 1:
            return
        wall, cpu = self._started
        if self._is_lowered:
            torch.set_num_threads(self._before)
            self._is_lowered = False
            return
        now = time.perf_counter()
        self._wall_s += now - wall
        self._cpu_s += time.process_time() - cpu
        if self._wall_s >= _WINDOW_S:
            self._decide(now)

    def _decide(self, now: float) -> None:
        """Go to one thread for a while if the passes since the last decision got too little of the processors' time."""
        if self._cpu_s < _STARVED * self._before * self._wall_s:
            self._one_until = now + self._pause_s
            self._pause_s = min(2 * self._pause_s, _LONGEST_PAUSE_S)
        else:
            self._pause_s = _FIRST_PAUSE_S
        self._wall_s = self._cpu_s = 0.0


@contextmanager
def keep_freed_memory(device: torch.device) -> Iterator[None]:
    """Context manager for loading on a CPU, after which glibc keeps up to 512 MiB of what operations free.

    A long prefill otherwise spends a fifth of its time on getting new pages, in int8 a third. The memory of weights
    is returned when they are freed. What the user has set, by environment variables, stays.
    """
    is_set = any(name.startswith(("MALLOC_", "GLIBC_TUNABLES")) for name in os.environ)
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if device.type != "cpu" or is_set or mallopt is None:
        yield
        return
    mallopt(_M_TRIM_THRESHOLD, _KEPT_BYTES)
    mallopt(_M_MMAP_THRESHOLD, _OWN_PAGES)
    try:
        yield
    finally:
        mallopt(_M_MMAP_THRESHOLD, _MOST_BYTES)


def available_cores() -> int:
    """Return the number of cores that this process may use: by its affinity, and by the quota of its control groups."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = _cpu_quota()
    return cores if quota is None else max(1, min(cores, math.ceil(quota)))


def _cpu_quota() -> float | None:
    """Return the cores that control groups grant, as `docker --cpus` sets them; None if there is no limit."""
    try:
        lines = [line.split(":", 2) for line in _OWN_CGROUP.read_text().splitlines()]
    except OSError:  # not on Linux
        return None
    quotas = []
    for _, controllers, path in lines:
        if controllers and "cpu" not in controllers.split(","):
            continue
        top = _CGROUPS / "cpu" if controllers else _CGROUPS  # version 1 names controllers
        files = ("cpu.cfs_quota_us", "cpu.cfs_period_us") if controllers else ("cpu.max",)
        folder = top / path.lstrip("/")
        groups = [folder, *folder.parents]  # in a container the path may be the host's; the top one exists
        for group in groups[: groups.index(top) + 1]:
            with suppress(OSError, ValueError):
                limit, period = " ".join((group / name).read_text() for name in files).split()
                if limit not in ("max", "-1"):
                    quotas.append(int(limit) / int(period))
    return min(quotas, default=None)


def pause_workers() -> None:
    """Ends the calling thread's workers. Its next operation of torch starts new ones, in some 0.1 ms.

    Without effect where torch runs on another library than GNU OpenMP. Also called before a fork, as the child's first
    operation would wait for workers that it does not have.
    """
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


def _use_one_thread() -> None:
    """In a forked process: the GNU OpenMP of torch 2.6 cannot end its workers before the fork."""
    if _omp_pause_resource_all() is None and any(Path(torch.__file__).parent.glob("lib/libgomp*.so*")):
        torch.set_num_threads(1)


os.register_at_fork(before=pause_workers, after_in_child=_use_one_thread)
