"""What llama.cpp's server promises of OpenAI's API, retold.

Left out is what is its own: GBNF grammars, timings, templates by name, slots. `continue_final_message` asks for what it
does with a last message of the assistant's.
"""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest

from tests.clients.conftest import MODEL
from tests.support.serving import ServerProcesses

pytestmark = pytest.mark.clients
CHAT, COMPLETION = "/v1/chat/completions", "/v1/completions"
BOOK: Any = [{"role": "system", "content": "Book"}, {"role": "user", "content": "What is the best book"}]
PARTS: Any = [{"type": "text", "text": "What is "}, {"type": "text", "text": "the best book"}]
CONTEXT = 4096


@pytest.fixture
def web(server: ServerProcesses) -> Any:
    with httpx.Client(base_url=server.url, timeout=120, trust_env=False) as web:
        yield web


@pytest.fixture
def client(url: str) -> Any:
    return pytest.importorskip("openai").OpenAI(base_url=url, api_key="dummy", max_retries=0)


def post(web: httpx.Client, path: str, body: dict[str, Any]) -> dict[str, Any]:
    answer = web.post(path, json=body)
    if answer.status_code == 400 and answer.json()["error"]["code"] == "unsupported_parameter":
        pytest.skip(answer.json()["error"]["message"])
    assert answer.status_code == 200, answer.text
    return answer.json()  # type: ignore[no-any-return]


def streamed(web: httpx.Client, path: str, body: dict[str, Any]) -> list[dict[str, Any]]:
    answer = web.post(path, json=body | {"stream": True})
    assert answer.headers["content-type"].startswith("text/event-stream")
    lines = [line.removeprefix("data: ") for line in answer.text.split("\n\n") if line]
    assert lines[-1] == "[DONE]"
    return [json.loads(line) for line in lines[:-1]]


# ---- chats ----


@pytest.mark.parametrize("limit", [8, 128])
@pytest.mark.parametrize("model", [None, MODEL])
@pytest.mark.parametrize("question", ["Hey", "What is the best book", PARTS])
def test_a_chat_is_answered(web: httpx.Client, question: Any, model: str | None, limit: int) -> None:
    dialog = [BOOK[0], {"role": "user", "content": question}]
    answer = post(web, CHAT, {"model": model, "max_tokens": limit, "messages": dialog, "temperature": 0})
    assert "cmpl" in answer["id"]
    assert answer["object"] == "chat.completion"
    assert answer["system_fingerprint"].startswith("fp_")
    usage = answer["usage"]
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]
    choice = answer["choices"][0]
    assert choice["message"]["role"] == "assistant"
    assert choice["message"]["content"]
    assert choice["finish_reason"] in ("stop", "length")
    assert choice["finish_reason"] == "stop" or usage["completion_tokens"] == limit


def test_parts_are_one_text(web: httpx.Client) -> None:
    whole, parts = (
        post(web, "/tokenize", {"messages": [BOOK[0], {"role": "user", "content": content}]})
        for content in ("What is the best book", PARTS)
    )
    assert whole == parts


@pytest.mark.parametrize("limit", [8, 128])
def test_a_streamed_chat_begins_with_the_role_and_ends_with_the_reason(web: httpx.Client, limit: int) -> None:
    body = {"max_tokens": limit, "messages": BOOK, "stream_options": {"include_usage": True}}
    first, *middle, last, usage = streamed(web, CHAT, body)
    assert first["choices"][0]["delta"]["role"] == "assistant"
    assert not first["choices"][0]["delta"]["content"]
    assert len({chunk["id"] for chunk in (first, *middle, last, usage)}) == 1
    assert {chunk["model"] for chunk in middle} == {MODEL}
    for chunk in middle:
        assert "role" not in chunk["choices"][0]["delta"]
        assert chunk["choices"][0]["finish_reason"] is None
    assert last["choices"][0]["finish_reason"] in ("stop", "length")
    assert "content" not in last["choices"][0]["delta"]
    assert usage["choices"] == []
    assert 0 < usage["usage"]["completion_tokens"] <= limit


def test_openais_client_chats(client: Any) -> None:
    answer = client.chat.completions.create(model=MODEL, messages=BOOK, max_tokens=8, seed=42, temperature=0.8)
    assert answer.choices[0].message.content is not None
    assert answer.system_fingerprint


def test_the_template_is_llama_2s(web: httpx.Client) -> None:
    chat = post(web, "/tokenize", {"messages": BOOK})["tokens"]
    text = "[INST] <<SYS>>\nBook\n<</SYS>>\n\nWhat is the best book [/INST]"
    assert post(web, "/tokenize", {"prompt": text})["tokens"] == chat


@pytest.mark.parametrize("beginning", ["Whill", [{"type": "text", "text": "Wh"}, {"type": "text", "text": "ill"}]])
def test_an_answer_is_continued(web: httpx.Client, beginning: Any) -> None:
    dialog = [*BOOK, {"role": "assistant", "content": beginning}]
    body = {"messages": dialog, "continue_final_message": True, "add_generation_prompt": False}
    text = "[INST] <<SYS>>\nBook\n<</SYS>>\n\nWhat is the best book [/INST] Whill"
    assert post(web, "/tokenize", body)["tokens"] == post(web, "/tokenize", {"prompt": text})["tokens"]
    assert post(web, CHAT, body | {"max_tokens": 8})["choices"][0]["message"]["role"] == "assistant"


@pytest.mark.parametrize(
    ("wanted", "expected"),
    [
        ({"type": "json_schema", "json_schema": {"name": "a", "schema": {"const": "foooooo"}}}, "foooooo"),
        ({"type": "json_schema", "json_schema": {"name": "a", "schema": {"enum": [42]}}}, 42),
        ({"type": "json_object"}, None),
    ],
)
def test_an_answer_has_the_form_of_a_schema(web: httpx.Client, wanted: Any, expected: Any) -> None:
    body = {"messages": BOOK, "max_tokens": 200, "response_format": wanted}
    choice = post(web, CHAT, body)["choices"][0]
    if expected is None:
        assert choice["finish_reason"] == "length" or isinstance(json.loads(choice["message"]["content"]), dict)
    else:
        assert json.loads(choice["message"]["content"]) == expected


@pytest.mark.parametrize(
    "wanted",
    [
        {"type": "sound"},
        {"type": "json_schema", "json_schema": {"name": "a", "schema": 123}},
        {"type": "json_schema", "json_schema": {"name": "a", "schema": {"type": 123}}},
        {"type": "json_schema", "json_schema": {"name": "a", "schema": {"type": "hiccup"}}},
    ],
)
def test_a_form_that_does_not_exist_is_refused(web: httpx.Client, wanted: Any) -> None:
    answer = web.post(CHAT, json={"messages": BOOK, "response_format": wanted})
    assert answer.status_code == 400
    assert "schema" in answer.json()["error"]["param"] or answer.json()["error"]["param"] == "response_format"


@pytest.mark.parametrize(
    "messages",
    [
        None,
        "string",
        [123],
        [{}],
        [{"role": 123}],
        [{"role": "system", "content": 123}],
        [{"role": "system", "content": "test"}, {}],
        [{"role": "user", "content": "test"}, {"role": "assistant", "content": "test"}],
    ],
)
def test_what_is_no_dialog_is_refused(web: httpx.Client, messages: Any) -> None:
    answer = web.post(CHAT, json={"messages": messages})
    assert answer.status_code == 400
    assert answer.json()["error"]["message"]


@pytest.mark.parametrize("stream", [False, True])
def test_log_probabilities_match_the_text(client: Any, stream: bool) -> None:
    ask: Any = {"model": MODEL, "messages": BOOK, "temperature": 0, "max_tokens": 5, "logprobs": True}
    answer = client.chat.completions.create(top_logprobs=10, stream=stream, **ask)
    if stream:
        choices = [chunk.choices[0] for chunk in answer if chunk.choices]
        text = "".join(choice.delta.content or "" for choice in choices)
    else:
        choices, text = answer.choices, answer.choices[0].message.content
    entries = [entry for choice in choices if choice.logprobs for entry in choice.logprobs.content]
    assert "".join(entry.token for entry in entries) == text
    for entry in entries:
        assert entry.logprob <= 0
        assert entry.bytes is not None
        assert len(entry.top_logprobs) == 10


def test_excluded_tokens_do_not_come(web: httpx.Client) -> None:
    plain = post(web, CHAT, {"messages": BOOK, "temperature": 0, "max_tokens": 1, "logprobs": True})
    text = plain["choices"][0]["logprobs"]["content"][0]["token"]
    (token,) = post(web, "/tokenize", {"prompt": text.strip(), "add_special_tokens": False})["tokens"][-1:]
    body = {"messages": BOOK, "temperature": 0, "max_tokens": 64, "logit_bias": {str(token): -100}, "logprobs": True}
    entries = post(web, CHAT, body)["choices"][0]["logprobs"]["content"]
    assert text.strip() not in [entry["token"].strip() for entry in entries]


@pytest.mark.parametrize("stream", [False, True])
def test_a_full_context_is_an_error_before_any_event(web: httpx.Client, stream: bool) -> None:
    dialog = [{"role": "user", "content": "Hi " * CONTEXT}]
    answer = web.post(CHAT, json={"messages": dialog, "stream": stream})
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert error["code"] == "context_length_exceeded"
    assert f"maximum context length is {CONTEXT} tokens" in error["message"]


# ---- completions ----


@pytest.mark.parametrize("prompt", ["I believe the meaning of life is", "Write a joke about AI", ""])
def test_a_text_is_completed(web: httpx.Client, prompt: str) -> None:
    answer = post(web, COMPLETION, {"prompt": prompt, "max_tokens": 8})
    assert answer["object"] == "text_completion"
    assert answer["usage"]["completion_tokens"] <= 8


def test_a_streamed_text_matches_the_whole_answer(web: httpx.Client) -> None:
    body = {"prompt": "I believe the meaning of life is", "max_tokens": 24, "temperature": 0}
    whole = post(web, COMPLETION, body)["choices"][0]["text"]
    assert "".join(chunk["choices"][0]["text"] for chunk in streamed(web, COMPLETION, body)) == whole


@pytest.mark.parametrize("stream", [False, True])
def test_openais_client_completes(client: Any, stream: bool) -> None:
    answer = client.completions.create(model=MODEL, prompt="I believe", max_tokens=8, temperature=0, stream=stream)
    text = "".join(chunk.choices[0].text for chunk in answer) if stream else answer.choices[0].text
    assert text


def test_a_seed_repeats_a_text_and_another_one_does_not(web: httpx.Client) -> None:
    def text(seed: int) -> str:
        body = {"prompt": "I believe", "max_tokens": 24, "seed": seed, "temperature": 1.0}
        return str(post(web, COMPLETION, body)["choices"][0]["text"])

    assert text(42) == text(42) != text(43)


def test_a_prompt_of_ids_and_several_prompts_are_completed(web: httpx.Client) -> None:
    ids = post(web, "/tokenize", {"prompt": "I believe"})["tokens"]
    body = {"max_tokens": 8, "temperature": 0}
    text = post(web, COMPLETION, body | {"prompt": "I believe"})["choices"][0]["text"]
    for prompt in (ids, [ids, ids], ["I believe", "I believe"]):
        choices = post(web, COMPLETION, body | {"prompt": prompt})["choices"]
        assert {choice["text"] for choice in choices} == {text}


def test_requests_at_once_are_answered_each_for_itself(web: httpx.Client) -> None:
    def text(i: int) -> str:
        body = {"prompt": f"I believe {i % 4}", "max_tokens": 8, "temperature": 0}
        return str(post(web, COMPLETION, body)["choices"][0]["text"])

    alone = [text(i) for i in range(4)]
    with ThreadPoolExecutor(16) as pool:
        assert list(pool.map(text, range(16))) == alone * 4


def test_a_cancelled_request_frees_its_slot(server: ServerProcesses) -> None:
    body = {"prompt": "x", "max_tokens": 3000, "n": 8, "ignore_eos": True}
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(f"{server.url}{COMPLETION}", json=body, timeout=0.3)
    server.wait_until_idle(10)


def test_a_stop_string_ends_a_text(web: httpx.Client) -> None:
    body = {"prompt": "I believe", "max_tokens": 24, "temperature": 0}
    whole = post(web, COMPLETION, body)["choices"][0]["text"]
    choice = post(web, COMPLETION, body | {"stop": [whole[5]]})["choices"][0]
    assert (choice["text"], choice["finish_reason"]) == (whole[: whole.index(whole[5])], "stop")


# ---- the rest ----


def test_texts_are_encoded_and_decoded(web: httpx.Client) -> None:
    text = "What is the capital of France ?"
    ids = post(web, "/tokenize", {"prompt": text, "add_special_tokens": False})["tokens"]
    assert post(web, "/detokenize", {"tokens": ids})["prompt"] == text
    begun = post(web, "/tokenize", {"prompt": text})["tokens"]
    assert begun[1:] == ids


def test_the_pieces_of_ids_are_given(web: httpx.Client) -> None:
    answer = post(web, "/tokenize", {"prompt": "Hé", "add_special_tokens": False, "return_token_strs": True})
    assert len(answer["token_strs"]) == answer["count"]


def test_the_model_is_listed(web: httpx.Client) -> None:
    (model,) = web.get("/v1/models").json()["data"]
    assert (model["id"], model["max_model_len"]) == (MODEL, CONTEXT)


def test_health_and_metrics(web: httpx.Client) -> None:
    assert web.get("/health").status_code == 200
    assert "llama_requests_total" in web.get("/metrics").text
