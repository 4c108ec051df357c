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

from hypothesis import HealthCheck, seed, settings

SEED = int(os.environ.get("LLAMA_FUZZ_SEED") or random.SystemRandom().randrange(2**32))
_ANY_SPEED = {"deadline": None, "database": None, "suppress_health_check": list(HealthCheck)}


def fast(max_examples: int) -> Callable[[Any], Any]:
    """Decorates a test that `hypothesis.given` made: the same few cases in every run."""
    return settings(max_examples=max_examples, derandomize=True, **_ANY_SPEED)


def long(max_examples: int) -> Callable[[Any], Any]:
    """Likewise: many cases, from `SEED`."""
    profile = settings(max_examples=int(os.environ.get("LLAMA_FUZZ_EXAMPLES") or max_examples), **_ANY_SPEED)

    def decorate(test: Any) -> Any:
        return seed(SEED)(profile(test))

    return decorate


def print_seed() -> None:
    """For the output of a failing test."""
    print(f"LLAMA_FUZZ_SEED={SEED}")
