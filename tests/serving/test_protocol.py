"""Which fields are taken: every row of the tables, and what no table has."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import pytest
from starlette.testclient import TestClient

from llama.serving.errors import ApiError
from llama.serving.protocol import ANY, MESSAGE_NEUTRAL, NEUTRAL, ChatBody, CompletionBody, Table, Unknown, check_body

QUESTION = {"role": "user", "content": "hi"}
BODIES: list[tuple[Any, dict[str, Any]]] = [(ChatBody, {"messages": [QUESTION]}), (CompletionBody, {"prompt": "x"})]
Serve = Callable[..., TestClient]


def labels_of(table: Table) -> list[str]:
    return [name for name, values in table.items() if values is ANY]


@pytest.mark.parametrize(("kind", "body"), BODIES)
def test_neutral_values_and_null_are_taken_and_others_are_refused_by_name(kind: Any, body: dict[str, Any]) -> None:
    plain = check_body(body, kind)
    optional = [name for name, field in kind.model_fields.items() if not field.is_required()]
    assert check_body(body | dict.fromkeys(optional), kind) == plain
    for label in labels_of(NEUTRAL):
        for value in (True, "high", {"a": "b"}, None):
            assert check_body(body | {label: value}, kind) == plain
    for name, values in NEUTRAL.items():
        if name in kind.model_fields or values is ANY:
            continue
        for value in (*values, None):
            assert check_body(body | {name: value}, kind) == plain, (name, value)
        for value in ("something else", {"type": "json_object"}, [7], 0.25):
            if value in values:
                continue
            with pytest.raises(ApiError, match=f"^{name} is not supported") as raised:
                check_body(body | {name: value}, kind)
            assert (raised.value.param, raised.value.code) == (name, "unsupported_parameter")


def test_nested_fields_are_read_like_the_bodys() -> None:
    labels = dict.fromkeys(labels_of(MESSAGE_NEUTRAL), "x")
    neutral = {name: values[0] for name, values in MESSAGE_NEUTRAL.items() if values}
    part = {"type": "text", "text": "hi", "cache_control": {"type": "ephemeral"}, "annotations": None}
    parts = [part | {"text": "h"}, part | {"text": "i"}]
    for message in ({**QUESTION, **labels, **neutral}, {**QUESTION, "content": parts}, {**QUESTION, "audio": None}):
        assert check_body({"messages": [message]}, ChatBody).messages == [QUESTION]
    for wrong, name in (
        ({**QUESTION, "weight": 1}, r"messages\[0\]\.weight"),
        ({**QUESTION, "reasoning_content": "hm"}, r"messages\[0\]\.reasoning_content"),
        ({"role": "assistant", "content": None, "tool_calls": [{}]}, r"messages\[0\]\.tool_calls"),
        ({**QUESTION, "content": [part | {"x": 1}]}, r"messages\[0\]\.content\[0\]\.x"),
    ):
        with pytest.raises(ApiError, match=f"^{name} is not supported"):
            check_body({"messages": [wrong]}, ChatBody)
    options = {"include_usage": None, "continuous_usage_stats": True}
    body = check_body({"prompt": "x", "stream": True, "stream_options": options}, CompletionBody)
    assert body.stream_options == {"continuous_usage_stats": True}
    text_format = {"type": "text", "json_schema": None}
    assert check_body({"prompt": "x", "response_format": text_format}, CompletionBody)


def test_best_of_must_be_n() -> None:
    check_body({"prompt": "x", "n": 3, "best_of": 3}, CompletionBody)
    with pytest.raises(ApiError, match="best_of is not supported"):
        check_body({"prompt": "x", "n": 2, "best_of": 3}, CompletionBody)


def test_all_refused_fields_are_named_with_tools_before_tool_choice() -> None:
    wrong = {"zzz": 1, "best_of": 5, "tool_choice": "required", "tools": [{}], "aaa": 2}
    with pytest.raises(
        ApiError, match=r"^tools, tool_choice, best_of, zzz, aaa are not supported; leave them out"
    ) as raised:
        check_body({"messages": [QUESTION], **wrong}, ChatBody)
    assert raised.value.param == "tools"


def test_unknown_fields_are_ignored_where_the_server_says_so_and_unsupported_ones_are_not() -> None:
    unknown = Unknown(ignore=True)
    body = {"prompt": "x", "stream": True, "frobnicate": 1, "stream_options": {"y": 2}}
    check_body(body, CompletionBody, unknown)
    assert unknown.ignored == ["frobnicate", "stream_options.y"]
    with pytest.raises(ApiError, match=r"^tools is not supported"):
        check_body({"prompt": "x", "tools": [{}], "frobnicate": 1}, CompletionBody, Unknown(ignore=True))


def test_ignored_fields_are_logged_once_and_listed_in_a_header(serve: Serve, caplog: pytest.LogCaptureFixture) -> None:
    body = {"prompt": "x", "max_tokens": 1, "frobnicate": 1, "n\u00e4me\n": 2}
    assert serve().post("/v1/completions", json=body).status_code == 400
    web = serve(unknown_fields="ignore")
    with caplog.at_level(logging.WARNING):
        for stream in (False, True):
            answer = web.post("/v1/completions", json=body | {"stream": stream})
            assert answer.status_code == 200
            assert answer.headers["x-ignored-fields"] == "frobnicate, n\\xe4me\\n"
    assert [record.getMessage() for record in caplog.records] == [
        "the field frobnicate is not supported, and ignored",
        "the field n\u00e4me\\n is not supported, and ignored",
    ]
    assert "x-ignored-fields" not in web.post("/v1/completions", json={"prompt": "x", "max_tokens": 1}).headers
