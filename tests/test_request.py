"""What a call may ask for, and the shape of what it gives back."""

from __future__ import annotations

import math
import re
from typing import Any

import pytest

from llama.request import Completion, Request, chat_prediction, completion_prediction

GOOD: dict[str, Any] = {"temperature": 0.6, "top_p": 0.9, "max_gen_len": 8}
TAKES = {
    "temperature": "it takes 0 (the likeliest token) or a number above",
    "top_p": "it takes a number above 0, up to 1",
    "max_gen_len": "it takes a whole number above zero",
    "stop": "it takes a list of strings that are not empty",
    "seed": "it takes a whole number, or None",
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
        {"top_p": 1},
        {"top_p": 1.0},
        {"top_p": 1e-9},
        {"max_gen_len": 1},
        {"max_gen_len": 10**6},
        {"stop": []},
        {"stop": ["a", "bc"]},
        {"stop": ("\n",)},
        {"seed": None},
        {"seed": 0},
        {"seed": -1},
        {"seed": 2**64 - 1},
        {"seed": -(2**63)},
    ],
    ids=repr,
)
def test_what_is_in_range_is_accepted(fields: dict[str, Any]) -> None:
    request = Request(**(GOOD | fields))
    assert {name: getattr(request, name) for name in fields} == fields


WRONG = [
    *[("temperature", value) for value in (-1, -1e-9, math.nan, math.inf, None, "0.6", True, [0.5])],
    *[("top_p", value) for value in (0, 0.0, -0.1, 1.0001, 2, math.nan, math.inf, None, "0.9", True)],
    *[("max_gen_len", value) for value in (0, -1, 1.0, "8", None, True, math.inf)],
    *[("stop", value) for value in ("text", "", [""], ["a", ""], ["a", None], [1], b"bytes")],
    *[("seed", value) for value in (1.0, "1", True, [1])],
]


@pytest.mark.parametrize(("name", "value"), WRONG, ids=repr)
def test_what_is_out_of_range_is_named_with_what_it_takes(name: str, value: object) -> None:
    message = f"{name} is {value!r}; {TAKES[name]}"
    with pytest.raises(ValueError, match=rf"^{re.escape(message)}"):
        Request(**(GOOD | {name: value}))


@pytest.mark.parametrize("value", [None, 5], ids=repr)
def test_stop_that_is_no_list_is_refused(value: object) -> None:
    with pytest.raises(ValueError, match=rf"^stop is {value!r}; it takes a list"):
        Request(**(GOOD | {"stop": value}))


def test_stop_that_can_be_read_only_once_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^stop is .*; it takes a list"):
        Request(**(GOOD | {"stop": iter(["a"])}))


@pytest.mark.parametrize("value", [2**64, -(2**63) - 1])
def test_a_seed_beyond_64_bits_is_refused(value: int) -> None:
    with pytest.raises(ValueError, match=rf"^seed is {value}; it takes"):
        Request(**(GOOD | {"seed": value}))


def test_a_text_completion_has_logprobs_only_if_asked_for() -> None:
    row = Completion([5, 6], ["a", " b"], [-1.0, -2.0], "stop")
    assert completion_prediction(row, Request(**GOOD)) == {"generation": "a b", "finish_reason": "stop"}
    assert completion_prediction(row, Request(**GOOD, logprobs=True)) == {
        "generation": "a b",
        "finish_reason": "stop",
        "tokens": ["a", " b"],
        "logprobs": [-1.0, -2.0],
    }


def test_a_chat_answer_is_the_assistants() -> None:
    row = Completion([5, 6], ["a", " b"], [-1.0, -2.0], "length")
    answer = {"generation": {"role": "assistant", "content": "a b"}, "finish_reason": "length"}
    assert chat_prediction(row, Request(**GOOD)) == answer
    assert chat_prediction(row, Request(**GOOD, logprobs=True)) == answer | {
        "tokens": ["a", " b"],
        "logprobs": [-1.0, -2.0],
    }


def test_a_dialog_that_was_not_run_has_no_tokens() -> None:
    answer = {"role": "assistant", "content": UNSAFE}
    assert chat_prediction(None, Request(**GOOD))["generation"] == answer
    assert "tokens" not in chat_prediction(None, Request(**GOOD))
    result = chat_prediction(None, Request(**GOOD, logprobs=True))
    assert (result["generation"], result["tokens"], result["logprobs"]) == (answer, [], [])
