"""Calls with any arguments: each works, or is refused by one clear error before the network is run."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import strategies as st

from llama import Llama
from llama.errors import PromptError
from tests.fuzz.profiles import Profile, fast_and_long

MAX_SEQ_LEN = 48
GOLDEN_PROMPTS = [[1, 9, 4, 77], [1], [300, 5] * 12]
pytestmark = pytest.mark.filterwarnings("ignore:Generating overly large repr")
BOTH_BUILDS = pytest.mark.parametrize("llama", ["float32", None], indirect=True, ids=["float32", "default"])


@pytest.fixture(scope="module")
def llama(request: pytest.FixtureRequest, small_checkpoint: Path, tokenizer_path: Path) -> Llama:
    return Llama.build(small_checkpoint, tokenizer_path, MAX_SEQ_LEN, 2, device="cpu", dtype=request.param, seed=None)


@pytest.fixture(scope="module")
def golden(llama: Llama) -> list[Any]:
    return golden_answers(llama)


def golden_answers(llama: Llama) -> list[Any]:
    return [
        llama.generate(GOLDEN_PROMPTS, 6, temperature=0, logprobs=True),
        llama.generate(GOLDEN_PROMPTS[:1], 4, temperature=1.0, seed=7),
    ]


@contextmanager
def counted(llama: Llama) -> Iterator[list[int]]:
    """The positions of each pass over the network meanwhile."""
    passes: list[int] = []
    handle = llama.model.tok_embeddings.register_forward_pre_hook(lambda _, args: passes.append(args[0].shape[1]))
    try:
        yield passes
    finally:
        handle.remove()


class ControlCharacters:
    def __repr__(self) -> str:
        return "\x1b[2J\r\n" * 100


# Texts with control characters, halves of surrogate pairs and all planes; some of them too long for the cache.
texts = st.one_of(
    st.text(st.characters(exclude_categories=()), max_size=12),
    st.sampled_from(["", " ", "\x00", "\x1b[2J", "\ud83d", "[INST]", "<s>", "\u202e", "🦙", "x " * 200, "日" * 60]),
)
extreme_integers = st.sampled_from([0, 2**31, 2**32, 2**63, 2**64 - 1, 2**64, -(2**63), -(2**63) - 1, 10**400])
integers = st.one_of(st.integers(), st.integers(-3, 600), extreme_integers)
floats = st.one_of(st.floats(), st.sampled_from([0.0, -0.0, 5e-324, 1e-40, 1.0, 1e38, 1e39, 1e308, -1e-300, 1 - 1e-16]))
numbers_of_libraries = st.one_of(
    st.builds(np.int64, st.integers(-3, 600)),
    st.builds(np.uint8, st.integers(0, 255)),
    st.builds(np.float32, st.floats(width=32)),
    st.builds(np.bool_, st.booleans()),
    st.builds(torch.tensor, st.integers(-3, 600)),
    st.builds(torch.tensor, st.floats()),
    st.builds(Fraction, st.integers(-3, 3), st.integers(1, 5)),
    st.builds(Decimal, st.integers(-3, 3)),
    st.complex_numbers(),
)
arrays = st.sampled_from(
    [
        np.zeros(0),
        np.zeros((0, 3), dtype=np.int64),
        np.zeros((2, 0), dtype=np.int64),
        np.ones((2, 3), dtype=np.int32),
        np.ones((2, 3)),
        np.ones((2, 2, 2), dtype=np.int64),
        np.array(["a", "\x1b"]),
        np.array([None, 1], dtype=object),
        np.array("2020-01-01", dtype="datetime64[D]"),
        torch.ones((2, 3), dtype=torch.int64),
        torch.ones(3),
        torch.tensor([True]),
        torch.empty(0),
        torch.empty((2, 3), device="meta", dtype=torch.int64),
        torch.eye(3).to_sparse(),
        torch.ones(2, requires_grad=True),
    ]
)
objects = st.sampled_from([None, True, False, object, object(), ControlCharacters(), len, ..., {1, 2}, frozenset()])
atoms = st.one_of(objects, integers, floats, numbers_of_libraries, texts, st.binary(max_size=5), arrays)
junk = st.recursive(
    atoms,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.tuples(inner),
        st.builds(deque, st.lists(inner, max_size=2)),
        st.dictionaries(texts, inner, max_size=2),
        st.builds(iter, st.lists(inner, max_size=2)),
    ),
    max_leaves=5,
)


def mostly(good: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    """Values that a call may take, and now and then anything at all."""
    return st.integers(0, 11).flatmap(lambda n: junk if n == 7 else good)


ids = st.one_of(
    st.lists(st.integers(0, 400), min_size=1, max_size=MAX_SEQ_LEN),
    st.lists(mostly(st.integers(0, 400)), min_size=1, max_size=4),
)
prompts = mostly(st.lists(mostly(ids), min_size=1, max_size=4))
roles = mostly(st.sampled_from(["user", "assistant", "system"]))
messages = mostly(st.fixed_dictionaries({"role": roles, "content": mostly(texts)}))
short = st.text(max_size=4)
turns = st.lists(short, min_size=1, max_size=3).map(
    lambda contents: [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(contents)]
)
dialogs = mostly(st.one_of(turns, st.lists(messages, max_size=3)))
sampling = {
    "temperature": mostly(st.sampled_from([0, 0.6, 1.5])),
    "top_p": mostly(st.sampled_from([0, 0.5, 0.9, 1])),
    "seed": mostly(st.one_of(st.none(), st.integers(-(2**63), 2**64 - 1))),
    "max_gen_len": mostly(st.one_of(st.none(), st.integers(0, 5))),
}
flags = {"logprobs": mostly(st.booleans()), "echo": mostly(st.booleans())}
stops = {"stop": mostly(st.lists(mostly(short), max_size=3))}


def optional(*options: dict[str, st.SearchStrategy[Any]]) -> st.SearchStrategy[dict[str, Any]]:
    return st.fixed_dictionaries({}, optional={name: values for some in options for name, values in some.items()})


def call(name: str, argument: st.SearchStrategy[Any], *options: dict[str, Any]) -> st.SearchStrategy[Any]:
    return st.tuples(st.just(name), st.tuples(argument), optional(*options))


no_echo = {"logprobs": flags["logprobs"]}
calls = st.one_of(
    st.tuples(
        st.just("generate"),
        st.tuples(prompts, mostly(st.integers(0, 5))),
        optional({k: v for k, v in sampling.items() if k != "max_gen_len"}, flags),
    ),
    call("text_completion", mostly(st.lists(texts, max_size=3)), sampling, flags, stops),
    call("chat_completion", mostly(st.lists(dialogs, max_size=3)), sampling, no_echo, stops),
    call("stream_text_completion", mostly(texts), sampling, {"echo": flags["echo"]}, stops),
    call("stream_chat_completion", dialogs, sampling, stops),
    call(
        "score",
        mostly(st.lists(texts, max_size=3)),
        {"contexts": mostly(st.one_of(st.none(), st.lists(texts, max_size=3)))},
    ),
    call("score_tokens", prompts),
)


def check(llama: Llama, golden: list[Any], name: str, args: tuple[Any, ...], options: dict[str, Any]) -> None:
    with counted(llama) as passes:
        try:
            result = getattr(llama, name)(*args, **options)
        except PromptError as error:
            message = str(error)
            assert "must" in message and ", got " in message, message
            assert message.isprintable() and len(message) < 400, message
            assert not passes
        else:
            if name.startswith("stream"):
                assert all(isinstance(piece, str) and piece for piece in result)
            assert not any(n > MAX_SEQ_LEN for n in passes)
    assert golden_answers(llama) == golden
    assert torch.is_grad_enabled() and not torch.is_inference_mode_enabled()


@BOTH_BUILDS
@fast_and_long(80, 10_000)
def test_a_call_works_or_is_refused_by_one_clear_error(llama: Llama, golden: list[Any], profile: Profile) -> None:
    def call_one(made: Any) -> None:
        check(llama, golden, *made)

    profile(call_one, calls)
