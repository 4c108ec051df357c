"""The form of answers, where clients have stumbled over it."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
from starlette.testclient import TestClient

from llama import Llama

Serve = Callable[..., TestClient]


def chunks_of(answer: Any) -> list[dict[str, Any]]:
    lines = answer.text.split("\n\n")
    assert lines[-2:] == ["data: [DONE]", ""]
    return [json.loads(line.removeprefix("data: ")) for line in lines[:-2]]


def test_offsets_begin_after_the_prompt(serve: Serve, llama: Llama) -> None:
    ids = llama.tokenizer.encode("A llama é", bos=True, eos=False)
    for prompt in ("A llama é", ids):
        body = {"prompt": prompt, "max_tokens": 3, "logprobs": 0, "temperature": 0}
        choice = serve().post("/v1/completions", json=body).json()["choices"][0]
        assert choice["logprobs"]["text_offset"][0] == len("A llama é")
        echoed = serve().post("/v1/completions", json=body | {"echo": True}).json()["choices"][0]
        assert echoed["logprobs"]["text_offset"][0] == 0
        assert echoed["logprobs"]["text_offset"][-3:] == choice["logprobs"]["text_offset"]


def test_with_logprobs_0_the_chosen_token_is_there(serve: Serve) -> None:
    body = {"prompt": "x", "max_tokens": 4, "logprobs": 0, "temperature": 0}
    logprobs = serve().post("/v1/completions", json=body).json()["choices"][0]["logprobs"]
    assert [list(top.values()) for top in logprobs["top_logprobs"]] == [[p] for p in logprobs["token_logprobs"]]


def test_no_chunk_has_an_empty_list_of_tokens(serve: Serve) -> None:
    body = {"prompt": "x", "max_tokens": 4, "logprobs": 1, "stream": True}
    choices = [chunk["choices"][0] for chunk in chunks_of(serve().post("/v1/completions", json=body))]
    assert choices[-1]["finish_reason"] == "length"
    assert all(choice["logprobs"] is None or choice["logprobs"]["tokens"] for choice in choices)
    assert sum(len(choice["logprobs"]["tokens"]) for choice in choices if choice["logprobs"]) == 4


@pytest.mark.parametrize("include", [False, True])
def test_usage_is_in_each_chunk_where_asked_for(serve: Serve, include: bool) -> None:
    options = {"continuous_usage_stats": True, "include_usage": include}
    body = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 4, "stream": True, "stream_options": options}
    chunks = chunks_of(serve().post("/v1/chat/completions", json=body))
    counts = [chunk["usage"]["completion_tokens"] for chunk in chunks]
    assert counts == sorted(counts)
    assert (counts[0], counts[-1]) == (0, 4)
    assert (chunks[-1]["choices"] == []) == include


def test_answers_have_the_fingerprint_of_the_network(serve: Serve) -> None:
    body = {"prompt": "x", "max_tokens": 1}
    web = serve(fingerprint="fp_1")
    assert web.post("/v1/completions", json=body).json()["system_fingerprint"] == "fp_1"
    chunks = chunks_of(web.post("/v1/completions", json=body | {"stream": True}))
    assert {chunk["system_fingerprint"] for chunk in chunks} == {"fp_1"}


def test_more_than_four_stops_are_taken(serve: Serve) -> None:
    stops = [f"never {i}" for i in range(20)]
    assert serve().post("/v1/completions", json={"prompt": "x", "stop": stops, "max_tokens": 2}).status_code == 200
