"""Workers of OpenMP: a thread keeps them between its own steps, and gives them up to other threads."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator

import pytest
import torch

from llama import Llama
from llama.distributed import openmp
from llama.distributed.openmp import pause_workers
from llama.engine.lock import ModelLock
from tests.conftest import ROOT

pytestmark = pytest.mark.skipif(openmp._omp_pause_resource_all() is None, reason="torch runs on another OpenMP library")


@pytest.fixture(autouse=True)
def _two_threads() -> Iterator[None]:
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


def test_workers_end_and_start_again() -> None:
    alone = n_threads()
    for _ in range(3):
        work_in_parallel()
        assert n_threads() == alone + 1
        pause_workers()
        assert n_threads() == alone
    pause_workers()  # without any


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


def test_without_the_library_nothing_happens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(openmp, "_omp_pause_resource_all", lambda: None)
    work_in_parallel()
    before = n_threads()
    pause_workers()
    assert n_threads() == before


_FORKED = """
import os, torch
from llama.distributed.openmp import pause_workers
torch.set_num_threads(2)
torch.ones(1 << 18).exp_()
child = os.fork()
if child == 0:
    torch.set_num_threads(1)
    pause_workers()
    os._exit(0)
raise SystemExit(os.waitpid(child, 0)[1])
"""


def test_a_forked_process_does_not_wait_for_its_parents_workers() -> None:
    subprocess.run([sys.executable, "-c", _FORKED], check=True, timeout=60, cwd=ROOT)
