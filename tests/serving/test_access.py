"""Keys, hosts, origins, ids and the log."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from llama.serving import settings
from llama.tools import serve as command

Serve = Callable[..., TestClient]
LOOPBACK = frozenset(("localhost", "127.0.0.1", "[::1]"))


def test_keys_are_taken_from_both_headers_and_bearer_in_any_case(serve: Serve) -> None:
    web = serve(api_keys=["first", "sécond"])
    second = "sécond".encode().decode("latin-1")
    right = (
        ("Authorization", "Bearer first"),
        ("authorization", "bearer first"),
        ("Authorization", f"BEARER {second}"),
    )
    for name, value in (*right, ("X-Api-Key", "first"), ("x-api-key", second)):
        headers: Any = {name: value.encode("latin-1")}
        assert web.get("/v1/models", headers=headers).status_code == 200, (name, value)
    for name, value in (("Authorization", "first"), ("Authorization", "Basic first"), ("X-Api-Key", "Bearer first")):
        assert web.get("/v1/models", headers={name: value}).status_code == 401, (name, value)
    for path in ("/v1/models", "/metrics"):
        assert (web.get(path).status_code, web.get(path).json()["error"]["code"]) == (401, "invalid_api_key")
    assert web.post("/v1/chat/completions", content=b"x" * 10).status_code == 401
    assert web.get("/health").status_code == web.get("/").status_code == 200


def test_keys_that_no_header_can_carry_are_refused_at_the_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LLAMA_API_KEY", "one")
    file = tmp_path / "keys"
    file.write_text("two\n\nthree \n")
    assert settings.api_keys(None, str(file)) == ["one", "two", "three"]
    monkeypatch.setenv("LLAMA_API_KEY", "secret\n")
    with pytest.raises(ValueError, match=r"LLAMA_API_KEY must have no spaces, newlines.*7 characters") as raised:
        settings.api_keys(None, None)
    assert "secret" not in str(raised.value)
    file.write_text("\n")
    with pytest.raises(ValueError, match="--api_key_file must have a key per line"):
        settings.api_keys("", str(file))


@pytest.mark.parametrize("port", [-1, 65536, 87001, "x", True])
def test_ports_that_do_not_exist_are_refused(port: Any) -> None:
    with pytest.raises(ValueError, match="--port must be a number from 0 to 65535"):
        command.main(port=port)


def test_other_hosts_are_refused_where_pages_could_reach_a_loopback_address(serve: Serve) -> None:
    """DNS rebinding: evil.example resolves to 127.0.0.1, and the browser sends its name as Host."""
    web = serve(allowed_hosts=LOOPBACK | {"llama.local"})
    for host in ("localhost", "LOCALHOST:8000", "127.0.0.1:1", "[::1]", "[::1]:8000", "llama.local:80"):
        assert web.get("/health", headers={"Host": host}).status_code == 200, host
    for host in ("evil.example", "evil.example:8000", "127.0.0.1.evil.example", "localhost@evil", "[::2]:8000", ":80"):
        answer = web.get("/v1/models", headers={"Host": host})
        assert (answer.status_code, answer.json()["error"]["code"]) == (403, "host_not_allowed"), host
    assert serve().get("/v1/models", headers={"Host": "evil.example"}).status_code == 200


def test_foreign_pages_are_refused_and_the_own_one_is_not(serve: Serve) -> None:
    web = serve(allowed_hosts=LOOPBACK, allowed_origins="http://app.example")
    host = {"Host": "localhost:8000"}
    for origin in ("http://localhost:8000", "http://app.example"):
        assert web.get("/v1/models", headers={**host, "Origin": origin}).status_code == 200
    for origin in ("http://evil.example", "null", "http://localhost:3000", "http://[", "http://app.example.evil"):
        answer = web.get("/v1/models", headers={**host, "Origin": origin})
        assert (answer.status_code, answer.json()["error"]["code"]) == (403, "origin_not_allowed"), origin


def test_pages_of_allowed_origins_can_read_answers(serve: Serve) -> None:
    origin = {"Origin": "http://app.example"}
    preflight = origin | {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization"}
    path = "/v1/chat/completions"
    assert "access-control-allow-origin" not in serve().get("/v1/models", headers=origin).headers
    for origins in ("*", "http://a, http://app.example"):
        web = serve(allowed_origins=origins, api_keys=["k"])
        assert web.options(path, headers=preflight).status_code == 200
        answer = web.get("/v1/models", headers=origin | {"Authorization": "Bearer k"})
        assert answer.headers["access-control-allow-origin"] in ("*", "http://app.example")
    assert "access-control-allow-origin" not in serve(allowed_origins="http://b").get("/", headers=origin).headers


def test_requests_have_an_id_that_is_echoed_or_made(serve: Serve) -> None:
    web = serve()
    assert web.get("/health", headers={"X-Request-Id": "abc-1"}).headers["x-request-id"] == "abc-1"
    made = [web.get("/health").headers["x-request-id"] for _ in range(2)]
    assert len(set(made)) == 2
    for wrong in ("a b", "x" * 200, ""):
        assert web.get("/nowhere", headers={"X-Request-Id": wrong}).headers["x-request-id"].startswith("req-")


def test_the_log_has_a_line_per_request(serve: Serve, capsys: pytest.CaptureFixture[str]) -> None:
    body = {"prompt": "x", "max_tokens": 3}
    for form in ("json", "text"):
        web = serve(log_requests=True, log_format=form)
        web.post("/v1/completions", json=body | {"stream": True}, headers={"X-Request-Id": "me"})
        web.get("/nowhere%0A")
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 4
    first = json.loads(lines[0])
    assert (first["method"], first["path"], first["status"]) == ("POST", "/v1/completions", 200)
    assert (first["prompt_tokens"], first["completion_tokens"], first["request_id"]) == (3, 3, "me")
    assert (json.loads(lines[1])["path"], json.loads(lines[1])["status"]) == ("/nowhere\\n", 404)
    assert re.search(r"path=/v1/completions status=200 seconds=[\d.]+ prompt_tokens=3 completion_tokens=3", lines[2])
    serve().get("/health")
    assert not capsys.readouterr().err


def test_head_and_a_slash_at_the_end_are_taken(serve: Serve) -> None:
    web = serve()
    for path in ("/", "/health", "/metrics", "/v1/models", "/v1/models/llama", "/ping", "/version"):
        assert web.head(path).status_code == web.get(path).status_code == 200, path
    assert web.get("/v1/models/").json() == web.get("/v1/models").json()
    answer = web.post("/v1/completions/", json={"prompt": "x", "max_tokens": 1}, follow_redirects=False)
    assert answer.status_code == 200
    assert web.get("/health/", headers={"Host": "evil.example"}, follow_redirects=False).status_code == 200


def test_bodies_that_are_compressed_are_refused(serve: Serve) -> None:
    headers = {"Content-Type": "application/json", "Content-Encoding": "gzip"}
    assert serve().post("/v1/completions", content=b"\x1f\x8b", headers=headers).status_code == 415
