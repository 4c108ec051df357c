"""This library in a build for one row, in which the weights stay as they are, mapped from the file."""

from __future__ import annotations

import statistics
from collections.abc import Iterator

from benchmarks import ours
from benchmarks.bandwidth import typical_bandwidth
from benchmarks.ceiling import bytes_per_decode_step
from benchmarks.job import Job
from benchmarks.measure import decode_rate
from benchmarks.ours import Ours, prepare, version

__all__ = ["load", "prepare", "version"]

_TURNS = 5


class Alone(Ours):
    ragged = False

    def extras(self, job: Job) -> Iterator[tuple[str, float]]:
        yield "share_of_bandwidth_decode_1", self._share_of_bandwidth(job)

    def _share_of_bandwidth(self, job: Job) -> float:
        """The median rate of reading in steps at batch 1, over that of plain reading right before each of them: what a
        machine shared with others gives changes from one minute to the next."""
        bytes_per_step = bytes_per_decode_step(self.llama.model.params, job)
        prompts = job.prompts([job.decode_prompt])
        shares = []
        for _ in range(_TURNS):
            bandwidth = typical_bandwidth(job.device)
            shares.append(bytes_per_step * decode_rate(self, prompts, job.decode_steps // 2) / bandwidth)
        return statistics.median(shares)


def load(job: Job) -> Alone:
    return Alone(ours.build(job, max_batch_size=1), (1,))
