"""A tokenizer of any class, or with a replaced `decode`, in every call: what it decodes is what comes back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from llama import Llama, Tokenizer
from llama.chat import ChatFormat
from tests.support.serving import running, web_of
from tests.support.tokenizers import Foreign

DIALOG: Any = [{"role": "user", "content": "The fox?"}]
KINDS = ["of another class", "assigned decode", "subclass"]


class Loud(Tokenizer):
    def decode(self, t: Any) -> Any:
        return super().decode(t).upper()


@pytest.fixture(params=KINDS)
def other(request: pytest.FixtureRequest, llama: Llama, tokenizer_path: Path) -> Llama:
    if request.param == "of another class":
        tokenizer: Any = Foreign(llama.tokenizer)
    elif request.param == "subclass":
        tokenizer = Loud(tokenizer_path)
    else:
        tokenizer = Tokenizer(tokenizer_path)
        tokenizer.decode = lambda t: llama.tokenizer.decode(t).upper()
    return Llama(llama.model, tokenizer)


def expected(other: Llama, ids: list[int], n: int = 20) -> str:
    """The network's greedy continuation as the tokenizer decodes it."""
    (row,), _ = other.generate([ids], n, temperature=0)
    text: str = other.tokenizer.decode(row)
    assert len(text) > 5
    return text


def test_text_chat_and_streams_are_what_it_decodes(other: Llama) -> None:
    prompt = other.tokenizer.encode("The quick", bos=True, eos=False)
    text = expected(other, prompt)
    (result,) = other.text_completion(["The quick"], temperature=0, max_gen_len=20, logprobs=True)
    assert result["generation"] == "".join(result["tokens"]) == text
    assert len(result["tokens"]) == len(result["logprobs"])
    assert "".join(other.stream_text_completion("The quick", 0, max_gen_len=20)) == text

    text = expected(other, ChatFormat().encode(DIALOG, other.tokenizer))
    (answer,) = other.chat_completion([DIALOG], temperature=0, max_gen_len=20)
    assert answer["generation"]["content"] == text
    assert "".join(other.stream_chat_completion(DIALOG, 0, max_gen_len=20)) == text


def test_stop_strings_and_echo_are_found_in_what_it_decodes(other: Llama) -> None:
    prompt = other.tokenizer.encode("The quick", bos=True, eos=False)
    text = expected(other, prompt)
    stop = text[4:6]
    cut = text[: text.index(stop)]
    (result,) = other.text_completion(["The quick"], temperature=0, max_gen_len=20, stop=[stop])
    assert result == {"generation": cut, "finish_reason": "stop"}
    assert "".join(other.stream_text_completion("The quick", 0, max_gen_len=20, stop=[stop])) == cut
    (result,) = other.text_completion(["The quick"], temperature=0, max_gen_len=20, echo=True)
    (row,), _ = other.generate([prompt], 20, temperature=0, echo=True)
    assert result["generation"] == other.tokenizer.decode(row)


def test_scores_have_its_texts(other: Llama) -> None:
    (score,) = other.score(["The quick fox"])
    assert "".join(score["tokens"]) == other.tokenizer.decode(other.tokenizer.encode("The quick fox", True, False))


def test_a_server_answers_with_what_it_decodes(other: Llama) -> None:
    text = expected(other, ChatFormat().encode(DIALOG, other.tokenizer))
    body = {"messages": DIALOG, "temperature": 0, "max_tokens": 20, "logprobs": True, "top_logprobs": 2}
    with running(other) as service:
        answer = web_of(service).post("/v1/chat/completions", json=body).json()
    (choice,) = answer["choices"]
    assert choice["message"]["content"] == text
    assert all(entry["token"] == entry["top_logprobs"][0]["token"] for entry in choice["logprobs"]["content"])
