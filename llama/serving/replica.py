"""A replica of the network that completes jobs in the caller's own loop, for tools without HTTP."""

from __future__ import annotations

import sys

from llama import Llama
from llama.engine.output import Piece
from llama.serving.jobs import Job
from llama.serving.service import Service


class Replica(Service):
    """A service without a thread of its own: the caller starts jobs and takes the steps.

    All ranks of a model-parallel group start the same jobs between the same two steps.
    """

    def __init__(self, llama: Llama) -> None:
        super().__init__(llama, max_waiting=sys.maxsize)
        self._open: dict[int, list[list[Piece]]] = {}  # by job, the pieces of each of its choices
        self._failure: BaseException | None = None

    @property
    def n_free(self) -> int:
        """Number of sequences that could start now; below 0 if some wait."""
        n_slots: int = self.llama.model.params.max_batch_size
        return n_slots - self.engine.n_running - self.engine.n_waiting

    @property
    def is_idle(self) -> bool:
        """Whether no job runs or waits."""
        return not self._open

    def start(self, number: int, job: Job) -> None:
        """Adds a job to the engine's next step.

        Args:
            number: identifies the job among those that run.
        """
        choices: list[list[Piece]] = [[] for _ in range(job.n_choices)]

        def keep(piece: Piece | BaseException) -> None:
            if isinstance(piece, BaseException):
                self._failure = piece
            else:
                choices[piece.choice].append(piece)

        self._open[number] = choices
        self.submit(job.prompts, job.params, keep, n=job.n, top_logprobs=job.top_logprobs, continues=job.continues)
        self._apply(self._collect())

    def step(self) -> tuple[list[tuple[int, list[Piece]]], int]:
        """Takes a step of the engine.

        Returns:
            For each job that ended, its number and one piece per choice; and the number of new tokens of all jobs.
        """
        before = self.n_generated
        self.engine.advance()
        self._deliver()
        if self._failure is not None:
            raise self._failure
        over = [number for number, choices in self._open.items() if all(map(_is_over, choices))]
        ended = [(number, [_joined(pieces) for pieces in self._open.pop(number)]) for number in over]
        return ended, self.n_generated - before


def _is_over(pieces: list[Piece]) -> bool:
    return bool(pieces) and pieces[-1].finish_reason is not None


def _joined(pieces: list[Piece]) -> Piece:
    """All that a choice got, as one piece."""
    return Piece(
        pieces[0].choice,
        "".join(piece.text for piece in pieces),
        tuple(token for piece in pieces for token in piece.tokens),
        sum(piece.n_generated for piece in pieces),
        pieces[-1].finish_reason,
    )
