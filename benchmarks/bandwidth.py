"""How fast this machine reads and multiplies: `python -m benchmarks.bandwidth JOB.json`.

A buffer of 1 GiB, far larger than any cache, is read from one end to the other by torch's own multithreaded kernels,
with as many threads as the engines get. Which kernel comes closest to the memory's speed differs between machines, so
several that do little arithmetic for each byte run in turn, each a few times; the fastest pass of all is the figure:
the most that any of them was seen to read. Next to nothing is written. On CUDA a copy of the buffer is timed instead,
which reads and writes it.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F

from benchmarks.job import Job
from benchmarks.lines import emit
from llama.kernels import can_pack, pack_weight, packed_linear

BUFFER_BYTES = 1 << 30
PASSES = 4
COLUMNS = 4096  # of the buffer seen as a matrix


def read_bandwidth(device: str) -> float:
    """Bytes a second: the most that any reader sees now."""
    return cuda_copy_bandwidth(device) if device.startswith("cuda") else max(map(fastest, cpu_readers().values()))


def typical_bandwidth(device: str) -> float:
    """Bytes a second in the median pass of the reader whose median is best: what to hold a median against."""
    if device.startswith("cuda"):
        return cuda_copy_bandwidth(device)
    readers = cpu_readers().values()
    return BUFFER_BYTES / min(statistics.median(_seconds(read) for _ in range(PASSES + 1)) for read in readers)


def fastest(read: Callable[[], object]) -> float:
    """The rate of the fastest pass over the buffer, after one that warms up."""
    read()
    return BUFFER_BYTES / min(_seconds(read) for _ in range(PASSES))


def cpu_readers() -> dict[str, Callable[[], object]]:
    """Ways to read the whole buffer once."""
    buffer = torch.ones(BUFFER_BYTES // 4)
    matrix = buffer.view(-1, COLUMNS)
    vector = torch.ones(COLUMNS)
    halves = buffer.view(torch.bfloat16).view(-1, COLUMNS)  # the same bytes: zeros and ones in turn
    row = torch.ones(1, COLUMNS, dtype=torch.bfloat16)

    def plain_linear() -> object:
        with torch.backends.mkldnn.flags(enabled=False):
            return F.linear(row, halves)

    return {
        "sum of float32": buffer.sum,
        "max of float32": buffer.max,
        "dot of float32": lambda: buffer.dot(buffer),
        "float32 matrix times vector": lambda: matrix @ vector,
        "bfloat16 matrix times vector": lambda: F.linear(row, halves),
        "bfloat16 matrix times vector, ATen's own": plain_linear,
    }


def cuda_copy_bandwidth(device: str) -> float:
    source = torch.ones(BUFFER_BYTES, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)

    def copy() -> None:
        target.copy_(source)
        torch.cuda.synchronize()

    return 2 * fastest(copy)


def matmul_rate(dim: int, hidden_dim: int, n_rows: int, device: str, dtype: torch.dtype) -> float:
    """Floating-point operations a second of the feed-forward's own product, for as many rows.

    The most that a prefill could reach; of plain `F.linear`, and on a CPU of oneDNN's packed weights too.
    """
    rows = torch.randn(n_rows, dim, device=device).to(dtype)
    weight = torch.randn(hidden_dim, dim, device=device).to(dtype)
    products = [lambda: F.linear(rows, weight)]
    if can_pack(torch.device(device), dtype):
        packed = pack_weight(weight)
        products.append(lambda: packed_linear(rows, packed))
    operations = 2.0 * rows.numel() * hidden_dim
    return operations / min(_seconds_of_product(product, device) for product in products)


def _seconds_of_product(product: Callable[[], object], device: str, repeats: int = 20) -> float:
    def several() -> None:
        for _ in range(repeats):
            product()
        if device.startswith("cuda"):
            torch.cuda.synchronize()

    several()
    return min(_seconds(several) for _ in range(PASSES)) / repeats


def read_file(folder: Path) -> float:
    """Seconds that reading a checkpoint takes, from the page cache after a first pass; no copy of it is kept."""
    buffer = memoryview(bytearray(1 << 24))
    seconds = 0.0
    for _ in range(2):
        started = time.perf_counter()
        for shard in folder.glob("*.pth"):
            with shard.open("rb", buffering=0) as file:
                while file.readinto(buffer):
                    pass
        seconds = time.perf_counter() - started
    return seconds


def _seconds(read: Callable[[], object]) -> float:
    started = time.perf_counter()
    read()
    return time.perf_counter() - started


def main(job_file: str) -> None:
    job = Job.read(Path(job_file))
    emit("read_file", read_file(Path(job.ckpt_dir)))
    with torch.inference_mode():
        emit("read_bandwidth", read_bandwidth(job.device))
        rows, dtype = max(job.prefill_lengths), getattr(torch, job.dtype)
        emit("matmul_rate", matmul_rate(job.dim, job.hidden_dim, rows, job.device, dtype))


if __name__ == "__main__":
    main(*sys.argv[1:])
