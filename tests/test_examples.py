"""The example scripts as users start them: torchrun in a process of its own, with the checkpoint that ships."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from llama.checkpoint import read_params
from tests.conftest import ROOT

CHAT, TEXT = "example_chat_completion.py", "example_text_completion.py"
TINY_LLAMA = ROOT / "tiny-llama"
SAFE_DIALOGS = 5


def clean_environment() -> dict[str, str]:
    """That of a user's shell: no variable of a launcher's, no setting for threads."""
    drop = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "OMP_NUM_THREADS")
    return {name: value for name, value in os.environ.items() if name not in drop}


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


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@pytest.fixture(scope="module")
def chat_answers() -> str:
    return torchrun(CHAT, "--temperature", "0")[0]


@pytest.fixture(scope="module")
def cut_in_two(write_checkpoint: Callable[..., Path]) -> tuple[str, ...]:
    """Flags for the checkpoint that ships, cut for two ranks."""
    state: dict[str, Any] = torch.load(TINY_LLAMA / "consolidated.00.pth", weights_only=True)
    folder = write_checkpoint(read_params(TINY_LLAMA), state, 2)
    return ("--ckpt_dir", str(folder), "--temperature", "0")


def answers(printed: str) -> list[str]:
    return re.findall(r"^> (?:Assistant: )?(.*?)\n\n====", printed, flags=re.MULTILINE | re.DOTALL)


def test_the_chat_example_prints_each_dialog_its_answer_and_a_rule(chat_answers: str) -> None:
    assert chat_answers.count("\n==================================\n") == SAFE_DIALOGS + 1
    assert "User: How do I make mayonnaise?\n" in chat_answers
    assert "System: Always answer with a haiku.\n" in chat_answers
    found = answers(chat_answers)
    assert len(found) == SAFE_DIALOGS + 1
    assert found[-1] == "Error: special tags are not allowed as part of the prompt."
    assert all(len(answer) > 3 for answer in found)


def test_the_answers_fit_the_dialogs(chat_answers: str) -> None:
    mayonnaise, eiffel, haiku, emojis, birthday, _ = answers(chat_answers)
    assert "egg" in mayonnaise
    assert "Eiffel" in eiffel
    assert len(haiku.splitlines()) == 3
    assert any(ord(character) > 0x2600 for character in emojis)
    assert "John" in birthday


def test_the_text_example_completes_sensibly_as_it_ships() -> None:
    out, err = torchrun(TEXT)
    life, relativity, mail, french = answers(out)
    assert min(map(len, (life, relativity, mail))) > 20
    assert french.startswith("fromage")
    assert "Loaded in" in err


def test_two_ranks_answer_as_one(chat_answers: str, cut_in_two: tuple[str, ...]) -> None:
    out, err = torchrun(CHAT, *cut_in_two, processes=2)
    assert out == chat_answers
    assert err.count("Loaded in") == 1  # the first rank alone logs
    assert "Warning" not in err


def test_two_machines_answer_as_one(chat_answers: str, cut_in_two: tuple[str, ...]) -> None:
    """Two agents of torchrun, one process each, over the loopback interface."""
    shared = ("--nnodes", "2", "--nproc_per_node", "1", "--master_addr", "127.0.0.1", "--master_port", str(free_port()))
    nodes = [start(CHAT, *cut_in_two, launcher=(*shared, "--node_rank", str(rank))) for rank in range(2)]
    printed = [node.communicate(timeout=120) for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], printed
    assert [out for out, _ in printed] == [chat_answers, ""]


def test_the_wrong_number_of_processes_is_said_with_what_to_do(cut_in_two: tuple[str, ...]) -> None:
    process = start(CHAT, *cut_in_two, launcher=("--nproc_per_node", "1", "--master_port", str(free_port())))
    _, err = process.communicate(timeout=120)
    assert process.returncode != 0
    assert "AssertionError: Loading a checkpoint for MP=2 but world size is 1" in err
    assert "--nproc_per_node 2" in err
