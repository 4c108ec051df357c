"""The lock that all users of a network share, and what they need to know of each other."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from typing import Any
from weakref import ReferenceType, WeakKeyDictionary

from llama.distributed.device import pause_workers


class _Waiter:
    """A thread that waits for the lock, or until `unless` holds."""

    __slots__ = ("has_lock", "signal", "unless")

    def __init__(self, unless: Callable[[], bool] | None) -> None:
        self.unless = unless
        self.has_lock = False
        self.signal = threading.Lock()
        self.signal.acquire()

    @property
    def is_done(self) -> bool:
        return self.unless is not None and self.unless()


class ModelLock:
    """A lock that is handed over in order of arrival. A context manager: entering acquires it.

    A thread may wait for it *unless* something happens first, such as that the holder computes what the thread wants.
    Only threads that have a reason to run are woken.

    Attributes:
        holder: identifier of the thread that holds the lock; None if it is free.
        engine: weak reference to the network's shared engine; None before there is one.
        last_writer: the mark of the `ModelRunner` that last wrote to the KV cache (not the runner itself, which would
            keep the network alive).
    """

    def __init__(self) -> None:
        self.holder: int | None = None
        self.engine: ReferenceType[Any] | None = None
        self.last_writer: object = None
        self._first_thread: int | None = None
        self._mutex = threading.Lock()  # guards what follows
        self._is_held = False
        self._waiters: deque[_Waiter] = deque()

    def check_thread(self, *, several_ranks: bool) -> None:
        """Raises RuntimeError in a second thread if there are several ranks, which must make calls in one order."""
        self._first_thread = self._first_thread or threading.get_ident()
        if several_ranks and self._first_thread != threading.get_ident():
            raise RuntimeError(
                "under model parallelism all calls must come from one thread, got a call from a second one; make them "
                "in one thread, so that all ranks make the same calls in the same order"
            )

    @property
    def is_held(self) -> bool:
        """Whether a thread holds the lock."""
        return self._is_held

    @property
    def is_wanted(self) -> bool:
        """Whether a thread waits for the lock unconditionally."""
        with self._mutex:
            return any(waiter.unless is None for waiter in self._waiters)

    def acquire(self, unless: Callable[[], bool] | None = None) -> bool:
        """Waits for the lock, or until `unless()` is true; returns whether this thread holds it.

        Args:
            unless: called by any thread, quickly; asked again at each `wake` and when the lock would be handed over.
        """
        if self.holder == threading.get_ident():
            raise RuntimeError(
                "a call must not be made from inside another call on the same network, such as in a hook; wait until "
                "that call has ended"
            )
        waiter = _Waiter(unless)
        with self._mutex:
            if waiter.is_done:
                return False
            if self._is_held:
                self._waiters.append(waiter)
            else:
                self._is_held = waiter.has_lock = True
        if not waiter.has_lock:
            self._wait(waiter)
        if waiter.has_lock:
            self.holder = threading.get_ident()
        return waiter.has_lock

    def _wait(self, waiter: _Waiter) -> None:
        try:
            waiter.signal.acquire()
        except BaseException:  # Ctrl-C
            with self._mutex:
                if waiter in self._waiters:
                    self._waiters.remove(waiter)
                elif waiter.has_lock:
                    self._hand_over()
            raise

    def try_acquire(self) -> bool:
        """Acquires the lock without waiting; returns False if this or another thread holds it."""
        with self._mutex:
            if self._is_held:
                return False
            self._is_held = True
        self.holder = threading.get_ident()
        return True

    def release(self) -> None:
        """Hands the lock over to the first thread that waits for it."""
        self.holder = None
        if self._waiters:
            pause_workers()
        with self._mutex:
            self._hand_over()

    def _hand_over(self) -> None:
        while self._waiters:
            waiter = self._waiters.popleft()
            waiter.has_lock = not waiter.is_done
            waiter.signal.release()
            if waiter.has_lock:
                return
        self._is_held = False

    def wake(self) -> None:
        """Wakes the threads whose `unless()` has become true."""
        with self._mutex:
            for waiter in [waiter for waiter in self._waiters if waiter.is_done]:
                self._waiters.remove(waiter)
                waiter.signal.release()

    def __enter__(self) -> None:
        self.acquire()

    def __exit__(self, *exc_info: object) -> None:
        self.release()


_locks: WeakKeyDictionary[Any, ModelLock] = WeakKeyDictionary()
_locks_lock = threading.Lock()


def lock_of(model: Any) -> ModelLock:
    """Returns the network's `ModelLock`, always the same one."""
    with _locks_lock:
        try:
            return _locks.setdefault(model, ModelLock())
        except TypeError:  # an object that cannot be a dictionary key, such as one that compares by value
            lock: ModelLock = vars(model).setdefault("_model_lock", ModelLock())
            return lock
