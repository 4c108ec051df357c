"""Resharding: exact to the bit for any number of files, all or nothing on disk, one clear error for a mistake."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from llama.checkpoint import writing
from llama.checkpoint.sharded import ShardedCheckpoint
from llama.checkpoint.writing import TensorFile
from llama.tools import progress
from llama.tools.reshard import reshard
from llama.tools.verify import verify
from tests.conftest import PARAMS, ROOT
from tests.support import oracle
from tests.support.processes import run_python
from tests.tools.test_commandline import command

SIZES = (1, 2, 4, 8)
Write = Callable[..., Path]
State = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def wide_params() -> dict[str, Any]:
    """Counts that 1, 2, 4 and 8 ranks can share."""
    return PARAMS | {"n_kv_heads": 8}


@pytest.fixture(scope="module")
def wide_state(wide_params: dict[str, Any]) -> State:
    """bfloat16 weights with some bit patterns that arithmetic would not keep: a NaN with a payload, minus zero."""
    state = {name: w.bfloat16() for name, w in oracle.random_state(wide_params, seed=1).items()}
    for tensor in state.values():
        tensor.view(torch.int16).view(-1)[:3] = torch.tensor([0x7FA1, -0x8000, 0x0001], dtype=torch.int16)
    return state


@pytest.fixture(scope="module")
def folders(write_checkpoint: Write, wide_params: dict[str, Any], wide_state: State) -> dict[int, Path]:
    """The same weights in 1, 2, 4 and 8 files, split by the fixture's own rule."""
    return {n: write_checkpoint(wide_params, wide_state, n) for n in SIZES}


@pytest.fixture
def source(write_checkpoint: Write, wide_params: dict[str, Any], wide_state: State) -> Path:
    """Two files that a test may change."""
    return write_checkpoint(wide_params, wide_state, 2)


def load(folder: Path, *, mmap: bool = True) -> list[State]:
    return [torch.load(path, weights_only=True, mmap=mmap) for path in sorted(folder.glob("*.pth"))]


def assert_same_files(folder: Path, other: Path, *, mmap: bool = True) -> None:
    ours, theirs = load(folder, mmap=mmap), load(other)
    assert len(ours) == len(theirs)
    for one, two in zip(ours, theirs, strict=True):
        assert one.keys() == two.keys()
        for name, tensor in one.items():
            assert tensor.dtype == two[name].dtype and tensor.shape == two[name].shape
            assert torch.equal(tensor.view(torch.uint8), two[name].contiguous().view(torch.uint8)), name


def assert_refused(message: str, folder: Path, output: Path, size: Any = 1, kind: type[Exception] = ValueError) -> None:
    """The call raises, with these words, and leaves the disk as it was."""
    before = sorted(output.parent.rglob("*"))
    with pytest.raises(kind, match=message):
        reshard(folder, output, size)
    assert sorted(output.parent.rglob("*")) == before


@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("m", SIZES)
def test_any_number_of_files_to_any_is_exact_to_the_bit(
    folders: dict[int, Path], tmp_path: Path, n: int, m: int
) -> None:
    reshard(folders[n], tmp_path / "out", m)
    assert_same_files(tmp_path / "out", folders[m])
    assert os.listdir(tmp_path) == ["out"]


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_numbers_of_files_that_do_not_divide_each_other_and_other_dtypes(
    write_checkpoint: Write, tmp_path: Path, dtype: torch.dtype
) -> None:
    params = PARAMS | {"dim": 48, "n_heads": 6, "n_kv_heads": 6, "multiple_of": 12, "vocab_size": 510}
    state = {name: w.to(dtype) for name, w in oracle.random_state(params, seed=2).items()}
    reshard(write_checkpoint(params, state, 3), tmp_path / "out", 2)
    assert_same_files(tmp_path / "out", write_checkpoint(params, state, 2))


def test_written_files_pass_zips_own_check_and_load_without_mapping(folders: dict[int, Path], tmp_path: Path) -> None:
    """Their checksums are those of the bytes, as in files that torch.save writes."""
    reshard(folders[1], tmp_path / "out", 2)
    for path in (tmp_path / "out").glob("*.pth"):
        with zipfile.ZipFile(path) as archive:
            assert archive.testzip() is None
    assert_same_files(tmp_path / "out", folders[2], mmap=False)


def test_params_and_tokenizer_are_copied_as_they_are(source: Path, tmp_path: Path) -> None:
    params = json.loads((source / "params.json").read_text()) | {"vocab_size": -1}  # as in the released files
    (source / "params.json").write_text(json.dumps(params, indent=3))
    (source / "tokenizer.model").write_bytes(b"a tokenizer")
    (source / "checklist.chk").write_text("would not fit the new files")
    reshard(source, tmp_path / "out", 1)
    names = ["checklist.chk", "consolidated.00.pth", "params.json", "tokenizer.model"]
    assert sorted(os.listdir(tmp_path / "out")) == names
    for name in names[2:]:
        assert (tmp_path / "out" / name).read_bytes() == (source / name).read_bytes()


def test_rope_freqs_goes_into_every_file(source: Path, tmp_path: Path) -> None:
    freqs = torch.arange(4.0)
    for path in source.glob("*.pth"):
        torch.save(torch.load(path) | {"rope.freqs": freqs}, path)
    reshard(source, tmp_path / "out", 4)
    assert all(torch.equal(state["rope.freqs"], freqs) for state in load(tmp_path / "out"))


def test_tensors_that_are_views(
    write_checkpoint: Write, folders: dict[int, Path], wide_params: dict[str, Any], tmp_path: Path
) -> None:
    folder = write_checkpoint(wide_params, {}, 1)
    whole = {name: tensor.t().contiguous().t() for name, tensor in load(folders[1])[0].items()}  # strides turned
    torch.save(whole, folder / "consolidated.00.pth")
    reshard(folder, tmp_path / "out", 2)
    assert_same_files(tmp_path / "out", folders[2])


def test_sizes_that_cannot_be_split_are_refused_with_the_numbers(
    source: Path, checkpoint: Path, tmp_path: Path
) -> None:
    assert_refused(r"n_heads \(8\) .* \(3\)", source, tmp_path / "out", 3)
    assert_refused(r"n_kv_heads \(4\) .* \(8\)", checkpoint, tmp_path / "out", 8)
    for size in (0, -2, True, 1.5, "two"):
        assert_refused("model_parallel_size must be an integer of at least 1, got", source, tmp_path / "out", size)


def test_places_that_are_taken_are_refused(source: Path, tmp_path: Path) -> None:
    assert_refused("must not be the input folder", source, source)
    (tmp_path / "link").symlink_to(source)
    assert_refused("must not be the input folder", source, tmp_path / "link")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").write_text("keep")
    assert_refused("exists already", source, tmp_path / "full", kind=FileExistsError)
    assert_refused("exists already", source, tmp_path / "full" / "mine", kind=FileExistsError)
    (tmp_path / "empty").mkdir()
    reshard(source, tmp_path / "empty", 1)
    reshard(source, tmp_path / "deep" / "er", 1)
    assert_same_files(tmp_path / "empty", tmp_path / "deep" / "er")


def test_too_small_a_disk_is_found_out_first(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = type("Usage", (), {"free": 1000})
    monkeypatch.setattr(writing.shutil, "disk_usage", lambda path: usage)
    assert_refused(r"must have 0\.00 GB free, got 0\.00 GB", source, tmp_path / "new" / "out", kind=OSError)


def test_files_that_disagree_are_refused(source: Path, tmp_path: Path) -> None:
    """test_reading.py has what is refused of one file, by the same functions."""
    path = source / "consolidated.01.pth"
    good = torch.load(path)
    for changed, message in (
        (
            {"norm.weight": good["norm.weight"] + 1},
            "01.pth must repeat the values .*, but differs in norm.weight",
        ),
        (
            {"output.weight": good["output.weight"].float()},
            "01.pth must have the dtypes .*, got output.weight of torch.float32 for torch.bfloat16",
        ),
        ({"extra": torch.zeros(2)}, r"consolidated.01.pth must hold no other tensors .* but has extra"),
    ):
        torch.save(good | changed, path)
        assert_refused(message, source, tmp_path / "out")
    path.unlink()
    assert_refused(r"got tok_embeddings.weight of \(512, 32\)", source, tmp_path / "out")
    (source / "params.json").unlink()
    assert_refused("no params.json", source, tmp_path / "out", kind=FileNotFoundError)
    assert_refused("no checkpoint files found in", tmp_path / "nowhere", tmp_path / "out", kind=AssertionError)


@pytest.mark.parametrize("n_files", [3, 7])
def test_a_missing_file_is_named_as_the_likely_cause(folders: dict[int, Path], tmp_path: Path, n_files: int) -> None:
    (tmp_path / "in").mkdir()
    for path in [folders[8] / "params.json", *sorted(folders[8].glob("*.pth"))[:n_files]]:
        (tmp_path / "in" / path.name).symlink_to(path)
    assert_refused(f"has {n_files} files, .* is a file missing", tmp_path / "in", tmp_path / "out")


def test_ctrl_c_leaves_nothing(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write, calls = TensorFile.write, iter(range(1000))

    def fails(self: TensorFile, name: str, tensor: torch.Tensor) -> int:
        if next(calls) == 10:
            raise KeyboardInterrupt
        return write(self, name, tensor)

    monkeypatch.setattr(TensorFile, "write", fails)
    (tmp_path / "out").mkdir()
    arguments = ["--ckpt_dir", source, "--model_parallel_size", 4, "--output_dir", tmp_path / "out"]
    assert command(monkeypatch, reshard, *arguments) == 130
    assert capsys.readouterr().err.split() == ["interrupted"]
    assert os.listdir(tmp_path) == ["out"] and os.listdir(tmp_path / "out") == []


KILLED = """
import os, signal, sys
from llama.tools.reshard import reshard
from llama.checkpoint.writing import TensorFile
TensorFile.write = lambda *args: os.kill(os.getpid(), signal.SIGKILL)
reshard(*sys.argv[1:], 1)
"""


def test_what_a_killed_run_left_is_replaced(source: Path, folders: dict[int, Path], tmp_path: Path) -> None:
    assert run_python("-c", KILLED, source, tmp_path / "out").returncode == -signal.SIGKILL
    (left,) = tmp_path.iterdir()
    assert left.name != "out"
    reshard(source, tmp_path / "out", 1)
    assert os.listdir(tmp_path) == ["out"]
    assert_same_files(tmp_path / "out", folders[1])


LIMITED = """
import resource
from llama.tools.commandline import run
from llama.tools.reshard import reshard
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, -1))
run(reshard)
"""


def test_a_limit_on_the_size_of_files_is_one_clear_error(source: Path, tmp_path: Path) -> None:
    """`ulimit -f`."""
    arguments = ["--ckpt_dir", source, "--output_dir", tmp_path / "out", "--model_parallel_size", "1"]
    done = run_python("-c", LIMITED, *arguments)
    assert done.returncode == 1 and os.listdir(tmp_path) == []
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    assert "ulimit -f" in done.stderr or "File too large" in done.stderr


@pytest.mark.parametrize("place", [7, None, True])
def test_places_that_are_no_paths_are_refused(source: Path, tmp_path: Path, place: Any) -> None:
    with pytest.raises(ValueError, match=f"output_dir must be a path, got {place}"):
        reshard(source, place, 1)
    assert_refused(f"must be a path, got {place}", place, tmp_path / "out")


def test_two_runs_for_one_folder_do_not_mix(source: Path, tmp_path: Path) -> None:
    with writing.staged_folder(tmp_path / "out", 0) as folder:
        (folder / "mine").write_text("whole")
        assert_refused("another run is writing", source, tmp_path / "out", kind=FileExistsError)
    assert (tmp_path / "out" / "mine").read_text() == "whole"


def test_the_command(
    source: Path,
    folders: dict[int, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    flags = ["--ckpt_dir", source, "--model_parallel_size", 4]
    assert command(monkeypatch, reshard, *flags, "--output_dir", "1e3") == 0  # a name, not a number
    assert_same_files(tmp_path / "1e3", folders[4])
    n_files = len(os.listdir(tmp_path / "1e3"))
    assert re.fullmatch(rf"wrote {n_files} files, \d+\.\d MiB, to 1e3 in \d+ s\n", capsys.readouterr().out)
    assert command(monkeypatch, reshard, *flags, "--output_dir", "1e3") == 1
    taken = "error: output_dir must be a new or an empty folder, got 1e3, which exists already\n"
    assert capsys.readouterr().err == taken
    assert command(monkeypatch, reshard, *flags, "--output_dir", "out", "--mistyped", 3) == 2
    assert os.listdir(tmp_path) == ["1e3"]


MEASURED = """
import resource, sys
import torch
from llama.tools.reshard import reshard
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
reshard(sys.argv[1], sys.argv[2], 2, quiet=True)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere mapped pages count until memory is short")
def test_memory_stays_bounded(write_checkpoint: Write, tmp_path: Path) -> None:
    params = PARAMS | {"dim": 512, "n_layers": 16, "vocab_size": 2048}
    folder = write_checkpoint(params, {name: w.bfloat16() for name, w in oracle.random_state(params, seed=4).items()})
    n_mib = (folder / "consolidated.00.pth").stat().st_size // 2**20
    arguments = [sys.executable, "-c", MEASURED, str(folder), str(tmp_path / "out")]
    done = subprocess.run(arguments, cwd=ROOT, check=True, capture_output=True, text=True)  # memory of its own
    assert n_mib > 80 and int(done.stdout) < n_mib / 4


def test_progress_tells_bytes_and_speed_with_tqdm_and_nothing_without(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("tqdm", reason="without it there is no bar")
    monkeypatch.setattr(progress, "_PLAIN_S", 0.0)

    def shown(**settings: Any) -> str:
        with progress.showing("copy", 10**10, **settings) as add:
            add(4 * 10**9)
            add(6 * 10**9, "a note")
        return capfd.readouterr().err

    assert re.search(r"copy: 100%.* 10\.0G/10\.0G .*B/s, a note", shown())
    assert shown(quiet=True) == ""
    monkeypatch.setattr(progress, "tqdm", None)
    assert shown() == ""


@pytest.mark.parametrize("n_rows", [-1, 513])
def test_a_vocabulary_that_files_cannot_share_is_padded(
    write_checkpoint: Write, params: dict[str, Any], state: State, tokenizer_path: Path, tmp_path: Path, n_rows: int
) -> None:
    """Fine-tunes with one added token, such as Vicuna's <pad>, have 32001 rows."""
    longer = {name: torch.cat([state[name], state[name][:1]]) for name in ("tok_embeddings.weight", "output.weight")}
    folder = write_checkpoint(params | {"vocab_size": n_rows}, state | longer)
    (folder / "added_tokens.json").write_text(json.dumps({"<pad>": 512}))
    reshard(folder, tmp_path / "two", 2, quiet=True)
    assert json.loads((tmp_path / "two" / "params.json").read_text())["vocab_size"] == 514
    assert (tmp_path / "two" / "added_tokens.json").read_bytes() == (folder / "added_tokens.json").read_bytes()
    whole = ShardedCheckpoint(tmp_path / "two")
    for name, tensor in (state | longer).items():
        rows = whole.whole(name)
        assert torch.equal(rows[: len(tensor)], tensor)
        assert not rows[len(tensor) :].any()


def test_the_result_can_be_verified(source: Path, tokenizer_path: Path, tmp_path: Path) -> None:
    shutil.copyfile(tokenizer_path, source / "tokenizer.model")
    reshard(source, tmp_path / "out", 2, quiet=True)
    found = verify(tmp_path / "out", quiet=True)
    assert found.notes == []
    assert all("NaN or infinite" in problem for problem in found.problems)  # the source has some


def test_a_folder_whose_name_is_no_utf8(source: Path, tmp_path: Path) -> None:
    """Every tool takes such folders, and prints their names escaped."""
    taken, out = tmp_path / os.fsdecode(b"in-\xff"), tmp_path / os.fsdecode(b"out-\xfe")
    shutil.copytree(source, taken)
    arguments = ["-m", "llama.tools.reshard", "--ckpt_dir", taken, "--output_dir", out, "--model_parallel_size", "2"]
    done = run_python(*arguments)
    assert (done.returncode, done.stderr) == (0, "")
    done = run_python(*arguments)
    assert done.returncode == 1 and r"out-\udcfe, which exists already" in done.stderr
    done = run_python("-m", "llama.tools.verify", "--ckpt_dir", out, "--quiet")
    assert r"out-\udcfe/consolidated.01.pth must hold finite numbers, got NaN" in done.stdout  # the source has some
