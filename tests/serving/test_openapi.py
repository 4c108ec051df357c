"""The description of the API: what its schemas refuse is refused, and what is accepted is in them."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
from starlette.testclient import TestClient

from llama.serving.protocol import ANY, NEUTRAL
from tests.serving.test_serve import CHAT, QUESTION, TEXT_PATH, WRONG

jsonschema = pytest.importorskip("jsonschema", reason="needs the package jsonschema, of the extra [test]")

Serve = Callable[..., TestClient]
BODIES: dict[str, dict[str, Any]] = {
    CHAT: {"messages": QUESTION},
    TEXT_PATH: {"prompt": "x"},
    "/v1/responses": {"input": "x"},
    "/tokenize": {"prompt": "x"},
    "/detokenize": {"tokens": [1]},
}


def schema_of(web: TestClient, path: str) -> dict[str, Any]:
    operation = web.get("/openapi.json").json()["paths"][path]["post"]
    return operation["requestBody"]["content"]["application/json"]["schema"]  # type: ignore[no-any-return]


def fits(body: Any, schema: dict[str, Any]) -> bool:
    return bool(jsonschema.Draft202012Validator(schema).is_valid(body))


def test_bodies_that_are_taken_are_in_the_schemas(serve: Serve) -> None:
    web = serve()
    limits = {CHAT: "max_tokens", TEXT_PATH: "max_tokens", "/v1/responses": "max_output_tokens"}
    for path, body in BODIES.items():
        schema = schema_of(web, path)
        jsonschema.Draft202012Validator.check_schema(schema)
        limit = {limits[path]: 1} if path in limits else {}
        labels = {name: {"a": 1} for name, values in NEUTRAL.items() if values is ANY}
        neutral = {name: values[0] for name, values in NEUTRAL.items() if values}
        nothing = dict.fromkeys(set(schema["properties"]) - set(body))
        for more in ({}, labels, neutral, nothing):
            assert web.post(path, json=body | more | limit).status_code == 200, (path, more)
            assert fits(body | more | limit, schema), (path, more)


def test_bodies_that_are_not_in_the_schemas_are_refused(serve: Serve) -> None:
    web = serve()
    wrong = [(path, BODIES[path] | fields) for path, fields, _ in WRONG]
    wrong += [(path, body | {"frobnicate": 1}) for path, body in BODIES.items()]
    wrong += [(path, {}) for path in BODIES]
    n_refused = 0
    for path, body in wrong:
        if not fits(body, schema_of(web, path)):
            answer = web.post(path, content=json.dumps(body), headers={"Content-Type": "application/json"})
            assert answer.status_code == 400, (path, body)
            n_refused += 1
    assert n_refused > 25


def test_a_server_that_ignores_unknown_fields_says_so(serve: Serve) -> None:
    body = BODIES[TEXT_PATH] | {"frobnicate": 1, "max_tokens": 1}
    web = serve(unknown_fields="ignore")
    assert fits(body, schema_of(web, TEXT_PATH))
    assert web.post(TEXT_PATH, json=body).status_code == 200
    assert not fits(body | {"tools": [{}]}, schema_of(web, TEXT_PATH))


def test_penalties_that_make_logits_overflow_are_the_clients_mistake(serve: Serve) -> None:
    for penalty in (5e-324, 1e308):
        answer = serve().post(TEXT_PATH, json={"prompt": "x", "repetition_penalty": penalty})
        assert answer.status_code == 400
        assert answer.json()["error"]["param"] == "repetition_penalty"
