"""The HTTP routes: OpenAI's API, health, metrics, and the chat page."""

from __future__ import annotations

import asyncio
import hmac
import time
from collections.abc import AsyncIterator
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from fastapi import APIRouter, Depends, FastAPI, Request
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from llama.engine.output import Piece
from llama.errors import printable, quote
from llama.serving.chat_page import page_routes
from llama.serving.endpoints import CHAT_URL, COMPLETIONS_URL, check_model, read_request
from llama.serving.errors import ApiError
from llama.serving.formats import Answer, Format, event, usage
from llama.serving.jobs import Job, Planner
from llama.serving.metrics import CONTENT_TYPE, Metrics
from llama.serving.protocol import parse_json
from llama.serving.run import ClientLeftError, Run, while_connected
from llama.serving.service import Service

_BODY_S = 30.0  # in which a client has to send its body
_LEFT = 499  # status of requests whose client left, as in nginx


@dataclass
class Server:
    """The state that the routes share. For the event loop's thread alone, except `ready` and `failed`.

    Attributes:
        model_name: name of the network in requests and answers.
        api_key: key that clients must send; "" for none.
        max_body_bytes: maximum size of a request's body.
        timeout_s: time limit of a request, waiting included.
        speculative: as in `SamplingParams`, of all requests.
        chat_error: why the checkpoint cannot answer chats; None if it can.
        service, planner: None until the network is loaded.
        error: why the network can no longer be used.
    """

    model_name: str
    api_key: str = ""
    max_body_bytes: int = 2**22
    timeout_s: float = 600.0
    speculative: str | None = None
    chat_error: str | None = None
    metrics: Metrics = field(default_factory=Metrics)
    created: int = field(default_factory=lambda: int(time.time()))
    service: Service | None = None
    planner: Planner | None = None
    error: BaseException | None = None

    def ready(self, service: Service) -> None:
        """Starts to accept requests."""
        self.planner = Planner(
            service.llama, service.max_waiting, speculative=self.speculative, chat_error=self.chat_error
        )
        self.metrics.watch("llama_requests_open", "Requests that are not finished.", lambda: service.n_requests)
        self.metrics.watch("llama_sequences_running", "Sequences in slots of the cache.", lambda: service.n_running)
        self.metrics.watch("llama_sequences_waiting", "Sequences that wait for a slot.", lambda: service.n_waiting)
        self.metrics.watch_count("llama_generated_tokens", "Generated tokens.", lambda: service.n_generated)
        self.service = service

    def failed(self, error: BaseException) -> None:
        """Refuses all requests from now on."""
        self.error = error

    def parts(self) -> tuple[Service, Planner]:
        """Raises ApiError unless requests can be served."""
        error = self.error or (self.service.error if self.service else None)
        if error is not None:
            raise ApiError(f"the server has failed: {printable(error)}", status=503, code="failed")
        if self.service is None or self.planner is None:
            raise ApiError("the network is being loaded", status=503, code="loading", headers={"Retry-After": "2"})
        return self.service, self.planner


def make_app(server: Server) -> FastAPI:
    """The application, for an ASGI server such as uvicorn."""
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    app.add_middleware(_CountRequests, metrics=server.metrics)
    app.add_exception_handler(ApiError, _answer_error)
    app.add_exception_handler(HTTPException, _answer_error)
    app.add_exception_handler(ClientDisconnect, _answer_error)
    app.add_exception_handler(ClientLeftError, _answer_error)
    app.add_exception_handler(Exception, _answer_error)
    app.include_router(page_routes())
    app.include_router(_open_routes(server))
    app.include_router(_guarded_routes(server))
    return app


def _open_routes(server: Server) -> APIRouter:
    """The routes that need no key."""
    routes = APIRouter()

    @routes.get("/health")
    async def health() -> Response:
        server.parts()
        return JSONResponse({"status": "ok"})

    return routes


def _guarded_routes(server: Server) -> APIRouter:
    """The routes that need the key, if one is set."""

    async def check_key(request: Request) -> None:
        given = request.headers.get("authorization", "").encode("latin-1")
        if server.api_key and not hmac.compare_digest(given, f"Bearer {server.api_key}".encode()):
            raise ApiError(
                "the header Authorization must be 'Bearer ' and the server's API key",
                status=401,
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )

    routes = APIRouter(dependencies=[Depends(check_key)])

    @routes.get("/metrics")
    async def metrics() -> Response:
        return Response(server.metrics.text(), media_type=CONTENT_TYPE)

    @routes.get("/v1/models")
    async def models() -> Response:
        return JSONResponse({"object": "list", "data": [_model(server)]})

    @routes.get("/v1/models/{name:path}")
    async def model(name: str) -> Response:
        check_model(name, server.model_name)
        return JSONResponse(_model(server))

    @routes.post(CHAT_URL)
    async def chat_completions(request: Request) -> Response:
        return await _complete(server, request, CHAT_URL)

    @routes.post(COMPLETIONS_URL)
    async def completions(request: Request) -> Response:
        return await _complete(server, request, COMPLETIONS_URL)

    return routes


def _model(server: Server) -> dict[str, Any]:
    context = server.planner.max_seq_len if server.planner else None
    model = {"id": server.model_name, "object": "model", "created": server.created, "owned_by": "local"}
    return model | {"max_model_len": context}


async def _complete(server: Server, request: Request, url: str) -> Response:
    """Answers a request for completions, as a whole or as a stream."""
    arrived = time.perf_counter()
    service, planner = server.parts()
    raw = await _read_body(request, server.max_body_bytes)
    asked = await asyncio.to_thread(lambda: read_request(url, parse_json(raw), planner, server.model_name))
    body, job, form = asked.body, asked.job, asked.form
    run = Run(service, job, server.metrics, arrived=arrived, timeout_s=server.timeout_s)
    answer = Answer(form, server.model_name)
    if body.stream:
        with_usage = body.stream_options is not None and body.stream_options.include_usage
        return _EventStream(run, _events(run, job, form, answer, with_usage=with_usage), server.timeout_s)
    with run:
        choices = await while_connected(_whole(run, job, form), request.receive, server.timeout_s)
    return JSONResponse(answer.whole(choices, usage(job.prompts, run.n_generated)))


async def _read_body(request: Request, max_bytes: int) -> bytes:
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise ApiError(f"the header Content-Type must be application/json, got {quote(kind)}", status=415)

    async def read() -> bytes:
        body = bytearray()
        async for chunk in request.stream():
            body += chunk
            if len(body) > max_bytes:
                raise ApiError(
                    f"the body must have at most {max_bytes} bytes", status=413, headers={"Connection": "close"}
                )
        return bytes(body)

    try:
        return await asyncio.wait_for(read(), _BODY_S)
    except asyncio.TimeoutError:
        raise ApiError(f"the body must come within {_BODY_S:g} seconds", status=408) from None


async def _whole(run: Run, job: Job, form: Format) -> list[dict[str, Any]]:
    """The choices, once all are complete."""
    pieces: list[list[Piece]] = [[] for _ in range(job.n_choices)]
    async for piece in run.pieces():
        pieces[piece.choice].append(piece)
    return [form.whole(i, of_choice) for i, of_choice in enumerate(pieces)]


async def _events(run: Run, job: Job, form: Format, answer: Answer, *, with_usage: bool) -> AsyncIterator[bytes]:
    """The server-sent events of a streamed answer."""
    for i in range(job.n_choices):
        if first := form.first_chunk(i):
            yield event(answer.chunk([first], None, with_usage=with_usage))
    try:
        async for piece in run.pieces():
            for choice in form.chunks(piece):
                yield event(answer.chunk([choice], None, with_usage=with_usage))
    except ApiError as error:
        yield event(error.body())
        return
    if with_usage:
        yield event(answer.chunk([], usage(job.prompts, run.n_generated), with_usage=True))
    yield b"data: [DONE]\n\n"


class _EventStream(Response):
    """Sends events as they come, until the client leaves."""

    media_type = "text/event-stream"

    def __init__(self, run: Run, events: AsyncIterator[bytes], timeout_s: float) -> None:
        self.status_code = 200
        self.background = None
        self._run = run
        self._events = events
        self._timeout_s = timeout_s
        self.init_headers({"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with self._run, suppress(ClientLeftError):
            await while_connected(self._send(send), receive, self._timeout_s)

    async def _send(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        async for chunk in self._events:
            await send({"type": "http.response.body", "body": chunk, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})


class _CountRequests:
    """Counts the requests by path and status."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self._app = app
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        status, is_complete = _LEFT, False

        async def watch(message: Message) -> None:
            nonlocal status, is_complete
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)
            is_complete = message["type"] == "http.response.body" and not message.get("more_body")

        try:
            await self._app(scope, receive, watch)
        finally:
            path = getattr(scope.get("route"), "path", "other")
            self._metrics.requests.labels(path, str(status if is_complete else _LEFT)).inc()


async def _answer_error(request: Request, error: Exception) -> Response:
    """The response for an error, in OpenAI's form."""
    if isinstance(error, (ClientLeftError, ClientDisconnect)):
        return Response(status_code=_LEFT)
    if isinstance(error, HTTPException):
        error = ApiError(
            f"{request.method} {printable(request.url.path)}: {printable(error.detail)}",
            status=error.status_code,
            headers=error.headers,
        )
    if not isinstance(error, ApiError):
        error = ApiError("the server failed to answer; its log says why", status=500)
    return JSONResponse(error.body(), error.status, headers=error.headers)
