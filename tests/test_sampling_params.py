"""What a call may ask for, and the shape of what it gives back."""

from __future__ import annotations

import math
import re
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch

from llama.errors import PromptError, quote
from llama.inputs import SamplingParams

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


IN_RANGE: dict[str, list[Any]] = {
    "temperature": [0, 0.0, 2, 1e-3, 100.0, 2**64, Fraction(1, 2), np.float32(0.5), torch.tensor(0.5)],
    "top_p": [0, 1, 1.0, 1e-9],
    "max_gen_len": [0, 1, np.int16(5), torch.tensor(5), 10**6],
    "logprobs": [np.True_],
    "echo": [1],
    "stop": [(), ("a", "bc"), ("\n",)],
    "seed": [None, 0, -1, 2**64 - 1, -(2**63)],
}


@pytest.mark.parametrize(("name", "value"), [(name, value) for name in IN_RANGE for value in IN_RANGE[name]])
def test_what_is_in_range_is_accepted_and_becomes_pythons_own(name: str, value: Any) -> None:
    request = SamplingParams(**(GOOD | {name: value}))
    assert getattr(request, name) == value
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


def test_stop_strings_may_be_read_only_once() -> None:
    assert SamplingParams(**(GOOD | {"stop": iter(["a", "b"])})).stop == ("a", "b")
