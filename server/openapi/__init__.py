"""GET /openapi.json and GET /docs: the API described for programs and for people.

The document is made anew when another model has been loaded: its examples are rows of the models that
are served, so that each of them really runs.
"""

from __future__ import annotations

from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from cobatch import __version__
from cobatch.server.api.routing import as_response, guarded
from cobatch.server.http.compression import compressed
from cobatch.server.http.reply import JSON, Reply
from cobatch.server.inference.service import Inference
from cobatch.server.openapi.document import (
    HEADERS,
    OF_AUTH,
    Described,
    access_paths,
    complete,
    headers,
    problem_examples,
    security_schemes,
)
from cobatch.server.openapi.live import dashboard_paths, metrics_paths
from cobatch.server.openapi.native import ABOUT, BATCH, V1, about_paths, batch_path, native_paths
from cobatch.server.openapi.page import HEADERS as PAGE_HEADERS
from cobatch.server.openapi.page import render
from cobatch.server.openapi.schemas import schemas
from cobatch.server.openapi.seeing import seeing_paths
from cobatch.server.openapi.v2 import V2, v2_paths

_HTML = b"text/html; charset=utf-8"
_ABOUT = (
    "An inference server that turns many concurrent callers into one batch. Whatever goes wrong is answered "
    "with `application/problem+json`; its `type` leads to a page that says what to do. Methods that a path "
    "does not list are answered with 405 and the header `Allow`; HEAD goes wherever GET does. Each answer "
    "has `X-Request-Id`, the caller's where he sent one."
)
_TAGS = {
    V2: "What clients of Triton and KServe speak: tensors in JSON or as binary.",
    V1: "The native resource: named inputs in, one object out, now or later.",
    BATCH: "Many requests in one call.",
    ABOUT: "What the server says of itself.",
}


def openapi_routes(core: Inference) -> list[Route]:
    """Both routes, for Starlette."""
    made = _Made(core)

    async def document(request: Request) -> Response:
        return await _send(request, core, Reply(200, JSON, (made.document(),)))

    async def page(request: Request) -> Response:
        return await _send(request, core, Reply(200, _HTML, (made.page(),), headers=PAGE_HEADERS))

    return [
        Route("/openapi.json", guarded(core, "metadata", document), methods=["GET"]),
        Route("/docs", guarded(core, "metadata", page), methods=["GET"]),
    ]


def describe(core: Inference) -> dict[str, Any]:
    """The OpenAPI document, with what the models that are loaded by now take."""
    models = Described(core)
    auth = core.auth
    paths = v2_paths(models) | native_paths(models) | batch_path(models) | about_paths()
    paths |= access_paths(auth, ABOUT) | dashboard_paths() | metrics_paths() | seeing_paths()
    for operations in paths.values():
        for described in operations.values():
            complete(described, auth)
    components: dict[str, Any] = {
        "schemas": schemas(models.signatures, models.required),
        "headers": HEADERS | headers(auth),
        "examples": problem_examples(left_out=OF_AUTH if auth is None else ()),
    }
    if auth is not None:
        components["securitySchemes"] = security_schemes(auth)
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "cobatch",
            "version": __version__,
            "description": _ABOUT,
            "license": {"name": "Apache-2.0", "identifier": "Apache-2.0"},
        },
        "tags": [{"name": name, "description": text} for name, text in _TAGS.items()],
        "paths": paths,
        "components": components,
    }


class _Made:
    """The document and the page, kept until another model is loaded."""

    def __init__(self, core: Inference) -> None:
        self._core = core
        self._loaded: list[str] | None = None
        self._document = b""
        self._page: bytes | None = None

    def document(self) -> bytes:
        """As JSON."""
        loaded = [name for name, model in self._core.models.items() if model.batcher is not None]
        if loaded != self._loaded:
            self._document = msgspec.json.encode(describe(self._core))
            self._page = None
            self._loaded = loaded
        return self._document

    def page(self) -> bytes:
        """As HTML."""
        document = self.document()
        if self._page is None:
            self._page = render(msgspec.json.decode(document)).encode()
        return self._page


async def _send(request: Request, core: Inference, reply: Reply) -> Response:
    accept = request.headers.get("accept-encoding", "").encode("latin-1")
    return as_response(await compressed(reply, accept, core.settings.server.compress_min_bytes))
