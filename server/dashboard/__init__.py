"""GET /dashboard: the live page, its files and its feed.

The page and its files need no credentials, because they show no data and have to ask for a token. The feed
needs the permission `admin`.
"""

import hashlib
from pathlib import Path

from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route

from cobatch.server.api.routing import guarded
from cobatch.server.auth.principal import principal_in
from cobatch.server.dashboard.feed import Feed
from cobatch.server.http.problem import Problem
from cobatch.server.inference.service import Inference

_FOLDER = Path(__file__).with_name("static")
_TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}
_EVENTS = "text/event-stream"
_HEADERS = {
    # Scripts, styles and data come from this server only, and no script writes HTML.
    "content-security-policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'"
    ),
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    # Browsers ask each time, and get 304 until the server is upgraded.
    "cache-control": "no-cache",
}


def dashboard_routes(inference: Inference, feed: Feed) -> list[Route]:
    """Return page, files and feed, for Starlette."""
    files = {path.name: path.read_bytes() for path in _FOLDER.iterdir() if path.suffix in _TYPES}
    etags = {name: f'"{hashlib.sha256(body).hexdigest()[:20]}"' for name, body in files.items()}

    async def file(request: Request) -> Response:
        name = request.path_params.get("file", "index.html")
        if name not in files:
            raise Problem("not-found", f"the dashboard has no file {name!r}")
        headers = {**_HEADERS, "etag": etags[name]}
        if request.headers.get("if-none-match") == etags[name]:
            return Response(status_code=304, headers=headers)
        return Response(files[name], media_type=_TYPES[Path(name).suffix], headers=headers)

    async def events(request: Request) -> Response:
        # Proxies must not buffer the events.
        headers = {"cache-control": "no-store", "x-accel-buffering": "no"}
        if request.method == "HEAD":
            return Response(media_type=_EVENTS, headers=headers)  # the stream itself would never end
        stream = feed.stream(principal_in(request.scope))
        return StreamingResponse(stream, media_type=_EVENTS, headers=headers)

    return [
        Route("/dashboard", guarded(inference, "open", file), methods=["GET"]),
        Route("/dashboard/static/{file}", guarded(inference, "open", file), methods=["GET"]),
        Route("/dashboard/events", guarded(inference, "admin", events), methods=["GET"]),
    ]
