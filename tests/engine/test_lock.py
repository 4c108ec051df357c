"""The lock of a network: one holder at a time, handed over in order, and waited for until something else happens."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial

import pytest
from torch import nn

from llama.engine.lock import _PATIENCE_S, ModelLock, lock_of


def test_users_of_one_network_share_a_lock_and_others_do_not() -> None:
    class Equal:
        """By value, as a dataclass is: no key of a dictionary."""

        def __eq__(self, other: object) -> bool:
            return True

    one, another, equal, too = nn.Linear(1, 1), nn.Linear(1, 1), Equal(), Equal()
    locks = [lock_of(x) for x in (one, another, equal, too)]
    assert len({id(lock) for lock in locks}) == 4
    assert [lock_of(x) for x in (one, another, equal, too)] == locks


def test_a_call_from_inside_of_another_is_an_error_and_not_a_deadlock() -> None:
    lock, errors = ModelLock(), []

    def call_inside() -> None:
        with lock:
            with pytest.raises(RuntimeError, match="must not be made from inside another call") as info, lock:
                pass
            errors.append(info.value)
            assert lock.holder == threading.get_ident()

    thread = threading.Thread(target=call_inside, daemon=True)
    thread.start()
    thread.join(timeout=60)
    assert not thread.is_alive() and len(errors) == 1
    assert lock.holder is None


def test_try_acquire_does_not_wait() -> None:
    lock = ModelLock()
    with lock:
        assert not lock.try_acquire()
        with ThreadPoolExecutor(1) as pool:
            assert not pool.submit(lock.try_acquire).result(timeout=60)
        assert lock.holder == threading.get_ident()
    assert lock.try_acquire() and lock.holder == threading.get_ident()
    lock.__exit__()
    assert lock.holder is None


def test_a_call_that_fails_releases_the_lock() -> None:
    lock = ModelLock()
    with pytest.raises(ZeroDivisionError), lock:
        1 / 0  # noqa: B018
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(take_and_release, lock).result(timeout=60) is True


def test_several_ranks_are_called_from_one_thread_only() -> None:
    lock, other = ModelLock(), ModelLock()
    for _ in range(2):
        lock.check_thread(several_ranks=True)
        other.check_thread(several_ranks=False)
    with ThreadPoolExecutor(1) as pool:
        with pytest.raises(RuntimeError, match="must come from one thread"):
            pool.submit(lock.check_thread, several_ranks=True).result()
        pool.submit(other.check_thread, several_ranks=False).result()
    lock.check_thread(several_ranks=True)


# Waiting in order, or until something happens


class Waiters:
    """Threads that wait for a lock, one after another."""

    def __init__(self, lock: ModelLock, pool: ThreadPoolExecutor) -> None:
        self.lock, self._pool = lock, pool

    def start(self, work: Callable[[], object]) -> Future[object]:
        """Starts a thread that will wait for the lock; returns when it does."""
        n_waiting = self.lock.n_waiting
        future = self._pool.submit(work)
        until(lambda: self.lock.n_waiting > n_waiting)
        return future


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)


def take_and_release(lock: ModelLock, unless: Callable[[], bool] | None = None) -> bool:
    if not lock.acquire(unless):
        return False
    lock.release()
    return True


@pytest.fixture
def lock() -> ModelLock:
    return ModelLock()


@pytest.fixture
def waiters(lock: ModelLock) -> Iterator[Waiters]:
    with ThreadPoolExecutor(8) as pool:
        yield Waiters(lock, pool)


def test_the_lock_is_handed_over_in_order_of_arrival(lock: ModelLock, waiters: Waiters) -> None:
    order: list[int] = []

    def work(i: int) -> None:
        with lock:
            order.append(i)

    with lock:
        futures = [waiters.start(partial(work, i)) for i in range(6)]
        assert lock.is_wanted
        assert order == []
    for future in futures:
        future.result(timeout=60)
    assert order == list(range(6)) and lock.holder is None and not lock.is_wanted


def test_a_thread_that_waits_unless_is_woken_without_the_lock_when_that_holds(
    lock: ModelLock, waiters: Waiters
) -> None:
    happened: set[int] = set()
    with lock:
        futures = [waiters.start(partial(take_and_release, lock, lambda i=i: i in happened)) for i in range(3)]
        assert not lock.is_wanted
        lock.wake()
        assert lock.n_waiting == 3
        happened.add(1)
        lock.wake()
        assert futures[1].result(timeout=60) is False
        assert not futures[0].done() and not futures[2].done()
        happened.add(0)
    # When the lock is released, the first thread has no use for it any more: the third one gets it.
    assert futures[0].result(timeout=60) is False
    assert futures[2].result(timeout=60) is True
    assert lock.holder is None


def test_a_release_by_another_thread_has_no_effect(lock: ModelLock, waiters: Waiters) -> None:
    with lock:
        waiters._pool.submit(lock.release).result(timeout=60)
        assert lock.holder == threading.get_ident()


@pytest.mark.parametrize("is_late", [False, True])
def test_an_interrupted_wait_leaves_the_lock_to_the_others(lock: ModelLock, waiters: Waiters, is_late: bool) -> None:
    """Interrupted while another thread holds it, or when it has been handed over."""
    interrupted = threading.Event()

    def unless() -> bool:
        if interrupted.is_set() and (lock.n_waiting == 1 or not is_late):
            raise KeyboardInterrupt
        return False

    with lock:
        first = waiters.start(partial(take_and_release, lock, unless))
        other = waiters.start(partial(take_and_release, lock))
        interrupted.set()
        if not is_late:
            with pytest.raises(KeyboardInterrupt):
                first.result(timeout=60)
            assert lock.n_waiting == 1
    with pytest.raises(KeyboardInterrupt):
        first.result(timeout=60)
    assert other.result(timeout=60) is True
    assert lock.holder is None


# Released by nobody


def take_and_end(lock: ModelLock) -> bool:
    return lock.acquire()  # as where Ctrl-C comes before the caller's `try`


def test_a_function_that_ends_holds_nothing(lock: ModelLock, waiters: Waiters) -> None:
    assert take_and_end(lock)
    assert lock.holder is None
    assert take_and_end(lock), "not a call from inside another"
    assert waiters._pool.submit(take_and_release, lock).result(timeout=60) is True
    assert lock.try_acquire()
    lock.release()


def test_a_thread_that_ends_holds_nothing(lock: ModelLock) -> None:
    thread = threading.Thread(target=take_and_end, args=(lock,))
    thread.start()
    thread.join()
    with lock:
        assert lock.holder == threading.get_ident()


def test_those_who_wait_notice_that_the_holder_has_ended(lock: ModelLock, waiters: Waiters) -> None:
    def hold() -> None:
        lock.acquire()
        until(lambda: lock.n_waiting == 1)

    holder = waiters._pool.submit(hold)
    until(lambda: lock.holder is not None)
    assert waiters._pool.submit(take_and_release, lock).result(timeout=60) is True
    holder.result(timeout=60)


def test_the_holder_may_run_for_long(lock: ModelLock, waiters: Waiters) -> None:
    """Longer than those who wait are patient, and deep inside other functions."""
    with lock:
        future = waiters.start(partial(take_and_release, lock))
        (lambda: time.sleep(3 * _PATIENCE_S))()
        assert not future.done() and lock.holder == threading.get_ident()
    assert future.result(timeout=60) is True
