"""The requests of a batch on their way through the network: handed out to replicas, completed, written.

The first rank reads requests and writes results. Each replica of the network keeps its own batch full; the first ranks
of the others exchange messages with the first rank, which hands out requests as results come.
"""

from __future__ import annotations

import base64
import pickle
import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from fairscale.nn.model_parallel.initialize import get_model_parallel_group, get_model_parallel_src_rank
from torch.distributed.distributed_c10d import PrefixStore, Store

from llama import Llama, runtime
from llama.engine import Call, Engine
from llama.engine import Sequence as EngineSequence
from llama.inputs import SamplingParams
from llama.runner import device_of
from llama.sampling import Sampler
from llama.tokenizer import IncrementalDetokenizer
from llama.tools.batch_file import Completion, Line, Reader, RequestError, error_result, result
from llama.tools.batch_results import Results

T = TypeVar("T")
_POLL_S = 0.01  # between two looks for a message while there is nothing else to do
_HEARTBEAT_S = 5.0  # after which a replica that has nothing to say sends an empty message
_SILENCE_S = 300.0  # after which a replica that has sent nothing is taken for lost
_REPORT_S = 1.0  # between two reports of a replica while no request ends


@dataclass(frozen=True)
class Job:
    """A request as replicas get it.

    Attributes:
        number: of its line.
        prompt: token ids.
    """

    number: int
    prompt: list[int]
    params: SamplingParams


@dataclass
class _Running:
    call: Call
    text: IncrementalDetokenizer
    n_tokens: int = 0


class Replica:
    """Completes jobs on this replica of the network, as many at a time as its cache has rows.

    All ranks of a model-parallel group start the same jobs between the same two steps.
    """

    def __init__(self, llama: Llama) -> None:
        self._llama = llama
        self._engine = Engine(llama.model, llama.stepper)
        self._running: dict[int, _Running] = {}

    @property
    def n_free(self) -> int:
        """Number of jobs that could start now."""
        n_rows: int = self._llama.model.params.max_batch_size
        return n_rows - self._engine.n_running - self._engine.n_waiting

    @property
    def is_idle(self) -> bool:
        return not self._running

    def start(self, job: Job) -> None:
        """Has the engine work on a request, from its next step on."""
        params = job.params
        assert params.seed is not None
        generator = torch.Generator(device_of(self._llama.model)).manual_seed(params.seed)
        text = IncrementalDetokenizer(self._llama.tokenizer, params.stop)

        def ends(token: int) -> bool:
            text.push(token)
            return text.stopped

        sampler = Sampler(params.temperature, params.top_p, 1, generator)
        eos_id = self._llama.tokenizer.eos_id
        call = Call([EngineSequence(list(job.prompt), sampler, 0, params.max_gen_len, eos_id, ends=ends)])
        self._running[job.number] = _Running(call, text)
        self._engine.add(call)

    def step(self) -> tuple[list[tuple[int, Completion]], int]:
        """Advances all jobs. Returns those that ended, by their numbers, and the number of new tokens."""
        self._engine.advance()
        ended: list[tuple[int, Completion]] = []
        n_new = 0
        for number, running in list(self._running.items()):
            steps = running.call.steps
            while steps:
                step = steps.popleft()
                running.n_tokens += step.token is not None
                n_new += step.token is not None
                if step.finish_reason:
                    del self._running[number]
                    ended.append((number, _completion(running, step.finish_reason)))
            if running.call.error is not None:
                raise running.call.error
        return ended, n_new


def _completion(running: _Running, finish_reason: str) -> Completion:
    running.text.finish()
    reason = "stop" if running.text.stopped else finish_reason
    return Completion("".join(running.text.pieces), running.n_tokens, reason)


class Channel:
    """Messages between two ranks, in order and without waiting.

    Both send an empty list now and then, so that each knows that the other one is there.
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
        """The messages that have come.

        Raises:
            RuntimeError: none has come for minutes.
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
                f"{self._other} has not been heard of for {_SILENCE_S:.0f} seconds; start the command again, which "
                "goes on where this run stopped"
            )


def _channel(replica: int, *, is_first_rank: bool) -> Channel:
    """That between the first rank and the first rank of another replica."""
    store = dist.distributed_c10d._get_default_store()
    down, up = f"batch/{replica}/jobs", f"batch/{replica}/results"
    return Channel(store, down, up, f"replica {replica}") if is_first_rank else Channel(store, up, down, "rank 0")


class Worker:
    """On the first rank of another replica than the first: takes jobs from the first rank, and returns results."""

    def __init__(self, replica: int) -> None:
        self._channel = _channel(replica, is_first_rank=False)
        self._jobs: deque[Job] = deque()
        self._is_last = False
        self._n_new = 0
        self._reported = time.monotonic()

    def take(self, n: int) -> list[Job] | None:
        """Up to `n` jobs, if there are any; None once no more will come."""
        for message in self._channel.receive():
            self._is_last |= message is None
            self._jobs.extend(message or ())
        if not self._jobs and self._is_last:
            return None
        return [self._jobs.popleft() for _ in range(min(n, len(self._jobs)))]

    def deliver(self, ended: Sequence[tuple[int, Completion]], n_new: int) -> None:
        self._n_new += n_new
        now = time.monotonic()
        if ended or now - self._reported > _REPORT_S:
            self._channel.send([(list(ended), self._n_new)])
            self._n_new, self._reported = 0, now


@dataclass
class Coordinator:
    """On the first rank: hands out the requests, and writes the results.

    Args:
        lines: the requests without results.
        read: checks a request.
        n_ahead: number of jobs that another replica has at a time: those in its batch, and some that wait.
        bar: shows the progress.
    """

    lines: Iterator[Line]
    read: Reader
    results: Results
    fingerprint: str
    n_ahead: int
    bar: Any
    n_errors: int = 0
    n_prompt_tokens: int = 0
    n_new_tokens: int = 0
    _channels: dict[int, Channel] = field(default_factory=dict)
    _out: dict[int, tuple[int, Line, Job]] = field(default_factory=dict)  # by line: the replica that has it
    _is_last: bool = False  # whether the requests are all handed out
    _is_last_told: bool = False
    _started: float = field(default_factory=time.monotonic)

    def __post_init__(self) -> None:
        _, n_replicas = runtime.replica()
        self._channels = {i: _channel(i, is_first_rank=True) for i in range(1, n_replicas)}

    def take(self, n: int) -> list[Job] | None:
        """Up to `n` jobs for the first replica; None if there are no more."""
        self.exchange()
        jobs = self._next(n, 0)
        return None if self._is_last and not jobs else jobs

    def deliver(self, ended: Sequence[tuple[int, Completion]], n_new: int) -> None:
        """Writes results, and sees to the other replicas."""
        self._write(ended, n_new)
        self.exchange()

    def finish(self) -> None:
        """Waits for the other replicas."""
        self.exchange()
        while self._out:
            time.sleep(_POLL_S)
            self.exchange()

    def exchange(self) -> None:
        """Takes results from the other replicas, and gives them jobs."""
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

    def _next(self, n: int, replica: int) -> list[Job]:
        """Up to `n` jobs for a replica. A request that is wrong gets its result at once."""
        jobs: list[Job] = []
        while len(jobs) < n and not self._is_last:
            line = next(self.lines, None)
            if line is None:
                self._is_last = True
                break
            try:
                job = Job(line.number, *self.read(line))
            except RequestError as error:
                self.n_errors += 1
                self._append(error_result(line, error))
                continue
            self._out[job.number] = replica, line, job
            jobs.append(job)
        return jobs

    def _write(self, ended: Sequence[tuple[int, Completion]], n_new: int) -> None:
        self.n_new_tokens += n_new
        for number, completion in ended:
            _, line, job = self._out.pop(number)
            self.n_prompt_tokens += len(job.prompt)
            self._append(result(line, job.prompt, completion, self.read.model, self.fingerprint))

    def _append(self, line: bytes) -> None:
        self.results.append(line)
        speed = self.n_new_tokens / max(time.monotonic() - self._started, 1e-9)
        self.bar.set_postfix_str(f"{speed:.0f} tokens/s", refresh=False)
        self.bar.update()


def complete_jobs(replica: Replica, desk: Coordinator | Worker | None) -> None:
    """Completes jobs until there are no more.

    Args:
        desk: on the first rank of each replica, where its jobs come from; None on the other ranks.
    """
    may_come = True
    while may_come or not replica.is_idle:
        if may_come and replica.n_free > 0:
            jobs = _share_in_group(desk.take(replica.n_free) if desk else None)
            may_come = jobs is not None
            for job in jobs or ():
                replica.start(job)
        if replica.is_idle:
            time.sleep(_POLL_S if may_come else 0)
            continue
        ended, n_new = replica.step()
        if desk:
            desk.deliver(ended, n_new)


def _share_in_group(value: T) -> T:
    """The value of the first rank of this model-parallel group."""
    if runtime.model_parallel_size() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=get_model_parallel_src_rank(), group=get_model_parallel_group())
    return box[0]
