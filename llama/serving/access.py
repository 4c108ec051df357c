"""Who may ask, and what is noted of each request: keys, hosts and origins; ids, counts and the log."""

from __future__ import annotations

import hmac
import json
import re
import sys
import time
import uuid
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from starlette.datastructures import Headers
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from llama.errors import printable, quote
from llama.serving.errors import ApiError
from llama.serving.formats import Counts
from llama.serving.metrics import Metrics

LEFT = 499  # status of requests whose client left, as in nginx
LOOPBACK_HOSTS = frozenset(("localhost", "127.0.0.1", "[::1]"))
_REQUEST_ID = re.compile(r"[\x21-\x7e]{1,128}")


def check_key(headers: Mapping[str, str], keys: Sequence[str]) -> None:
    """Raises ApiError unless a request has one of the keys, or no key is needed."""
    scheme, _, given = headers.get("authorization", "").partition(" ")
    if scheme.lower() != "bearer":
        given = headers.get("x-api-key", "")
    matches = [hmac.compare_digest(given.strip().encode("latin-1"), key.encode()) for key in keys]
    if keys and not any(matches):
        raise ApiError(
            "the header Authorization must be 'Bearer ' and the server's API key, or X-Api-Key the key",
            status=401,
            code="invalid_api_key",
            headers={"WWW-Authenticate": "Bearer"},
        )


def error_response(error: ApiError) -> JSONResponse:
    """An error in OpenAI's form."""
    return JSONResponse(error.body(), error.status, headers=error.headers)


@dataclass(frozen=True)
class Guard:
    """Refuses what a browser sends on behalf of a foreign page, and ambiguous requests.

    A page can have its own name resolve to this machine (DNS rebinding): the browser then sends that name as `Host`.
    """

    app: ASGIApp
    hosts: Collection[str] | None  # names in lower case that `Host` may have, with any port; None for all
    origins: Sequence[str]  # of pages that may use the server besides its own, "*" for all

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and (error := self._error(Headers(scope=scope))):
            return await error_response(error)(scope, receive, send)
        await self.app(scope, receive, send)

    def _error(self, headers: Headers) -> ApiError | None:
        if "transfer-encoding" in headers and "content-length" in headers:
            return ApiError(
                "a request must not have both Content-Length and Transfer-Encoding", headers={"Connection": "close"}
            )
        if self.hosts is None:
            return None
        host, origin = headers.get("host", "").lower(), headers.get("origin")
        if host and re.sub(r":\d*$", "", host) not in self.hosts:
            expected = ", ".join(sorted(self.hosts))
            message = f"the header Host must be one of {expected}, got {quote(host)}; allow others by --allowed_hosts"
            return ApiError(message, status=403, code="host_not_allowed")
        is_own = origin is None or origin.lower() in (f"http://{host}", f"https://{host}")
        if is_own or "*" in self.origins or origin in self.origins:
            return None
        message = f"pages of other origins must be allowed by --allowed_origins, got {quote(origin)}"
        return ApiError(message, status=403, code="origin_not_allowed")


@dataclass(frozen=True)
class Observe:
    """Gives each request an id, counts it by path and status, and logs it."""

    app: ASGIApp
    metrics: Metrics
    log: str | None  # "text" or "json" for a line per request on stderr; None for none
    paths: Collection[str]  # those that are counted by themselves; the others are "other"

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        started = time.perf_counter()
        given = Headers(scope=scope).get("x-request-id", "")
        request_id = given if _REQUEST_ID.fullmatch(given) else f"req-{uuid.uuid4().hex}"
        scope.setdefault("state", {})
        scope["path"] = scope["path"].rstrip("/") or "/"
        status, is_complete = LEFT, False

        async def watch(message: Message) -> None:
            nonlocal status, is_complete
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message.get("headers", ()), (b"x-request-id", request_id.encode())]
            await send(message)
            is_complete = message["type"] == "http.response.body" and not message.get("more_body")

        try:
            await self.app(scope, receive, watch)
        finally:
            path = scope["path"] if scope["path"] in self.paths else "other"
            status = status if is_complete else LEFT
            self.metrics.requests.labels(path, str(status)).inc()
            if self.log:
                self._write(scope, status, time.perf_counter() - started, request_id)

    def _write(self, scope: Scope, status: int, seconds: float, request_id: str) -> None:
        counts: Counts | None = scope["state"].get("counts")
        tokens = {"prompt_tokens": counts.n_prompt, "completion_tokens": counts.n_generated} if counts else {}
        values = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "client": (scope.get("client") or ("-",))[0],
            "method": scope["method"],
            "path": printable(scope["path"]),
            "status": status,
            "seconds": round(seconds, 4),
            **tokens,
            "request_id": request_id,
        }
        line = json.dumps(values) if self.log == "json" else " ".join(f"{k}={v}" for k, v in values.items())
        print(line, file=sys.stderr, flush=True)
