"""Tokens for clients that count them, and the prompt's log-probabilities."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
from starlette.testclient import TestClient

from llama import Llama, __version__

Serve = Callable[..., TestClient]


def test_texts_are_encoded_and_decoded_as_by_the_tokenizer(serve: Serve, llama: Llama) -> None:
    web, text = serve(), "A llama é 🦙"
    ids = llama.tokenizer.encode(text, bos=True, eos=False)
    answer = web.post("/tokenize", json={"prompt": text, "return_token_strs": True}).json()
    assert (answer["tokens"], answer["count"], answer["max_model_len"]) == (ids, len(ids), 64)
    assert answer["token_strs"][:2] == ["<s>", " A"]
    bare = web.post("/tokenize", json={"model": "llama", "prompt": text, "add_special_tokens": False}).json()
    assert bare["tokens"] == ids[1:]
    assert bare["token_strs"] is None
    for given in (ids, ids[1:]):
        assert web.post("/detokenize", json={"tokens": given}).json() == {"prompt": text}


def test_control_pieces_are_their_ids(serve: Serve, llama: Llama) -> None:
    """So that a client of `/tokenizer_info` finds the ids of the names there."""
    web = serve()
    info = web.get("/tokenizer_info").json()
    for name, token in (("bos_token", llama.tokenizer.bos_id), ("eos_token", llama.tokenizer.eos_id)):
        answer = web.post("/tokenize", json={"prompt": info[name], "add_special_tokens": False})
        assert answer.json()["tokens"] == [token]


def test_messages_are_encoded_as_their_answer_needs_them(serve: Serve, llama: Llama) -> None:
    web, messages = serve(), [{"role": "user", "content": "hi"}]
    whole = web.post("/v1/chat/completions", json={"messages": messages, "max_tokens": 1}).json()
    answer = web.post("/tokenize", json={"messages": messages, "add_generation_prompt": True}).json()
    assert answer["count"] == whole["usage"]["prompt_tokens"]
    assert answer["tokens"] == llama.tokenizer.encode("[INST] hi [/INST]", bos=True, eos=False)


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/tokenize", {}, "prompt"),
        ("/tokenize", {"prompt": "a", "messages": []}, "messages"),
        ("/tokenize", {"prompt": 5}, "prompt"),
        ("/tokenize", {"prompt": "\ud800"}, "prompt"),
        ("/tokenize", {"prompt": "a", "frobnicate": 1}, "frobnicate"),
        ("/tokenize", {"prompt": "a", "model": "gpt"}, "model"),
        ("/tokenize", {"messages": [{"role": "system", "content": "x"}]}, "messages[0]"),
        ("/detokenize", {}, "tokens"),
        ("/detokenize", {"tokens": [1, 10**6]}, "tokens"),
        ("/detokenize", {"tokens": [1, -1]}, "tokens"),
        ("/detokenize", {"tokens": "abc"}, "tokens"),
        ("/v1/completions", {"prompt": "x", "prompt_logprobs": 1, "stream": True}, "prompt_logprobs"),
        ("/v1/completions", {"prompt": "x", "prompt_logprobs": 21}, "prompt_logprobs"),
    ],
)
def test_wrong_fields_are_named(serve: Serve, path: str, body: Any, param: str) -> None:
    answer = serve().post(path, content=json.dumps(body), headers={"Content-Type": "application/json"})
    assert answer.status_code in (400, 404)
    assert answer.json()["error"]["param"] == param


def test_version_and_ping(serve: Serve) -> None:
    assert serve().get("/version").json() == {"version": __version__}
    assert serve().post("/ping").status_code == 200


def test_log_probabilities_of_the_prompt_match_the_library(serve: Serve, llama: Llama) -> None:
    prompts = ["A llama", "Grass and é"]
    body = {"prompt": prompts, "max_tokens": 3, "temperature": 0, "prompt_logprobs": 2, "n": 2}
    plain = serve().post("/v1/completions", json={k: v for k, v in body.items() if k != "prompt_logprobs"}).json()
    for extra in ({}, {"logprobs": 1}, {"echo": True}, {"echo": True, "logprobs": 4}):
        choices = serve().post("/v1/completions", json=body | extra).json()["choices"]
        for choice, without in zip(choices, plain["choices"], strict=True):
            prompt = prompts[choice["index"] // 2]
            assert choice["text"] == (prompt if "echo" in extra else "") + without["text"]
            ids = llama.tokenizer.encode(prompt, bos=True, eos=False)
            first, *entries = choice["prompt_logprobs"]
            assert first is None
            scored = llama.generate([ids], 0, 0, logprobs=True, echo=True)[1]
            assert scored
            assert [entry[str(i)]["logprob"] for entry, i in zip(entries, ids[1:], strict=True)] == pytest.approx(
                scored[0][1:], abs=1e-4
            )
            for entry in entries:
                ranks = sorted(value["rank"] for value in entry.values() if value["rank"] is not None)
                assert ranks[:2] == [1, 2]
                assert max(entry.values(), key=lambda value: value["logprob"])["rank"] == 1
            if "logprobs" in extra:
                n_tokens = 3 + ("echo" in extra) * len(ids)
                assert len(choice["logprobs"]["tokens"]) == n_tokens
                assert all(len(top) <= extra["logprobs"] + 1 for top in choice["logprobs"]["top_logprobs"] if top)
            else:
                assert choice["logprobs"] is None
