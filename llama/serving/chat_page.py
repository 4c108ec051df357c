"""The chat page: its files, with a policy that lets the browser load and run nothing else."""

from __future__ import annotations

import hashlib
from collections.abc import Awaitable, Callable
from pathlib import Path

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

_TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript"}
_HEADERS = {
    # Trusted types: only the sanitizer may make HTML of text.
    "Content-Security-Policy": "default-src 'none'; connect-src 'self'; img-src data:; script-src 'self'; "
    "style-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
    "require-trusted-types-for 'script'; trusted-types dompurify",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",  # asks with the ETag whether the file has changed
}


def page_routes() -> list[Route]:
    """The routes of the page at `/` and of its scripts and styles below `/static/`. They need no key."""
    routes = []
    folder = Path(__file__).with_name("static")
    for file in folder.rglob("*"):
        if file.suffix in _TYPES:
            path = "/" if file.suffix == ".html" else f"/static/{file.relative_to(folder).as_posix()}"
            routes.append(Route(path, _file(file.read_bytes(), _TYPES[file.suffix])))
    return routes


def _file(content: bytes, media_type: str) -> Callable[[Request], Awaitable[Response]]:
    headers = _HEADERS | {"ETag": f'"{hashlib.sha256(content).hexdigest()[:32]}"'}

    async def answer(request: Request) -> Response:
        if request.headers.get("if-none-match") == headers["ETag"]:
            return Response(status_code=304, headers=headers)
        return Response(content, media_type=media_type, headers=headers)

    return answer
