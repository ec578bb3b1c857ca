"""GET /openapi.json and GET /docs: the description of the API for programs and for people."""

from __future__ import annotations

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from cobatch.server.api.routing import compressed_response, guarded
from cobatch.server.http.reply import JSON, Reply
from cobatch.server.inference.service import Inference
from cobatch.server.openapi.document import describe
from cobatch.server.openapi.page import HEADERS, render

_HTML = b"text/html; charset=utf-8"


def openapi_routes(inference: Inference) -> list[Route]:
    """Return both routes, for Starlette."""
    cache = _Cache(inference)

    async def document(request: Request) -> Response:
        return await compressed_response(inference, request, Reply(200, JSON, (cache.document(),)))

    async def page(request: Request) -> Response:
        return await compressed_response(
            inference, request, Reply(200, _HTML, (cache.page(),), headers=HEADERS)
        )

    return [
        Route("/openapi.json", guarded(inference, "metadata", document), methods=["GET"]),
        Route("/docs", guarded(inference, "metadata", page), methods=["GET"]),
    ]


class _Cache:
    """The document and the page, made again when another model is loaded: the examples use its rows."""

    def __init__(self, inference: Inference) -> None:
        self._inference = inference
        self._loaded: list[str] | None = None
        self._document = b""
        self._page: bytes | None = None

    def document(self) -> bytes:
        """Return the document as JSON."""
        loaded = [name for name, model in self._inference.models.items() if model.batcher is not None]
        if loaded != self._loaded:
            self._document = msgspec.json.encode(describe(self._inference))
            self._page = None
            self._loaded = loaded
        return self._document

    def page(self) -> bytes:
        """Return the page as HTML."""
        document = self.document()
        if self._page is None:
            self._page = render(msgspec.json.decode(document)).encode()
        return self._page
