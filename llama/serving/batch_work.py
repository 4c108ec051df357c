"""Distributes the requests of a batch over the replicas of the network, and collects their results.

Rank 0 reads requests and writes results. Each replica keeps its own batch full; the first rank of each further replica
exchanges messages with rank 0, which hands out requests as results come.
"""

from __future__ import annotations

import base64
import pickle
import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore, Store

from llama.distributed import groups
from llama.engine.output import Piece
from llama.serving.batch_file import Line, Reader, error_result, result
from llama.serving.batch_results import Results
from llama.serving.endpoints import Request
from llama.serving.errors import ApiError
from llama.serving.jobs import Job
from llama.serving.replica import Replica
from llama.tools.progress import Progress

T = TypeVar("T")
Numbered = tuple[int, Job]  # a job, and the number of its line
Ended = tuple[int, list[Piece]]  # the number of a job's line, and one piece for each of its choices
_POLL_S = 0.01  # between two looks for messages while nothing runs
_HEARTBEAT_S = 5.0  # after which a rank without messages sends an empty one
_SILENCE_S = 300.0  # after which a rank that has sent nothing counts as lost
_REPORT_S = 1.0  # between two reports of a replica while no request ends


class Channel:
    """Messages between two ranks, in order and without waiting.

    Both send an empty list every few seconds, by which each knows that the other one still runs.
    """

    def __init__(self, store: Store, send: str, receive: str, other: str) -> None:
        self._outbox, self._inbox = PrefixStore(send, store), PrefixStore(receive, store)
        self._n_sent = self._n_received = 0
        self._other = other
        self._last_sent = self._last_received = time.monotonic()

    def send(self, message: object) -> None:
        self._outbox.set(str(self._n_sent), base64.b85encode(pickle.dumps(message)).decode())
        self._n_sent += 1
        self._last_sent = time.monotonic()

    def receive(self) -> Iterator[Any]:
        """The messages that have arrived.

        Raises:
            RuntimeError: none has arrived for `_SILENCE_S`.
        """
        now = time.monotonic()
        if now - self._last_sent > _HEARTBEAT_S:
            self.send([])
        while self._inbox.check([str(self._n_received)]):
            message = pickle.loads(base64.b85decode(self._inbox.get(str(self._n_received))))
            self._inbox.delete_key(str(self._n_received))
            self._n_received += 1
            self._last_received = now
            yield message
        if now - self._last_received > _SILENCE_S:
            raise RuntimeError(
                f"{self._other} must send a message at least every {_SILENCE_S:.0f} seconds, got none; start the "
                "command again: it continues where this run stopped"
            )


def _channel(replica: int, *, is_first_rank: bool) -> Channel:
    """The channel between rank 0 and the first rank of another replica."""
    store = dist.distributed_c10d._get_default_store()
    down, up = f"batch/{replica}/jobs", f"batch/{replica}/results"
    return Channel(store, down, up, f"replica {replica}") if is_first_rank else Channel(store, up, down, "rank 0")


class Worker:
    """On the first rank of each further replica: takes jobs from rank 0, and returns results."""

    def __init__(self, replica: int) -> None:
        self._channel = _channel(replica, is_first_rank=False)
        self._jobs: deque[Numbered] = deque()
        self._is_last = False
        self._n_new = 0
        self._reported = time.monotonic()

    def take(self, n: int) -> list[Numbered] | None:
        """Up to `n` jobs, if there are any; None after the last one."""
        for message in self._channel.receive():
            self._is_last |= message is None
            self._jobs.extend(message or ())
        if not self._jobs and self._is_last:
            return None
        return [self._jobs.popleft() for _ in range(min(n, len(self._jobs)))]

    def deliver(self, ended: Sequence[Ended], n_new: int) -> None:
        self._n_new += n_new
        now = time.monotonic()
        if ended or now - self._reported > _REPORT_S:
            self._channel.send([(list(ended), self._n_new)])
            self._n_new, self._reported = 0, now


@dataclass
class Coordinator:
    """On rank 0: hands out the requests, and writes the results.

    Args:
        lines: the requests without results.
        read: checks a request.
        fingerprint: goes into the results.
        n_ahead: number of jobs that each further replica has at a time: those in its batch, and some that wait.
        progress: counts the results.
    """

    lines: Iterator[Line]
    read: Reader
    results: Results
    fingerprint: str
    n_ahead: int
    progress: Progress
    n_errors: int = 0
    n_prompt_tokens: int = 0
    n_new_tokens: int = 0
    _channels: dict[int, Channel] = field(default_factory=dict)
    _out: dict[int, tuple[int, Line, Request]] = field(default_factory=dict)  # by line number: its replica, ...
    _is_last: bool = False  # whether all requests are handed out
    _is_last_told: bool = False
    _started: float = field(default_factory=time.monotonic)

    def __post_init__(self) -> None:
        _, n_replicas = groups.replica()
        self._channels = {i: _channel(i, is_first_rank=True) for i in range(1, n_replicas)}

    def take(self, n: int) -> list[Numbered] | None:
        """Up to `n` jobs for the first replica; None after the last one."""
        self.exchange()
        jobs = self._next(n, 0)
        return None if self._is_last and not jobs else jobs

    def deliver(self, ended: Sequence[Ended], n_new: int) -> None:
        """Writes results, and exchanges messages with the other replicas."""
        self._write(ended, n_new)
        self.exchange()

    def finish(self) -> None:
        """Waits until all requests have results."""
        self.exchange()
        while self._out:
            time.sleep(_POLL_S)
            self.exchange()

    def exchange(self) -> None:
        """Writes the other replicas' results, and sends them jobs."""
        for replica, channel in self._channels.items():
            for message in channel.receive():
                for ended, n_new in message:
                    self._write(ended, n_new)
            if not self._is_last:
                n_there = sum(where == replica for where, _, _ in self._out.values())
                if jobs := self._next(self.n_ahead - n_there, replica):
                    channel.send(jobs)
        if self._is_last and not self._is_last_told:
            for channel in self._channels.values():
                channel.send(None)
            self._is_last_told = True

    def _next(self, n: int, replica: int) -> list[Numbered]:
        """Up to `n` jobs for a replica. A request that is wrong gets its result at once."""
        jobs: list[Numbered] = []
        while len(jobs) < n and not self._is_last:
            line = next(self.lines, None)
            if line is None:
                self._is_last = True
                break
            try:
                request = self.read(line)
            except ApiError as error:
                self.n_errors += 1
                self._append(error_result(line, error))
                continue
            self._out[line.number] = replica, line, request
            jobs.append((line.number, request.job))
        return jobs

    def _write(self, ended: Sequence[Ended], n_new: int) -> None:
        self.n_new_tokens += n_new
        for number, choices in ended:
            _, line, request = self._out.pop(number)
            self.n_prompt_tokens += sum(map(len, request.job.prompts))
            self._append(result(line, request, choices, self.read.model, self.fingerprint))

    def _append(self, line: bytes) -> None:
        self.results.append(line)
        speed = self.n_new_tokens / max(time.monotonic() - self._started, 1e-9)
        self.progress.add(1, f"{speed:.0f} tokens/s")


def complete_jobs(replica: Replica, source: Coordinator | Worker | None) -> None:
    """Completes jobs until the last one.

    Args:
        source: hands out the jobs, on the first rank of each replica; None on the other ranks.
    """
    may_come = True
    while may_come or not replica.is_idle:
        if may_come and replica.n_free > 0:
            jobs = groups.broadcast_in_group(source.take(replica.n_free) if source else None)
            may_come = jobs is not None
            for number, job in jobs or ():
                replica.start(number, job)
        if replica.is_idle:
            time.sleep(_POLL_S if may_come else 0)
            continue
        ended, n_new = replica.step()
        if source:
            source.deliver(ended, n_new)
