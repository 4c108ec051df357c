"""The lock that all users of a network share, and what they need to know of each other.

Ctrl-C can come between any two lines, also between the end of a pass and the release of the lock. So no state here
depends on a line that has to run: there is a queue, which built-in operations alone change, and whoever stands first in
it holds the lock for as long as the function that acquired it runs. No mutex guards the queue, so that the garbage
collector may close an abandoned stream at any point.
"""

from __future__ import annotations

import contextlib
import os
import queue
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from types import FrameType
from typing import Any
from weakref import ReferenceType, WeakKeyDictionary

from llama.distributed.device import pause_workers

_PATIENCE_S = 0.1  # how long to wait before asking whether the holder still runs
_FORK_PATIENCE_S = 10.0  # how long a fork waits for the end of another thread's pass


class _Ticket:
    """A thread's place in the queue for the lock."""

    def __init__(self, frame: FrameType, unless: Callable[[], bool] | None) -> None:
        self.thread = threading.get_ident()
        self.frame = frame
        self.unless = unless
        self.signal: queue.SimpleQueue[None] = queue.SimpleQueue()

    @property
    def is_done(self) -> bool:
        return self.unless is not None and self.unless()

    @property
    def is_alive(self) -> bool:
        """Whether the function that acquired the lock, or waits for it, is still running."""
        try:
            self.frame.clear()  # refused for a running function; one that has ended loses its local variables
        except RuntimeError:
            return self.thread in sys._current_frames()
        return False


class ModelLock:
    """A lock that is handed over in order of arrival. A context manager: entering acquires it.

    A thread may wait for it *unless* something happens first, such as that the holder computes what the thread wants.
    Only threads that have a reason to run are woken. The function that acquires the lock must release it; if it ends
    without, as it can when it is interrupted, the lock is free. So a generator must not yield while it holds the lock.

    Attributes:
        engines: weak references to the network's engines.
        last_writer: the mark of the `ModelRunner` that last wrote to the KV cache (not the runner itself, which would
            keep the network alive).
    """

    def __init__(self) -> None:
        self.engines: deque[ReferenceType[Any]] = deque()
        self.last_writer: object = None
        self._first_thread: int | None = None
        self._queue: deque[_Ticket] = deque()  # the first one's thread holds the lock, the others wait
        self._last_thread: int | None = None  # that held the lock
        self._changes_hands = False  # whether it came from another thread

    def check_thread(self, *, several_ranks: bool) -> None:
        """Raises RuntimeError in a second thread if there are several ranks, which must make calls in one order."""
        self._first_thread = self._first_thread or threading.get_ident()
        if several_ranks and self._first_thread != threading.get_ident():
            raise RuntimeError(
                "under model parallelism all calls must come from one thread, got a call from a second one; make them "
                "in one thread, so that all ranks make the same calls in the same order"
            )

    @property
    def holder(self) -> int | None:
        """Identifier of the thread that holds the lock; None if it is free."""
        first = self._first()
        return first.thread if first and first.is_alive else None

    @property
    def n_waiting(self) -> int:
        """Number of threads that wait for the lock."""
        return max(0, len(self._queue) - 1)

    @property
    def is_wanted(self) -> bool:
        """Whether a thread waits for the lock unconditionally."""
        return any(ticket.unless is None for ticket in list(self._queue)[1:])

    def acquire(self, unless: Callable[[], bool] | None = None, *, frame: FrameType | None = None) -> bool:
        """Waits for the lock, or until `unless()` is true; returns whether this thread holds it.

        Args:
            unless: called by any thread, quickly; asked again at each `wake` and when the lock is handed over.
            frame: of the function that acquires the lock; None for the caller.
        """
        ticket = _Ticket(frame or sys._getframe(1), unless)
        if (first := self._first()) and first.thread == ticket.thread:
            if first.is_alive:
                raise RuntimeError(
                    "a call must not be made from inside another call on the same network, such as in a hook; wait "
                    "until that call has ended"
                )
            self._remove(first)
        if ticket.is_done:
            return False
        try:
            self._queue.append(ticket)
            while not ticket.is_done:
                if self._queue[0] is ticket:
                    self._changes_hands = self._last_thread not in (None, ticket.thread)
                    self._last_thread = ticket.thread
                    return True
                try:
                    ticket.signal.get(timeout=_PATIENCE_S)
                except queue.Empty:
                    self._drop_ended()
        except BaseException:  # Ctrl-C
            self._remove(ticket)
            raise
        self._remove(ticket)
        return False

    def try_acquire(self) -> bool:
        """Acquires the lock without waiting; returns False if this or another thread holds it."""
        self._drop_ended()
        thread = threading.get_ident()
        return not self._queue and self.acquire(
            unless=lambda: (first := self._first()) is not None and first.thread != thread, frame=sys._getframe(1)
        )

    def release(self) -> None:
        """Hands the lock over to the first thread that waits for it. Without effect if this thread does not hold it."""
        if self.n_waiting or self._changes_hands:
            pause_workers()  # the next pass may be another thread's
        if (first := self._first()) and first.thread == threading.get_ident():
            self._remove(first)

    def wake(self) -> None:
        """Wakes the threads whose `unless()` has become true."""
        for ticket in list(self._queue)[1:]:
            if ticket.is_done:
                ticket.signal.put(None)

    def __enter__(self) -> None:
        self.acquire(frame=sys._getframe(1))

    def __exit__(self, *exc_info: object) -> None:
        self.release()

    def _first(self) -> _Ticket | None:
        return next(iter(list(self._queue)), None)

    def _remove(self, ticket: _Ticket) -> None:
        """Removes a thread from the queue, if it is there, and tells the first one that it holds the lock."""
        with contextlib.suppress(ValueError):
            self._queue.remove(ticket)
        if first := self._first():
            first.signal.put(None)

    def _drop_ended(self) -> None:
        """Removes those in front whose functions have ended without a release."""
        while (first := self._first()) and not first.is_alive:
            self._remove(first)


_locks: WeakKeyDictionary[Any, ModelLock] = WeakKeyDictionary()


def lock_of(model: Any) -> ModelLock:
    """Returns the network's `ModelLock`, always the same one."""
    try:
        return _locks.setdefault(model, ModelLock())
    except TypeError:  # an object that cannot be a dictionary key, such as one that compares by value
        lock: ModelLock = vars(model).setdefault("_model_lock", ModelLock())
        return lock


_held_for_fork: list[ModelLock] = []


def _before_fork() -> None:
    """Waits for other threads' passes: the child has what such a thread has locked, but not the thread."""
    end = time.monotonic() + _FORK_PATIENCE_S
    for lock in list(_locks.values()):
        is_mine = lock.holder == threading.get_ident()
        if not is_mine and lock.acquire(lambda: time.monotonic() > end, frame=sys._getframe(1)):  # which forks
            _held_for_fork.append(lock)


def _after_fork() -> None:
    while _held_for_fork:
        _held_for_fork.pop().release()


os.register_at_fork(before=_before_fork, after_in_parent=_after_fork, after_in_child=_after_fork)
