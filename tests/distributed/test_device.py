"""Device, dtype, and threads: a call keeps its OpenMP workers between its steps, and gives them up to other threads."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from llama import Llama
from llama.distributed import device
from llama.distributed.device import (
    AdaptiveThreads,
    available_cores,
    pause_workers,
    processes_on,
    select_device,
    select_dtype,
    set_threads,
)
from llama.engine.lock import ModelLock
from tests.conftest import ROOT

needs_openmp = pytest.mark.skipif(
    device._omp_pause_resource_all() is None, reason="torch runs on another OpenMP library"
)


CPU = torch.device("cpu")


# ---- devices and dtypes ----


def test_the_fastest_device_there_is(
    machine: Callable[[int, bool], None], nothing_initialized: Callable[..., None]
) -> None:
    machine(2, True)
    assert select_device(None) == torch.device("cuda:0")
    machine(0, True)
    assert select_device(None) == torch.device("mps")
    machine(0, False)
    assert select_device(None) == CPU
    nothing_initialized(WORLD_SIZE="2")
    machine(0, True)
    assert select_device(None) == CPU  # gloo takes no MPS tensors


def test_the_local_rank_chooses_the_cuda_device(
    machine: Callable[[int, bool], None], nothing_initialized: Callable[..., None]
) -> None:
    machine(4, False)
    nothing_initialized(RANK="7", LOCAL_RANK="3", WORLD_SIZE="8")
    assert select_device(None) == select_device("cuda") == torch.device("cuda:3")
    assert select_device("cuda:1") == torch.device("cuda:1")
    assert select_device("cpu") == CPU
    machine(2, False)
    with pytest.raises(ValueError, match=r"number of devices .2., got 3"):
        select_device(None)


def test_a_device_that_is_none_or_that_this_machine_lacks(machine: Callable[[int, bool], None]) -> None:
    machine(0, False)
    for requested in ("tpu", "gpu", "", "cuda:x", 1.5, ["cpu"], "meta", "xpu"):
        with pytest.raises(ValueError, match="device must be"):
            select_device(requested)  # type: ignore[arg-type]
    for requested in ("cuda", "cuda:0", "mps", torch.device("cuda")):
        with pytest.raises(ValueError, match=r"device must be .* got '(cuda|cuda:0|mps)'.* use device='cpu'"):
            select_device(requested)


def test_a_dtype_by_name_or_itself_or_the_devices_default() -> None:
    assert select_dtype(None, CPU) == torch.bfloat16
    assert select_dtype(None, torch.device("cuda:1")) == select_dtype(None, torch.device("mps")) == torch.float16
    for name in ("float16", "bfloat16", "float32"):
        assert select_dtype(name, CPU) == select_dtype(getattr(torch, name), CPU) == getattr(torch, name)
    for requested in ("int8", "fp16", "float64", "", torch.float64, torch.int8, 16, ["float16"]):
        with pytest.raises(ValueError, match="dtype must be one of float16, bfloat16, float32, got "):
            select_dtype(requested, CPU)  # type: ignore[arg-type]


@pytest.mark.parametrize("value", ["-1", "x"])
def test_the_local_rank_in_the_environment_is_a_whole_number(
    machine: Callable[[int, bool], None], nothing_initialized: Callable[..., None], value: str
) -> None:
    machine(2, False)
    nothing_initialized(LOCAL_RANK=value)
    with pytest.raises(ValueError, match=rf"variable LOCAL_RANK must be a whole number of at least 0, got '{value}'"):
        select_device(None)


# ---- cores ----


@pytest.fixture
def threads(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., int]]:
    """The number of threads after `set_threads` on a machine of 8 cores, with that environment."""
    before = torch.get_num_threads()
    monkeypatch.setattr(device, "_threads_are_fixed", False)
    monkeypatch.setattr(device, "_cpu_quota", lambda: None)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)), raising=False)
    for name in ("OMP_NUM_THREADS", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)

    def threads(requested: int | None = None, *, before: int = 1, **variables: str) -> int:
        with pytest.MonkeyPatch.context() as patch:
            for name, value in variables.items():
                patch.setenv(name, value)
            torch.set_num_threads(before)
            set_threads(requested)
            return torch.get_num_threads()

    yield threads
    torch.set_num_threads(before)


@pytest.mark.parametrize(("processes", "share"), [(2, 4), (3, 2), (8, 1), (16, 1)])
def test_processes_of_a_machine_share_its_cores(threads: Callable[..., int], processes: int, share: int) -> None:
    assert threads(LOCAL_WORLD_SIZE=str(processes), OMP_NUM_THREADS="1") == share  # what torchrun sets


def test_a_number_of_threads_that_the_user_set_stays(threads: Callable[..., int]) -> None:
    assert threads(LOCAL_WORLD_SIZE="2", OMP_NUM_THREADS="3") == 1  # left as torch took it
    assert threads(LOCAL_WORLD_SIZE="1", OMP_NUM_THREADS="1") == 1
    assert threads() == 1
    assert threads(3) == threads(3, LOCAL_WORLD_SIZE="2", OMP_NUM_THREADS="1") == 3


@pytest.mark.parametrize(
    ("groups", "files", "cores"),
    [
        ("0::/\n", {"cpu.max": "200000 100000"}, 2),  # docker --cpus=2
        ("0::/\n", {"cpu.max": "50000 100000"}, 1),
        ("0::/\n", {"cpu.max": "max 100000"}, 8),
        ("0::/a/b\n", {"a/b/cpu.max": "max 100000", "a/cpu.max": "250000 100000"}, 3),
        ("4:memory:/\n2:cpu,cpuacct:/a\n", {"cpu/a/cpu.cfs_quota_us": "20000", "cpu/a/cpu.cfs_period_us": "10000"}, 2),
        ("1:cpu:/\n", {"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, 8),
        ("1:cpu:/of-the-host\n", {"cpu/cpu.cfs_quota_us": "400000", "cpu/cpu.cfs_period_us": "100000"}, 4),
    ],
)
def test_a_quota_of_control_groups_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, groups: str, files: dict[str, str], cores: int
) -> None:
    """`docker --cpus=2` on a large host: without it, as many threads as the host has cores share two."""
    (tmp_path / "cgroup").write_text(groups)
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text + "\n")
    monkeypatch.setattr(device, "_OWN_CGROUP", tmp_path / "cgroup")
    monkeypatch.setattr(device, "_CGROUPS", tmp_path)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)), raising=False)
    assert available_cores() == cores


def test_more_threads_than_cores_are_lowered(threads: Callable[..., int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "_cpu_quota", lambda: 2.0)
    assert threads(before=8) == 2
    assert threads(before=8, OMP_NUM_THREADS="8") == 8


# ---- adaptive threads ----


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch, two_threads: None) -> Callable[[float, float], int]:
    """Makes a pass take that long and use that much of the processors' time; returns its number of threads."""
    monkeypatch.setattr(device, "_threads_are_fixed", False)
    times = SimpleNamespace(wall=100.0, cpu=50.0)
    fake = SimpleNamespace(perf_counter=lambda: times.wall, process_time=lambda: times.cpu)
    adaptive = AdaptiveThreads([torch.zeros(1024, 1024)])  # large
    monkeypatch.setattr(device, "time", fake)

    def run_pass(wall: float, cpu: float) -> int:
        with adaptive:
            n_threads = torch.get_num_threads()
            times.wall += wall
            times.cpu += cpu
        assert torch.get_num_threads() == 2
        return n_threads

    return run_pass


def test_threads_that_nobody_disturbs_stay(clock: Callable[[float, float], int]) -> None:
    assert [clock(0.03, 0.055) for _ in range(50)] == [2] * 50


def test_starved_passes_go_to_one_thread_and_come_back_when_the_load_has_ended(
    clock: Callable[[float, float], int],
) -> None:
    assert clock(2.0, 1.5) == 2  # two threads should have used nearly four seconds
    assert [clock(0.3, 0.2) for _ in range(4)] == [1] * 4
    assert clock(0.3, 0.55) == 2  # a second later
    assert [clock(0.3, 0.55) for _ in range(5)] == [2] * 5


def test_under_lasting_load_several_threads_are_tried_ever_more_rarely(clock: Callable[[float, float], int]) -> None:
    used = [clock(0.1, 0.05) for _ in range(400)]
    assert used[:2] == [2, 1]
    assert used.count(2) <= 9  # after 1, 2, 4, 8, 8, ... seconds of 40


def test_a_number_of_threads_that_the_user_set_stays_under_load(
    clock: Callable[[float, float], int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(device, "_threads_are_fixed", True)
    assert [clock(2.0, 1.0) for _ in range(3)] == [2] * 3


@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize(("gains", "during"), [(True, 2), (False, 1)])
def test_a_small_network_has_several_threads_only_if_its_products_gain(
    monkeypatch: pytest.MonkeyPatch, gains: bool, during: int
) -> None:
    monkeypatch.setattr(device, "_threads_are_fixed", False)
    monkeypatch.setattr(
        device, "_fastest_product", lambda x, weight: 1.0 if torch.get_num_threads() == 1 or not gains else 0.5
    )
    with AdaptiveThreads([torch.zeros(64), torch.zeros(64, 64)]):
        assert torch.get_num_threads() == during
    assert torch.get_num_threads() == 2


def test_processes_share_host_memory_but_not_a_cuda_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert processes_on(CPU) == 4
    assert processes_on(torch.device("cuda:2")) == 1
    monkeypatch.delenv("LOCAL_WORLD_SIZE")
    assert processes_on(CPU) == 1


# ---- OpenMP ----


@pytest.fixture
def two_threads(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(device, "_threads_are_fixed", True)  # however busy the machine is
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    pause_workers()
    yield
    torch.set_num_threads(before)


def n_threads() -> int:
    """Of this process, as the system counts them."""
    return len(os.listdir("/proc/self/task"))


def work_in_parallel() -> None:
    assert torch.ones(1 << 18).exp_().sum() > 0


@needs_openmp
@pytest.mark.usefixtures("two_threads")
def test_workers_end_and_start_again() -> None:
    alone = n_threads()
    for _ in range(3):
        work_in_parallel()
        assert n_threads() == alone + 1
        pause_workers()
        assert n_threads() == alone
    pause_workers()  # without any


@needs_openmp
@pytest.mark.usefixtures("two_threads")
def test_a_call_keeps_its_workers_until_it_ends(llama: Llama) -> None:
    alone, during = n_threads(), []

    def hook(*_: object) -> None:
        during.append(n_threads())
        work_in_parallel()

    handle = llama.model.tok_embeddings.register_forward_pre_hook(hook)
    try:
        llama.generate([[1, 2, 3]], 4, temperature=0)
        list(llama.stream_text_completion("The", max_gen_len=4, temperature=0))
    finally:
        handle.remove()
    assert during.count(alone) == 2  # at the first pass of each call
    assert set(during) == {alone, alone + 1}
    assert n_threads() == alone


@needs_openmp
@pytest.mark.usefixtures("two_threads")
def test_a_thread_gives_up_its_workers_to_one_that_waits_for_the_lock() -> None:
    lock, seen = ModelLock(), []

    def other() -> None:
        with lock:
            seen.append(n_threads())

    thread = threading.Thread(target=other)
    with lock:
        work_in_parallel()
        thread.start()
        while not lock.is_wanted:
            time.sleep(0.001)
        with_both = n_threads()
    thread.join()
    assert seen == [with_both - 1]


_FORKED = """
import os, torch
from llama.distributed.device import pause_workers
torch.set_num_threads(2)
torch.ones(1 << 18).exp_()
child = os.fork()
if child == 0:
    torch.set_num_threads(1)
    pause_workers()
    os._exit(0)
raise SystemExit(os.waitpid(child, 0)[1])
"""


@needs_openmp
@pytest.mark.usefixtures("two_threads")
def test_a_forked_process_does_not_wait_for_its_parents_workers() -> None:
    subprocess.run([sys.executable, "-c", _FORKED], check=True, timeout=60, cwd=ROOT)


_FORKED_WITH_WORKERS = """
import os, signal, torch
from llama.distributed import device
device._omp_pause_resource_all = lambda: None
torch.set_num_threads(2)
torch.ones(1 << 18).exp_()
child = os.fork()
if child == 0:
    signal.alarm(30)
    torch.ones(1 << 18).exp_()
    os._exit(0)
raise SystemExit(os.waitpid(child, 0)[1])
"""


@pytest.mark.skipif(sys.platform != "linux", reason="forks a process that has threads")
def test_a_forked_process_computes_where_workers_cannot_be_ended() -> None:
    """As with torch 2.6, whose OpenMP lacks the function."""
    subprocess.run([sys.executable, "-c", _FORKED_WITH_WORKERS], check=True, timeout=60, cwd=ROOT)


# ---- freed memory ----


_PASSES = """
import resource, sys, torch
from llama.distributed.device import keep_freed_memory

torch.set_num_threads(1)
with keep_freed_memory(torch.device("cpu")):
    weights = [torch.ones(2**20) for _ in range(64)]
small = [[] for _ in range(1000)]


def faults(sizes):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    kept = [torch.ones(size) for size in sizes]
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


def resident():
    line = next(line for line in open("/proc/self/status") if line.startswith("VmRSS"))
    return int(line.split()[1]) // 1024


faults([2**22, 2**22, 2**21])
again, before = min(faults([2**22, 2**22, 2**21]) for _ in range(10)), resident()  # Linux may move pages meanwhile
del weights
print(again, before - resident())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="of glibc")
@pytest.mark.parametrize("setting", [None, "MALLOC_TRIM_THRESHOLD_"])
def test_passes_get_the_memory_that_earlier_ones_freed(setting: str | None) -> None:
    """And that of weights, which is not kept, goes back; nothing is changed where the user has set something."""
    environment = {"MALLOC_TRIM_THRESHOLD_": "131072", "MALLOC_MMAP_THRESHOLD_": "131072"} if setting else {}
    run = [sys.executable, "-c", _PASSES]
    out = subprocess.run(run, env={**os.environ, **environment}, cwd=ROOT, capture_output=True, text=True, check=True)
    n_faults, n_freed = map(int, out.stdout.split())
    assert n_freed > 240  # MiB, of 256
    assert n_faults > 5000 if setting else n_faults < 500
