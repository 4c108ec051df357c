"""The example scripts as users start them: torchrun in a process of its own, with the checkpoint that ships."""

from __future__ import annotations

import inspect
import json
import re
import runpy
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import example_chat_completion
import example_infilling
import example_text_completion
from llama import Llama, Tokenizer
from llama.checkpoint.format import read_params
from llama.tools import chat
from tests.conftest import ROOT
from tests.support.processes import clean_environment, free_port

CHAT, TEXT, INFILLING = "example_chat_completion.py", "example_text_completion.py", "example_infilling.py"
TINY_LLAMA = ROOT / "tiny-llama"


def start(script: str, *args: str, launcher: tuple[str, ...]) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "torch.distributed.run", *launcher, str(ROOT / script), *args]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=clean_environment(), cwd=ROOT
    )


def torchrun(script: str, *args: str, processes: int = 1) -> tuple[str, str]:
    """What it prints and what it logs; its status has to be 0."""
    launcher = ("--nproc_per_node", str(processes), "--master_port", str(free_port()))
    process = start(script, *args, launcher=launcher)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    return out, err


PRINTED = {  # by each script of examples/, among other lines
    "stream": "Put one egg yolk",
    "score": "The capital of France is Paris.   -0.0 -0.0",
    "hook": "block 3: 1 tokens in this pass",
    "patch_activation": "block 0, token 27 (3): the answer is 8",
    "lora": "is Dolly.",
    "beam_search": "width 4: -3.13 The best llama sea is beautiful, and",
    "guidance": "scale 1.5: Paris. Many people visit it every year",
    "logits_processor": "', ",
    "json_schema": "{'model': '13B', 'mp': 2}",
    "infilling": "The capital of France is Paris.",
    "client": "Put one egg yolk",
    "batch": "cheese:fromage (stop)",
}


@pytest.mark.parametrize("name", sorted(path.stem for path in (ROOT / "examples").glob("*.py")))
def test_a_script_of_the_folder_runs_without_arguments(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", [f"examples/{name}.py"])
    runpy.run_path(f"examples/{name}.py", run_name="__main__")
    printed = capsys.readouterr().out.splitlines()
    assert any(PRINTED[name] in line for line in printed), printed
    if name == "logits_processor":
        assert "e" in printed[0] and "e" not in printed[1]


@pytest.fixture(scope="module")
def chat_answers() -> str:
    return torchrun(CHAT, "--temperature", "0")[0]


@pytest.fixture(scope="module")
def cut_in_two(write_checkpoint: Callable[..., Path]) -> tuple[str, ...]:
    """Flags for the checkpoint that ships, cut for two ranks."""
    state: dict[str, Any] = torch.load(TINY_LLAMA / "consolidated.00.pth", weights_only=True)
    folder = write_checkpoint(read_params(TINY_LLAMA), state, 2)
    shutil.copy(TINY_LLAMA / "tokenizer.model", folder)
    return ("--ckpt_dir", str(folder), "--temperature", "0")


def answers(printed: str) -> list[str]:
    return re.findall(r"^> (?:Assistant: )?(.*?)\n\n====", printed, flags=re.MULTILINE | re.DOTALL)


def test_the_chat_example_prints_each_dialog_its_fitting_answer_and_a_rule(chat_answers: str) -> None:
    assert chat_answers.count("\n==================================\n") == 6
    assert "User: How do I make mayonnaise?\n" in chat_answers
    assert "System: Always answer with a haiku.\n" in chat_answers
    mayonnaise, eiffel, haiku, emojis, birthday, unsafe = answers(chat_answers)
    assert "egg" in mayonnaise
    assert "Eiffel" in eiffel
    assert len(haiku.splitlines()) == 3
    assert any(ord(character) > 0x2600 for character in emojis)
    assert "John" in birthday
    assert unsafe == "Error: special tags are not allowed as part of the prompt."


def test_the_text_example_completes_sensibly_as_it_ships(capsys: pytest.CaptureFixture[str]) -> None:
    example_text_completion.main()
    printed = capsys.readouterr()
    life, relativity, mail, french = answers(printed.out)
    assert min(map(len, (life, relativity, mail))) > 20
    assert french.startswith("fromage")
    assert printed.err == ""


def test_two_machines_answer_as_one(chat_answers: str, cut_in_two: tuple[str, ...]) -> None:
    """Two agents of torchrun, one process each, over the loopback interface."""
    shared = ("--nnodes", "2", "--nproc_per_node", "1", "--master_addr", "127.0.0.1", "--master_port", str(free_port()))
    nodes = [start(CHAT, *cut_in_two, launcher=(*shared, "--node_rank", str(rank))) for rank in range(2)]
    printed = [node.communicate(timeout=120) for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], printed
    assert [out for out, _ in printed] == [chat_answers, ""]
    assert not any(re.search("Loaded|Kernels|Warning", err) for _, err in printed)


def test_two_replicas_share_the_prompts_and_print_what_one_prints(capsys: pytest.CaptureFixture[str]) -> None:
    flags = {"temperature": 0, "dtype": "float32", "device": "cpu", "seed": 3}
    example_text_completion.main(**flags)
    words = [word for name, value in flags.items() for word in (f"--{name}", str(value))]
    shared, _ = torchrun(TEXT, *words, "--model_parallel_size", "1", processes=2)
    assert shared == capsys.readouterr().out


def test_an_error_stands_in_torchruns_report_once(cut_in_two: tuple[str, ...]) -> None:
    """Also where the folder is given by position, as Meta's scripts take it."""
    folder = cut_in_two[1]
    process = start(CHAT, folder, launcher=("--nproc_per_node", "1", "--master_port", str(free_port())))
    _, err = process.communicate(timeout=120)
    assert process.returncode != 0
    before, report = err.split("Root Cause")
    assert "traceback : AssertionError: Loading a checkpoint for MP=2 but world size is 1\n" in report
    assert "--nproc_per_node 2" in report
    assert "Loading a checkpoint" not in before and f'File "{ROOT / CHAT}"' not in err


@pytest.mark.parametrize("script", [CHAT, TEXT, INFILLING])
def test_an_unknown_flag_is_refused_before_anything_runs(
    script: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", [script, "--ckpt_dir", "no-such-folder", "--max_seq_length", "64"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(ROOT / script), run_name="__main__")
    assert ended.value.code == 2
    err = capsys.readouterr().err
    assert "--max_seq_length" in err
    assert "no checkpoint files" not in err  # what a run would have said first


@pytest.mark.parametrize(
    ("script", "names"),
    [
        (example_chat_completion, ["temperature", "top_p", "max_seq_len", "max_batch_size", "max_gen_len"]),
        (example_text_completion, ["temperature", "top_p", "max_seq_len", "max_gen_len", "max_batch_size"]),
        (example_infilling, ["temperature", "top_p", "max_seq_len", "max_gen_len", "max_batch_size"]),
    ],
)
def test_flags_come_in_the_order_of_metas_scripts_and_ours_after_them(script: Any, names: list[str]) -> None:
    metas = ["ckpt_dir", "tokenizer_path", *names]
    of_build = [name for name in inspect.signature(Llama.build).parameters if name not in metas]
    ours = ["suffix_first"] * (script is example_infilling) + ["speculative", *of_build]
    assert {"seed", "dtype", "device", "model_parallel_size", "quantize"} <= set(ours)
    assert list(inspect.signature(script.main).parameters) == metas + ours


def completions(capsys: pytest.CaptureFixture[str], **flags: Any) -> list[str]:
    """What the text example prints, run in this process for a few tokens."""
    capsys.readouterr()
    example_text_completion.main(**{"max_gen_len": 12, "device": "cpu", "dtype": "float32"} | flags)
    return answers(capsys.readouterr().out)


@pytest.mark.parametrize("place", ["checkpoint", "."], ids=["in the folder", "in its parent"])
def test_the_tokenizer_is_the_checkpoints_own(
    place: str, tmp_path: Path, tokenizer_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """In the checkpoint's folder or, if there is none, above it, where the download puts it."""
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    for name in ("params.json", "consolidated.00.pth"):
        (folder / name).symlink_to(TINY_LLAMA / name)
    shutil.copy(tokenizer_path, tmp_path / "tokenizer.model")  # of another size, which would be refused
    shutil.copy(TINY_LLAMA / "tokenizer.model", tmp_path / place)
    assert completions(capsys, ckpt_dir=str(folder), temperature=0) == completions(capsys, temperature=0)


def test_what_is_missing_is_named_the_checkpoint_first(tmp_path: Path, checkpoint: Path) -> None:
    with pytest.raises(AssertionError, match="no checkpoint files found in"):
        example_chat_completion.main(ckpt_dir=str(tmp_path))
    with pytest.raises(FileNotFoundError, match=re.escape(str(checkpoint / "tokenizer.model"))):
        example_chat_completion.main(ckpt_dir=str(checkpoint))
    for flag, value in {"dtype": "float64", "device": "abacus", "model_parallel_size": 0, "seed": 2**64}.items():
        with pytest.raises(ValueError, match=flag):
            example_chat_completion.main(**{flag: value})  # type: ignore[arg-type]


@pytest.mark.parametrize("says_size", [False, True], ids=["by the tensors", "by params.json"])
def test_a_tokenizer_of_a_larger_vocabulary_is_named_with_both_sizes(
    says_size: bool, tmp_path: Path, checkpoint: Path
) -> None:
    """As when one checkpoint's folder is given and another one's tokenizer. Released files say -1."""
    tokenizer_path = TINY_LLAMA / "tokenizer.model"
    folder = shutil.copytree(checkpoint, tmp_path / "checkpoint")
    n_rows = len(torch.load(folder / "consolidated.00.pth", weights_only=True)["tok_embeddings.weight"])
    (folder / "params.json").write_text(
        json.dumps(read_params(checkpoint) | {"vocab_size": n_rows if says_size else -1})
    )
    with pytest.raises(ValueError, match=r"give the tokenizer\.model that") as error:
        example_text_completion.main(ckpt_dir=str(folder), tokenizer_path=str(tokenizer_path))
    assert f"the tokenizer {tokenizer_path}" in str(error.value)
    sizes = {int(number) for number in re.findall(r"\b\d+\b", str(error.value).replace(str(tokenizer_path), ""))}
    assert {n_rows, Tokenizer(tokenizer_path).n_words} <= sizes


def test_a_seed_decides_what_is_sampled(capsys: pytest.CaptureFixture[str]) -> None:
    runs = [completions(capsys, temperature=1.0, top_p=1.0, seed=seed) for seed in (1, 1, 2)]
    assert runs[0] == runs[1] != runs[2]


@pytest.mark.parametrize("main", [example_chat_completion.main, example_text_completion.main, chat.main])
@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"temperature": (0, 5)}, r"temperature must be 0 \(greedy\) or a finite number above 0, got \(0, 5\)"),
        ({"top_p": 2}, "top_p must be a number from 0 to 1, got 2"),
        ({"max_seq_len": 4}, "max_seq_len"),
        ({"max_seq_len": "abc"}, "max_seq_len must be an integer, got 'abc'"),
        ({"speculative": "guess"}, "speculative must be"),
    ],
)
def test_arguments_are_checked_before_the_weights_are_loaded(
    main: Callable[..., None], flags: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As `--temperature 0,5`, and a prompt without room: an error at once, not after minutes."""
    monkeypatch.setattr(Llama, "build", lambda *args, **kwargs: pytest.fail("loads"))
    with pytest.raises(ValueError, match=message):
        main(**flags)
