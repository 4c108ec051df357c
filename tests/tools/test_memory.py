"""The memory command: what it prints is `MemoryPlan`'s sum, and the sizes it names are the largest that fit."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from llama import ModelArgs
from llama.checkpoint.memory import MemoryPlan
from llama.checkpoint.releases import RELEASES, find_release
from llama.tools.memory import memory_table, parse_memory
from tests.support.processes import run_python

GIB = 1024**3


def amounts(table: str, name: str) -> list[float]:
    """The GiB of a row, each rank's and, with several ranks, all of theirs."""
    (row,) = (line for line in table.splitlines() if line.startswith(name))
    return [float(amount) for amount in re.findall(r"([\d.]+) GiB", row)]


@pytest.mark.parametrize(
    ("model", "parameters", "files"),
    [
        ("7B", 6_738_415_616, 1),
        ("13B", 13_015_864_320, 2),
        ("70B", 68_976_648_192, 8),
        ("CodeLlama-7b", 6_738_546_688, 1),
        ("CodeLlama-13b", 13_016_028_160, 2),
        ("CodeLlama-34b", 33_743_970_304, 4),
        ("CodeLlama-70b", 68_976_910_336, 8),
    ],
)
def test_the_published_sizes(model: str, parameters: int, files: int) -> None:
    """The parameter counts are those of Hugging Face's model cards; norms count once a rank."""
    release = RELEASES[model]
    assert release.model_parallel_size == files and find_release(release.args) == (model, release)
    assert MemoryPlan(release.args, 1, torch.float16).weights == 2 * parameters
    table = memory_table(model=model)
    assert amounts(table, "weights")[-1] == pytest.approx(2 * parameters / GIB, abs=0.03)
    assert len(amounts(table, "weights")) == (2 if files > 1 else 1)


@pytest.mark.parametrize(("dtype", "n_bytes"), [("float16", 2), ("float32", 4)])
def test_the_kv_cache_follows_the_formula(dtype: str, n_bytes: int) -> None:
    """Of 70B: 2 * layers * KV heads * head size * bytes per position, 16 of them spare, over the ranks."""
    table = memory_table(model="70B", max_seq_len=4096, max_batch_size=3, model_parallel_size=4, dtype=dtype)
    expected = 2 * 80 * 8 * 128 * n_bytes * (4096 + 16) * 3
    assert amounts(table, "KV cache") == pytest.approx([expected / 4 / GIB, expected / GIB], abs=0.006)
    assert amounts(table, "total")[0] == pytest.approx(
        sum(amounts(table, part)[0] for part in ("weights", "KV cache", "activations")), abs=0.02
    )


@pytest.mark.parametrize(("model", "memory"), [("7B", "16GiB"), ("13B", "24GB"), ("70B", "24GiB"), ("70B", "80GiB")])
def test_the_sizes_named_are_the_largest_that_fit(model: str, memory: str) -> None:
    sizes = {"max_seq_len": 700, "max_batch_size": 3}
    table = memory_table(model=model, device_memory=memory, **sizes)
    for name in sizes:
        n = int(re.search(rf"largest {name} with .*: (\d+)", table)[1])  # type: ignore[index]
        for size, verdict in ((n, "fits"), (n + 1, "does not fit")):
            again = memory_table(model=model, device_memory=memory, **(sizes | {name: size}))
            assert f"\n{verdict} in " in again


def test_a_sequence_beyond_what_was_trained_is_marked_and_what_cannot_fit_is_said() -> None:
    for memory, marked in (("80GiB", True), ("14GiB", False)):
        last = memory_table(model="7B", device_memory=memory).splitlines()[-1]
        assert last.startswith("largest max_seq_len") and ("(Llama 2 was trained for 4096)" in last) == marked
    table = memory_table(model="70B", model_parallel_size=1, device_memory="24GiB")
    assert re.search(r"does not fit in 24.00 GiB: it lacks 1\d\d\.\d\d GiB", table)
    assert table.count("none fits") == 2


@pytest.mark.parametrize("files", [1, 2, 4])
def test_a_checkpoint_tells_its_sizes(
    write_checkpoint: Callable[..., Path],
    params: dict[str, Any],
    state: dict[str, torch.Tensor],
    tmp_path: Path,
    files: int,
) -> None:
    folder = write_checkpoint(params | {"vocab_size": -1}, state, files)
    table = memory_table(folder, max_seq_len=10**6, max_batch_size=3, dtype="float32")
    plan = MemoryPlan(ModelArgs(**params, max_seq_len=10**6, max_batch_size=3), files, torch.float32)
    assert f"MP={files}" in table
    assert amounts(table, "total")[0] == pytest.approx(plan.total / GIB, abs=0.006)


@pytest.mark.parametrize(
    ("text", "n_bytes"),
    [("24GiB", 24 * GIB), ("80 GB", 80 * 10**9), ("1.5g", 3 * GIB // 2), ("512MiB", GIB // 2), (" 16gb ", 16 * 10**9)],
)
def test_amounts_of_memory_have_a_number_and_a_unit(text: str, n_bytes: int) -> None:
    assert parse_memory(text) == n_bytes
    for wrong in ("24", "GiB", "", "24 apples", "-3GiB", "1e9GB", "24GiB or so"):
        with pytest.raises(ValueError, match="must be a number and a unit"):
            parse_memory(wrong)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "ckpt_dir, a folder, or model .* must be given"),
        ({"ckpt_dir": "x", "model": "7B"}, "and not both"),
        ({"model": "8B"}, "model must be 7B, 13B, 70B, CodeLlama-7b, .*, got '8B'"),
        ({"model": "7B", "dtype": "int4"}, "dtype must be .*, got 'int4'"),
        ({"model": "7B", "max_seq_len": 0}, "max_seq_len must be above 0 .*, got 0"),
        ({"model": "7B", "max_batch_size": "many"}, "max_batch_size must be an integer, got 'many'"),
        ({"model": "70B", "model_parallel_size": 16}, r"n_kv_heads \(8\)"),
        ({"model": "70B", "model_parallel_size": 0}, "model_parallel_size must be an integer of at least 1, got 0"),
    ],
)
def test_wrong_arguments_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        memory_table(**arguments)


@pytest.mark.parametrize(
    ("model", "size"),
    [
        ("7B-chat", "7B"),
        ("llama-2-7b", "7B"),
        ("Llama-2-13b-chat-hf", "13B"),
        ("70b", "70B"),
        ("34B", "CodeLlama-34b"),
        ("CodeLlama-7b-Instruct-hf", "CodeLlama-7b"),
        ("codellama-13b-python", "CodeLlama-13b"),
    ],
)
def test_a_model_has_the_names_that_it_was_released_under(model: str, size: str) -> None:
    assert memory_table(model=model).splitlines()[1:] == memory_table(model=size).splitlines()[1:]


def test_the_module_is_a_command() -> None:
    done = run_python("-m", "llama.tools.memory", "--model", "70B", "--device_memory", "1GiB")
    assert (done.returncode, done.stderr) == (1, "")  # it does not fit: for `&&` in a script
    assert done.stdout == memory_table(model="70B", device_memory="1GiB") + "\n"
