"""The form of answers, where clients have stumbled over it."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
from starlette.testclient import TestClient

from llama import Llama
from tests.support.steps import dictated

Serve = Callable[..., TestClient]


def chunks_of(answer: Any) -> list[dict[str, Any]]:
    lines = answer.text.split("\n\n")
    assert lines[-2:] == ["data: [DONE]", ""]
    return [json.loads(line.removeprefix("data: ")) for line in lines[:-2]]


def test_a_streamed_chat_begins_with_the_role_and_ends_with_the_reason(serve: Serve) -> None:
    options = {"stream": True, "stream_options": {"include_usage": True}}
    body = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 8, **options}
    first, *middle, last, usage = chunks_of(serve().post("/v1/chat/completions", json=body))
    assert first["choices"][0]["delta"]["role"] == "assistant" and not first["choices"][0]["delta"]["content"]
    assert len({(chunk["id"], chunk["model"]) for chunk in (first, *middle, last, usage)}) == 1
    for choice in (chunk["choices"][0] for chunk in middle):
        assert "role" not in choice["delta"] and choice["finish_reason"] is None
    assert last["choices"][0]["finish_reason"] == "length" and "content" not in last["choices"][0]["delta"]
    assert usage["choices"] == [] and usage["usage"]["completion_tokens"] == 8


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


BODIES = {
    "chat": {"messages": [{"role": "user", "content": "hi"}], "logprobs": True, "top_logprobs": 3},
    "completion": {"prompt": "The quick", "logprobs": 3},
    "empty prompt": {"prompt": "", "logprobs": 3},
    "echo": {"prompt": "The quick", "logprobs": 3, "echo": True},
}


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("kind", BODIES)
def test_a_token_is_spelled_as_among_the_likeliest(serve: Serve, llama: Llama, kind: str, stream: bool) -> None:
    """The first of an answer too, whose space is dropped, and one that is a part of a character."""
    sp = llama.tokenizer.sp_model
    ids = [*sp.encode("The fox"), *(sp.piece_to_id(f"<0x{byte:02X}>") for byte in "é".encode()), llama.tokenizer.bos_id]
    path = "/v1/chat/completions" if kind == "chat" else "/v1/completions"
    with dictated(llama, ids):
        body = BODIES[kind] | {"temperature": 0, "stream": stream, "max_tokens": len(ids)}
        answer = serve().post(path, json=body)
    choices = [chunk["choices"][0] for chunk in chunks_of(answer)] if stream else answer.json()["choices"]
    found = [choice["logprobs"] for choice in choices if choice["logprobs"]]
    if kind == "chat":
        entries = [entry for logprobs in found for entry in logprobs["content"]]
        assert [(e["token"], e["bytes"]) for e in entries] == [
            (e["top_logprobs"][0]["token"], e["top_logprobs"][0]["bytes"]) for e in entries
        ]
        tokens = [entry["token"] for entry in entries]
    else:
        tokens = [token for logprobs in found for token in logprobs["tokens"]]
        tops = [top for logprobs in found for top in logprobs["top_logprobs"]]
        new = slice(-len(ids), None)
        assert tokens[new] == [max(top, key=top.__getitem__) for top in tops[new]]
        assert all(token in top for token, top in zip(tokens, tops, strict=True) if top is not None)
    first = "The" if kind in ("chat", "empty prompt") else " The"
    new_tokens = tokens[-len(ids) :]
    assert new_tokens[0] == first and new_tokens[-3:] == ["bytes:\\xc3", "bytes:\\xa9", "<s>"]
    if kind == "echo":
        assert tokens[:2] == ["<s>", "The"]
