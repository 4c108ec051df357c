"""The serving loop: requests from other threads join and leave the engine's batch between steps.

Under model parallelism the first rank receives the requests. It announces changes together with a step's tokens, and
then broadcasts them to the other ranks, so that a step without changes costs no extra message.
"""

from __future__ import annotations

import itertools
import queue
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from llama.distributed import groups
from llama.engine.calls import Request
from llama.engine.lock import lock_of
from llama.engine.output import Piece
from llama.engine.scoring import score
from llama.errors import NonFiniteLogitsError
from llama.generation import Llama
from llama.inputs import SamplingParams

_SCORED_POSITIONS = 512  # maximum number of positions whose logits are in memory at a time
_HEARTBEAT_S = 2.0  # interval of broadcasts while idle, by which ranks find out if another one has ended


class QueueFullError(RuntimeError):
    """The maximum number of sequences is already waiting."""


class ServiceStoppedError(RuntimeError):
    """The service has stopped, or is stopping."""


OnPiece = Callable[[Piece | BaseException], None]
OnScore = Callable[[list[float] | BaseException], None]


@dataclass(frozen=True)
class _Added:
    """A new request, as broadcast to the other ranks."""

    number: int
    prompts: list[list[int]]
    params: SamplingParams
    n: int
    top_logprobs: int
    continues: bool


@dataclass(frozen=True)
class _Aborted:
    number: int


@dataclass(frozen=True)
class _Scored:
    number: int
    tokens: list[int]


@dataclass(frozen=True)
class _Stopped:
    pass


class Service:
    """Serves requests from any number of threads with one `Llama`.

    The first rank calls `run` in one thread; every other rank calls `follow`. `submit`, `score`, `abort` and `stop` may
    be called from any thread of the first rank.

    Args:
        llama: the network and its tokenizer.
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
        self._inbox: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._n_arriving = 0  # sequences in the inbox
        self._numbers = itertools.count()
        self._listeners: dict[int, Callable[[Any], None]] = {}  # by request number; only on the first rank
        self._running: dict[int, Request] = {}
        self._is_stopping = False
        self._lock = threading.Lock()

    @property
    def n_requests(self) -> int:
        """Number of unfinished requests."""
        return len(self._listeners)

    @property
    def n_running(self) -> int:
        """Number of sequences that have a KV cache slot."""
        return self.engine.n_running

    @property
    def n_waiting(self) -> int:
        """Number of sequences that wait for a slot."""
        return self.engine.n_waiting + self._n_arriving

    def submit(
        self,
        prompts: Sequence[Sequence[int]],
        params: SamplingParams,
        on_piece: OnPiece,
        *,
        n: int = 1,
        top_logprobs: int = 0,
        continues: bool = False,
    ) -> int:
        """Adds a request; returns its number, for `abort`.

        Args:
            prompts: token ids, checked by the caller (see `llama.inputs`).
            params: sampling parameters.
            on_piece: called in the service's thread with each piece, or with the error that ended the request. It must
                not block.
            n: number of completions of each prompt; prompt i has the choices `i * n` to `i * n + n - 1`. With a seed,
                the j-th completion, from 0, is the one that `n=1` gives with `seed + j`.
            top_logprobs: number of most likely tokens to report at each position.
            continues: whether the completion continues the prompt's text, and keeps its leading space. False for
                answers of a chat, whose leading space is dropped.

        Raises:
            QueueFullError: more than `max_waiting` sequences would wait.
            ServiceStoppedError: the service has stopped, or is stopping.
        """
        lists = [list(prompt) for prompt in prompts]
        n_sequences = len(lists) * n
        return self._register(on_piece, n_sequences, lambda i: _Added(i, lists, params, n, top_logprobs, continues))

    def score(self, tokens: Sequence[int], on_score: OnScore) -> int:
        """Adds a request for the log-probability of each id, as in `Llama.score_tokens`; returns its number."""
        return self._register(on_score, 0, lambda number: _Scored(number, list(tokens)))

    def abort(self, number: int) -> None:
        """Ends a request, and frees its slots before the next step. Does nothing if the request has finished."""
        if self._listeners.pop(number, None):
            self._inbox.put(_Aborted(number))

    def stop(self) -> None:
        """Stops the service before its next step; unfinished requests get a `ServiceStoppedError`."""
        self._is_stopping = True
        self._inbox.put(_Stopped())

    def _register(self, listener: Callable[[Any], None], n_sequences: int, change: Callable[[int], Any]) -> int:
        with self._lock:
            if self._is_stopping or self.error is not None:
                raise ServiceStoppedError("the service has stopped")
            n_free = self.llama.model.params.max_batch_size - self.n_running
            if (n_waiting := self.n_waiting + n_sequences - n_free) > self.max_waiting:
                raise QueueFullError(
                    f"the number of waiting sequences must be at most {self.max_waiting}, got {n_waiting} with this "
                    "request; try again later"
                )
            number = next(self._numbers)
            self._listeners[number] = listener
            self._n_arriving += n_sequences
            self._inbox.put(change(number))
            return number

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
                listener(self.error or ServiceStoppedError("the service has stopped"))

    def follow(self) -> None:
        """Runs the same steps as the first rank on another rank, until the first one stops."""
        self._loop(lambda: None)

    def _loop(self, collect: Callable[[], list[Any] | None]) -> None:
        with groups.rank_errors():
            while True:
                has_changes = self.engine.is_idle or groups.broadcast_flag(not self._inbox.empty())
                if has_changes and not self._apply(groups.broadcast_object(collect()) or []):
                    return
                if not self.engine.is_idle:
                    self.engine.advance()
                    self._deliver()

    def _collect(self) -> list[Any]:
        """Returns new changes; if the engine is idle, first waits up to `_HEARTBEAT_S` for one."""
        changes = []
        try:
            if self.engine.is_idle:
                changes.append(self._inbox.get(timeout=_HEARTBEAT_S))
            while True:
                changes.append(self._inbox.get_nowait())
        except queue.Empty:
            return changes

    def _apply(self, changes: Sequence[Any]) -> bool:
        """Applies changes to the engine; returns False if the service must stop."""
        for change in changes:
            if isinstance(change, _Stopped):
                for running in self._running.values():
                    self.engine.abort(running.call)
                return False
            if isinstance(change, _Aborted):
                if aborted := self._running.pop(change.number, None):
                    self.engine.abort(aborted.call)
            else:
                self._begin(change)
        return True

    def _begin(self, change: _Added | _Scored) -> None:
        """Adds a request to the engine, or scores it; passes an error to its listener."""
        try:
            if isinstance(change, _Scored):
                with lock_of(self.llama.model):
                    self._tell(change.number, score(self.llama.model, [change.tokens])[0])
                self._listeners.pop(change.number, None)
            else:
                self._running[change.number] = self._start(change)
        except Exception as error:
            self._fail(change.number, error)
            self._listeners.pop(change.number, None)
        finally:
            if isinstance(change, _Added) and groups.is_first_rank():
                with self._lock:
                    self._n_arriving -= len(change.prompts) * change.n

    def _start(self, added: _Added) -> Request:
        """Adds a request's sequences to the engine; with echo, delivers the pieces that have the prompts."""
        request = Request(
            self.engine,
            self.llama.tokenizer,
            added.prompts,
            added.params,
            n=added.n,
            top_logprobs=added.top_logprobs,
            continues=added.continues,
        )
        for piece in request.first_pieces:
            self._tell(added.number, piece)
        return request

    def _deliver(self) -> None:
        """Passes what is new of all requests to their listeners."""
        for number, running in list(self._running.items()):
            for piece in running.new_pieces():
                self.n_generated += piece.n_generated
                self._tell(number, piece)
            if running.call.is_finished:
                if running.call.error is not None:
                    self._fail(number, running.call.error)
                del self._running[number]
                self._listeners.pop(number, None)

    def _fail(self, number: int, error: BaseException) -> None:
        """Passes an error to a request's listener; raises it under model parallelism, where ranks may have diverged.

        All ranks get the same tokens, and so the same error for logits that are not finite.
        """
        if groups.model_parallel_size() > 1 and not isinstance(error, NonFiniteLogitsError):
            raise error
        self._tell(number, error)

    def _tell(self, number: int, result: Any) -> None:
        """Passes a result to a request's listener, if it has one on this rank."""
        if listener := self._listeners.get(number):
            listener(result)
