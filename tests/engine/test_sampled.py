"""The tokens of a pass: rows of the embedding that no token has are never among them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from llama import Llama
from llama.errors import PromptError
from llama.tools.reshard import reshard
from tests.support.ranks import run_ranks

N_ADDED = 2
PROMPTS = ["the quick", "<|im_start|>a tiny<|im_end|>", "llamas"]


@pytest.fixture(scope="module")
def padded(
    write_checkpoint: Callable[..., Path], params: dict[str, Any], state: dict[str, Tensor], tokenizer_path: Path
) -> Path:
    """The random checkpoint with rows for two added tokens, and 62 that no token has but any logits favor."""
    longer = {name: torch.cat([state[name], state[name][:64]]) for name in ("tok_embeddings.weight", "output.weight")}
    longer["output.weight"][params["vocab_size"] + N_ADDED :] *= 100
    folder = write_checkpoint(params | {"vocab_size": params["vocab_size"] + 64}, state | longer)
    shutil.copyfile(tokenizer_path, folder / "tokenizer.model")
    added = {"<|im_start|>": params["vocab_size"], "<|im_end|>": params["vocab_size"] + 1}
    (folder / "added_tokens.json").write_text(json.dumps(added))
    return folder


def build(folder: Path, draft: Path | None = None) -> Llama:
    sizes = {"max_seq_len": 64, "max_batch_size": 4}
    return Llama.build(folder, folder / "tokenizer.model", **sizes, device="cpu", dtype="float32", draft_ckpt_dir=draft)


@pytest.mark.parametrize("temperature", [0, 5.0])
@pytest.mark.parametrize("speculative", [None, "prompt_lookup", "draft"])
def test_rows_that_no_token_has_are_never_sampled(
    padded: Path,
    params: dict[str, Any],
    state: dict[str, Tensor],
    write_checkpoint: Callable[..., Path],
    temperature: float,
    speculative: str | None,
) -> None:
    """And the draft model, whose embedding is padded to another size, proposes none either."""
    n_words = params["vocab_size"] + N_ADDED
    longer = {name: torch.cat([state[name], state[name][:99]]) for name in ("tok_embeddings.weight", "output.weight")}
    longer["output.weight"][n_words:] *= 100
    draft = write_checkpoint(params | {"vocab_size": params["vocab_size"] + 99}, state | longer)
    llama = build(padded, draft if speculative == "draft" else None)
    assert llama.model(torch.tensor([[1, 2]]), 0).shape == (1, 2, n_words + 62)
    ids = [llama.tokenizer.encode(prompt, bos=True, eos=False) for prompt in PROMPTS]
    assert ids[1][1] == params["vocab_size"] and ids[1][-1] == n_words - 1
    arguments = {"temperature": temperature, "seed": 3, "speculative": speculative}
    rows, _ = llama.generate(ids, 24, **arguments)
    assert all(token < n_words for row in rows for token in row)
    assert [len(row) for row in rows] == [24] * 3
    whole = llama.text_completion(PROMPTS, logprobs=True, max_gen_len=24, **arguments)
    assert ["".join(row["tokens"]) for row in whole] == [row["generation"] for row in whole]
    streamed = "".join(llama.stream_text_completion(PROMPTS[0], max_gen_len=24, **arguments))
    assert streamed == llama.text_completion(PROMPTS[:1], max_gen_len=24, **arguments)[0]["generation"]


def test_log_probabilities_match_the_raw_logits(padded: Path, params: dict[str, Any]) -> None:
    llama = build(padded)
    (row,), (logprobs,) = llama.generate([[1, 5, 9]], 4, temperature=0, logprobs=True)
    raw = llama.model(torch.tensor([[1, 5, 9, *row]]), 0).log_softmax(-1)[0, 2:6]
    torch.testing.assert_close(torch.tensor(logprobs), raw[torch.arange(4), torch.tensor(row)], rtol=1e-6, atol=1e-4)


def test_ids_that_no_token_has_are_refused_in_prompts(padded: Path, params: dict[str, Any]) -> None:
    llama = build(padded)
    for call in (lambda ids: llama.generate(ids, 1), llama.score_tokens):
        with pytest.raises(PromptError, match=f"must have ids from 0 to {params['vocab_size'] + 1}, got"):
            call([[1, params["vocab_size"] + N_ADDED]])


def rank_rows(rank: int, folder: str) -> list[list[int]]:
    llama = build(Path(folder))
    rows, _ = llama.generate([[1, 5, 9], [1, 7]], 12, temperature=0)
    return rows


def test_two_ranks_sample_the_same(padded: Path, tmp_path: Path) -> None:
    reshard(padded, tmp_path / "two", 2, quiet=True)
    expected = rank_rows(0, str(padded))
    assert run_ranks(2, rank_rows, str(tmp_path / "two")) == [expected] * 2
