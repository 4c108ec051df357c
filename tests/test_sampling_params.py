"""What a call may ask for, and the shape of what it gives back."""

from __future__ import annotations

import math
import re
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch

from llama.chat import built_in_format
from llama.engine.output import Completion, chat_prediction, completion_prediction
from llama.engine.sequence import TokenResult
from llama.errors import PromptError, quote
from llama.inputs import SamplingParams
from llama.tokenizer import IncrementalDetokenizer

GOOD: dict[str, Any] = {"temperature": 0.6, "top_p": 0.9, "max_gen_len": 8}
MUST_BE = {
    "temperature": "0 (greedy) or a finite number above 0",
    "top_p": "a number from 0 to 1",
    "max_gen_len": "an integer of at least 0",
    "logprobs": "True or False",
    "echo": "True or False",
    "stop": "a list of non-empty strings",
    "seed": "None or an integer from -2**63 to 2**64 - 1",
}
UNSAFE = "Error: special tags are not allowed as part of the prompt."


@pytest.mark.parametrize(
    "fields",
    [
        {"temperature": 0},
        {"temperature": 0.0},
        {"temperature": 2},
        {"temperature": 1e-3},
        {"temperature": 100.0},
        {"temperature": 2**64},
        {"temperature": Fraction(1, 2)},
        {"temperature": np.float32(0.5)},
        {"temperature": torch.tensor(0.5)},
        {"top_p": 0},
        {"top_p": 1},
        {"top_p": 1.0},
        {"top_p": 1e-9},
        {"max_gen_len": 0},
        {"max_gen_len": 1},
        {"max_gen_len": np.int16(5)},
        {"max_gen_len": torch.tensor(5)},
        {"max_gen_len": 10**6},
        {"logprobs": np.True_},
        {"echo": 1},
        {"stop": ()},
        {"stop": ("a", "bc")},
        {"stop": ("\n",)},
        {"seed": None},
        {"seed": 0},
        {"seed": -1},
        {"seed": 2**64 - 1},
        {"seed": -(2**63)},
    ],
    ids=repr,
)
def test_what_is_in_range_is_accepted_and_becomes_pythons_own(fields: dict[str, Any]) -> None:
    request = SamplingParams(**(GOOD | fields))
    assert {name: getattr(request, name) for name in fields} == fields
    assert type(request.temperature) is type(request.top_p) is float
    assert type(request.max_gen_len) is int and type(request.stop) is tuple
    assert type(request.logprobs) is type(request.echo) is bool


WRONG = [
    *[("temperature", value) for value in (-1, -1e-9, math.nan, math.inf, None, "0.6", True, [0.5])],
    *[("temperature", value) for value in (10**400, -(10**5000), 1j, np.complex64(1), torch.tensor([1.0, 2.0]))],
    *[("temperature", value) for value in (np.True_, np.str_("1"), torch.tensor(1.0, device="meta"))],
    *[("top_p", value) for value in (-1e-30, -0.1, 1.0001, 2, math.nan, math.inf, None, "0.9", True)],
    *[("max_gen_len", value) for value in (-1, 1.0, "8", None, True, math.inf, -(10**5000))],
    *[("max_gen_len", value) for value in (torch.tensor([1, 2]), torch.tensor(1.0), torch.tensor(1, device="meta"))],
    *[(name, np.zeros(2)) for name in ("logprobs", "echo")],
    *[("stop", value) for value in ("text", "", [""], ["a", ""], ["a", None], [1], b"bytes", None, 5)],
    *[("stop", value) for value in (np.array("a"), torch.tensor(1), torch.tensor([1]), torch.eye(2).to_sparse())],
    *[("seed", value) for value in (1.0, "1", True, [1], 2**64, -(2**63) - 1, 10**5000)],
]


@pytest.mark.parametrize(("name", "value"), WRONG, ids=lambda value: quote(value)[:20])
def test_what_is_out_of_range_is_named_with_what_it_must_be(name: str, value: object) -> None:
    with pytest.raises(PromptError, match=rf"^{name} must be {re.escape(MUST_BE[name])}, got ") as caught:
        SamplingParams(**(GOOD | {name: value}))
    if isinstance(value, (int, float, str)) and abs(hash(value)) < 10**9:
        assert str(caught.value).endswith(f", got {value!r}")


@pytest.mark.parametrize(
    "value", ["\x1b[31m" * 10**5, [10**5 * "a", "\x1b", ""], np.array(["\x1b[31m", "a\nb"])], ids=len
)
def test_what_an_error_quotes_is_short_and_printable(value: object) -> None:
    for name in ("temperature", "top_p", "max_gen_len", "stop", "seed"):
        if name != "stop" or not isinstance(value, np.ndarray):
            with pytest.raises(PromptError, match=f"^{name} must be") as caught:
                SamplingParams(**(GOOD | {name: value}))
            assert str(caught.value).isprintable()
            assert len(str(caught.value)) < 250


def test_stop_strings_may_be_read_only_once() -> None:
    assert SamplingParams(**(GOOD | {"stop": iter(["a", "b"])})).stop == ("a", "b")


FORMAT = built_in_format(None)


class Letters:
    """A tokenizer of the letters: "a" is 97."""

    def decode(self, t: list[int]) -> str:
        return "".join(map(chr, t))


def completed(reason: Any) -> Completion:
    row = Completion(IncrementalDetokenizer(Letters()))
    for token, logprob in ((97, -1.0), (98, -2.0)):
        row.ends(token, len(row.tokens))
        row.add(TokenResult(0, token, logprob, reason if token == 98 else None))
    return row


def test_a_text_completion_has_logprobs_only_if_asked_for() -> None:
    row = completed("stop")
    assert completion_prediction(row, SamplingParams(**GOOD)) == {"generation": "ab", "finish_reason": "stop"}
    assert completion_prediction(row, SamplingParams(**GOOD, logprobs=True)) == {
        "generation": "ab",
        "finish_reason": "stop",
        "tokens": ["a", "b"],
        "logprobs": [-1.0, -2.0],
    }


def test_a_chat_answer_is_the_assistants() -> None:
    row = completed("length")
    answer = {"generation": {"role": "assistant", "content": "ab"}, "finish_reason": "length"}
    assert chat_prediction(row, SamplingParams(**GOOD), FORMAT) == answer
    assert chat_prediction(row, SamplingParams(**GOOD, logprobs=True), FORMAT) == answer | {
        "tokens": ["a", "b"],
        "logprobs": [-1.0, -2.0],
    }


def test_a_dialog_that_was_not_run_has_no_tokens() -> None:
    answer = {"role": "assistant", "content": UNSAFE}
    assert chat_prediction(None, SamplingParams(**GOOD), FORMAT)["generation"] == answer
    assert "tokens" not in chat_prediction(None, SamplingParams(**GOOD), FORMAT)
    result = chat_prediction(None, SamplingParams(**GOOD, logprobs=True), FORMAT)
    assert (result["generation"], result["tokens"], result["logprobs"]) == (answer, [], [])
