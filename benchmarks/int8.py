"""This library in a build with `quantize="int8"`."""

from __future__ import annotations

from benchmarks import ours
from benchmarks.job import Job
from benchmarks.ours import Ours, prepare, version

__all__ = ["load", "prepare", "version"]


def load(job: Job) -> Ours:
    return ours.load(job, quantize="int8")
