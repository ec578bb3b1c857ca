"""GET /openapi.json and GET /docs: the description of the API for programs and for people."""

from functools import lru_cache

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

    @lru_cache(maxsize=1)
    def replies(_loaded: tuple[str, ...]) -> dict[str, Reply]:
        """Return both replies by path. They change when another model or pipeline is loaded."""
        document = msgspec.json.encode(describe(inference))
        page = render(msgspec.json.decode(document)).encode()
        return {
            "/openapi.json": Reply(200, JSON, (document,)),
            "/docs": Reply(200, _HTML, (page,), headers=HEADERS),
        }

    def route(path: str) -> Route:
        async def endpoint(request: Request) -> Response:
            targets = {**inference.models, **inference.pipelines}
            loaded = tuple(name for name, target in targets.items() if target.batcher is not None)
            return await compressed_response(inference, request, replies(loaded)[path])

        return Route(path, guarded(inference, "metadata", endpoint), methods=["GET"])

    return [route("/openapi.json"), route("/docs")]
