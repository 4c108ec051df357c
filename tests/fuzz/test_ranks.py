"""Faults of ranks: whatever happens to one of them in the middle of a call, every other one ends or says what happened.

`pytest -m faults` tries 60 cases, or LLAMA_FAULT_CASES, drawn from a seed that a failure prints: LLAMA_FUZZ_SEED=N
tries the same ones again. The ranks are processes that no launcher watches, so that none is ended from outside.
"""

from __future__ import annotations

import itertools
import os
import random
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from llama import Llama
from tests.fuzz.profiles import SEED
from tests.support.ranks import FAULT, run_faulty_ranks

pytestmark = pytest.mark.faults
WITHIN_S = 30.0  # within which every rank has to end, on a machine with a core per rank or not
RANK_TIMEOUT_S = 4  # LLAMA_RANK_TIMEOUT
STOPPED_S = 2  # how long a stopped rank stands still
N_PASSES = 12  # of the network in a call
PROMPTS = [[1, 9, 4], [1, 300, 7, 7, 12]]
FAULTS = ("kill", "raise", "exit", "stop", "stop before", "stop too long", "skip", "absent", "refuse", "other call")


@dataclass(frozen=True)
class Case:
    """One fault of one rank.

    Attributes:
        at_pass: the pass of the network in which it happens.
        stream: whether the call is a stream.
        agent: whether the ranks' store outlives rank 0, as under torchrun.
    """

    world_size: int
    fault: str
    rank: int
    at_pass: int
    stream: bool
    agent: bool


def cases() -> list[Case]:
    chance = random.Random(SEED)
    number = int(os.environ.get("LLAMA_FAULT_CASES") or 60)
    kinds = itertools.islice(itertools.cycle(itertools.product(FAULTS, (2, 4), (False, True))), number)
    return [
        Case(size, fault, chance.randrange(size), chance.randrange(N_PASSES), stream, chance.random() < 0.5)
        for fault, size, stream in kinds
    ]


def call(llama: Llama, stream: bool) -> list[Any]:
    if stream:
        return ["".join(llama.stream_text_completion("The", temperature=0, max_gen_len=N_PASSES))]
    return llama.generate(PROMPTS, N_PASSES, temperature=0)[0]


def stop(seconds: float) -> None:
    """Stops this process; another one wakes it."""
    subprocess.Popen(["sh", "-c", f"sleep {seconds}; kill -CONT {os.getpid()}"])
    os.kill(os.getpid(), signal.SIGSTOP)


def fail(fault: str) -> None:
    if fault == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    elif fault == "raise":
        raise ArithmeticError("the fault")
    elif fault == "exit":
        os._exit(3)
    elif fault == "stop":
        stop(STOPPED_S)


def rank_with_fault(rank: int, case: Case, folder: Path, tokenizer_path: Path) -> Iterator[Any]:
    os.environ["LLAMA_RANK_TIMEOUT"] = str(RANK_TIMEOUT_S if case.fault in ("skip", "absent", "stop too long") else 60)
    if case.fault == "absent":
        yield FAULT
    llama = Llama.build(folder, tokenizer_path, 64, 2, device="cpu", dtype="float32")
    mine = rank == case.rank
    passes = itertools.count()
    llama.model.layers[1].register_forward_hook(
        lambda *_: fail(case.fault) if mine and next(passes) == case.at_pass else None
    )
    if case.fault != "absent":
        yield FAULT
    try:
        if mine and case.fault == "stop before":
            stop(STOPPED_S)
        if mine and case.fault == "stop too long":
            stop(RANK_TIMEOUT_S + 3)
        if mine and case.fault == "skip":
            time.sleep(RANK_TIMEOUT_S + 3)
        elif mine and case.fault == "refuse":
            llama.generate(PROMPTS, N_PASSES, temperature=-1)
        elif mine and case.fault == "other call":
            llama.generate(PROMPTS, N_PASSES + 1, temperature=0)
        else:
            yield call(llama, case.stream)
    except Exception as error:
        yield f"{type(error).__name__}: {str(error).splitlines()[0]}"
        if rank == 0 and case.fault in ("skip", "stop too long"):
            time.sleep(0 if case.agent else 8)  # it holds the store, which tells the late rank


@pytest.fixture(scope="module")
def expected(checkpoint: Path, tokenizer_path: Path) -> dict[bool, list[Any]]:
    alone = Llama.build(checkpoint, tokenizer_path, 64, 2, device="cpu", dtype="float32")
    return {stream: call(alone, stream) for stream in (False, True)}


@pytest.fixture(scope="module")
def figures() -> Iterator[Counter[str]]:
    """The number of cases of each fault; printed at the end, with the longest time that a rank took to end."""
    counts: Counter[str] = Counter()
    yield counts
    print(f"\nFUZZ_SEED={SEED}; cases: {dict(counts)}")


def message(case: Case) -> str:
    """What the errors of the other ranks say."""
    if case.fault in ("kill", "exit") and case.rank == 0 and not case.agent:
        return "ended"  # the store with it
    late = f"rank {case.rank} did not make the call {'stream_text_completion' if case.stream else 'generate'} within"
    return {
        "kill": f"rank {case.rank} ended",
        "exit": f"rank {case.rank} ended",
        "raise": f"rank {case.rank} failed: ArithmeticError: the fault",
        "skip": late,
        "stop too long": late,
        "absent": "within 4 seconds",
        "refuse": f"rank {case.rank} refused the arguments",
        "other call": "all ranks must make the same calls",
    }[case.fault]


@pytest.mark.parametrize("case", cases(), ids=str)
def test_every_rank_ends_or_says_what_happened(
    case: Case,
    checkpoint_in: Callable[[int], Path],
    tokenizer_path: Path,
    expected: dict[bool, list[Any]],
    figures: Counter[str],
) -> None:
    print(f"LLAMA_FUZZ_SEED={SEED}")
    absent = (case.rank,) if case.fault == "absent" else ()
    arguments = (case, checkpoint_in(case.world_size), tokenizer_path)
    outcomes = run_faulty_ranks(
        case.world_size, rank_with_fault, *arguments, within_s=WITHIN_S, absent=absent, agent=case.agent
    )
    ranks = [rank for rank in range(case.world_size) if rank not in absent]
    for rank, outcome in zip(ranks, outcomes, strict=True):
        told = outcome.told[1:]
        if case.fault in ("stop", "stop before") or (case.fault == "stop too long" and told == [expected[case.stream]]):
            assert case.fault != "stop too long" or (case.rank == 0 and not case.agent)  # the store stood still too
            assert told == [expected[case.stream]]
        elif rank != case.rank:
            assert len(told) == 1 and told[0].startswith("RankError: "), told
            assert message(case) in told[0]
        elif case.fault in ("kill", "exit", "skip"):
            assert told == []
        elif case.fault == "raise":
            assert told == ["ArithmeticError: the fault"]
    figures[case.fault] += 1
    figures["slowest rank, s"] = max(figures["slowest rank, s"], round(max(o.seconds for o in outcomes)))
