"""Completes a file of requests: `torchrun --nproc_per_node N -m llama.tools.batch --input FILE --output FILE`.

Requests and results are lines in OpenAI's batch format (see `batch_file`). The first rank reads and writes; replicas of
the network share the requests, and each keeps its batch full. A run that was interrupted goes on where it stopped.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import pickle
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from fairscale.nn.model_parallel.initialize import get_model_parallel_group, get_model_parallel_src_rank
from torch.distributed.distributed_c10d import PrefixStore, Store

from llama import Llama, runtime
from llama.checkpoint import find_tokenizer
from llama.engine import Call, Engine
from llama.engine import Sequence as EngineSequence
from llama.quoting import quote
from llama.request import Request
from llama.runner import device_of
from llama.sampling import Sampler
from llama.text import GrowingText
from llama.tools import commandline
from llama.tools.batch_file import Completion, Line, Reader, RequestError, error_result, read_line, result, result_id
from llama.tools.toy import toy_checkpoint

try:
    import fcntl
except ImportError:  # not a POSIX system: two runs at once are then not noticed
    fcntl = None  # type: ignore[assignment]

T = TypeVar("T")
_SYNC_S = 5.0  # between two times that the results are forced onto the disk
_POLL_S = 0.01  # between two looks for a message while there is nothing else to do
_HEARTBEAT_S = 5.0  # after which a replica that has nothing to say sends an empty message
_SILENCE_S = 300.0  # after which a replica that has sent nothing is taken for lost
_REPORT_S = 1.0  # between two reports of a replica while no request ends
_PLAIN_S = 10.0  # between two updates of the progress bar where stderr is no terminal


# ---- the files ----


class Results:
    """The file of results, of which each line is one request's. Only one process may have it open.

    Args:
        path: a file that is continued if it exists; a last line that was not written whole is removed.

    Raises:
        ValueError: another process has it open.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        is_new = not path.exists()
        self._file = open(path, "a+b")  # noqa: SIM115 (`close` closes it)
        try:
            _lock(self._file.fileno(), path)
            _repair(self._file)
        except BaseException:
            self._file.close()
            raise
        self._synced = time.monotonic()
        if is_new and os.name == "posix":
            folder = os.open(path.parent, os.O_RDONLY)
            os.fsync(folder)
            os.close(folder)

    def read(self) -> Iterator[tuple[int, dict[str, Any]]]:
        """The results that the file has, and the numbers of their lines."""
        self._file.seek(0)
        for number, raw in enumerate(self._file, start=1):
            try:
                fields = json.loads(raw)
                if not isinstance(fields, dict) or not {"id", "custom_id", "response"} <= fields.keys():
                    raise ValueError("not a result")
            except (ValueError, RecursionError) as error:
                raise ValueError(
                    f"{self._path}, line {number}: each line must be a result of this command, got "
                    f"{quote(raw.decode(errors='replace'))}; use another --output, or remove the line"
                ) from error
            yield number, fields

    def append(self, line: bytes) -> None:
        """Adds a line, which is in the file on return, and on the disk a few seconds later."""
        self._file.write(line)
        self._file.flush()
        if time.monotonic() - self._synced > _SYNC_S:
            self._sync()

    def close(self) -> None:
        self._sync()
        self._file.close()

    def _sync(self) -> None:
        os.fsync(self._file.fileno())
        self._synced = time.monotonic()


def _lock(fd: int, path: Path) -> None:
    """Takes the file for this process, until it ends. Where the file system has no locks, does nothing."""
    if fcntl is None:
        return
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise ValueError(
            f"--output must be a file that no other process writes, got {path}, which one does; wait for it to end"
        ) from error
    except OSError:
        return


def _repair(file: Any) -> None:
    """Removes a last line that was not written whole; completes one that lacks its newline alone."""
    size = file.seek(0, os.SEEK_END)
    tail = b""
    while size > len(tail) and b"\n" not in tail:
        start = max(0, size - 2 * len(tail) - 4096)
        file.seek(start)
        tail = file.read(size - start)
    torn = tail.rpartition(b"\n")[2]
    if not torn:
        return
    try:
        json.loads(torn)
    except (ValueError, RecursionError):
        file.truncate(size - len(torn))
    else:
        file.write(b"\n")
    file.flush()


def read_requests(path: Path) -> Iterator[Line]:
    """The lines of a file of requests; empty ones are skipped.

    Raises:
        ValueError: a request is without a `custom_id`.
    """
    with open(path, "rb") as file:
        for number, raw in enumerate(file, start=1):
            raw = raw.removeprefix(b"\xef\xbb\xbf") if number == 1 else raw
            if raw.strip():
                try:
                    yield read_line(number, raw)
                except ValueError as error:
                    raise ValueError(f"{path}: {error}") from error


@dataclass
class Progress:
    """What is done already, found before any work.

    Attributes:
        n_lines: number of requests in the input.
        done: numbers of the lines that have a result.
        fingerprints: of the runs that made the results, each with the number of the first line of results.
    """

    n_lines: int
    done: set[int]
    fingerprints: dict[str, int]

    @property
    def is_complete(self) -> bool:
        return len(self.done) == self.n_lines


def compare(input: Path, results: Results, output: Path) -> Progress:
    """Finds which requests have results.

    Raises:
        ValueError: two requests have one `custom_id`, or a result is not of a request as it is in the input now.
    """
    numbers: dict[str, int] = {}
    ids: dict[str, int] = {}
    n_lines = 0
    for line in read_requests(input):
        n_lines += 1
        ids[result_id(line)] = line.number
        if line.custom_id is not None and numbers.setdefault(line.custom_id, line.number) != line.number:
            raise ValueError(
                f"{input}: line {line.number} must have a custom_id of its own, got {quote(line.custom_id)}, which "
                f"line {numbers[line.custom_id]} has too"
            )
    progress = Progress(n_lines, set(), {})
    for number, fields in results.read():
        request = ids.get(fields["id"])
        custom_id = fields["custom_id"]
        if request is None:
            was = numbers.get(custom_id) if isinstance(custom_id, str) else None
            now = f"line {was} of the input has another request now" if was else "the input has no such request"
            raise ValueError(
                f"--output must be a new file, or the results of the same --input, got {output}, whose line {number} "
                f"is the result of custom_id {quote(custom_id)}: {now}"
            )
        if request in progress.done:
            raise ValueError(f"{output}, line {number}: custom_id {quote(custom_id)} must have one result, got two")
        progress.done.add(request)
        body = (fields["response"] or {}).get("body") or {}
        if mark := body.get("system_fingerprint"):
            progress.fingerprints.setdefault(mark, number)
    return progress


# ---- the work ----


@dataclass(frozen=True)
class Job:
    """A request as replicas get it.

    Attributes:
        number: of its line.
        prompt: token ids.
    """

    number: int
    prompt: list[int]
    params: Request


@dataclass
class _Running:
    call: Call
    text: GrowingText
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
        params = job.params
        assert params.seed is not None
        generator = torch.Generator(device_of(self._llama.model)).manual_seed(params.seed)
        text = GrowingText(self._llama.tokenizer, params.stop)

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


def run(replica: Replica, desk: Coordinator | Worker | None) -> None:
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


# ---- the command ----


def fingerprint(llama: Llama, tokenizer_path: str | Path, seed: int) -> str:
    """Identifies what results depend on besides the request: checkpoint, tokenizer, dtype, length, seed.

    It does not depend on the model-parallel size.
    """
    norm = llama.model.norm.weight.detach()  # whole on every rank
    params = llama.model.params
    parts = (params.dim, params.n_layers, params.n_heads, params.vocab_size, params.max_seq_len, str(norm.dtype), seed)
    digest = hashlib.sha256(repr(parts).encode())
    digest.update(norm.float().cpu().numpy().tobytes())
    digest.update(Path(tokenizer_path).read_bytes())
    return f"fp_{digest.hexdigest()[:16]}"


def _check_fingerprint(progress: Progress, mark: str, output: Path) -> None:
    for other, number in progress.fingerprints.items():
        if other != mark:
            raise ValueError(
                f"--output must be a new file, or results of the same checkpoint, tokenizer, dtype, max_seq_len and "
                f"seed, got {output}, whose line {number} is a result of others (system_fingerprint {quote(other)}, "
                f"now {mark})"
            )


def _open(input: Path, output: Path) -> tuple[Results, Progress]:
    _tqdm()  # if it is missing, that is said before any work
    if not input.is_file():
        raise FileNotFoundError(f"--input must be a file of requests, got {input}, where there is none")
    if output.exists() and (not output.is_file() or output.samefile(input)):
        raise ValueError(f"--output must be a file other than --input, got {output}")
    results = Results(output)
    try:
        return results, compare(input, results, output)
    except BaseException:
        results.close()
        raise


def _tqdm() -> Any:
    try:
        from tqdm import tqdm
    except ImportError as error:
        raise ImportError(
            'the progress bar needs tqdm, of the extra [batch]; install it with: pip install -e ".[batch]"'
        ) from error
    return tqdm


def _progress_bar(progress: Progress) -> Any:
    interval = 0.2 if sys.stderr.isatty() else _PLAIN_S
    n_done = len(progress.done)
    return _tqdm()(total=progress.n_lines, initial=n_done, unit=" requests", smoothing=0, mininterval=interval)


def _first_rank_does(work: Callable[[], T]) -> T | None:
    """What `work` returns on the first rank, None on the others. Its error ends all ranks, and is printed once."""
    done: T | None = None
    error: Exception | None = None
    if runtime.is_first_rank():
        try:
            done = work()
        except commandline.MISTAKES as problem:
            error = problem
    if runtime.broadcast_object(error is not None):
        raise error or SystemExit(1)
    return done


def main(
    input: str,
    output: str,
    ckpt_dir: str | None = None,
    tokenizer_path: str | None = None,
    max_seq_len: int = 512,
    max_batch_size: int = 8,
    model: str | None = None,
    seed: int = 1,
    dtype: str | None = None,
    device: str | None = None,
    model_parallel_size: int | None = None,
) -> None:
    """Completes the requests of a file in OpenAI's batch format. The same command goes on after an interruption.

    Args:
        input: path of the requests, one JSON object per line.
        output: path of the results, to which they are appended as they come.
        ckpt_dir: folder of params.json and consolidated.NN.pth; by default the toy checkpoint of the repository.
        tokenizer_path: its tokenizer.model; by default the one in ckpt_dir or in its parent folder.
        max_seq_len: maximum number of tokens of a prompt and its completion.
        max_batch_size: number of requests that each replica works on at a time.
        model: name of the checkpoint in requests and results; by default that of its folder.
        seed: of requests that have none: each gets its own, derived from this one and its custom_id.
        dtype: float16, bfloat16 or float32.
        device: cpu, cuda, cuda:N or mps; by default the fastest available.
        model_parallel_size: number of processes that share a network; with fewer than there are, replicas of it share
            the requests. By default all of them.
    """
    ckpt_dir = ckpt_dir or toy_checkpoint()
    tokenizer_path = tokenizer_path or str(find_tokenizer(ckpt_dir))
    name = model or Path(ckpt_dir).resolve().name
    chosen = runtime.select_device(device)
    runtime.init_process_groups(runtime.resolve_model_parallel_size(model_parallel_size), chosen)
    opened = _first_rank_does(lambda: _open(Path(input), Path(output)))
    with closing(opened[0]) if opened else nullcontext():
        if runtime.broadcast_object(opened[1].is_complete if opened else None):
            if opened:
                print(f"{output}: all {opened[1].n_lines} requests have results already")
            return
        llama = Llama.build(
            ckpt_dir, tokenizer_path, max_seq_len, max_batch_size, model_parallel_size, seed, device=device, dtype=dtype
        )
        mark = fingerprint(llama, tokenizer_path, seed)
        _first_rank_does(lambda: _check_fingerprint(opened[1], mark, Path(output)) if opened else None)
        if opened:
            read = Reader(llama.tokenizer, llama.model.params.vocab_size, max_seq_len, name, seed)
            _lead(llama, Path(input), read, *opened, mark)
        else:
            _follow(llama)


def _lead(llama: Llama, input: Path, read: Reader, results: Results, progress: Progress, mark: str) -> None:
    """The first rank's part."""
    lines = (line for line in read_requests(input) if line.number not in progress.done)
    started = time.monotonic()
    with runtime.rank_errors(), _progress_bar(progress) as bar:
        n_ahead = 2 * llama.model.params.max_batch_size
        desk = Coordinator(lines, read, results, mark, n_ahead, bar)
        run(Replica(llama), desk)
        desk.finish()
    seconds = time.monotonic() - started
    n_new, n_prompt = desk.n_new_tokens, desk.n_prompt_tokens
    print(
        f"{progress.n_lines - len(progress.done)} requests, {desk.n_errors} of them refused: {n_prompt} prompt tokens, "
        f"{n_new} new tokens in {seconds:.1f} s ({n_new / seconds:.0f} tokens/s)"
    )


def _follow(llama: Llama) -> None:
    """The other ranks' part."""
    with runtime.rank_errors():
        run(Replica(llama), Worker(runtime.replica()[0]) if runtime.is_first_of_group() else None)


if __name__ == "__main__":
    commandline.run(main)
