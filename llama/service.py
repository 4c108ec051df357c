"""The serving loop: requests from other threads join and leave the engine's batch between two steps.

Under model parallelism the first rank takes the requests and the others follow: what changes travels to them once, with
the announcement in the message that has a step's tokens.
"""

from __future__ import annotations

import itertools
import queue
import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from llama import runtime
from llama.decoding import score
from llama.engine import Call, Engine, FinishReason, Step
from llama.engine import Sequence as EngineSequence
from llama.generation import Llama
from llama.request import Request
from llama.runner import device_of, use_of
from llama.sampling import Sampler
from llama.text import GrowingText

_HEARTBEAT_S = 5.0  # an idle first rank lets the others know as often that it is there, and learns that they are


class QueueFullError(RuntimeError):
    """As many requests wait already as the service takes."""


class ServiceStoppedError(RuntimeError):
    """The service has ended, or is about to."""


@dataclass(frozen=True)
class Piece:
    """What one step brought to one choice of a request.

    Attributes:
        choice: from 0 to n - 1.
        text: that became final with this step; often a word, sometimes empty.
        token: the new id; None where the choice ended without one.
        logprob, top_logprobs: as in `engine.Step`, if asked for.
        finish_reason: why this is the choice's last piece; None if it is not.
    """

    choice: int
    text: str
    token: int | None = None
    logprob: float | None = None
    top_logprobs: tuple[tuple[int, float], ...] = ()
    finish_reason: FinishReason | None = None


OnPiece = Callable[[Piece | BaseException], None]
OnScore = Callable[[list[float] | BaseException], None]


@dataclass(frozen=True)
class _Added:
    """A request, as it travels to the other ranks."""

    number: int
    prompt: list[int]
    params: Request
    n: int
    top_logprobs: int


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


class _Choice:
    """The text of one completion of a request."""

    def __init__(self, text: GrowingText) -> None:
        self._text = text
        self._settled: deque[str] = deque()

    def ends(self, token: int) -> bool:
        self._settled.append(self._text.push(token))
        return self._text.stopped

    def piece(self, step: Step) -> Piece:
        text = self._settled.popleft() if step.token is not None else ""
        if step.finish_reason:
            text += self._text.finish()
        finish_reason: FinishReason | None = "stop" if self._text.stopped else step.finish_reason
        if not step.finish_reason:
            finish_reason = None
        return Piece(step.sequence, text, step.token, step.logprob, step.top_logprobs, finish_reason)


@dataclass
class _Running:
    """A request in the engine."""

    call: Call
    choices: list[_Choice] = field(repr=False)


class Service:
    """Serves requests from any number of threads on one `Llama`.

    One thread of the first rank calls `run`, each other rank `follow`. `submit`, `score`, `abort` and `stop` may be
    called from any thread of the first rank.

    Args:
        llama: the network and its tokenizer.
        max_waiting: maximum number of requests that wait for a slot; more are refused.

    Attributes:
        error: what ended the service; None as long as it runs, and after `stop`.
    """

    def __init__(self, llama: Llama, *, max_waiting: int = 256) -> None:
        self.llama = llama
        self.engine = Engine(llama.model, llama.stepper)
        self.engine.announces = lambda: not self._inbox.empty()
        self.max_waiting = max_waiting
        self.error: BaseException | None = None
        self._inbox: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._numbers = itertools.count()
        self._listeners: dict[int, Callable[[Any], None]] = {}  # on the first rank alone
        self._running: dict[int, _Running] = {}
        self._is_stopping = False
        self._lock = threading.Lock()

    @property
    def n_requests(self) -> int:
        """Number of requests that are not finished."""
        return len(self._listeners)

    def submit(
        self, prompt: Sequence[int], params: Request, on_piece: OnPiece, *, n: int = 1, top_logprobs: int = 0
    ) -> int:
        """Adds a request; returns its number, for `abort`.

        Args:
            prompt: ids, checked by the caller (see `prompts`).
            params: how to sample; `echo` is the caller's business.
            on_piece: called in the service's thread with each piece, or with the error that ended the request. It must
                not wait.
            n: number of completions, at most `max_batch_size`. With a seed the first is what one alone would be.
            top_logprobs: number of most likely tokens to report at each position.

        Raises:
            QueueFullError: `max_waiting` requests wait already.
            ServiceStoppedError: the service has ended, or was told to stop.
        """
        number = self._register(on_piece)
        self._inbox.put(_Added(number, list(prompt), params, n, top_logprobs))
        return number

    def score(self, tokens: Sequence[int], on_score: OnScore) -> int:
        """Has the log-probability of each id computed, as in `Llama.score_tokens`; otherwise like `submit`."""
        number = self._register(on_score)
        self._inbox.put(_Scored(number, list(tokens)))
        return number

    def abort(self, number: int) -> None:
        """Ends a request, whose slot is free from the next step on; without effect if it is finished."""
        if self._listeners.pop(number, None):
            self._inbox.put(_Aborted(number))

    def stop(self) -> None:
        """Ends the service before its next step; what is not finished gets a `ServiceStoppedError`."""
        self._is_stopping = True
        self._inbox.put(_Stopped())

    def _register(self, listener: Callable[[Any], None]) -> int:
        with self._lock:
            if self._is_stopping or self.error is not None:
                raise ServiceStoppedError("the service has stopped")
            if self.engine.n_waiting + self._inbox.qsize() >= self.max_waiting:
                raise QueueFullError(f"at most {self.max_waiting} requests may wait; try again later")
            number = next(self._numbers)
            self._listeners[number] = listener
            return number

    def run(self) -> None:
        """Serves on the first rank until `stop`.

        Raises:
            Exception: another rank was lost.
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
        """Does on another rank what the first one does, until that stops."""
        self._loop(lambda: None)

    def _loop(self, collect: Callable[[], list[Any] | None]) -> None:
        with runtime.rank_errors():
            while True:
                if self.engine.is_idle or self.engine.changes_follow:
                    self.engine.changes_follow = False
                    if not self._apply(runtime.broadcast_object(collect()) or []):
                        return
                if not self.engine.is_idle:
                    self.engine.advance()
                    self._deliver()

    def _collect(self) -> list[Any]:
        """The changes since the last time; waits for one if there is nothing else to do."""
        changes = []
        try:
            if self.engine.is_idle:
                changes.append(self._inbox.get(timeout=_HEARTBEAT_S))
            while True:
                changes.append(self._inbox.get_nowait())
        except queue.Empty:
            return changes

    def _apply(self, changes: Sequence[Any]) -> bool:
        """Brings changes to the engine; False once the service has to stop."""
        for change in changes:
            if isinstance(change, _Stopped):
                for running in self._running.values():
                    self.engine.abort(running.call)
                return False
            if isinstance(change, _Aborted):
                if aborted := self._running.pop(change.number, None):
                    self.engine.abort(aborted.call)
            elif isinstance(change, _Scored):
                with use_of(self.llama.model):
                    self._tell(change.number, score(self.llama.model, [change.tokens])[0])
                self._listeners.pop(change.number, None)
            else:
                self._running[change.number] = self._start(change)
        return True

    def _start(self, added: _Added) -> _Running:
        params = added.params
        device = device_of(self.llama.model)
        if params.seed is None:
            generator = runtime.default_generator(device)
        else:
            generator = torch.Generator(device).manual_seed(params.seed)
        sampler = Sampler(params.temperature, params.top_p, added.n, generator)
        choices = [_Choice(GrowingText(self.llama.tokenizer, params.stop)) for _ in range(added.n)]
        sequences = [
            EngineSequence(
                list(added.prompt),
                sampler,
                lane,
                params.max_gen_len,
                self.llama.tokenizer.eos_id,
                logprobs=params.logprobs,
                top_logprobs=added.top_logprobs,
                ends=choice.ends,
            )
            for lane, choice in enumerate(choices)
        ]
        call = Call(sequences)
        self.engine.add(call)
        return _Running(call, choices)

    def _deliver(self) -> None:
        """Passes the new steps of all requests to their listeners."""
        for number, running in list(self._running.items()):
            call = running.call
            while call.steps:
                step = call.steps.popleft()
                self._tell(number, running.choices[step.sequence].piece(step))
            if call.is_over:
                if call.error is not None:
                    self._tell(number, call.error)
                del self._running[number]
                self._listeners.pop(number, None)
                if call.error is not None and runtime.model_parallel_size() > 1:
                    raise call.error  # the ranks may have parted

    def _tell(self, number: int, news: Any) -> None:
        if listener := self._listeners.get(number):
            listener(news)
