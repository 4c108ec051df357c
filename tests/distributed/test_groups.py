"""Processes, devices, dtypes and threads: in this process where that can be, else in a fresh interpreter."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from llama import Llama
from llama.distributed import groups
from tests.conftest import ROOT
from tests.support import oracle
from tests.support.processes import run_python


def run_script(script: str, *arguments: object, fresh: str = "", **environment: str) -> Any:
    """Runs Python with these environment variables and no others but the search paths; returns what it prints as JSON.

    The script may leave no word on stderr and has to end with status 0.

    Args:
        fresh: how a new interpreter treats warnings; else one is used that has imported torch.
    """
    env = {"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT), "HOME": os.environ.get("HOME", "/")}
    env |= {"OMP_NUM_THREADS": "1"} | environment
    if fresh:
        command = [sys.executable, "-W", fresh, "-c", script, *map(str, arguments)]
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120, check=False)
    else:
        done = run_python("-c", script, *map(str, arguments), env=env)
    assert (done.returncode, done.stderr) == (0, "")
    return json.loads(done.stdout)


PLAIN = """
import atexit, json, sys
import torch.distributed as dist
from llama import Llama
results = []
atexit.register(lambda: print(json.dumps([*results, dist.is_initialized()])))  # after the library's own
folder, tokenizer = sys.argv[1:]
def build():
    return Llama.build(folder, tokenizer, max_seq_len=64, max_batch_size=4, device="cpu", dtype="float32")
first = build()
second = build()
results += [llama.generate([[1, 9, 4], [7]], 8, temperature=0)[0] for llama in (second, first)]
results.append(first.generate([[1, 9]], 8, seed=4)[0])
"""


def test_a_plain_script_needs_no_environment(checkpoint: Path, tokenizer_path: Path, llama: Llama) -> None:
    """No launcher, no variables; two builds; any warning is an error; the end is clean."""
    greedy, seeded = llama.generate([[1, 9, 4], [7]], 8, temperature=0)[0], llama.generate([[1, 9]], 8, seed=4)[0]
    got = run_script(PLAIN, checkpoint, tokenizer_path, fresh="error")
    assert got == [greedy, greedy, seeded, False]  # and no process group is left


OWN_GROUPS = """
import contextlib, io, json, os, sys
import torch.distributed as dist
from fairscale.nn.model_parallel.initialize import get_model_parallel_group, initialize_model_parallel
from llama import Llama
folder, tokenizer, two_files = sys.argv[1:]
def build(folder, size=None):
    return Llama.build(folder, tokenizer, 64, 4, size, device="cpu", dtype="float32")
errors = []
for size in (None, 2):
    try:
        build(two_files, size)
    except ValueError as error:
        errors.append(str(error))
del os.environ["WORLD_SIZE"]
dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
with contextlib.redirect_stdout(io.StringIO()):
    initialize_model_parallel(1)
before = dist.group.WORLD, get_model_parallel_group()
rows = build(folder).generate([[1, 9, 4], [7]], 8, temperature=0)[0]
kept = before == (dist.group.WORLD, get_model_parallel_group())
dist.destroy_process_group()
print(json.dumps([errors, rows, kept]))
"""


def test_groups_that_exist_are_used_and_an_unfinished_launch_is_explained(
    checkpoint: Path, tokenizer_path: Path, llama: Llama, checkpoint_in: Callable[[int], Path]
) -> None:
    """WORLD_SIZE=2 without a launcher's other variables; then, the error past, a program with groups of its own."""
    two_files = checkpoint_in(2)
    errors, rows, kept = run_script(OWN_GROUPS, checkpoint, tokenizer_path, two_files, WORLD_SIZE="2")
    assert len(errors) == 2
    for error in errors:
        assert "WORLD_SIZE=2" in error and "MASTER_ADDR" in error and "torchrun" in error
    assert rows == llama.generate([[1, 9, 4], [7]], 8, temperature=0)[0]
    assert kept


THREADS = """
import io, json, sys, threading
from fairscale.nn.model_parallel import initialize
from llama import Llama
folder, tokenizer = sys.argv[1:]
printed, errors, rows = io.StringIO(), [], []
stdout, sys.stdout = sys.stdout, printed
start = threading.Barrier(8)
def build():
    start.wait()
    try:
        llama = Llama.build(folder, tokenizer, max_seq_len=64, max_batch_size=4, device="cpu", dtype="float32")
        rows.append(llama.generate([[1, 9, 4], [7]], 8, temperature=0)[0])
    except Exception as error:
        errors.append(repr(error))
threads = [threading.Thread(target=build) for _ in range(8)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
kept = sys.stdout is printed
sys.stdout = stdout
print(json.dumps([errors, rows, kept, printed.getvalue(), "print" in vars(initialize)]))
"""


def test_first_builds_in_several_threads(checkpoint: Path, tokenizer_path: Path, llama: Llama) -> None:
    """They make the groups once, print nothing, and leave stdout to the other threads."""
    expected = llama.generate([[1, 9, 4], [7]], 8, temperature=0)[0]
    got = run_script(THREADS, checkpoint, tokenizer_path)
    assert got == [[], [expected] * 8, True, "", False]


FORK = """
import json, os, sys
from llama import Llama
folder, tokenizer = sys.argv[1:]
llama = Llama.build(folder, tokenizer, max_seq_len=64, max_batch_size=4, device="cpu", dtype="float32")
child = os.fork()
if child == 0:
    sys.exit(7)
status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
print(json.dumps([status, llama.generate([[1, 9, 4], [7]], 8, temperature=0)[0]]))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs a system on which processes can fork")
def test_a_forked_child_can_exit_and_leaves_the_parents_groups_alone(
    checkpoint: Path, tokenizer_path: Path, llama: Llama
) -> None:
    expected = llama.generate([[1, 9, 4], [7]], 8, temperature=0)[0]
    status, rows = run_script(FORK, checkpoint, tokenizer_path, fresh="ignore")
    assert (status, rows) == (7, expected)


PEAK = """
import json, sys
import torch
from llama import Llama
def peak_and_now():
    lines = dict(line.split(":", 1) for line in open("/proc/self/status"))
    return [1024 * int(lines[key].split()[0]) for key in ("VmHWM", "VmRSS")]
folder, tokenizer, dtype = sys.argv[1:]
torch.nn.functional.linear(torch.ones(4, 64), torch.ones(64, 64))
before = peak_and_now()[1]
llama = Llama.build(folder, tokenizer, max_seq_len=16, max_batch_size=1, device="cpu", dtype=dtype)
loaded = peak_and_now()[0]
llama.generate([[1, 9]], 2, temperature=0)
print(json.dumps([loaded - before, peak_and_now()[0] - before]))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc to see what memory is used")
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_loading_never_holds_a_second_copy(
    write_checkpoint: Callable[..., Path], params: dict[str, Any], tokenizer_path: Path, dtype: str
) -> None:
    """The checkpoint is bfloat16: as it is, and converted. Peak memory, mapped pages counted, to the first token."""
    big = params | {"dim": 768, "n_layers": 8, "n_heads": 8, "multiple_of": 256, "ffn_dim_multiplier": None}
    state = {name: torch.ones(shape, dtype=torch.bfloat16) for name, shape in oracle.shapes(big).items()}
    weights = sum(tensor.numel() for tensor in state.values()) * (2 if dtype == "bfloat16" else 4)
    folder = write_checkpoint(big, state)
    assert weights > 90 * 2**20
    for grown in run_script(PEAK, folder, tokenizer_path, dtype, fresh="ignore"):
        assert grown < 1.25 * weights + 20 * 2**20


# ---- sizes ----


def test_the_model_parallel_size_defaults_to_the_world_size_else_one(nothing_initialized: Callable[..., None]) -> None:
    assert groups.resolve_model_parallel_size(None) == 1
    nothing_initialized(WORLD_SIZE="8")
    assert groups.resolve_model_parallel_size(None) == 8
    assert [groups.resolve_model_parallel_size(size) for size in (1, 2, 4, 8)] == [1, 2, 4, 8]


def test_sizes_in_the_environment_are_whole_numbers_above_zero(nothing_initialized: Callable[..., None]) -> None:
    for name, read in (("WORLD_SIZE", groups.world_size), ("LOCAL_WORLD_SIZE", groups.local_world_size)):
        for value in ("0", "-1", "two", "", "1.5"):
            nothing_initialized(**{name: value})
            message = f"variable {name} must be a whole number of at least 1, got '{value}'; unset"
            with pytest.raises(ValueError, match=message):
                read()


def test_no_size_is_clamped(nothing_initialized: Callable[..., None]) -> None:
    nothing_initialized(WORLD_SIZE="8")
    for size in (3, 5, 9, 16):
        with pytest.raises(ValueError, match=rf"multiple .* got a world size of 8 and model_parallel_size={size};"):
            groups.resolve_model_parallel_size(size)
