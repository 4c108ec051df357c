"""Keeps ranks in lockstep: checks that all make the same calls, and tells the others when one fails, exits or hangs.

Ranks exchange short strings through the key-value store of their process group. Unlike a collective, the store works
with every backend, shows which rank is missing, and still works when a connection of the group is broken.
"""

from __future__ import annotations

import os
import socket
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from hashlib import blake2b
from pathlib import Path
from typing import Any, TypeVar

import torch.distributed as dist
from torch.distributed.distributed_c10d import Store

from llama.errors import RankError

T = TypeVar("T")
REFUSED = "refused"
TIMEOUT_VARIABLE = "LLAMA_RANK_TIMEOUT"
_SPIN_S = 0.002  # a waiting rank polls without sleeping for this long
_CHECK_INTERVAL_S = 0.5  # between a waiting rank's checks that the others are still running
_LINGER_S = 1.0  # maximum time for which rank 0 keeps the store open at exit
_GRACE_S = 5.0  # how long a rank that failed waits to see whether all others fail in the same way
_STORE_ENDED = "the process that holds the ranks' key-value store ended (rank 0, or torchrun)"
_COMMUNICATION = ("gloo", "NCCL", "Connection closed", "Connection reset", "pair closure", "ProcessGroup")


class Lockstep:
    """Synchronizes this rank with the others, for which the constructor waits. Not thread-safe.

    Args:
        store: a key-value store that all ranks can reach, used for nothing else.
        timeout_s: maximum time in seconds to wait for the other ranks to make the same call.

    Attributes:
        failure: why the ranks can no longer work together; None while they can.
    """

    def __init__(self, store: Store, rank: int, world_size: int, timeout_s: float) -> None:
        self.failure: str | None = None
        self._store = store
        self._rank = rank
        self._world = range(world_size)
        self._timeout_s = timeout_s
        self._exchanges: Counter[str] = Counter()
        store.set(f"process/{rank}", _describe_process(os.getpid()))
        self._wait({other: f"process/{other}" for other in self._world}, timeout_s, "start")

    def leave(self) -> None:
        """Tells the other ranks that this one makes no more calls. To be called when the process exits.

        Rank 0, which may host the store, waits up to a second for the others, so that they can still read from it.
        """
        try:
            self._store.set(f"left/{self._rank}", "")
            if self._rank == 0:
                _poll(lambda: all(map(self._has_ended, self._world[1:])), _LINGER_S)
        except RuntimeError:  # the process that hosts the store has already ended
            return

    def check(self) -> None:
        """Raises RankError if the ranks can no longer work together."""
        if self.failure is not None:
            raise self._error()

    def exchange(self, value: str, ranks: Sequence[int], action: str, timeout_s: float | None = None) -> list[str]:
        """Returns the values that all `ranks` pass, in the order of `ranks` (all-gather).

        Args:
            ranks: the ranks that take part, including this one; all must call this equally often.
            action: what the ranks do here; completes "rank 1 did not ..." in the error.
            timeout_s: None for the constructor's.
        """
        self.check()
        group = ",".join(map(str, ranks))
        number = self._exchanges[group]
        self._exchanges[group] += 1
        keys = {rank: f"{group}/{number}/{rank}" for rank in ranks}
        try:
            self._store.set(keys[self._rank], value)
            self._wait(keys, timeout_s or self._timeout_s, action, own=keys[self._rank])
            values = [text.decode() for text in self._store.multi_get(list(keys.values()))]
            if number >= 2:  # every rank has taken part in exchange number - 1, so it has read all values of number - 2
                self._store.delete_key(f"{group}/{number - 2}/{self._rank}")
        except dist.DistError as error:
            self.failure = _STORE_ENDED
            raise self._error() from error
        return values

    def compare_calls(self, call: object, groups: Sequence[Sequence[int]], timeout_s: float | None = None) -> None:
        """Raises RankError on all ranks unless all of them make the same call: see `groups.compare_calls`.

        `groups` are this rank's model-parallel group and, with replicas, the ranks that hold the same shard.
        """
        error = ""
        value = REFUSED if call is None else f"{_name(call)} {_digest(call)}"
        for ranks in groups:
            values = self.exchange(value, ranks, f"make the call {_name(call)}", timeout_s)
            if len(set(values)) == 1:
                continue
            error = error or _difference(dict(zip(ranks, values, strict=True)), self._rank, call)
            value = values[0] if REFUSED in values else "different calls"
            if any(other.startswith("stream ") for other in values):  # whose next steps would be out of step
                self.fail(error)
        if error and call is not None:
            raise RankError(error)

    def broadcast_flag(self, flag: bool, ranks: Sequence[int], stream: int) -> bool:
        """Returns the flag of the first of `ranks`; all of them must be at a step of the same stream."""
        values = self.exchange(f"stream {stream} {int(flag)}", ranks, "take the next step of a stream")
        steps = {value.rsplit(" ", 1)[0] for value in values}
        if steps != {f"stream {stream}"}:
            error = _difference(dict(zip(ranks, values, strict=True)), self._rank, ("a step of a stream",))
            self.fail(error)
            raise RankError(error)
        return values[0].endswith("1")

    def fail(self, reason: str) -> None:
        """Records that the ranks can no longer work together, for all ranks. Only the first reason is kept."""
        try:
            self.failure = self._store.compare_set("failure", "", reason).decode() if reason != _STORE_ENDED else reason
        except RuntimeError:  # the process that hosts the store has ended
            self.failure = reason

    @contextmanager
    def guard(self, close_groups: Callable[[], None]) -> Iterator[None]:
        """Context manager of `groups.rank_errors`; `close_groups` closes the connections that others may wait on."""
        self.check()
        try:
            yield
        except RankError:
            if self.failure is not None:
                close_groups()
            raise
        except Exception as error:
            if _is_communication_error(error):
                self.fail(self._find_reason() or f"rank {self._rank} lost the connection to another rank")
                traceback.clear_frames(error.__traceback__)  # their locals keep the groups' connections open
                close_groups()
                raise self._error() from error
            if not self._all_failed_alike(error):
                self.fail(f"rank {self._rank} failed: {_short(error)}")
                close_groups()
            raise

    def _wait(self, keys: dict[int, str], timeout_s: float, action: str, *, own: str | None = None) -> None:
        """Waits until the store has each rank's key; on failure, deletes the key `own` and raises RankError."""
        now = since = last_check = time.monotonic()
        while not self._store.check(list(keys.values())):
            time.sleep(0 if now - since < _SPIN_S else min(0.05, (now - since) / 10))
            now = time.monotonic()
            if now - last_check < _CHECK_INTERVAL_S:
                continue
            last_check = now
            missing = [rank for rank, key in keys.items() if not self._store.check([key])]
            reason = self._posted() or self._failing(missing) or self._ended(missing, keys)
            if reason is None and missing and now - since > timeout_s:
                reason = f"{_ranks(missing)} did not {action} within {timeout_s:g} seconds (set by {TIMEOUT_VARIABLE})"
            if reason is not None:
                if own is not None:
                    self._store.delete_key(own)  # otherwise a late rank would find all keys and continue alone
                self.fail(reason)
                raise self._error()

    def _failing(self, missing: Sequence[int]) -> str | None:
        """Describes the error of a missing rank that has failed in its own work; None if there is none."""
        for rank in missing:
            key = f"errors/{self._exchanges['errors']}/{rank}"
            if self._store.check([key]):
                return f"rank {rank} failed: {self._store.get(key).decode().partition(' ')[2]}"
        return None

    def _ended(self, ranks: Sequence[int], keys: Mapping[int, str] = {}) -> str | None:
        """Names the ranks that have ended without setting their key, if they have one; None if there are none."""
        gone = [rank for rank in ranks if self._has_ended(rank)]
        gone = [rank for rank in gone if rank not in keys or not self._store.check([keys[rank]])]
        return f"{_ranks(gone)} ended" if gone else None

    def _has_ended(self, rank: int) -> bool:
        if self._store.check([f"left/{rank}"]):
            return True
        return self._store.check([f"process/{rank}"]) and not _is_running(self._store.get(f"process/{rank}").decode())

    def _find_reason(self) -> str | None:
        """Finds out why a connection broke, waiting until a rank posts a reason or ends; None if none does in time."""
        others = [rank for rank in self._world if rank != self._rank]
        try:
            return _poll(lambda: self._posted() or self._ended(others), _GRACE_S + 1)
        except RuntimeError:
            return _STORE_ENDED

    def _all_failed_alike(self, error: Exception) -> bool:
        """Whether all ranks raise the same type of error at the same place."""
        lines = [(frame.filename, frame.lineno) for frame in traceback.extract_tb(error.__traceback__)]
        place = _digest((type(error).__name__, lines))
        number = self._exchanges["errors"]
        self._exchanges["errors"] += 1
        keys = [f"errors/{number}/{rank}" for rank in self._world]
        try:
            self._store.set(keys[self._rank], f"{place} {_short(error)}")
            _poll(lambda: self._store.check(keys) or self._posted(), _GRACE_S)
            errors = self._store.multi_get(keys) if self._store.check(keys) else [b""]
            return all(text.decode().startswith(f"{place} ") for text in errors)
        except RuntimeError:
            return False

    def _error(self) -> RankError:
        return RankError(f"{self.failure}; restart all ranks")

    def _posted(self) -> str | None:
        return self._store.get("failure").decode() if self._store.check(["failure"]) else None


def _poll(condition: Callable[[], T], seconds: float) -> T:
    """What the condition returns, as soon as that is true or the time is over."""
    deadline = time.monotonic() + seconds
    while not (result := condition()) and time.monotonic() < deadline:
        time.sleep(0.05)
    return result


def _difference(values: dict[int, str], rank: int, call: object) -> str:
    """Describes how the calls of the ranks differ."""
    refused = [other for other, value in values.items() if value == REFUSED]
    if refused:
        return f"all ranks must make the same calls, but {_ranks(refused)} refused the arguments of this one"
    own = values[rank]
    other, theirs = next((other, value) for other, value in values.items() if value != own)
    name, their_name = _name(call), theirs.split()[0]
    if their_name == own.split()[0]:
        same = "all ranks must make the same calls with the same arguments"
        return f"{same}, got different arguments of {name} on rank {rank} and rank {other}"
    theirs = "a step of a stream" if their_name == "stream" else their_name
    return f"all ranks must make the same calls, got {name} on rank {rank} and {theirs} on rank {other}"


def _name(call: object) -> str:
    return str(call[0]) if isinstance(call, tuple) else "a call whose arguments it refused"


def _digest(value: Any) -> str:
    return blake2b(repr(value).encode(), digest_size=16).hexdigest()


def _ranks(ranks: Sequence[int]) -> str:
    return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))}"


def _short(error: Exception) -> str:
    """The type and the first line of an error, up to 500 characters."""
    line = next(iter(str(error).splitlines()), "")
    return f"{type(error).__name__}: {line}"[:500]


def _is_communication_error(error: Exception) -> bool:
    return isinstance(error, dist.DistError) or (
        isinstance(error, RuntimeError) and any(word in str(error) for word in _COMMUNICATION)
    )


def _describe_process(pid: int) -> str:
    """Identifies a process by its machine and PID namespace (containers differ in it), its number and start time."""
    try:
        machine = f"{Path('/proc/sys/kernel/random/boot_id').read_text().strip()} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        machine = socket.gethostname()
    return f"{machine}|{pid}|{_started(pid)}"


def _is_running(process: str) -> bool:
    """Whether the process that `_describe_process` identified is running; assumed to be if on another machine."""
    machine, pid, _ = process.split("|")
    now = _describe_process(int(pid))
    return now == process or not now.startswith(f"{machine}|")


def _started(pid: int) -> str:
    """Start time of a process on this machine, as a string to compare; "" if it is not running."""
    with suppress(OSError):
        if Path("/proc/self/stat").exists():
            state, *fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
            return "" if state in "ZX" else fields[18]
        os.kill(pid, 0)
        return "running"
    return ""
