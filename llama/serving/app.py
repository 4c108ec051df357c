"""The HTTP routes: OpenAI's API, health, metrics, and the chat page."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles
from starlette.types import Receive, Scope, Send

from llama import __version__
from llama.errors import printable, quote
from llama.serving import endpoints
from llama.serving.access import LEFT, Guard, Observe, check_key, error_response
from llama.serving.errors import ApiError, BusyError
from llama.serving.formats import CompletionAnswer
from llama.serving.jobs import Planner
from llama.serving.metrics import CONTENT_TYPE, Metrics
from llama.serving.protocol import Unknown, check_model, parse_json
from llama.serving.responses import ResponseAnswer
from llama.serving.run import ClientLeftError, Run
from llama.serving.service import Service
from llama.serving.settings import ServerSettings, api_keys, names_in

_BODY_S = 30.0  # in which a client has to send its body
_SMALL_BODY = 2**16  # bytes; what a body has beyond them counts towards the sum of all
_OPEN_BODIES = 16  # that may have their maximum size at the same time
_MOST_IGNORED = 1000  # names of ignored fields that are remembered
_PAGE_HEADERS = {
    # Trusted types: only the sanitizer may make HTML of text.
    "Content-Security-Policy": "default-src 'none'; connect-src 'self'; img-src data:; script-src 'self'; "
    "style-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
    "require-trusted-types-for 'script'; trusted-types dompurify",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",  # asks with the ETag whether the file has changed
}
Endpoint: TypeAlias = Callable[[Request], Awaitable[Response]]

logger = logging.getLogger(__name__)


@dataclass
class Server:
    """The state that the routes share. For the event loop's thread alone, except `ready` and `error`."""

    model_name: str  # in requests and answers
    settings: ServerSettings = field(default_factory=ServerSettings)
    api_keys: Sequence[str] = ()  # of which clients must send one; none to need no key
    allowed_hosts: Collection[str] | None = None  # names that the header Host may have; None for all
    max_body_bytes: int = 0  # set by `ready`
    n_body_bytes: int = 0  # of large bodies that are being read or checked
    ignored: set[str] = field(default_factory=set)  # names of fields that were logged
    metrics: Metrics = field(default_factory=Metrics)
    created: int = field(default_factory=lambda: int(time.time()))
    service: Service | None = None  # None, like `planner`, until the network is loaded
    planner: Planner | None = None
    error: BaseException | None = None  # why the network can no longer be used

    @classmethod
    def of(cls, settings: ServerSettings, ckpt_dir: str) -> Server:
        """The server of a checkpoint."""
        keys = api_keys(settings.api_key, settings.api_key_file)
        return cls(settings.model_name or Path(ckpt_dir).resolve().name, settings, keys)

    def ready(self, service: Service, fingerprint: str | None = None) -> None:
        """Starts to accept requests. The fingerprint identifies the network in answers."""
        params = service.llama.model.params
        self.planner = Planner(
            service.llama,
            service.max_waiting + params.max_batch_size,
            self.model_name,
            fingerprint,
            speculative=self.settings.speculative,
        )
        needed = max(2**20, 16 * params.max_seq_len * params.max_batch_size)
        self.max_body_bytes = self.settings.max_body_bytes or needed
        self.metrics.service = self.service = service

    @property
    def failure(self) -> BaseException | None:
        return self.error or (self.service.error if self.service else None)

    def parts(self) -> tuple[Service, Planner]:
        """Raises ApiError unless requests can be served."""
        if self.failure is not None:
            raise ApiError(f"the server has failed: {printable(self.failure)}", status=503, code="failed")
        if self.service is None or self.planner is None:
            raise BusyError("the network is being loaded", "loading")
        return self.service, self.planner


def make_app(server: Server) -> Starlette:
    """The application, for an ASGI server such as uvicorn."""
    routes = _routes(server)
    settings, origins = server.settings, names_in(server.settings.allowed_origins)
    log = settings.log_format if settings.log_requests else None
    hosts = None if server.allowed_hosts is None else {host.lower() for host in server.allowed_hosts}
    middleware = [
        Middleware(Observe, metrics=server.metrics, log=log, paths={route.path for route in routes}),
        Middleware(Guard, hosts=hosts, origins=origins),
    ]
    if origins:
        cors = Middleware(
            CORSMiddleware,
            allow_origins=origins,
            allow_methods=["GET", "POST"],
            allow_headers=["*"],
            expose_headers=["x-request-id", "x-ignored-fields", "retry-after"],
        )
        middleware.append(cors)
    kinds = (ApiError, HTTPException, ClientDisconnect, ClientLeftError, asyncio.TimeoutError, Exception)
    app = Starlette(routes=routes, middleware=middleware, exception_handlers=dict.fromkeys(kinds, _answer_error))
    app.router.redirect_slashes = False
    return app


class _Page(StaticFiles):
    """The chat page's files, with a policy that lets the browser load and run nothing else."""

    def file_response(self, *args: Any, **kwargs: Any) -> Response:
        response = super().file_response(*args, **kwargs)
        response.headers.update(_PAGE_HEADERS)
        return response


def _routes(server: Server) -> list[Route | Mount]:
    files = _Page(directory=Path(__file__).with_name("static"), follow_symlink=True)  # installers may link them

    async def page(request: Request) -> Response:
        return await files.get_response("chat.html", request.scope)

    async def health(request: Request) -> Response:
        server.parts()
        return JSONResponse({"status": "ok"})

    async def version(request: Request) -> Response:
        return JSONResponse({"version": __version__})

    async def openapi(request: Request) -> Response:
        return JSONResponse(endpoints.describe(ignores_unknown=server.settings.unknown_fields == "ignore"))

    async def metrics(request: Request) -> Response:
        return Response(server.metrics.text(), media_type=CONTENT_TYPE)

    def describe_model() -> dict[str, Any]:
        context = server.planner.max_seq_len if server.planner else None
        model = {"id": server.model_name, "object": "model", "created": server.created, "owned_by": "local"}
        return model | {"max_model_len": context}

    async def models(request: Request) -> Response:
        return JSONResponse({"object": "list", "data": [describe_model()]})

    async def model(request: Request) -> Response:
        check_model(request.path_params["name"], server.model_name)
        return JSONResponse(describe_model())

    async def info(request: Request) -> Response:
        return JSONResponse(endpoints.tokenizer_info(server.parts()[1]))

    def with_key(endpoint: Endpoint) -> Endpoint:
        async def check_first(request: Request) -> Response:
            check_key(request.headers, server.api_keys)
            return await endpoint(request)

        return check_first

    no_key = {"/": page, "/health": health, "/version": version, "/openapi.json": openapi}
    gets = {"/metrics": metrics, "/v1/models": models, "/v1/models/{name:path}": model, "/tokenizer_info": info}
    completing = (endpoints.CHAT_URL, endpoints.COMPLETIONS_URL, endpoints.RESPONSES_URL)
    posts = {url: partial(_complete, server, url) for url in completing}
    converting = {"/tokenize": endpoints.tokenize, "/detokenize": endpoints.detokenize}
    posts |= {url: partial(_convert, server, convert) for url, convert in converting.items()}
    return [
        Mount("/static", files),
        Route("/ping", health, methods=["GET", "POST"]),
        *(Route(path, endpoint) for path, endpoint in no_key.items()),
        *(Route(path, with_key(endpoint)) for path, endpoint in gets.items()),
        *(Route(path, with_key(endpoint), methods=["POST"]) for path, endpoint in posts.items()),
    ]


async def _convert(server: Server, convert: Callable[..., dict[str, Any]], request: Request) -> Response:
    """Answers a request that takes no part of the network."""
    _, planner = server.parts()
    async with _body_of(server, request) as raw:
        answer = await asyncio.to_thread(lambda: convert(parse_json(raw), planner))
    return JSONResponse(answer)


async def _complete(server: Server, url: str, request: Request) -> Response:
    """Answers a request for completions, as a whole or as a stream."""
    arrived = time.perf_counter()
    service, planner = server.parts()
    unknown = Unknown(ignore=server.settings.unknown_fields == "ignore")
    async with _body_of(server, request) as raw:
        asked = await asyncio.to_thread(lambda: endpoints.read_request(url, parse_json(raw), planner, unknown))
    request.state.counts = counts = asked.answer.counts
    run = Run(service, asked.job, counts, server.metrics, arrived=arrived, timeout_s=server.settings.timeout_s)
    headers = _note_ignored(server, unknown.ignored)
    if asked.is_stream:
        return _EventStream(run, asked.answer, headers)
    pieces = await run.until_left(run.all_pieces(), request.receive)
    return JSONResponse(asked.answer.whole(pieces), headers=headers)


def _note_ignored(server: Server, names: Sequence[str]) -> dict[str, str]:
    """Logs the names of ignored fields, each once; returns the header that lists them."""
    for name in names:
        if name not in server.ignored and len(server.ignored) < _MOST_IGNORED:
            server.ignored.add(name)
            logger.warning("the field %s is not supported, and ignored", name)
    shown = ", ".join(name.encode("ascii", "backslashreplace").decode() for name in names[:20])
    return {"X-Ignored-Fields": shown} if names else {}


@asynccontextmanager
async def _body_of(server: Server, request: Request) -> AsyncIterator[bytes]:
    """A request's body. Until the context ends, it counts towards the sum of all bodies in memory."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise ApiError(f"the header Content-Type must be application/json, got {quote(kind)}", status=415)
    if (encoding := request.headers.get("content-encoding", "identity")).lower() != "identity":
        raise ApiError(f"the body must not be compressed, got Content-Encoding {quote(encoding)}", status=415)
    _check_size(server, int(request.headers.get("content-length", "0")))  # before anything of it is read
    body = bytearray()
    try:
        await asyncio.wait_for(_read_into(body, server, request), _BODY_S)
        yield bytes(body)
    finally:
        server.n_body_bytes -= _counted(body)


async def _read_into(body: bytearray, server: Server, request: Request) -> None:
    async for chunk in request.stream():
        before = _counted(body)
        body += chunk
        server.n_body_bytes += _counted(body) - before
        _check_size(server, len(body))
        if _counted(body) > before and server.n_body_bytes > _OPEN_BODIES * server.max_body_bytes:
            message = "the bodies of other requests take all of the memory for them; try again later"
            raise BusyError(message, "bodies_full", {"Connection": "close"})


def _counted(body: bytearray) -> int:
    return max(0, len(body) - _SMALL_BODY)


def _check_size(server: Server, n_bytes: int) -> None:
    if n_bytes > server.max_body_bytes:
        message = f"the body must have at most {server.max_body_bytes} bytes"
        raise ApiError(message, status=413, headers={"Connection": "close"})


class _EventStream(StreamingResponse):
    """Sends an answer's events as they come, until the client leaves."""

    media_type = "text/event-stream"

    def __init__(self, run: Run, answer: CompletionAnswer | ResponseAnswer, headers: dict[str, str]) -> None:
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no", **headers}
        super().__init__(_events(run, answer), headers=headers)
        self._run = run

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with suppress(ClientLeftError):
            await self._run.until_left(self.stream_response(send), receive)


async def _events(run: Run, answer: CompletionAnswer | ResponseAnswer) -> AsyncIterator[bytes]:
    for event in answer.start():
        yield event
    try:
        async for piece in run.pieces():
            for event in answer.events(piece):
                yield event
    except ApiError as error:
        yield answer.failed(error)
        return
    for event in answer.end():
        yield event


async def _answer_error(request: Request, error: Exception) -> Response:
    """The response for an error, in OpenAI's form."""
    if isinstance(error, (ClientLeftError, ClientDisconnect)):
        return Response(status_code=LEFT)
    if isinstance(error, asyncio.TimeoutError):
        error = ApiError(f"the body must come within {_BODY_S:g} seconds", status=408)
    if isinstance(error, HTTPException):
        error = ApiError(
            f"{request.method} {printable(request.url.path)}: {printable(error.detail)}",
            status=error.status_code,
            headers=error.headers,
        )
    if not isinstance(error, ApiError):
        error = ApiError("the server failed to answer; its log says why", status=500)
    return error_response(error)
