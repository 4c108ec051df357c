"""The bytes that a run needs and that a device has; what is refused for it, and whether the advice holds."""

from __future__ import annotations

import random
import re
import subprocess
import sys
import weakref
from collections.abc import Callable
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

import llama.model
from llama import Llama, ModelArgs
from llama.checkpoint import memory
from llama.checkpoint.format import tensor_shapes
from llama.checkpoint.memory import GIB, MemoryPlan, available_memory
from llama.engine.sampling import Sampler
from tests.conftest import ROOT
from tests.support import oracle

CPU = torch.device("cpu")
DTYPES = [torch.float16, torch.bfloat16, torch.float32]


def random_args(rng: random.Random) -> tuple[ModelArgs, int, torch.dtype]:
    parts = rng.choice([1, 2, 4])
    kv_heads = parts * rng.choice([1, 2, 8])
    heads = kv_heads * rng.choice([1, 4])
    args = ModelArgs(
        dim=heads * rng.choice([16, 64, 128]),
        n_layers=rng.randint(1, 80),
        n_heads=heads,
        n_kv_heads=kv_heads,
        vocab_size=rng.choice([512, 32000]),
        multiple_of=rng.choice([16, 256]),
        max_batch_size=rng.choice([1, 2, 7, 32, 500]),
        max_seq_len=rng.choice([1, 64, 1000, 4096]),
    )
    return args, parts, rng.choice(DTYPES)


# What a run needs


def test_weights_and_cache_of_random_networks() -> None:
    rng = random.Random(0)
    for _ in range(200):
        args, parts, dtype = random_args(rng)
        args = replace(args, multiple_of=256)  # which the parts divide
        plan = MemoryPlan(args, parts, dtype)
        assert plan.weights == sum(map(prod, tensor_shapes(args, parts).values())) * dtype.itemsize
        per_token = 2 * args.n_layers * (args.kv_heads // parts) * (args.dim // args.n_heads) * dtype.itemsize
        assert plan.kv_cache == per_token * args.max_batch_size * (args.max_seq_len + 16)
        assert plan.total == plan.weights + plan.kv_cache + plan.activations
        assert plan.activations > 0


def test_weights_and_cache_match_a_built_network(llama: Llama) -> None:
    plan = MemoryPlan(llama.model.params, 1, torch.float32)
    assert plan.weights == sum(parameter.nbytes for parameter in llama.model.parameters())
    assert plan.kv_cache == sum(
        buffer.nbytes for layer in llama.model.layers for buffer in layer.attention.cache.buffers()
    )


def peak_of_generate(generator: Llama) -> int:
    """What a full batch of prompts that fill the context takes, besides weights and cache."""
    args = generator.model.params
    prompts = [[1] * (args.max_seq_len - 2)] * args.max_batch_size
    generator.generate(prompts, 2, seed=0)
    return peak_bytes(lambda: generator.generate(prompts, 2, seed=0))


def peak_bytes(work: Callable[[], object]) -> int:
    """The most that tensors made meanwhile took at a time."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        work()
    events = [event for event in recorded.profiler.kineto_results.events() if event.name() == "[memory]"]
    total = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        total += event.nbytes()
        most = max(most, total)
    return most


def test_a_prefill_stays_within_the_plan(checkpoint: Path, tokenizer_path: Path) -> None:
    generator = Llama.build(checkpoint, tokenizer_path, 256, 1, device="cpu", dtype="float32")
    assert peak_of_generate(generator) <= MemoryPlan(generator.model.params, 1, torch.float32).activations


def test_a_prefill_of_many_passes_stays_within_the_plan(
    monkeypatch: pytest.MonkeyPatch, write_checkpoint: Callable[..., Path], params: dict[str, Any], tokenizer_path: Path
) -> None:
    monkeypatch.setattr(llama.model, "PREFILL_TOKENS", 64)
    wide = params | {"dim": 256, "n_layers": 1}
    folder = write_checkpoint(wide, oracle.random_state(wide, seed=0))
    generator = Llama.build(folder, tokenizer_path, 64, 64, device="cpu", dtype="float32")
    assert peak_of_generate(generator) <= MemoryPlan(generator.model.params, 1, torch.float32).activations


def test_sampling_stays_within_the_plan() -> None:
    args = ModelArgs(dim=16, n_layers=1, n_heads=4, vocab_size=8000, multiple_of=16, max_batch_size=32, max_seq_len=1)
    sampler = Sampler(0.6, 0.9, 32, torch.Generator().manual_seed(0))
    peak = peak_bytes(lambda: sampler(torch.ones(32, 8000), range(32), [0] * 32))
    assert peak <= MemoryPlan(args, 1, torch.float32).activations


# What is refused


def message_of(args: ModelArgs, parts: int, dtype: torch.dtype, available: int, where: str = "cpu") -> str:
    with pytest.raises(MemoryError) as caught:
        MemoryPlan(args, parts, dtype).check(available, where)
    return str(caught.value)


def test_what_fits_is_taken_and_what_does_not_is_refused_with_each_part_in_gib() -> None:
    rng = random.Random(1)
    for _ in range(100):
        args, parts, dtype = random_args(rng)
        plan = MemoryPlan(args, parts, dtype)
        plan.check(plan.total, "cpu")
        available = rng.choice([plan.total - 1, rng.randrange(plan.total)])
        message = message_of(args, parts, dtype, available, "cuda:3")
        first = f"this model needs {plan.total / GIB:.2f} GiB on cuda:3, which has {available / GIB:.2f} GiB available"
        assert message.splitlines()[0] == first
        told = dict(re.findall(r"^ +(weights|KV cache|activations) +([0-9.]+) GiB", message, re.MULTILINE))
        assert told == {
            "weights": f"{plan.weights / GIB:.2f}",
            "KV cache": f"{plan.kv_cache / GIB:.2f}",
            "activations": f"{plan.activations / GIB:.2f}",
        }
        sizes = f"max_batch_size={args.max_batch_size}, max_seq_len={args.max_seq_len}"
        assert f"MP={parts}" in message and str(dtype).split(".")[1] in message and sizes in message


def test_the_advice_fits_and_no_larger_size_does() -> None:
    """Each way that it names is followed; where it names none, not even one token of one row fits."""
    rng = random.Random(3)
    seen = set()
    for _ in range(500):
        args, parts, dtype = random_args(rng)
        smallest = MemoryPlan(replace(args, max_batch_size=1, max_seq_len=1), parts, dtype).total
        spare = MemoryPlan(args, parts, dtype).total - smallest
        available = rng.choice([smallest - 1, smallest, smallest + int(rng.random() ** 3 * spare)])
        if MemoryPlan(args, parts, dtype).total <= available:
            continue

        def fits(args: ModelArgs, parts: int = parts, dtype: torch.dtype = dtype, available: int = available) -> bool:
            return MemoryPlan(args, parts, dtype).total <= available

        advice = message_of(args, parts, dtype, available).splitlines()[-1]
        ways = [(name, int(size)) for name, size in re.findall(r"(max_batch_size|max_seq_len) to (\d+)", advice)]
        if not ways:
            assert advice.startswith("the weights leave no room: ")
            assert smallest > available
        elif " or " in advice or len(ways) == 1:
            for name, size in ways:
                assert size >= 1
                MemoryPlan(replace(args, **{name: size}), parts, dtype).check(available, "cpu")
                assert not fits(replace(args, **{name: size + 1}))
        else:
            MemoryPlan(replace(args, **dict(ways)), parts, dtype).check(available, "cpu")
            assert not fits(replace(args, **(dict(ways) | {"max_seq_len": dict(ways)["max_seq_len"] + 1})))
            assert not fits(replace(args, max_batch_size=1)) and not fits(replace(args, max_seq_len=1))
        seen.add(len(ways))
    assert seen == {0, 1, 2}


def _until_it_fails(call: Callable[[], object]) -> None:
    for _ in range(5):
        call()


def test_a_device_that_runs_out_is_told_with_the_plan_and_the_model_stays_usable(
    llama: Llama, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And what the call held is freed, though its error is kept."""
    prompt, held = [[1, 2, 3]], []
    expected = llama.generate(prompt, 8, temperature=0)
    steps = iter(range(3))

    def run_out(*args: object, **kwargs: object) -> torch.Tensor:
        activations = torch.zeros(100)
        held.append(weakref.ref(activations))
        if next(steps, None) is None:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nMore on allocators")
        return forward(*args, **kwargs)

    forward = llama.model.norm.forward
    calls: list[Callable[[], object]] = [
        lambda: llama.generate(prompt, 8, temperature=0),
        lambda: list(llama.stream_text_completion("The fox", temperature=0)),
        lambda: llama.score_tokens([[1, 2], [3, 4]]),
    ]
    for call in calls:
        monkeypatch.setattr(llama.model.norm, "forward", run_out)
        with pytest.raises(MemoryError) as caught:
            _until_it_fails(call)
        lines = str(caught.value).splitlines()
        assert lines[0] == "cpu ran out of memory (CUDA out of memory. Tried to allocate 2.00 GiB.)"
        assert any("KV cache" in line and "max_batch_size=4" in line for line in lines)
        assert "lower max_batch_size or max_seq_len" in lines[-1]
        assert all(reference() is None for reference in held)
        monkeypatch.undo()
        assert llama.generate(prompt, 8, temperature=0) == expected


def test_a_build_that_cannot_fit_is_refused_before_it_loads(
    monkeypatch: pytest.MonkeyPatch, checkpoint: Path, tokenizer_path: Path
) -> None:
    monkeypatch.setattr("llama.checkpoint.loading.available_memory", lambda device: 2**20)
    with pytest.raises(MemoryError, match=r"(?s)on cpu.*KV cache.*max_batch_size=4, max_seq_len=64"):
        Llama.build(checkpoint, tokenizer_path, max_seq_len=64, max_batch_size=4, device="cpu")


# What a device has


def cgroup(folder: Path, monkeypatch: pytest.MonkeyPatch, limit: str, usage: str) -> None:
    """A container of its own for this process: version 2's files, and none of version 1."""
    (folder / "memory.max").write_text(limit + "\n")
    (folder / "memory.current").write_text(usage + "\n")
    files = ((str(folder / "memory.max"), str(folder / "memory.current")), ("/nowhere/limit", "/nowhere/usage"))
    monkeypatch.setattr(memory, "_CGROUP_FILES", files)


@pytest.mark.skipif(not Path("/proc/meminfo").exists(), reason="needs /proc/meminfo")
def test_a_host_gives_what_its_kernel_calls_available(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cgroup(tmp_path, monkeypatch, "max", "1000000")
    (kib,) = re.findall(r"MemAvailable: +(\d+) kB", Path("/proc/meminfo").read_text())
    assert available_memory(CPU) == pytest.approx(1024 * int(kib), rel=0.2)


def set_available(folder: Path, monkeypatch: pytest.MonkeyPatch, n_bytes: int) -> None:
    """What the kernel of this host says."""
    (folder / "meminfo").write_text(f"MemAvailable: {n_bytes // 1024} kB\n")
    monkeypatch.setattr(memory, "_MEMINFO", folder / "meminfo")


def test_a_container_gives_what_its_limit_leaves_and_no_more_than_the_host_has(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for limit, usage, host, left in (
        *((str(8 * GIB), 3, 64, 5), (str(8 * GIB), 3, 2, 2), (str(GIB), 2, 2, 0)),
        *((limit, 3, 2, 2) for limit in ("9223372036854771712", "max", "", "nonsense")),
    ):
        set_available(tmp_path, monkeypatch, host * GIB)
        cgroup(tmp_path, monkeypatch, limit, str(usage * GIB))
        assert available_memory(CPU) == left * GIB
    (tmp_path / "meminfo").unlink()  # a host without /proc is asked otherwise
    assert available_memory(CPU) > 0


@pytest.mark.parametrize(("version", "prefix"), [(2, ""), (1, "total_")])
def test_page_cache_of_a_container_counts_as_free(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, version: int, prefix: str
) -> None:
    """Else a checkpoint that was just downloaded, or read once before, leaves no room for itself."""
    set_available(tmp_path, monkeypatch, 64 * GIB)
    cgroup(tmp_path, monkeypatch, str(16 * GIB), str(15 * GIB))
    stat = f"cache {14 * GIB}\n{prefix}inactive_file {5 * GIB}\n{prefix}active_file {8 * GIB}\n{prefix}shmem {GIB}\n"
    (tmp_path / "memory.stat").write_text(stat)
    assert available_memory(CPU) == 14 * GIB


def test_a_cuda_device_gives_what_earlier_tensors_left(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else a second build, after the first model is gone, can be refused."""
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (7 * GIB, 80 * GIB))
    assert available_memory(torch.device("cuda", 0)) == 7 * GIB
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 20 * GIB)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 5 * GIB)
    assert available_memory(torch.device("cuda", 0)) == 22 * GIB


def test_a_limit_on_the_address_space_counts(checkpoint: Path, tokenizer_path: Path) -> None:
    """`ulimit -v` used to end the load in the middle, with "is it cut short?"."""
    program = (
        "import resource, sys, torch; from llama import Llama; from llama.checkpoint.memory import free_address_space\n"
        "assert free_address_space() == sys.maxsize\n"
        "used = int(open('/proc/self/statm').read().split()[0]) * resource.getpagesize()\n"
        "resource.setrlimit(resource.RLIMIT_AS, (used + 2**30, -1))\n"
        "assert 0.9 * 2**30 < free_address_space() <= 2**30\n"
        "sizes = dict(max_seq_len=64, device='cpu', dtype='float32')\n"
        "Llama.build(sys.argv[1], sys.argv[2], max_batch_size=1, **sizes)\n"
        "try: Llama.build(sys.argv[1], sys.argv[2], max_batch_size=2**17, **sizes)\n"
        "except MemoryError as error: assert 'lower max_batch_size' in str(error), error\n"
        "else: sys.exit('it was built')\n"
    )
    command = [sys.executable, "-c", program, checkpoint, tokenizer_path]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
