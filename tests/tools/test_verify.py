"""The verify command: silent on what is sound, one line for each thing that is wrong."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from llama.tools.verify import main, verify
from tests.support.processes import run_python

State = dict[str, torch.Tensor]
Write = Callable[..., Path]


@pytest.fixture
def folder(write_checkpoint: Write, params: dict[str, Any], state: State, tokenizer_path: Path) -> Path:
    """A sound checkpoint of two files, with checksums and tokenizer as downloaded."""
    folder = write_checkpoint(params, {name: weight.bfloat16() for name, weight in state.items()}, 2)
    (folder / "tokenizer.model").write_bytes(tokenizer_path.read_bytes())
    write_checklist(folder)
    return folder


def write_checklist(folder: Path) -> None:
    files = sorted([*folder.glob("*.pth"), folder / "params.json"])
    lines = [f"{hashlib.md5(path.read_bytes()).hexdigest()}  {path.name}\n" for path in files]
    (folder / "checklist.chk").write_text("".join(lines))


def problems(folder: Path, **arguments: Any) -> list[str]:
    return verify(folder, quiet=True, **arguments).problems


def change(path: Path, changes: dict[str, torch.Tensor | None]) -> None:
    """Rewrites a file with some tensors replaced, added or, where None, left out; and the checksums."""
    state = torch.load(path) | changes
    torch.save({name: tensor for name, tensor in state.items() if tensor is not None}, path)
    write_checklist(path.parent)


def assert_one(found: list[str], *words: str) -> None:
    assert len(found) == 1, found
    assert all(word in found[0] for word in words) and "\n" not in found[0], found


def test_a_sound_checkpoint_has_no_problems(folder: Path) -> None:
    found = verify(folder, quiet=True)
    assert found.problems == [] and found.notes == []


@pytest.mark.parametrize("files", [1, 4])
def test_what_could_not_be_compared_is_noted(
    write_checkpoint: Write, params: dict[str, Any], state: State, files: int
) -> None:
    found = verify(write_checkpoint(params | {"vocab_size": -1}, state, files), quiet=True)
    assert found.problems == []
    assert re.search("no checklist.chk .* no tokenizer.model was found", " ".join(found.notes))


def test_a_changed_byte_is_found_by_its_checksum(folder: Path) -> None:
    path = folder / "consolidated.01.pth"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    assert_one(problems(folder), "consolidated.01.pth must have the listed MD5 sum")


def test_lines_of_a_checklist(folder: Path) -> None:
    checklist = folder / "checklist.chk"
    sums = checklist.read_text()
    pairs = [line.split() for line in sums.splitlines()]
    for line in ("{upper} *./{name}\r\n\r\n", "MD5 ({name}) = {md5}\n"):  # the last as on macOS
        checklist.write_text("".join(line.format(md5=md5, upper=md5.upper(), name=name) for md5, name in pairs))
        assert problems(folder) == []
    checklist.write_text(sums + "nonsense\n")
    assert_one(problems(folder), "line 4 must be an MD5 sum")
    for name in ("../params.json", "/etc/passwd", "sub/file", ".."):
        checklist.write_text(f"{sums}{'0' * 32}  {name}\n")
        assert_one(problems(folder), "line 4 must name a file beside it", name)
    checklist.write_text(f"{sums}{'0' * 32}  consolidated.02.pth\n")
    assert_one(problems(folder), "consolidated.02.pth is missing, which checklist.chk lists")
    checklist.write_bytes(sums.encode() + b"\xff\xfe\x00")
    assert_one(problems(folder), "line 4 must be an MD5 sum")
    checklist.write_text(sums)
    (folder / "tokenizer_checklist.chk").touch()
    assert_one(problems(folder), "tokenizer_checklist.chk must list every file, but lacks tokenizer.model")


@pytest.mark.parametrize("content", ["", "\n \n", "{sum}  params.json\n", "<html>403 Forbidden</html>\n"])
def test_a_checklist_that_does_not_list_every_file_is_a_problem(folder: Path, content: str) -> None:
    """An empty list, as a failed download leaves, used to end with "ok" over damaged weights."""
    md5 = hashlib.md5((folder / "params.json").read_bytes()).hexdigest()
    (folder / "checklist.chk").write_text(content.format(sum=md5))
    found = [line for line in problems(folder) if "must list every file, but lacks" in line]
    assert_one(found, "consolidated.00.pth, consolidated.01.pth")


def test_a_file_copied_over_another_is_a_problem(folder: Path) -> None:
    (folder / "consolidated.01.pth").write_bytes((folder / "consolidated.00.pth").read_bytes())
    write_checklist(folder)
    assert_one(problems(folder), "consolidated.01.pth must hold its own rank's part", "a copy of consolidated.00.pth")


def test_llama_1s_frequencies_are_no_problem(folder: Path) -> None:
    for path in folder.glob("*.pth"):
        change(path, {"layers.0.attention.inner_attention.rope.freqs": torch.zeros(4), "rope.freqs": torch.zeros(4)})
    assert problems(folder) == []


def test_the_tokenizer_in_the_folder_or_above_or_named(folder: Path, tmp_path: Path) -> None:
    broken = tmp_path / "tokenizer.model"
    broken.write_bytes(b"broken")
    assert_one(problems(folder, tokenizer_path=broken), "must be a SentencePiece model")
    assert_one(problems(folder, tokenizer_path=tmp_path / "nowhere"), "must be a tokenizer.model file")
    (tmp_path / "model").symlink_to(folder)
    assert problems(tmp_path / "model") == []
    inner = tmp_path / "inner"
    inner.mkdir()
    for path in [*folder.glob("*.pth"), folder / "params.json"]:
        (inner / path.name).symlink_to(path)
    assert_one(problems(inner), "must be a SentencePiece model")
    (tmp_path / "tokenizer.model").write_bytes((folder / "tokenizer.model").read_bytes())
    (tmp_path / "tokenizer_checklist.chk").write_text(f"{'0' * 32}  tokenizer.model\n")
    assert_one(problems(inner), "tokenizer.model must have the listed MD5 sum")


def test_a_tokenizer_of_another_size(
    write_checkpoint: Write, params: dict[str, Any], tokenizer_path: Path, state: State
) -> None:
    smaller = state | {name: state[name][:-8] for name in ("tok_embeddings.weight", "output.weight")}
    folder = write_checkpoint(params | {"vocab_size": -1}, smaller, 1)
    n_words = params["vocab_size"]
    found = problems(folder, tokenizer_path=tokenizer_path)
    assert_one(found, f"the tokenizer's {n_words} tokens, got {n_words - 8}")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"layers.1.attention.wq.weight": None}, ["but lacks layers.1.attention.wq.weight"]),
        ({"extra": torch.zeros(2)}, ["no other tensors than the network's, but has extra"]),
        (
            {"norm.weight": torch.zeros(63)},
            ["must have the shapes of", "norm.weight of (63,), not (64,)"],
        ),
        (
            {"norm.weight": torch.zeros(64, dtype=torch.int32)},
            ["must hold dense tensors of", "got norm.weight ("],
        ),
        (
            {"norm.weight": torch.zeros(64, device="meta")},
            ["must hold dense tensors of", "got norm.weight ("],
        ),
        (
            {"norm.weight": torch.zeros(64).to_sparse()},
            ["must hold dense tensors of", "got norm.weight ("],
        ),
        ({"norm.weight": torch.ones(64)}, ["dtypes of the other files", "torch.float32 for torch.bfloat16"]),
        (
            {"norm.weight": torch.zeros(64).bfloat16()},
            ["must repeat the values of", "differs in norm.weight"],
        ),
    ],
)
def test_what_is_wrong_with_a_tensor(folder: Path, changes: State, words: list[str]) -> None:
    change(folder / "consolidated.01.pth", changes)
    assert_one(problems(folder), "consolidated.01.pth", *words)


@pytest.mark.parametrize(
    ("dtype", "value"), [(torch.float16, float("nan")), (torch.bfloat16, float("inf")), (torch.float32, -float("inf"))]
)
def test_values_that_are_not_finite_are_counted(
    write_checkpoint: Write, params: dict[str, Any], state: State, dtype: torch.dtype, value: float
) -> None:
    name = "layers.2.feed_forward.w2.weight"
    bad = state[name].clone()
    bad[[3, 40], [7, 0]] = value
    whole = {key: weight.to(dtype) for key, weight in (state | {name: bad}).items()}
    assert_one(problems(write_checkpoint(params, whole)), f"NaN or infinite values in {name} (2)")


def test_the_largest_finite_values_are_sound(write_checkpoint: Write, params: dict[str, Any], state: State) -> None:
    largest = {name: torch.full_like(weight, torch.finfo(torch.float32).max) for name, weight in state.items()}
    assert problems(write_checkpoint(params, largest)) == []


def test_many_tensors_with_one_fault_are_one_line(folder: Path) -> None:
    path = folder / "consolidated.01.pth"
    change(path, {name: tensor[:1] for name, tensor in torch.load(path).items() if tensor.dim() == 2})
    assert_one(problems(folder), "must have the shapes of its configuration, ", " and 20 more")


def test_missing_and_misnamed_files(folder: Path) -> None:
    (folder / "checklist.chk").unlink()
    (folder / "consolidated.01.pth").rename(folder / "consolidated.02.pth")
    assert_one(
        problems(folder),
        "must hold consolidated.00.pth, consolidated.01.pth, got consolidated.00.pth, consolidated.02.pth",
    )
    (folder / "consolidated.02.pth").unlink()
    assert_one(problems(folder), "must hold the 2 files that the tensors are split over, got 1")
    with pytest.raises(AssertionError, match="no checkpoint files found"):
        verify(folder / "nowhere")


def test_another_number_of_files_than_published_is_noted(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    release = type("Release", (), {"model_parallel_size": 8})
    monkeypatch.setattr("llama.tools.verify.find_release", lambda args: ("70B", release))
    found = verify(folder, quiet=True)
    assert found.problems == [] and found.notes == ["70B was published in 8 files; this one is split over 2"]


@pytest.mark.parametrize(
    ("content", "word"), [('{"dim": "64"}', "dim must be an integer, got '64'"), (None, "no params.json")]
)
def test_wrong_params(folder: Path, content: str | None, word: str) -> None:
    (folder / "checklist.chk").unlink()
    (folder / "params.json").unlink() if content is None else (folder / "params.json").write_text(content)
    assert_one(problems(folder), word)


def test_the_command_prints_a_line_a_problem(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Which a hostile name cannot forge: a terminal would carry out its escape sequences."""
    assert main(str(folder)) == 0
    assert capsys.readouterr().out == f"ok: {folder}, 2 files\n"
    name = f"\x1b[2K\rok: {folder}, 2 files\n\x1b[8m"
    change(folder / "consolidated.01.pth", {"norm.weight": None, name: torch.zeros(2)})
    (folder / "checklist.chk").unlink()
    done = run_python("-m", "llama.tools.verify", "--ckpt_dir", folder, "--quiet")
    assert (done.returncode, done.stderr) == (1, "")
    lines = done.stdout.splitlines()
    assert [line.split()[0] for line in lines] == [str(folder / "consolidated.01.pth")] * 2 + ["note:"]
    assert all(map(str.isprintable, lines)) and r"\x1b[2K\rok: " in done.stdout


def test_a_named_pipe_is_a_problem_and_not_waited_for(folder: Path) -> None:
    (folder / "checklist.chk").unlink()
    (folder / "consolidated.01.pth").unlink()
    os.mkfifo(folder / "consolidated.01.pth")
    assert_one(problems(folder), "consolidated.01.pth must be a regular file")
