"""The machine that figures belong to, and how fast it reads and multiplies: `python -m benchmarks.machine`.

A buffer of 1 GiB, far larger than any cache, is read from one end to the other by torch's own multithreaded kernels,
with as many threads as the engines get. Which kernel comes closest to the memory's speed differs between machines, so
several that do little arithmetic per byte run in turn; the fastest pass of all is the figure. On CUDA a copy of the
buffer is timed instead, which reads and writes it.
"""

from __future__ import annotations

import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F

from benchmarks.job import Job, emit
from llama.distributed.device import available_cores
from llama.layers.kernels import can_pack, pack_weight, packed_linear
from llama.tools.commandline import run

GIB = 1024**3
BUFFER_BYTES = GIB
PASSES = 4
COLUMNS = 4096  # of the buffer seen as a matrix


def describe_machine(device: str) -> dict[str, str | int | float]:
    """Processor, cores, memory and versions, as they go into every JSON line."""
    described: dict[str, str | int | float] = {
        "cpu": cpu_model(),
        "cores": available_cores(),
        "memory_gib": round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / GIB, 1),
        "vector_instructions": torch.backends.cpu.get_cpu_capability(),
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
    }
    if device.startswith("cuda"):
        described["gpu"] = torch.cuda.get_device_name(device)
    return described


def cpu_model() -> str:
    """The processor's name, and on x86 its family and model: names of virtual machines leave out which one it is."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").split("\n\n")[0].splitlines()
    except OSError:
        lines = []
    fields = {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    name = fields.get("model name", platform.processor() or platform.machine())
    if "cpu family" in fields and "model" in fields:
        return f"{name} (family {fields['cpu family']}, model {fields['model']})"
    return name


def read_bandwidth(device: str) -> float:
    """Bytes per second: the most that any reader reaches now."""
    return cuda_copy_bandwidth(device) if device.startswith("cuda") else max(map(fastest, cpu_readers().values()))


def typical_bandwidth(device: str) -> float:
    """Bytes per second in the median pass of the reader whose median is best: what to compare a median with."""
    if device.startswith("cuda"):
        return cuda_copy_bandwidth(device)
    readers = cpu_readers().values()
    return BUFFER_BYTES / min(statistics.median(seconds(read) for _ in range(PASSES + 1)) for read in readers)


def fastest(read: Callable[[], object]) -> float:
    """The rate of the fastest pass over the buffer, after one that warms up."""
    read()
    return BUFFER_BYTES / min(seconds(read) for _ in range(PASSES))


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
    """Floating-point operations per second of the feed-forward's own product, for as many rows.

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
    return min(seconds(several) for _ in range(PASSES)) / repeats


def read_file_seconds(folder: Path) -> float:
    """Seconds that reading a checkpoint takes, from the page cache after a first pass; no copy of it is kept."""
    buffer = memoryview(bytearray(1 << 24))
    passed = 0.0
    for _ in range(2):
        started = time.perf_counter()
        for shard in folder.glob("*.pth"):
            with shard.open("rb", buffering=0) as file:
                while file.readinto(buffer):
                    pass
        passed = time.perf_counter() - started
    return passed


def seconds(work: Callable[[], object]) -> float:
    """How long the work takes."""
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def main(job_file: str | None = None) -> None:
    """Emits what this machine reaches; with a job, also for its checkpoint and sizes."""
    job = None if job_file is None else Job.read(Path(job_file))
    if job:
        emit("read_file", read_file_seconds(Path(job.ckpt_dir)))
    with torch.inference_mode():
        emit("read_bandwidth", read_bandwidth(job.device if job else "cpu"))
        dim, hidden_dim, rows = (job.dim, job.hidden_dim, max(job.prefill_lengths)) if job else (2048, 5632, 512)
        device, dtype = (job.device, job.dtype) if job else ("cpu", "bfloat16")
        emit("matmul_rate", matmul_rate(dim, hidden_dim, rows, device, getattr(torch, dtype)))


if __name__ == "__main__":
    run(main)
