"""Requests with any body: each is answered, or refused by a 4xx in OpenAI's form; never a 500, never a hang."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import strategies as st
from starlette.testclient import TestClient

from llama import Llama
from tests.fuzz.profiles import Profile, fast_and_long
from tests.support.serving import running, web_of

LONGEST_MESSAGE = 500
GOLDEN = {"prompt": "A llama", "temperature": 0, "max_tokens": 8, "logprobs": 2, "echo": True}


@pytest.fixture(scope="module")
def web(small_checkpoint: Path, tokenizer_path: Path) -> Iterator[TestClient]:
    """The routes in this process."""
    llama = Llama.build(small_checkpoint, tokenizer_path, 48, 2, device="cpu", dtype="float32", seed=None)
    with running(llama, max_waiting=8) as service, web_of(service, max_body_bytes=20_000, timeout_s=60) as web:
        golden = web.post("/v1/completions", json=GOLDEN).json()["choices"]
        yield web
        assert web.post("/v1/completions", json=GOLDEN).json()["choices"] == golden
        assert service.n_requests == service.engine.n_running == service.n_waiting == 0


texts = st.one_of(
    st.text(st.characters(exclude_categories=()), max_size=20),
    st.sampled_from(["", "x", "A llama", "\x1b[2J", "\ud83d", "[INST]", "\u202e", "🦙", "y " * 300, "auto"]),
)
numbers = st.integers(-3, 6) | st.integers() | st.floats() | st.sampled_from([2**63, 10**40, 0.5, 1.0, 1e-320, True])
anything = st.recursive(
    st.one_of(st.none(), st.booleans(), numbers, texts),
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(texts, inner, max_size=4)),
    max_leaves=8,
)
ids = st.lists(st.one_of(st.integers(0, 511), st.integers(-2, 600)), max_size=12)
prompts = st.one_of(texts, ids, st.lists(texts, max_size=4), st.lists(ids, max_size=3), anything)
contents = st.one_of(
    texts,
    st.lists(st.fixed_dictionaries({"type": st.sampled_from(["text", "image_url"]), "text": texts}), max_size=3),
    anything,
)
messages = st.one_of(
    st.lists(
        st.fixed_dictionaries(
            {"role": st.sampled_from(["user", "assistant", "system", "developer", "tool"]), "content": contents},
            optional={"name": texts, "tool_calls": anything, "refusal": st.none()},
        ),
        max_size=4,
    ),
    st.just([{"role": "user", "content": "hi"}]),
    anything,
)
common = {
    "model": st.one_of(st.just("llama"), anything),
    "temperature": st.one_of(st.floats(0, 2), numbers, anything),
    "top_p": st.one_of(st.floats(0, 1), numbers, anything),
    "n": st.one_of(st.integers(1, 3), numbers, anything),
    "seed": st.one_of(st.integers(-(2**63), 2**63 - 1), anything),
    "stop": st.one_of(texts, st.lists(texts, max_size=5), anything),
    "stream": st.one_of(st.booleans(), anything),
    "stream_options": st.one_of(st.fixed_dictionaries({"include_usage": st.booleans()}), anything),
    "max_tokens": st.one_of(st.integers(0, 8), numbers),
    "user": texts,
    "tools": anything,
    "logit_bias": anything,
    "best_of": numbers,
    "presence_penalty": numbers,
    "response_format": st.one_of(st.just({"type": "text"}), anything),
}
completions = st.tuples(
    st.just("/v1/completions"),
    st.fixed_dictionaries(
        {"prompt": prompts},
        optional=common
        | {"logprobs": st.one_of(st.integers(0, 5), anything), "echo": st.one_of(st.booleans(), anything)},
    ),
)
chats = st.tuples(
    st.just("/v1/chat/completions"),
    st.fixed_dictionaries(
        {"messages": messages},
        optional=common
        | {
            "logprobs": st.one_of(st.booleans(), anything),
            "top_logprobs": st.one_of(st.integers(0, 20), anything),
            "max_completion_tokens": numbers,
        },
    ),
)
few_fields = st.tuples(  # so that many requests are right
    st.just("/v1/completions"),
    st.fixed_dictionaries(
        {"prompt": st.one_of(st.text(max_size=8), st.lists(st.integers(0, 511), min_size=1, max_size=9))},
        optional={
            "temperature": st.floats(0, 2),
            "stop": st.text(min_size=1, max_size=2),
            "n": st.integers(1, 3),
            "echo": st.booleans(),
            "logprobs": st.integers(0, 5),
            "stream": st.booleans(),
            "max_tokens": st.integers(0, 20),
        },
    ),
)


def check(web: TestClient, path: str, raw: bytes) -> int:
    """The status of one request; an exception in the server is raised here."""
    answer = web.post(path, content=raw, headers={"Content-Type": "application/json"})
    if answer.status_code == 200:
        if answer.headers["content-type"].startswith("text/event-stream"):
            assert answer.text.endswith("data: [DONE]\n\n")
            assert '"error"' not in answer.text.split("\n\n")[-3]
        else:
            assert answer.json()["choices"]
        return 200
    assert 400 <= answer.status_code < 500, (answer.status_code, raw[:300])
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert len(error["message"]) < LONGEST_MESSAGE
    assert error["message"].isprintable(), error["message"]
    return answer.status_code


def dump(body: Any) -> bytes:
    """As JSON, in which Python writes NaN and infinities too."""
    return json.dumps(body).encode()


bodies = st.one_of(completions, chats, few_fields)
mutations = st.lists(
    st.tuples(st.integers(0, 10**6), st.sampled_from(["cut", "flip", "double", "insert"]), st.binary(max_size=4))
)


def mutated(raw: bytes, changes: list[tuple[int, str, bytes]]) -> bytes:
    for at, how, new in changes:
        at %= len(raw) + 1
        if how == "cut":
            raw = raw[:at]
        elif how == "flip" and at < len(raw):
            raw = raw[:at] + bytes([raw[at] ^ 1 << (at % 8)]) + raw[at + 1 :]
        elif how == "double":
            raw = raw[:at] + raw[at : at + 40] + raw[at:]
        else:
            raw = raw[:at] + new + raw[at:]
    return raw


@fast_and_long(80, 3000)
def test_fields_of_any_value_are_taken_or_refused(web: TestClient, profile: Profile) -> None:
    def fields(body: tuple[str, Any]) -> None:
        check(web, body[0], dump(body[1]))

    profile(fields, bodies)


@fast_and_long(40, 1000)
def test_any_json_is_refused(web: TestClient, profile: Profile) -> None:
    def any_json(path: str, body: Any) -> None:
        check(web, path, dump(body))

    profile(any_json, st.sampled_from(["/v1/completions", "/v1/chat/completions"]), anything)


@fast_and_long(40, 2000)
def test_damaged_bodies_are_refused(web: TestClient, profile: Profile) -> None:
    def damaged(body: tuple[str, Any], changes: list[tuple[int, str, bytes]]) -> None:
        check(web, body[0], mutated(dump(body[1]), changes))

    profile(damaged, bodies, mutations)


def test_deep_nesting_and_other_encodings_are_refused(web: TestClient) -> None:
    bodies = [(opening * depth)[:19_000] for opening in ("[", '{"a":', '{"prompt": [') for depth in (100, 5_000, 9_000)]
    bodies += [f'{{"prompt": {"[" * depth}{"]" * depth}}}' for depth in (100, 5_000, 9_000)]
    encoded = ['{"prompt": "é"}'.encode(encoding) for encoding in ("utf-16", "utf-32", "latin-1", "utf-8-sig")]
    for raw in (*map(str.encode, bodies), *encoded):
        assert check(web, "/v1/completions", raw) == 400
