"""Calls, scores, aborts, failures and direct use of the network that meet in one engine, and leave each other alone."""

from __future__ import annotations

import math
import pickle
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from llama import Llama
from llama.engine import speculative
from llama.engine.calls import observe_logits
from llama.engine.runner import ModelRunner
from llama.engine.sequence import Call
from tests.support.steps import greedy

PROMPTS = [[1, 5, 6, 7], [1, *range(5, 55)]]
BAD_ID = 77


@pytest.fixture
def llama(checkpoint: Path, tokenizer_path: Path) -> Llama:
    return Llama.build(checkpoint, tokenizer_path, 600, 3, device="cpu", dtype="float32")


def test_an_abort_before_its_prefill_ends_no_other_call(llama: Llama, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another thread may abort a call at any moment, also after the rows of a pass were chosen."""
    engine, aborted = llama.engine, Call([greedy([1, *range(5, 105)], 10)])
    prefill = engine._prefill

    def abort_it(rows: list[int], width: int) -> Any:
        aborted.abort()
        return prefill(rows, width)

    expected = [result.token for result in engine.run(Call([greedy(PROMPTS[0], 9)]))]
    results = engine.run(Call([greedy(PROMPTS[0], 9)]))
    tokens = [next(results).token]
    engine.add(aborted)
    monkeypatch.setattr(engine, "_prefill", abort_it)
    assert tokens + [result.token for result in results] == expected


@pytest.mark.parametrize("length", [511, 512, 513, 514])
def test_the_logits_of_all_positions_are_shown(llama: Llama, length: int) -> None:
    """Also of a last one that a prefill in parts leaves."""
    ids = [1, *(5 + i % 50 for i in range(length - 1))]
    seen: dict[int, Tensor] = {}
    observe_logits(llama.engine, [ids], [lambda at, logits: seen.update(enumerate(logits, at))])
    expected = llama.model(torch.tensor([ids]), 0)[0]
    torch.testing.assert_close(torch.stack([seen[i] for i in range(length)]), expected, atol=1e-4, rtol=1e-4)


def test_a_prompt_beside_one_that_is_scored_is_computed_in_one_pass(
    llama: Llama, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The logits of all of its positions are not asked for, so its passes need not be small."""
    lengths: list[list[int]] = []
    prefill = ModelRunner.prefill

    def counted(self: ModelRunner, tokens: list[list[int]], *args: Any, **kwargs: Any) -> Tensor:
        lengths.append([len(row) for row in tokens])
        return prefill(self, tokens, *args, **kwargs)

    monkeypatch.setattr(ModelRunner, "prefill", counted)
    scored = Call([greedy(PROMPTS[0], 0)])
    scored.sequences[0].on_logits = lambda position, logits: None
    for call in (Call([greedy([1, *(5 + i % 50 for i in range(549))], 1)]), scored):
        llama.engine.add(call)
    while not llama.engine.is_idle:
        llama.engine.advance()
    assert lengths == [[550], [len(PROMPTS[0])]]


def test_what_a_failed_pass_left_in_a_row_harms_nobody(llama: Llama) -> None:
    """As where a hook notices NaN, and raises."""
    expected, _ = llama.generate(PROMPTS, 8, 0.0)

    def inject(module: Any, args: tuple[Tensor], out: Tensor) -> Tensor:
        return out.masked_fill((args[0] == BAD_ID).unsqueeze(-1), math.nan)

    def check(module: Any, args: Any, out: Tensor) -> None:
        if not out.isfinite().all():
            raise ValueError("NaN in layer 1")

    handles = [
        llama.model.tok_embeddings.register_forward_hook(inject),
        llama.model.layers[1].register_forward_hook(check),
    ]
    for _ in range(3):
        with pytest.raises(ValueError, match="NaN in layer 1"):
            llama.generate([[1, *range(5, 70), BAD_ID, 5, 6]] * 3, 4, 0.0)
    for handle in handles:
        handle.remove()
    assert llama.generate(PROMPTS, 8, 0.0)[0] == expected
    assert all(math.isfinite(logprob) for row in llama.score_tokens(PROMPTS) for logprob in row)


def test_a_stream_that_is_closed_leaves_what_others_wrote_in_the_cache(llama: Llama) -> None:
    ids = torch.tensor([[1, *range(5, 35)]] * 2)

    def direct(close: Any = lambda: None) -> Tensor:
        llama.model(ids, 0)
        close()
        return llama.model(torch.tensor([[7], [7]]), 31)

    expected = direct()
    streams = [llama.stream_text_completion(text, 0.0, max_gen_len=60) for text in ("The", "a b c d " * 12)]
    for stream in streams:
        next(stream)
    direct()
    next(streams[0])  # may compute the first one alone again
    torch.testing.assert_close(direct(streams[1].close), expected)


def test_a_draft_model_may_answer_itself(llama: Llama, checkpoint: Path, tokenizer_path: Path) -> None:
    """In another thread, at the same time."""
    small = Llama.build(checkpoint, tokenizer_path, 600, 3, device="cpu", dtype="float32")
    both = Llama(llama.model, llama.tokenizer, draft_model=small.model)
    expected, _ = llama.generate(PROMPTS, 40, 0.0, stop_token=-1)
    wrong: list[list[list[int]]] = []

    def answer() -> None:
        for _ in range(6):
            tokens, _ = small.generate(PROMPTS, 40, 0.0, stop_token=-1)
            wrong.extend([] if tokens == expected else [tokens])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(speculative, "_MIN_SPEEDUP", 0.0)  # always drafts
        thread = threading.Thread(target=answer)
        thread.start()
        for _ in range(4):
            assert both.generate(PROMPTS, 40, 0.0, speculative="draft", stop_token=-1)[0] == expected
        thread.join()
    assert not wrong
    assert both.engine.draft_counts.drafted
    copied = pickle.loads(pickle.dumps(both))
    assert copied.generate(PROMPTS, 9, 0.0, speculative="draft", stop_token=-1)[0] == [row[:9] for row in expected]


def test_a_draft_model_that_does_not_fit_is_refused(llama: Llama, checkpoint: Path, tokenizer_path: Path) -> None:
    with pytest.raises(ValueError, match="another network"):
        Llama(llama.model, llama.tokenizer, draft_model=llama.model)
    smaller = Llama.build(checkpoint, tokenizer_path, 64, 3, device="cpu", dtype="float32")
    with pytest.raises(ValueError, match="must have the model's max_seq_len, 600, got 64"):
        Llama(llama.model, llama.tokenizer, draft_model=smaller.model)


def test_scoring_calls_no_processors(llama: Llama) -> None:
    def fail(input_ids: Tensor, scores: Tensor) -> Tensor:
        raise AssertionError

    _, logprobs = llama.generate(PROMPTS, 0, echo=True, logprobs=True, logits_processors=[fail])
    assert logprobs is not None
    for row, expected in zip(logprobs, llama.score_tokens(PROMPTS), strict=True):
        assert row == pytest.approx(expected, abs=1e-4)
