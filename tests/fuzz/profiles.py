"""How many cases a fuzz test tries, and from which seed.

The fast profile is part of every run and always tries the same cases. The long one (`pytest -m fuzz`) starts from a new
seed, which a failure prints: with `LLAMA_FUZZ_SEED=N` it tries the same cases again. `LLAMA_FUZZ_EXAMPLES=N` sets their
number.
"""

from __future__ import annotations

import os
import random
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import HealthCheck, given, seed, settings
from hypothesis.strategies import SearchStrategy

SEED = int(os.environ.get("LLAMA_FUZZ_SEED") or random.SystemRandom().randrange(2**32))
EXAMPLES = os.environ.get("LLAMA_FUZZ_EXAMPLES")
Profile = Callable[..., None]  # calls a function with as many drawn arguments


def _fast(max_examples: int) -> Profile:
    def run(check: Callable[..., Any], *arguments: SearchStrategy[Any]) -> None:
        _settings(max_examples, derandomize=True)(given(*arguments)(check))()

    return run


def _long(max_examples: int) -> Profile:
    def run(check: Callable[..., Any], *arguments: SearchStrategy[Any]) -> None:
        print_seed()
        seed(SEED)(_settings(int(EXAMPLES or max_examples))(given(*arguments)(check)))()

    return run


def _settings(max_examples: int, **more: Any) -> settings:
    return settings(
        max_examples=max_examples, deadline=None, database=None, suppress_health_check=list(HealthCheck), **more
    )


def fast_and_long(fast: int, long: int) -> pytest.MarkDecorator:
    """Parametrizes a test with a `profile` of as many cases; the long one is marked fuzz."""
    profiles = [_fast(fast), pytest.param(_long(long), marks=pytest.mark.fuzz)]
    return pytest.mark.parametrize("profile", profiles, ids=["fast", "long"])


def print_seed() -> None:
    """For the output of a failing test."""
    print(f"LLAMA_FUZZ_SEED={SEED}")
