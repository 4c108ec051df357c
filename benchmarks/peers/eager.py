"""This library without what keeps a GPU busy: no graphs, each step launched after the last one's tokens came."""

from __future__ import annotations

from benchmarks import ours
from benchmarks.job import Job
from benchmarks.ours import Ours, prepare, version
from llama.stepping import PlainStepper

__all__ = ["load", "prepare", "version"]


def load(job: Job) -> Ours:
    engine = ours.load(job)
    engine.llama.stepper = PlainStepper(engine.llama.model)
    return engine
