"""Mutated checkpoints: each loads to the tensors that its bytes hold, or is refused by one clear error.

An error names the file, is one printable line of bounded length, and `verify` finds a problem too. No code of a file
runs.
"""

from __future__ import annotations

import json
import os
import pickle
import random
import resource
import shutil
import sys
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor

from llama.checkpoint.reading import find_shards, load_shard, model_args
from llama.tools.verify import verify
from tests.fuzz.profiles import Profile, fast_and_long
from tests.support import oracle

pytestmark = [
    pytest.mark.filterwarnings("ignore:Duplicate name"),
    pytest.mark.filterwarnings("ignore:invalid escape sequence"),  # in a damaged pickle
]

State = dict[str, Tensor]
ERRORS = (ValueError, AssertionError, FileNotFoundError, MemoryError)
MAX_GROWTH = 256 * 1024  # KiB of resident memory over all cases; a checkpoint has 100
MAX_MESSAGE = 2000  # characters
N_WORDS = 64
PARAMS: dict[str, Any] = {
    "dim": 16,
    "n_layers": 2,
    "n_heads": 4,
    "n_kv_heads": 2,
    "vocab_size": N_WORDS,
    "multiple_of": 8,
    "norm_eps": 1e-5,
}
FOREIGN = {"subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.fork", "socket.connect", "os.mkdir"}
FOREIGN |= {"os.remove", "os.rename", "os.rmdir", "os.chmod", "shutil.rmtree"}
_events: list[str] | None = None  # what code did while a checkpoint was loaded


def _note(event: str, arguments: tuple[Any, ...]) -> None:
    if _events is None:
        return
    writes = event == "open" and (isinstance(arguments[1], str) and set(arguments[1]) & set("wax+"))
    if writes or event in FOREIGN:
        _events.append(f"{event} {arguments}")


sys.addaudithook(_note)


@contextmanager
def no_foreign_code() -> Iterator[None]:
    global _events
    _events = []
    try:
        yield
    finally:
        events, _events = _events, None
    assert events == []


class Bomb:
    """Unpickling it runs code."""

    def __init__(self, call: Callable[..., Any], *arguments: Any) -> None:
        self.call = call, arguments

    def __reduce__(self) -> tuple[Any, ...]:
        return self.call


@dataclass
class Checkpoint:
    """A folder whose files a case may change, and the tensors that it holds then: None where only an error is right."""

    folder: Path
    expected: State | None

    @property
    def path(self) -> Path:
        return self.folder / "consolidated.00.pth"

    @property
    def params(self) -> Path:
        return self.folder / "params.json"


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    folder = tmp_path_factory.mktemp("original")
    state = {name: weight.bfloat16() for name, weight in oracle.random_state(PARAMS, seed=0).items()}
    torch.save(state, folder / "consolidated.00.pth")
    (folder / "params.json").write_text(json.dumps(PARAMS))
    return Checkpoint(folder, state)


# Mutations: each changes a checkpoint by the choices of `rng`.


def flip_bytes(checkpoint: Checkpoint, rng: random.Random) -> None:
    """A few bytes anywhere, half of them in the pickle or the directory. Values that changed are as they are now."""
    content = bytearray(checkpoint.path.read_bytes())
    offsets = value_offsets(checkpoint)
    for _ in range(rng.choice([1, 1, 2, 5])):
        places = [range(4000), range(len(content) - 4000, len(content)), range(len(content)), range(len(content))]
        content[rng.choice(rng.choice(places))] = rng.randrange(256)
    checkpoint.path.write_bytes(content)
    assert checkpoint.expected is not None
    for name, weight in checkpoint.expected.items():
        found = content[offsets[name] : offsets[name] + weight.nbytes]
        checkpoint.expected[name] = torch.frombuffer(found, dtype=weight.dtype).reshape(weight.shape)


def value_offsets(checkpoint: Checkpoint) -> dict[str, int]:
    """Where the values of each tensor are in the unchanged file: as bytes that are found once."""
    content = checkpoint.path.read_bytes()
    assert checkpoint.expected is not None
    offsets = {}
    for name, weight in checkpoint.expected.items():
        values = weight.view(torch.uint8).numpy().tobytes()
        offsets[name] = content.index(values)
        assert content.count(values) == 1 or "norm" in name
    return offsets


def cut_and_paste(checkpoint: Checkpoint, rng: random.Random) -> None:
    """A piece is cut off, taken out, repeated, overwritten or added."""
    content = checkpoint.path.read_bytes()
    start = rng.randrange(len(content))
    end = min(len(content), start + rng.choice([1, 4, 64, 4096]))
    noise = rng.randbytes(rng.choice([1, 16, 5000]))
    kinds = {
        "cut": content[:start],
        "head": content[start:],
        "out": content[:start] + content[end:],
        "twice": content[:end] + content[start:],
        "added": content + noise,
        "inserted": content[:start] + noise + content[start:],
        "noise": noise,
        "empty": b"",
    }
    checkpoint.path.write_bytes(kinds[rng.choice(list(kinds))])
    checkpoint.expected = None


def change_records(checkpoint: Checkpoint, rng: random.Random) -> None:
    """The zip archive is written again with its records compressed, lost, renamed, repeated, or with other content."""
    with zipfile.ZipFile(checkpoint.path) as archive:
        records = [(info.filename, archive.read(info)) for info in archive.infolist()]
    kind = rng.choice(["same", "compressed", "lost", "renamed", "twice", "grown", "pickle", "bomb", "order"])
    i = rng.randrange(len(records))
    name, data = records[i]
    harmless = name.endswith((".format_version", ".storage_alignment", "serialization_id", "version", "byteorder"))
    method = rng.choice([zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2]) if kind == "compressed" else zipfile.ZIP_STORED
    if kind == "lost":
        del records[i]
    elif kind == "renamed":
        records[i] = (name[:-1] + rng.choice(["~", "/", "\x1b[2J", "é", "x" * 1000]), data)
    elif kind == "twice":
        records.insert(rng.randrange(len(records)), (name, rng.choice([data, b"", rng.randbytes(9)])))
    elif kind == "grown":
        records[i] = (name, data + bytes(rng.choice([1, 100, 70_000, 5 * 1024**2])))
    elif kind == "pickle":
        changed = bytearray(records[0][1])
        for _ in range(rng.choice([1, 3, 20])):
            changed[rng.randrange(len(changed))] = rng.randrange(256)
        records[0] = (records[0][0], rng.choice([bytes(changed), rng.randbytes(300), changed[: rng.randrange(300)]]))
    elif kind == "bomb":
        records[0] = (records[0][0], bomb(rng, checkpoint.folder))
    elif kind == "order":
        rng.shuffle(records)
    with zipfile.ZipFile(checkpoint.path, "w", method) as archive:
        for record in records:
            archive.writestr(*record)
    if kind in ("pickle", "grown") or (harmless and kind in ("lost", "renamed")):
        # May be right still, or be well-formed and mean something else; torch looks at the bytes alone that it needs.
        checkpoint.expected = {}
    elif kind not in ("same", "order"):
        checkpoint.expected = None


def bomb(rng: random.Random, folder: Path) -> bytes:
    """A pickle that runs code, or takes endless memory, where it is trusted."""
    trace = str(folder / "trace")
    calls: list[tuple[Any, ...]] = [(os.mkdir, trace), (os.system, f"touch {trace}"), (exec, f"open({trace!r}, 'w')")]
    calls += [(bytearray, 2**40), (Path.touch, Path(trace)), (eval, "2 ** 2 ** 40"), (set, [1]), (torch.zeros, 2**40)]
    wrapped = Bomb(*rng.choice(calls))
    return pickle.dumps(rng.choice([wrapped, {"norm.weight": wrapped}, [wrapped], {wrapped: 1}]), protocol=2)


def change_tensors(checkpoint: Checkpoint, rng: random.Random) -> None:
    """Tensors are lost, added, renamed, reshaped or of other dtypes and layouts; the file is well-formed."""
    assert checkpoint.expected is not None
    state: dict[Any, Any] = dict(checkpoint.expected)
    right = True
    for _ in range(rng.choice([1, 1, 2, 4])):
        name = rng.choice(list(state))
        value = state[name]
        kind = rng.choice(["dtype", "lost", "renamed", "added", "reshaped", "turned", "int", "other", "sparse", "key"])
        if value is not checkpoint.expected.get(name):
            continue  # changed before
        if kind == "dtype" and value.dtype in (torch.bfloat16, torch.float16, torch.float32):
            state[name] = value.to(rng.choice([torch.float16, torch.float32, torch.bfloat16]))
        elif kind == "turned" and value.dim() == 2:
            state[name] = value.t().contiguous().t()
        else:
            right = False
            _damage(state, name, value, kind, rng)
    is_zip = rng.random() < 0.8
    torch.save(state, checkpoint.path, _use_new_zipfile_serialization=is_zip)
    checkpoint.expected = state if right and is_zip else None


def _damage(state: dict[Any, Any], name: Any, value: Tensor, kind: str, rng: random.Random) -> None:
    """One change that no network allows."""
    if kind in ("lost", "renamed", "key"):
        del state[name]
    strange = rng.choice(["\x1b[2J", "x" * 10**5, "layers.7.norm", "é\n", "rope.freqs.inv"])
    if kind == "renamed":
        state[strange] = value
    elif kind == "key":
        state[rng.choice([7, None, ("a", 1)])] = value
    elif kind in ("added", "dtype", "turned"):
        state[strange] = torch.ones(3)
    elif kind == "reshaped":
        state[name] = rng.choice([value[:-1], value.flatten()[:1], value[None], torch.ones(())])
    elif kind == "int":
        dtype = rng.choice([torch.int8, torch.bool, torch.float64, torch.complex64])
        state[name] = torch.zeros(value.shape, dtype=dtype)
    elif kind == "other":
        state[name] = rng.choice([[1.0], None, "x", {"nested": value}, value.tolist()])
    elif kind == "sparse":
        state[name] = rng.choice([value.float().to_sparse(), torch.empty(value.shape, device="meta")])


def change_params(checkpoint: Checkpoint, rng: random.Random) -> None:
    """Values, keys or bytes of params.json are others. What loads are the same tensors, whatever the rest says."""
    params: Any = dict(PARAMS)
    numbers: list[Any] = [0, -1, 1, 2, 3, 8, 16, 2.0, 0.5, True, None, "16", [], {}, 2**31, 2**53 + 1, 2**62, 10**400]
    numbers += [-2, 1e300, float("nan"), float("inf"), 2_000_000, "\x1b[2J", "x" * 10**5, [[[[1]]]]]
    for _ in range(rng.choice([1, 1, 2, 4])):
        key = rng.choice([*PARAMS, "rope_theta", "ffn_dim_multiplier", "heads", "\x1b[2J", "y" * 10**5])
        params[key] = rng.choice(numbers)
        if rng.random() < 0.1:
            del params[key]
    text = json.dumps(rng.choice([params] * 9 + [[params], 3, None, "x"])).encode()
    kind = rng.choice(["values"] * 6 + ["bytes", "cut", "nested", "noise", "gone"])
    if kind == "bytes":
        i = rng.randrange(len(text))
        text = text[:i] + rng.randbytes(2) + text[i + 1 :]
    elif kind == "cut":
        text = text[: rng.randrange(len(text))]
    elif kind == "nested":
        text = rng.choice([b"[", b'{"dim":', b'[{"a":']) * rng.choice([10, 1000, 100_000])
    elif kind == "noise":
        text = rng.randbytes(200)
    checkpoint.params.write_bytes(text)
    if kind == "gone":
        checkpoint.params.unlink()
        checkpoint.expected = None


MUTATIONS = [flip_bytes, cut_and_paste, change_records, change_tensors, change_params]


# What holds of every checkpoint


def load(folder: Path) -> State:
    """A checkpoint's tensors, read and checked as `Llama.build` does."""
    (path,) = find_shards(folder, 1)
    args = model_args(folder, N_WORDS, max_batch_size=1, max_seq_len=8)
    args.check_shards(1)
    return load_shard(path, args, 1)


def check(checkpoint: Checkpoint) -> str:
    """Whether the checkpoint was "loaded" or "refused", one of which has to be right."""
    state, refusal = {}, ""
    try:
        with no_foreign_code():
            state = load(checkpoint.folder)
    except ERRORS as error:
        refusal = str(error)
    if refusal:
        assert "consolidated.00.pth" in refusal or "params.json" in refusal
        assert refusal.isprintable() and len(refusal) < MAX_MESSAGE, refusal[:MAX_MESSAGE]
    else:
        assert checkpoint.expected is not None
        assert_same(state, checkpoint.expected)
        del state
    with no_foreign_code():
        found = verify(checkpoint.folder, quiet=True).problems
    assert found or not refusal
    assert all(line.isprintable() and len(line) < MAX_MESSAGE for line in found)
    return "refused" if refusal else "loaded"


def assert_same(state: State, expected: State) -> None:
    if expected:
        assert state.keys() == expected.keys()
    for name, weight in expected.items():
        assert state[name].dtype == weight.dtype and state[name].shape == weight.shape
        assert torch.equal(state[name].contiguous().view(torch.uint8), weight.contiguous().view(torch.uint8)), name


def peak_memory() -> int:
    """KiB of resident memory of this process, at most so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


@fast_and_long(40, 2000)
@pytest.mark.parametrize("mutate", MUTATIONS)
def test_a_mutated_checkpoint_loads_to_what_it_holds_or_is_one_clear_error(
    original: Checkpoint, tmp_path: Path, profile: Profile, mutate: Callable[[Checkpoint, random.Random], None]
) -> None:
    counts = {"loaded": 0, "refused": 0}
    folder, before = tmp_path / "mutated", peak_memory()

    def case(choices: int) -> None:
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(original.folder, folder)
        assert original.expected is not None
        checkpoint = Checkpoint(folder, dict(original.expected))
        mutate(checkpoint, random.Random(choices))
        counts[check(checkpoint)] += 1
        assert not (folder / "trace").exists()

    profile(case, st.integers(0, 2**64 - 1))
    growth = peak_memory() - before
    print(f"{mutate.__name__}: {counts}, peak memory grew by {growth // 1024} MiB")
    assert counts["refused"] > 0
    assert growth < MAX_GROWTH


def test_the_original_loads(original: Checkpoint) -> None:
    assert check(original) == "loaded"


def test_the_watch_sees_code_that_runs(tmp_path: Path) -> None:
    with pytest.raises(AssertionError), no_foreign_code():
        pickle.loads(pickle.dumps(Bomb(os.mkdir, str(tmp_path / "trace"))))
