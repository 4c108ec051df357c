"""The perplexity command, against windows made by hand and scored by Hugging Face's implementation."""

from __future__ import annotations

import math
import random
from pathlib import Path
from typing import Any

import pytest
import torch

from llama import Llama
from llama.tools import commandline
from llama.tools.perplexity import main, perplexity, windows
from tests.conftest import TEXT
from tests.contract.test_against_hf import hugging_face_model
from tests.support.processes import clean_environment, run_python

BOS = 1


def test_windows_score_each_token_once_with_as_much_context_as_promised() -> None:
    rng = random.Random(0)
    for _ in range(100):
        size = rng.randint(2, 20)
        stride = rng.randint(1, size - 1)
        tokens = list(range(100, 100 + rng.randint(1, 80)))
        scored: list[int] = []
        for window, n_new in windows(tokens, size, stride, BOS):
            assert window[0] == BOS and len(window) <= size and 1 <= n_new < len(window)
            start = window[1] - 100
            assert window[1:] == tokens[start : start + len(window) - 1]
            new = window[-n_new:]
            assert not scored or len(window) - 1 - n_new >= min(size - 1 - stride, new[0] - 100)
            scored += new
        assert scored == tokens


@pytest.mark.parametrize("stride", [None, 1, 7, 63])
def test_perplexity_equals_hugging_faces(
    llama: Llama, params: dict[str, Any], state: dict[str, torch.Tensor], stride: int | None
) -> None:
    """Every token's loss from one of its windows, by a loop over the text that slides as the docstring says."""
    text = " ".join(TEXT * 3)
    tokens = llama.tokenizer.sp_model.encode(text)
    model = hugging_face_model(state, params)
    size, step = 64, stride or 32
    total, done = 0.0, 0
    while done < len(tokens):
        end = min(len(tokens), done + (step if done else size - 1))
        window = torch.tensor([[BOS, *tokens[max(0, end - size + 1) : end]]])
        with torch.no_grad():
            logprobs = model(window).logits.float().log_softmax(-1)[0, :-1].gather(1, window[0, 1:, None])[:, 0]
        total += logprobs[-(end - done) :].sum().item()
        done = end
    value, count = perplexity(llama, text, stride=stride)
    assert count == len(tokens)
    assert value == pytest.approx(math.exp(-total / len(tokens)), rel=1e-4)


def test_a_stride_that_leaves_tokens_out_and_an_empty_text_are_refused(llama: Llama) -> None:
    for stride in (0, 64, -1):
        with pytest.raises(ValueError, match=f"stride must be from 1 to 63, one less than max_seq_len, got {stride}"):
            perplexity(llama, "text", stride=stride)
    with pytest.raises(ValueError, match="the text must have at least one token"):
        perplexity(llama, "")


def test_without_the_toy_checkpoint_the_error_says_what_to_pass(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in an installed package, which does not include it."""
    (tmp_path / "text.txt").write_text("a text")
    monkeypatch.setattr(commandline, "_TOY_PLACES", (tmp_path, tmp_path))
    with pytest.raises(FileNotFoundError, match=r"^--ckpt_dir must be given: .* the folder that holds params.json"):
        main(str(tmp_path / "text.txt"))


def test_the_command_prints_one_line(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("I think that the meaning of life is to share what we have.")
    done = run_python("-m", "llama.tools.perplexity", "--text", text, env=clean_environment())
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("perplexity ") and done.stdout.count("\n") == 1
    with pytest.raises(FileNotFoundError, match=r"none\.txt"):
        main(str(tmp_path / "none.txt"))
