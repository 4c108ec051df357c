"""The worker threads that torch's operations start on a CPU.

With GNU OpenMP, every Python thread that calls torch has a pool of workers of its own. Workers spin until the next
operation, which begins at once. But as soon as all pools together have more threads than there are cores, workers go
to sleep instead, and each operation waits until they are awake: some 40 us, hundreds of times per decode step. So a
thread must give up its pool before another one runs the network.
"""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path

import torch

_PROCESS = os.getpid()
_SOFT = 1  # omp_pause_soft: what the program has set, such as the number of threads, is kept


def pause_workers() -> None:
    """Ends the calling thread's workers. Its next operation of torch starts new ones, in some 0.1 ms.

    Without effect where torch runs on another library than GNU OpenMP, and in forked processes, where the parent's
    workers are not there to be ended.
    """
    if os.getpid() != _PROCESS:
        return
    if (pause := _omp_pause_resource_all()) is not None:
        pause(_SOFT)


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
