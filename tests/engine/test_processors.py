"""Each sampling parameter is transformers' processor of its name, for its row alone; neutral values do nothing."""

from __future__ import annotations

import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from llama import Llama
from llama.engine.processors import make_process
from llama.errors import PromptError
from llama.inputs import SamplingParams
from tests.support.ranks import run_ranks

transformers = pytest.importorskip("transformers", reason="needs the package transformers, of the extra [test]")
from transformers.generation import logits_process as hf  # noqa: E402

VOCAB = 300
STOP_IDS = frozenset({2, 7})


def processed(tokens: list[int], logits: Tensor, n_prompt: int = 4, **options: Any) -> Tensor:
    process = make_process(SamplingParams(1.0, 1.0, 9, **options), n_prompt, STOP_IDS)
    assert process is not None
    before = logits.clone()
    result = process(tokens, logits)
    assert torch.equal(logits, before)
    return result


PROCESSORS: dict[str, tuple[dict[str, Any], Any]] = {
    "top_k": ({"top_k": 7}, lambda: hf.TopKLogitsWarper(7)),
    "top_k above the vocabulary": ({"top_k": 10**6}, lambda: hf.TopKLogitsWarper(10**6)),
    "min_p": ({"min_p": 0.1}, lambda: hf.MinPLogitsWarper(0.1)),
    "typical_p": ({"typical_p": 0.6}, lambda: hf.TypicalLogitsWarper(0.6)),
    "repetition_penalty": ({"repetition_penalty": 1.3}, lambda: hf.RepetitionPenaltyLogitsProcessor(1.3)),
    "a bonus for repetition": ({"repetition_penalty": 0.5}, lambda: hf.RepetitionPenaltyLogitsProcessor(0.5)),
    "logit_bias": (
        {"logit_bias": {5: 3.0, 9: -100.0}},
        lambda: hf.SequenceBiasLogitsProcessor([[[5], 3.0], [[9], -100.0]]),
    ),
    "min_tokens": ({"min_tokens": 4}, lambda: hf.MinNewTokensLengthLogitsProcessor(4, 4, sorted(STOP_IDS))),
    "min_tokens reached": ({"min_tokens": 2, "top_k": 300}, lambda: hf.TopKLogitsWarper(300)),
}


@pytest.mark.parametrize("name", PROCESSORS)
@pytest.mark.parametrize("seed", range(3))
def test_a_parameter_is_transformers_processor(name: str, seed: int) -> None:
    options, make = PROCESSORS[name]
    generator = torch.Generator().manual_seed(seed)
    logits = 4 * torch.randn(VOCAB, generator=generator)
    tokens = torch.randint(VOCAB, (6,), generator=generator).tolist()
    expected = make()(torch.tensor([tokens]), logits[None].clone())[0]
    torch.testing.assert_close(processed(tokens, logits, **options), expected)


def test_presence_and_frequency_count_generated_tokens_as_openai_defines() -> None:
    """mu[j] - c[j] * frequency - (c[j] > 0) * presence, where the prompt does not count."""
    logits, tokens = torch.randn(VOCAB), [9, 9, 9, 9, 5, 6, 5]
    expected = logits.clone()
    expected[5] -= 2 * 0.7 + 0.4
    expected[6] -= 0.7 + 0.4
    got = processed(tokens, logits, presence_penalty=0.4, frequency_penalty=0.7)
    torch.testing.assert_close(got, expected)
    assert torch.equal(processed(tokens[:4], logits, presence_penalty=0.4), logits)


PROMPTS = [[5, 6, 7, 8] * 3, [9, 10], [11] * 20]


def rows(llama: Llama, prompts: list[list[int]], **options: Any) -> list[list[int]]:
    return llama.generate(prompts, 12, **({"temperature": 0.0} | options))[0]


def test_neutral_values_change_nothing(llama: Llama) -> None:
    neutral: dict[str, Any] = {
        **{"top_k": 0, "min_p": 0, "typical_p": 1, "repetition_penalty": 1, "presence_penalty": 0},
        **{"frequency_penalty": 0, "logit_bias": {}, "min_tokens": 0, "ignore_eos": False, "stop_token_ids": []},
        "logits_processors": [],
    }
    for options in ({}, {"temperature": 0.9, "seed": 3}):
        assert rows(llama, PROMPTS, **options, **neutral) == rows(llama, PROMPTS, **options)
    params = SamplingParams(1.0, 1.0, 9, **neutral)
    assert params.options() == {} and make_process(params, 3, STOP_IDS) is None


def test_each_call_in_a_batch_has_its_own(llama: Llama) -> None:
    """Calls of several threads, each with other parameters, give what each gives alone."""
    options: list[dict[str, Any]] = [
        {},
        {"repetition_penalty": 1.8},
        {"top_k": 2, "temperature": 1.0, "seed": 4},
        {"frequency_penalty": 2.0},
        {"logit_bias": {50: 100.0}},
    ]
    expected = [rows(llama, PROMPTS[:1], **each) for each in options]
    assert expected[4] == [[50] * 12]
    with ThreadPoolExecutor(5) as pool:
        assert list(pool.map(lambda each: rows(llama, PROMPTS[:1], **each), options)) == expected


def test_log_probabilities_are_those_of_the_raw_logits(llama: Llama) -> None:
    (row,), (logprobs,) = llama.generate(PROMPTS[:1], 6, 0.0, logprobs=True, logit_bias={50: 100.0})
    raw = llama.model(torch.tensor([PROMPTS[0] + row]), 0)[0, len(PROMPTS[0]) - 1 : -1].log_softmax(-1)
    assert row == [50] * 6
    torch.testing.assert_close(torch.tensor(logprobs), raw[:, 50], rtol=0, atol=1e-4)


def test_ends_and_their_absence(llama: Llama) -> None:
    (free,) = rows(llama, PROMPTS[:1])
    end = free[4]
    first = free.index(end)
    assert rows(llama, PROMPTS[:1], stop_token_ids=[end]) == [free[:first]]
    later = rows(llama, PROMPTS[:1], stop_token_ids=[end], min_tokens=first + 2)[0]
    assert len(later) >= first + 2 and later[first] != end
    eos = llama.tokenizer.eos_id
    assert rows(llama, PROMPTS[:1], logit_bias={eos: 1000.0}) == [[]]
    assert rows(llama, PROMPTS[:1], logit_bias={eos: 1000.0}, ignore_eos=True) == [[eos] * 12]


@pytest.mark.parametrize(
    "processor",
    [
        lambda: hf.NoRepeatNGramLogitsProcessor(2),
        lambda: hf.NoBadWordsLogitsProcessor([[5], [6]], eos_token_id=2),
        lambda: hf.TemperatureLogitsWarper(0.3),
    ],
    ids=["NoRepeatNGram", "NoBadWords", "Temperature"],
)
def test_transformers_own_processors_work(llama: Llama, processor: Any) -> None:
    """As in a loop over the network by hand, with the processor applied to each step's logits."""
    prompt, answer = PROMPTS[0], []
    for _ in range(8):
        with torch.no_grad():
            logits = llama.model(torch.tensor([prompt + answer]), 0)[:, -1]
        answer.append(int(processor()(torch.tensor([prompt + answer]), logits).argmax()))
    assert llama.generate([prompt], 8, 0.0, logits_processors=[processor()])[0] == [answer]


@pytest.mark.parametrize("speculative", [None, "prompt_lookup"])
def test_streams_and_speculation_apply_them_too(llama: Llama, speculative: str | None) -> None:
    options: dict[str, Any] = {"temperature": 0, "max_gen_len": 20, "repetition_penalty": 1.5}
    text = "fox fox fox fox"
    (whole,) = llama.text_completion([text], **options)
    assert whole != llama.text_completion([text], temperature=0, max_gen_len=20)[0]
    streamed = "".join(llama.stream_text_completion(text, **options, speculative=speculative))
    assert streamed == whole["generation"]


def test_a_processor_that_fails_ends_its_call_alone(llama: Llama) -> None:
    def fail(input_ids: Tensor, scores: Tensor) -> Tensor:
        raise ZeroDivisionError("mine")

    expected = rows(llama, PROMPTS)
    with pytest.raises(ZeroDivisionError, match="mine"):
        rows(llama, PROMPTS, logits_processors=[fail])
    with pytest.raises(ValueError, match=r"must return scores of shape \(1, 512\), got NoneType"):
        rows(llama, PROMPTS, logits_processors=[lambda input_ids, scores: None])
    assert rows(llama, PROMPTS) == expected


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"top_k": -2}, "top_k must be an integer of at least -1, got -2"),
        ({"min_p": 1.5}, "min_p must be a number from 0 to 1, got 1.5"),
        ({"typical_p": 0}, "typical_p must be a number above 0, up to 1, got 0"),
        ({"repetition_penalty": 0}, "repetition_penalty must be a number above 0, got 0"),
        ({"frequency_penalty": math.nan}, "frequency_penalty must be a number from -2 to 2, got nan"),
        ({"logit_bias": [5]}, "logit_bias must be a mapping from token ids to finite numbers, got"),
        ({"logit_bias": {10**6: 1}}, "logit_bias must have ids from 0 to"),
        ({"min_tokens": 1.5}, "min_tokens must be an integer of at least 0, got 1.5"),
        ({"stop_token_ids": 5}, "stop_token_ids must be a list of token ids, got 5"),
        ({"logits_processors": [5]}, "logits_processors must be a list of functions"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_wrong_values_are_refused(llama: Llama, options: dict[str, Any], message: str) -> None:
    with pytest.raises(PromptError, match=message):
        llama.generate(PROMPTS, 3, **options)


OPTIONS: list[dict[str, Any]] = [
    {"temperature": 0.0, "repetition_penalty": 1.7, "frequency_penalty": 0.5},
    {"temperature": 0.3, "seed": 2, "top_k": 4, "min_p": 0.05, "min_tokens": 3},
    {"temperature": 0.0, "logits_processors": [hf.NoRepeatNGramLogitsProcessor(2)]},
    {"temperature": 0.0, "structured_outputs": {"choice": ["yes", "no", "perhaps"]}},
]


def on_two_ranks(rank: int, folder: str, tokenizer_path: str) -> list[Any]:
    llama = Llama.build(folder, tokenizer_path, 64, 4, 2, device="cpu", dtype="float32")
    return [rows(llama, PROMPTS, **options) for options in OPTIONS]


def test_two_ranks_sample_what_one_does(
    llama: Llama, checkpoint_in: Callable[[int], Path], tokenizer_path: Path
) -> None:
    """Processors run on the first rank, whose tokens all ranks get."""
    pytest.importorskip("llguidance", reason="needs the package llguidance, of the extra [structured]")
    first, second = run_ranks(2, on_two_ranks, str(checkpoint_in(2)), str(tokenizer_path))
    assert first == second
    assert first == [rows(llama, PROMPTS, **options) for options in OPTIONS]
