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
from llama.generation import Llama
from llama.inputs import SamplingParams
from llama.runner import ModelRunner, device_of, lock_of
from llama.sampling import Sampler, logprobs_of
from llama.scoring import score
from llama.sequence import Call, FinishReason, Step
from llama.sequence import Sequence as EngineSequence
from llama.tokenizer import IncrementalDetokenizer

_SCORED_POSITIONS = 512  # whose logits are held at a time
_HEARTBEAT_S = 2.0  # an idle first rank lets the others know as often that it is there, and learns that they are


TopLogprobs = tuple[tuple[int, float], ...]
Scores = list[tuple[float | None, TopLogprobs]]


class QueueFullError(RuntimeError):
    """As many requests wait already as the service takes."""


class ServiceStoppedError(RuntimeError):
    """The service has ended, or is about to."""


@dataclass(frozen=True)
class Token:
    """A token whose text is final.

    Attributes:
        id: in the vocabulary.
        text: its part of the text; a character of several tokens belongs to the last of them.
        logprob: log-probability under the raw logits; None for the first token of a prompt.
        top_logprobs: the most likely tokens at this position and their log-probabilities; as many as asked for.
    """

    id: int
    text: str
    logprob: float | None
    top_logprobs: TopLogprobs = ()


@dataclass(frozen=True)
class Piece:
    """What one step brought to one choice of a request; with echo, a first one has the prompt.

    Attributes:
        choice: its index, see `Service.submit`.
        text: what became final with this step; often a word, sometimes empty.
        tokens: with logprobs, those that became final; joined over all pieces, their texts are the text.
        n_generated: number of tokens that the step generated, 0 or 1; also those that a stop string swallows count.
        finish_reason: why this is the choice's last piece; None if it is not.
    """

    choice: int
    text: str
    tokens: tuple[Token, ...] = ()
    n_generated: int = 0
    finish_reason: FinishReason | None = None


OnPiece = Callable[[Piece | BaseException], None]
OnScore = Callable[[list[float] | BaseException], None]


@dataclass(frozen=True)
class _Added:
    """A request, as it travels to the other ranks."""

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


class _Choice:
    """The text of one completion of a request, and its tokens if their log-probabilities were asked for.

    Args:
        index: among the request's choices.
        text: detokenizes it.
        logprobs: whether the pieces have tokens.
    """

    def __init__(self, index: int, text: IncrementalDetokenizer, *, logprobs: bool) -> None:
        self._index = index
        self._text = text
        self._logprobs = logprobs
        self._settled: deque[str] = deque()
        self._n_chars = 0  # that are final
        self._unsettled: deque[Step] = deque()  # of tokens that may still be cut off by a stop string
        self._n_released = 0  # tokens
        self._n_chars_released = 0

    def ends(self, token: int) -> bool:
        """Takes a token; whether the completion ends with it."""
        self._settled.append(self._text.push(token))
        return self._text.stopped

    def echo(self, prompt: Sequence[int], scores: Scores) -> Piece:
        """The piece of the prompt."""
        texts = self._text.prefix_pieces
        tokens = (
            [Token(*token) for token in zip(prompt, texts, *zip(*scores, strict=True), strict=True)] if scores else []
        )
        return Piece(self._index, "".join(texts), tuple(tokens))

    def piece(self, step: Step) -> Piece:
        """What a step brought."""
        text = ""
        if step.token is not None:
            text = self._settled.popleft()
            if self._logprobs:
                self._unsettled.append(step)
        if step.finish_reason:
            text += self._text.finish()
        self._n_chars += len(text)
        tokens = tuple(self._release(is_last=step.finish_reason is not None)) if self._logprobs else ()
        stopped = step.finish_reason and self._text.stopped
        return Piece(self._index, text, tokens, int(step.token is not None), "stop" if stopped else step.finish_reason)

    def _release(self, *, is_last: bool) -> list[Token]:
        """The further tokens whose text is final. Those without text wait for the character that they are part of."""
        pieces, n_final, n_chars = self._text.pieces, self._n_released, self._n_chars_released
        for i in range(self._n_released, len(pieces)):
            n_chars += len(pieces[i])
            if is_last or (pieces[i] and n_chars <= self._n_chars):
                n_final, self._n_chars_released = i + 1, n_chars
        tokens = []
        for text in pieces[self._n_released : n_final]:
            step = self._unsettled.popleft()
            assert step.token is not None
            tokens.append(Token(step.token, text, step.logprob, step.top_logprobs))
        self._n_released = max(self._n_released, n_final)
        return tokens


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
        max_waiting: maximum number of sequences that wait for a slot; requests with more are refused.

    Attributes:
        error: what ended the service; None as long as it runs, and after `stop`.
        n_generated: number of tokens that were generated for requests.
    """

    def __init__(self, llama: Llama, *, max_waiting: int = 256) -> None:
        self.llama = llama
        self.engine = llama.engine
        self.engine.announces = lambda: not self._inbox.empty()
        self.max_waiting = max_waiting
        self.error: BaseException | None = None
        self.n_generated = 0
        self._inbox: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._n_arriving = 0  # sequences in the inbox
        self._numbers = itertools.count()
        self._listeners: dict[int, Callable[[Any], None]] = {}  # on the first rank alone
        self._running: dict[int, _Running] = {}
        self._is_stopping = False
        self._lock = threading.Lock()

    @property
    def n_requests(self) -> int:
        """Number of requests that are not finished."""
        return len(self._listeners)

    @property
    def n_running(self) -> int:
        """Number of sequences that have a slot of the cache."""
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
            prompts: ids, checked by the caller (see `prompts`).
            params: how to sample.
            on_piece: called in the service's thread with each piece, or with the error that ended the request. It must
                not wait.
            n: number of completions of each prompt; those of prompt i are the choices from `i * n` on. With a seed,
                the first completion is what the prompt would get alone, and the others have the seeds that follow.
            top_logprobs: number of most likely tokens to report at each position.
            continues: whether the text continues that of the prompt, and so keeps its leading space. Otherwise it
                begins anew, as an answer does.

        Raises:
            QueueFullError: there is no room for it among the `max_waiting` sequences that may wait.
            ServiceStoppedError: the service has ended, or was told to stop.
        """
        lists = [list(prompt) for prompt in prompts]
        n_sequences = len(lists) * n
        return self._register(on_piece, n_sequences, lambda i: _Added(i, lists, params, n, top_logprobs, continues))

    def score(self, tokens: Sequence[int], on_score: OnScore) -> int:
        """Has the log-probability of each id computed, as in `Llama.score_tokens`; otherwise like `submit`."""
        return self._register(on_score, 0, lambda number: _Scored(number, list(tokens)))

    def abort(self, number: int) -> None:
        """Ends a request, whose slot is free from the next step on; without effect if it is finished."""
        if self._listeners.pop(number, None):
            self._inbox.put(_Aborted(number))

    def stop(self) -> None:
        """Ends the service before its next step; what is not finished gets a `ServiceStoppedError`."""
        self._is_stopping = True
        self._inbox.put(_Stopped())

    def _register(self, listener: Callable[[Any], None], n_sequences: int, change: Callable[[int], Any]) -> int:
        with self._lock:
            if self._is_stopping or self.error is not None:
                raise ServiceStoppedError("the service has stopped")
            if self.n_waiting + n_sequences > self.max_waiting:
                raise QueueFullError(f"at most {self.max_waiting} sequences may wait; try again later")
            number = next(self._numbers)
            self._listeners[number] = listener
            self._n_arriving += n_sequences
            self._inbox.put(change(number))
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
            else:
                self._begin(change)
        return True

    def _begin(self, change: _Added | _Scored) -> None:
        """Has a request join the engine's batch, or scores it; an error is its caller's."""
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
            if isinstance(change, _Added) and runtime.is_first_rank():
                with self._lock:
                    self._n_arriving -= len(change.prompts) * change.n

    def _start(self, added: _Added) -> _Running:
        """Adds the sequences of a request to the engine; with echo, delivers the prompts."""
        params, tokenizer = added.params, self.llama.tokenizer
        choices: list[_Choice] = []
        sequences: list[EngineSequence] = []
        for prompt in added.prompts:
            scores = self._score(prompt, added.top_logprobs) if params.echo and params.logprobs else []
            for i in range(added.n):
                text = IncrementalDetokenizer(tokenizer, params.stop, prompt if added.continues or params.echo else ())
                choice = _Choice(len(choices), text, logprobs=params.logprobs)
                if params.echo:
                    self._tell(added.number, choice.echo(prompt, scores))
                choices.append(choice)
                sequences.append(
                    EngineSequence(
                        list(prompt),
                        self._sampler(params, i),
                        0,
                        params.max_gen_len,
                        tokenizer.eos_id,
                        logprobs=params.logprobs,
                        top_logprobs=added.top_logprobs,
                        ends=choice.ends,
                        speculative=params.speculative,
                    )
                )
        call = Call(sequences)
        self.engine.add(call)
        return _Running(call, choices)

    def _sampler(self, params: SamplingParams, index: int) -> Sampler:
        """The sampler of a prompt's completion: each has its own, so that it does not depend on the others."""
        device = device_of(self.llama.model)
        if params.seed is None or params.temperature == 0:
            generator = runtime.default_generator(device)
        else:
            generator = torch.Generator(device).manual_seed((params.seed + index) % 2**64)
        return Sampler(params.temperature, params.top_p, 1, generator)

    def _score(self, prompt: list[int], n_top: int) -> Scores:
        """For each token of a prompt its log-probability and the most likely ones in its place; nothing for the first.

        Uses the cache from its first slot on; the engine computes anew what was there.
        """
        scores: Scores = [(None, ())]
        with lock_of(self.llama.model), torch.inference_mode():
            runner = ModelRunner(self.llama.model)
            tokens = runner.pad([prompt])
            for start in range(0, len(prompt) - 1, _SCORED_POSITIONS):
                targets = tokens[:, start + 1 : start + 1 + _SCORED_POSITIONS]
                logits = runner.run(tokens[:, start : start + targets.size(1)], start)
                values, ids = logits[0].log_softmax(-1).topk(min(n_top, logits.size(-1)))
                top = [tuple(zip(*row, strict=True)) for row in zip(ids.tolist(), values.tolist(), strict=True)]
                scores += zip(logprobs_of(logits, targets)[0].tolist(), top, strict=True)
        return scores

    def _deliver(self) -> None:
        """Passes the new steps of all requests to their listeners."""
        for number, running in list(self._running.items()):
            call = running.call
            while call.steps:
                step = call.steps.popleft()
                self.n_generated += step.token is not None
                self._tell(number, running.choices[step.sequence].piece(step))
            if call.is_over:
                if call.error is not None:
                    self._fail(number, call.error)
                del self._running[number]
                self._listeners.pop(number, None)

    def _fail(self, number: int, error: BaseException) -> None:
        """Tells a request's listener that it failed. Under model parallelism all fail: the ranks may have parted."""
        if runtime.model_parallel_size() > 1:
            raise error
        self._tell(number, error)

    def _tell(self, number: int, news: Any) -> None:
        if listener := self._listeners.get(number):
            listener(news)
