"""Logits that are NaN or infinite are an error of the calls that have them, never an answer."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from llama import Llama
from llama.engine.sequence import Call
from llama.errors import NonFiniteLogitsError
from llama.tools.batch import main
from tests.support.steps import greedy

BAD_ID = 77  # its embedding is overwritten
ERROR = "logits must be finite numbers, got NaN or infinity .* try dtype bfloat16 .* llama verify"


@pytest.fixture(params=[math.nan, math.inf, -math.inf], ids=str)
def broken(checkpoint: Path, tokenizer_path: Path, request: pytest.FixtureRequest) -> Llama:
    """A network that cannot compute a text with one of the tokens."""
    llama = Llama.build(checkpoint, tokenizer_path, 64, 3, device="cpu", dtype="float32")
    with torch.no_grad():
        llama.model.tok_embeddings.weight[BAD_ID] = request.param
    return llama


GOOD = [[5, 6, 7], [8, 9, 10, 11] * 8, [12]]
BAD = [5, 6, BAD_ID, 7] * 4


@pytest.mark.parametrize("options", [{"temperature": 0.0}, {"temperature": 0.1, "logprobs": True, "seed": 1}], ids=str)
@pytest.mark.parametrize("speculative", [None, "prompt_lookup"])
def test_a_call_raises_and_the_next_ones_are_right(
    broken: Llama, options: dict[str, Any], speculative: str | None
) -> None:
    """In every row that the bad prompt had: masked attention to what it left there would give NaN too."""
    broken.reuse_prefixes = options.get("temperature") == 0  # sampled tokens may differ with it, by rounding
    expected, _ = broken.generate(GOOD, 8, **options, speculative=speculative)
    for _ in range(4):
        with pytest.raises(NonFiniteLogitsError, match=ERROR):
            broken.generate([*GOOD, BAD, BAD], 8, **options, speculative=speculative)
    assert broken.generate(GOOD, 8, **options, speculative=speculative)[0] == expected


def test_every_row_that_holds_nan_is_cleared(broken: Llama) -> None:
    """Also those of a call that another of its rows has ended already, or that is aborted halfway through a prompt."""
    expected = broken.generate(GOOD, 20, 0.0)
    with pytest.raises(NonFiniteLogitsError):
        broken.generate([BAD] * 3, 8, 0.0)
    assert broken.generate(GOOD, 20, 0.0) == expected

    engine, calls = broken.engine, [Call([greedy(prompt, 30)]) for prompt in (GOOD[1], BAD, BAD)]
    engine.add(calls[0])
    engine.advance()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("llama.engine.runner.PASS_COST", {"cpu": 1})  # chunks of 16 tokens
        engine.add(calls[1])
        engine.add(calls[2])
        engine.advance()
    for each in calls:
        engine.abort(each)
    assert broken.generate(GOOD, 20, 0.0) == expected


def test_other_calls_in_the_batch_go_on(broken: Llama) -> None:
    engine = broken.engine
    (expected,), _ = broken.generate([GOOD[1]], 20, 0.0)
    good, bad = (Call([greedy(prompt, 20)]) for prompt in (GOOD[1], BAD))
    engine.add(good)
    engine.advance()
    engine.add(bad)
    while not engine.is_idle:
        engine.advance()
    assert isinstance(bad.error, NonFiniteLogitsError) and good.error is None
    assert good.sequences[0].tokens[len(GOOD[1]) :][: len(expected)] == expected


def test_streams_scores_and_texts_raise(broken: Llama, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(broken.tokenizer, "encode", lambda s, bos, eos: BAD)
    with pytest.raises(NonFiniteLogitsError, match=ERROR):
        list(broken.stream_text_completion("x"))
    with pytest.raises(NonFiniteLogitsError, match=ERROR):
        broken.text_completion(["x"])
    for score in (lambda: broken.score_tokens([BAD]), lambda: broken.generate([BAD], 0, logprobs=True, echo=True)):
        with pytest.raises(NonFiniteLogitsError, match="in text 0"):
            score()


def test_a_hook_may_mask_tokens_by_minus_infinity(broken: Llama) -> None:
    def mask(module: Any, args: Any, logits: Tensor) -> Tensor:
        return logits.index_fill(-1, torch.arange(100, logits.size(-1)), -math.inf)

    handle = broken.model.output.register_forward_hook(mask)
    (tokens,), _ = broken.generate([GOOD[0]], 8, 0.9)
    handle.remove()
    assert max(tokens) < 100


def test_a_batch_file_gets_an_error_line(
    tmp_path: Path, tokenizer_path: Path, write_checkpoint: Callable[..., Path], params: Any, state: dict[str, Tensor]
) -> None:
    weight = state["tok_embeddings.weight"].clone()
    weight[BAD_ID] = math.nan
    folder = write_checkpoint(params, state | {"tok_embeddings.weight": weight})
    bodies = {"good": {"prompt": GOOD[0], "max_tokens": 3}, "bad": {"prompt": BAD, "max_tokens": 3}}
    lines = [{"custom_id": i, "method": "POST", "url": "/v1/completions", "body": body} for i, body in bodies.items()]
    (tmp_path / "in").write_text("".join(json.dumps(line) + "\n" for line in lines))
    options: dict[str, Any] = {"max_seq_len": 64, "device": "cpu", "dtype": "float32"}
    main(str(tmp_path / "in"), str(tmp_path / "out"), str(folder), str(tokenizer_path), **options)
    results = {line["custom_id"]: line for line in map(json.loads, (tmp_path / "out").read_text().splitlines())}
    assert results["good"]["response"]["status_code"] == 200
    assert results["bad"]["response"]["status_code"] == 500
    assert results["bad"]["error"]["code"] == "logits_not_finite"
