"""The Responses API, by OpenAI's own client against the routes, and event by event."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
from openai import OpenAI
from starlette.testclient import TestClient

from llama import Llama
from llama.serving.protocol import ANY
from llama.serving.responses import NEUTRAL, ResponsesBody, check_body

Serve = Callable[..., TestClient]
URL = "/v1/responses"


def client_of(web: TestClient) -> OpenAI:
    return OpenAI(base_url="http://testserver/v1", api_key="none", http_client=web, max_retries=0)  # type: ignore[arg-type]


def test_an_answer_matches_the_chat(serve: Serve, llama: Llama) -> None:
    client = client_of(serve())
    dialog: Any = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "hi"}]
    expected = llama.chat_completion([dialog], 0, max_gen_len=8)[0]["generation"]["content"]
    whole = client.responses.create(
        model="llama", instructions="Be brief.", input="hi", temperature=0, max_output_tokens=8
    )
    assert whole.output_text == expected
    assert (whole.status, whole.incomplete_details and whole.incomplete_details.reason) == (
        "incomplete",
        "max_output_tokens",
    )
    assert whole.usage
    assert whole.usage.output_tokens == 8
    items: Any = [
        {"type": "message", "role": "developer", "content": [{"type": "input_text", "text": "Be brief."}]},
        {"role": "user", "content": "hi"},
    ]
    again = client.responses.create(model="llama", input=items, temperature=0, max_output_tokens=8)
    assert again.output_text == expected
    short = client.responses.create(model="llama", input="hi", max_output_tokens=2)
    follow_up: Any = [items[1], *(item.model_dump() for item in short.output), {"role": "user", "content": "a"}]
    assert client.responses.create(model="llama", input=follow_up, max_output_tokens=2).usage


def test_a_streams_events_add_up_to_the_whole(serve: Serve) -> None:
    body = {"input": "hi", "temperature": 0, "max_output_tokens": 8}
    web = serve()
    whole = web.post(URL, json=body).json()
    answer = web.post(URL, json=body | {"stream": True})
    events = [block.split("\n") for block in answer.text.strip().split("\n\n")]
    values = [json.loads(data.removeprefix("data: ")) for _, data in events]
    assert [name.removeprefix("event: ") for name, _ in events] == [value["type"] for value in values]
    assert [value["sequence_number"] for value in values] == list(range(len(values)))
    kinds = list(dict.fromkeys(value["type"].removeprefix("response.") for value in values))
    assert kinds == [
        "created",
        "in_progress",
        "output_item.added",
        "content_part.added",
        "output_text.delta",
        "output_text.done",
        "content_part.done",
        "output_item.done",
        "incomplete",
    ]
    text = whole["output"][0]["content"][0]["text"]
    assert "".join(value["delta"] for value in values if "delta" in value) == text
    last = values[-1]["response"]
    assert last["output"][0]["content"] == whole["output"][0]["content"]
    assert last["usage"] == whole["usage"]
    stream = client_of(web).responses.create(model="llama", input="hi", temperature=0, max_output_tokens=8, stream=True)
    last_event = list(stream)[-1]
    assert last_event.type == "response.incomplete"
    assert last_event.response.output_text == text


def test_neutral_values_and_labels_are_taken() -> None:
    plain = check_body({"input": "x"}, ResponsesBody)

    for name, values in NEUTRAL.items():
        for value in (*(values or [{"effort": "low"}] * (values is ANY)), None):
            assert check_body({"input": "x", name: value}, ResponsesBody) == plain


def test_an_answers_text_has_the_form_of_a_schema(serve: Serve) -> None:
    pytest.importorskip("llguidance")
    form = {"type": "json_schema", "name": "animal", "strict": True, "schema": {"enum": ["yes", "no"]}}
    text: Any = {"format": form, "verbosity": "low"}
    answer = client_of(serve()).responses.create(model="llama", input="hi", text=text, temperature=0)
    assert answer.output_text in ('"yes"', '"no"')
    plain: Any = {"format": {"type": "text"}}
    assert client_of(serve()).responses.create(model="llama", input="hi", text=plain, max_output_tokens=2).output_text


@pytest.mark.parametrize(
    ("wrong", "param"),
    [
        ({"previous_response_id": "resp_1"}, "previous_response_id"),
        ({"tools": [{"type": "function", "name": "f"}]}, "tools"),
        ({"text": {"format": {"type": "sound"}}}, "response_format"),
        ({"text": {"frobnicate": 1}}, "text.frobnicate"),
        ({"background": True}, "background"),
        ({"input": []}, "input"),
        ({"input": [{"type": "function_call_output", "call_id": "a", "output": "b"}]}, "input[0].type"),
        ({"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]}, "input[0].content[0]"),
        ({"input": [{"role": "user", "content": "x", "weight": 1}]}, "input[0].weight"),
        ({"max_output_tokens": 0}, "max_output_tokens"),
        ({"model": "gpt"}, "model"),
        ({"frobnicate": 1}, "frobnicate"),
    ],
)
def test_what_is_not_supported_is_named(serve: Serve, wrong: dict[str, Any], param: str) -> None:
    answer = serve().post(URL, json={"input": "hi"} | wrong)
    assert answer.status_code in (400, 404)
    assert answer.json()["error"]["param"] == param
