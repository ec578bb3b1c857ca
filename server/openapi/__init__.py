"""GET /openapi.json and GET /docs: the description of the API for programs and for people."""

from __future__ import annotations

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from cobatch.server.api.routing import as_response, guarded
from cobatch.server.http.compression import compressed
from cobatch.server.http.reply import JSON, Reply
from cobatch.server.inference.service import Inference
from cobatch.server.openapi.document import describe
from cobatch.server.openapi.page import HEADERS, render

_HTML = b"text/html; charset=utf-8"


def openapi_routes(core: Inference) -> list[Route]:
    """Return both routes, for Starlette."""
    cache = _Cache(core)

    async def document(request: Request) -> Response:
        return await _send(request, core, Reply(200, JSON, (cache.document(),)))

    async def page(request: Request) -> Response:
        return await _send(request, core, Reply(200, _HTML, (cache.page(),), headers=HEADERS))

    return [
        Route("/openapi.json", guarded(core, "metadata", document), methods=["GET"]),
        Route("/docs", guarded(core, "metadata", page), methods=["GET"]),
    ]


class _Cache:
    """The document and the page, made again when another model is loaded: the examples use its rows."""

    def __init__(self, core: Inference) -> None:
        self._core = core
        self._loaded: list[str] | None = None
        self._document = b""
        self._page: bytes | None = None

    def document(self) -> bytes:
        """Return the document as JSON."""
        loaded = [name for name, model in self._core.models.items() if model.batcher is not None]
        if loaded != self._loaded:
            self._document = msgspec.json.encode(describe(self._core))
            self._page = None
            self._loaded = loaded
        return self._document

    def page(self) -> bytes:
        """Return the page as HTML."""
        document = self.document()
        if self._page is None:
            self._page = render(msgspec.json.decode(document)).encode()
        return self._page


async def _send(request: Request, core: Inference, reply: Reply) -> Response:
    accept = request.headers.get("accept-encoding", "").encode("latin-1")
    return as_response(await compressed(reply, accept, core.settings.server.compress_min_bytes))
