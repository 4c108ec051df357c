"""The serving loop: requests from other threads join and leave the engine's batch between steps.

Under model parallelism the first rank receives the requests. It announces changes together with a step's tokens, and
then broadcasts them to the other ranks, so that a step without changes costs no extra message.
"""

from __future__ import annotations

import itertools
import queue
import threading
from collections.abc import Callable, Sequence

from llama.distributed import groups
from llama.engine.calls import Request
from llama.engine.output import Piece
from llama.errors import NonFiniteLogitsError
from llama.generation import Llama
from llama.serving.errors import BusyError
from llama.serving.jobs import Job

_HEARTBEAT_S = 2.0  # interval of broadcasts while idle, by which ranks find out if another one has ended
_Change = tuple[int, Job | None] | None  # a request's number with its job, or None to abort it; None to stop


class Service:
    """Serves requests from any number of threads with one `Llama`.

    The first rank calls `run` in one thread; every other rank calls `follow`. `submit`, `abort` and `stop` may be
    called from any thread of the first rank.

    Args:
        max_waiting: maximum number of sequences that wait for a slot; requests beyond that are refused.

    Attributes:
        error: the error that ended the service; None while it runs, and after `stop`.
        n_generated: number of tokens generated for requests so far.
    """

    def __init__(self, llama: Llama, *, max_waiting: int = 256) -> None:
        self.llama = llama
        self.engine = llama.engine
        self.max_waiting = max_waiting
        self.error: BaseException | None = None
        self.n_generated = 0
        self._inbox: queue.SimpleQueue[_Change] = queue.SimpleQueue()
        self._n_arriving = 0  # sequences in the inbox
        self._numbers = itertools.count()
        self._listeners: dict[int, Callable[[Piece | BaseException], None]] = {}  # only on the first rank
        self._running: dict[int, Request] = {}  # the same on all ranks
        self._is_stopping = False
        self._lock = threading.Lock()

    @property
    def n_requests(self) -> int:
        """Number of unfinished requests."""
        return len(self._listeners)

    @property
    def n_waiting(self) -> int:
        """Number of sequences that wait for a slot."""
        return self.engine.n_waiting + self._n_arriving

    def submit(self, job: Job, on_piece: Callable[[Piece | BaseException], None]) -> int:
        """Adds a request; returns its number, for `abort`.

        Args:
            job: its work, which has been checked.
            on_piece: called in the service's thread with each piece, or with the error that ended the request. It must
                not block.

        Raises:
            BusyError: more than `max_waiting` sequences would wait, or the service has stopped, or is stopping.
        """
        with self._lock:
            if self._is_stopping or self.error is not None:
                raise _stopped()
            n_free = self.llama.model.params.max_batch_size - self.engine.n_running
            if (n_waiting := self.n_waiting + job.n_choices - n_free) > self.max_waiting:
                raise BusyError(
                    f"the number of waiting sequences must be at most {self.max_waiting}, got {n_waiting} with this "
                    "request; try again later",
                    "queue_full",
                )
            number = next(self._numbers)
            self._listeners[number] = on_piece
            self._n_arriving += job.n_choices
            self._inbox.put((number, job))
            return number

    def abort(self, number: int) -> None:
        """Ends a request, and frees its slots before the next step. Does nothing if the request has finished."""
        if self._listeners.pop(number, None):
            self._inbox.put((number, None))

    def stop(self) -> None:
        """Stops the service before its next step; unfinished requests get a `BusyError`."""
        self._is_stopping = True
        self._inbox.put(None)

    def run(self) -> None:
        """Serves requests on the first rank until `stop`.

        Raises:
            Exception: another rank failed or ended; under model parallelism, also any error of a request.
        """
        try:
            self._loop(self._collect)
        except BaseException as error:
            self.error = error
            raise
        finally:
            self._is_stopping = True
            with self._lock:
                listeners, self._listeners = list(self._listeners.values()), {}
            for listener in listeners:
                listener(self.error or _stopped())

    def follow(self) -> None:
        """Runs the same steps as the first rank on another rank, until the first one stops."""
        self._loop(lambda: None)

    def _loop(self, collect: Callable[[], list[_Change] | None]) -> None:
        with groups.rank_errors():
            while True:
                has_changes = self.engine.is_idle or groups.broadcast_flag(not self._inbox.empty())
                if has_changes and not self._apply(groups.broadcast_object(collect()) or []):
                    return
                if not self.engine.is_idle:
                    self._advance()

    def _collect(self) -> list[_Change]:
        """Returns new changes; if the engine is idle, first waits up to `_HEARTBEAT_S` for one."""
        changes = []
        try:
            if self.engine.is_idle:
                changes.append(self._inbox.get(timeout=_HEARTBEAT_S))
            while True:
                changes.append(self._inbox.get_nowait())
        except queue.Empty:
            return changes

    def _apply(self, changes: Sequence[_Change]) -> bool:
        """Returns False if the service must stop."""
        for change in changes:
            if change is None:
                for request in self._running.values():
                    self.engine.abort(request.call)
                return False
            number, job = change
            if job is not None:
                self._start(number, job)
            elif number in self._running:
                self.engine.abort(self._running.pop(number).call)
        return True

    def _start(self, number: int, job: Job) -> None:
        """Adds a request to the engine; passes an error to its listener."""
        try:
            self._running[number] = job.start(self.llama)
        except Exception as error:
            self._end(number, error)
        finally:
            if groups.is_first_rank():
                with self._lock:
                    self._n_arriving -= job.n_choices

    def _advance(self) -> None:
        """Runs a pass; passes what is new of all requests to their listeners."""
        self.engine.advance()
        for number, request in list(self._running.items()):
            for piece in request.new_pieces():
                self.n_generated += piece.n_generated
                self._tell(number, piece)
            if request.call.is_finished:
                del self._running[number]
                self._end(number, request.call.error)

    def _end(self, number: int, error: BaseException | None) -> None:
        """Forgets a request; passes the error that ended it to its listener."""
        if error is not None:
            # Ranks may have diverged, but all get the same tokens, and so the same logits that are not finite.
            if groups.model_parallel_size() > 1 and not isinstance(error, NonFiniteLogitsError):
                raise error
            self._tell(number, error)
        self._listeners.pop(number, None)

    def _tell(self, number: int, result: Piece | BaseException) -> None:
        """Passes a result to a request's listener, if it has one on this rank."""
        if listener := self._listeners.get(number):
            listener(result)


def _stopped() -> BusyError:
    return BusyError("the server is shutting down", "shutting_down")
