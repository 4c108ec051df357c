"""The server's context where none is asked for."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from llama.serving import settings

BUILD = {"device": "cpu", "dtype": "float32"}


@pytest.mark.parametrize(("theta", "expected"), [({}, 4096), ({"rope_theta": 1e6}, 16384), ({"rope_theta": 1e4}, 4096)])
def test_it_is_the_familys_where_nothing_says_what_the_checkpoint_was_trained_for(
    write_checkpoint: Callable[..., Path],
    params: dict[str, Any],
    state: dict[str, torch.Tensor],
    tokenizer_path: Path,
    capsys: pytest.CaptureFixture[str],
    theta: dict[str, float],
    expected: int,
) -> None:
    folder = write_checkpoint(params | theta, state)
    assert settings._choose_context(str(folder), str(tokenizer_path), 4, BUILD) == expected
    family = "Code Llama" if expected == 16384 else "Llama 2"
    assert f"--max_seq_len {expected}, as for {family}: this checkpoint's" in capsys.readouterr().err


def test_it_is_what_a_published_checkpoint_was_trained_for(
    tmp_path: Path, tokenizer_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    sizes = {"dim": 4096, "n_layers": 32, "n_heads": 32, "multiple_of": 256, "norm_eps": 1e-5, "vocab_size": -1}
    (tmp_path / "params.json").write_text(json.dumps(sizes))
    monkeypatch.setattr(settings, "available_memory", lambda device: 2**40)
    build = BUILD | {"model_parallel_size": 1}
    assert settings._choose_context(str(tmp_path), str(tokenizer_path), 4, build) == 4096
    assert "--max_seq_len 4096, for which the checkpoint was trained" in capsys.readouterr().err


def test_it_is_found_with_a_tokenizer_json_too(tmp_path: Path) -> None:
    pytest.importorskip("tokenizers", reason="needs the package tokenizers, of the extra [chat]")
    from tests.text.test_tokenizer_json import train

    sizes = {"dim": 64, "n_layers": 1, "n_heads": 2, "multiple_of": 32, "norm_eps": 1e-5, "vocab_size": -1}
    (tmp_path / "params.json").write_text(json.dumps(sizes))
    build = BUILD | {"model_parallel_size": 1}
    assert settings._choose_context(str(tmp_path), str(train(tmp_path)), 4, build) == 4096


def test_it_is_less_where_the_memory_has_no_room(
    checkpoint: Path, tokenizer_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    found = {}
    for mib in (24, 28):
        monkeypatch.setattr(settings, "available_memory", lambda device, mib=mib: mib * 2**20)
        found[mib] = settings._choose_context(str(checkpoint), str(tokenizer_path), 16, BUILD)
        assert f"--max_seq_len {found[mib]} of 4096: the memory has no room" in capsys.readouterr().err
    assert 1 < found[24] < found[28] < 4096
    monkeypatch.setattr(settings, "available_memory", lambda device: 1)
    assert (
        settings._choose_context(str(checkpoint), str(tokenizer_path), 16, BUILD) == 4096
    )  # `build` says what is missing
