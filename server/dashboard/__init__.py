"""GET /dashboard: the page for whoever watches a node, its files, and its feed.

The page and its files are open, since they show nothing and have to ask for a token; the feed needs the
permission `admin`.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route

from cobatch.server.api.routing import guarded
from cobatch.server.auth.principal import principal_in
from cobatch.server.dashboard.feed import Live
from cobatch.server.http.problem import Problem
from cobatch.server.inference.service import Inference

_FOLDER = Path(__file__).with_name("static")
_TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}
_PAGE = "index.html"
_EVENTS = "text/event-stream"
_HEADERS = {
    # Scripts, styles and the feed are this server's own, and nothing is written into the page as HTML.
    "content-security-policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'"
    ),
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    # A new version of the server has a new page, and it is not worth asking for more than a 304.
    "cache-control": "no-cache",
}


class _File:
    """One of the page's files, in memory."""

    def __init__(self, path: Path) -> None:
        self._body = path.read_bytes()
        self._type = _TYPES[path.suffix]
        self._headers = {**_HEADERS, "etag": f'"{hashlib.sha256(self._body).hexdigest()[:20]}"'}

    def answer(self, request: Request) -> Response:
        """The file, or 304 for who has it."""
        if request.headers.get("if-none-match") == self._headers["etag"]:
            return Response(status_code=304, headers=self._headers)
        return Response(self._body, media_type=self._type, headers=self._headers)


def dashboard_routes(core: Inference, live: Live) -> list[Route]:
    """The page, its files and its feed, for Starlette."""
    files = {path.name: _File(path) for path in sorted(_FOLDER.iterdir()) if path.suffix in _TYPES}

    async def page(request: Request) -> Response:
        return files[_PAGE].answer(request)

    async def file(request: Request) -> Response:
        name = request.path_params["file"]
        if name not in files:
            raise Problem("not-found", f"the dashboard has no file {name!r}")
        return files[name].answer(request)

    async def events(request: Request) -> Response:
        # What stands in between must not collect it.
        headers = {"cache-control": "no-store", "x-accel-buffering": "no"}
        if request.method == "HEAD":
            # It would wait for an end that does not come.
            return Response(media_type=_EVENTS, headers=headers)
        stream = live.stream(principal_in(request.scope))
        return StreamingResponse(stream, media_type=_EVENTS, headers=headers)

    return [
        Route("/dashboard", guarded(core, "open", page), methods=["GET"]),
        Route("/dashboard/static/{file}", guarded(core, "open", file), methods=["GET"]),
        Route("/dashboard/events", guarded(core, "admin", events), methods=["GET"]),
    ]
