"""The V2 protocol's routes beside infer: server, health, models. Bodies as the protocol has them."""

from __future__ import annotations

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from cobatch import __version__
from cobatch.server.api.routing import Endpoint, Needs, find, guarded, json, loaded
from cobatch.server.api.v2_describe import config, index_entry, metadata, statistics
from cobatch.server.http.problem import Problem
from cobatch.server.inference.service import Core

# Only what works.
EXTENSIONS = ["binary_tensor_data", "model_configuration", "model_repository", "parameters", "statistics"]


def v2_routes(core: Core) -> list[Route]:
    """All of them, for Starlette. Infer stands here for its 404 and 405; `InferRoutes` serves it."""

    async def server(_: Request) -> Response:
        return json({"name": "cobatch", "version": __version__, "extensions": EXTENSIONS})

    async def live(_: Request) -> Response:
        dead = [name for name, model in core.models.items() if model.dead]
        return json({"live": not dead} | ({"dead_models": dead} if dead else {}), 503 if dead else 200)

    async def ready(_: Request) -> Response:
        return json({"ready": core.ready}, 200 if core.ready else 503)

    async def model(request: Request) -> Response:
        return json(metadata(loaded(find(core, request))))

    async def model_ready(request: Request) -> Response:
        found = find(core, request)
        is_ready = found.ready and not core.draining
        return json({"name": found.name, "ready": is_ready}, 200 if is_ready else 503)

    async def model_config(request: Request) -> Response:
        return json(config(loaded(find(core, request))))

    async def model_stats(request: Request) -> Response:
        return json({"model_stats": [statistics(loaded(find(core, request)))]})

    async def all_stats(_: Request) -> Response:
        return json({"model_stats": [statistics(m) for m in core.models.values() if m.batcher is not None]})

    async def index(_: Request) -> Response:
        return json([index_entry(model) for model in core.models.values()])

    async def infer(request: Request) -> Response:
        # `InferRoutes` serves those that exist.
        find(core, request)
        raise Problem("not-found", f"there is nothing at {request.url.path!r}")

    def of_model(path: str, needs: Needs, endpoint: Endpoint, method: str) -> list[Route]:
        bases = ("/v2/models/{name}", "/v2/models/{name}/versions/{version}")
        return [Route(base + path, guarded(core, needs, endpoint), methods=[method]) for base in bases]

    return [
        Route("/v2", guarded(core, "known", server), methods=["GET"]),
        # How the protocol's OpenAPI document spells it.
        Route("/v2/", guarded(core, "known", server), methods=["GET"]),
        Route("/v2/health/live", guarded(core, "open", live), methods=["GET"]),
        Route("/v2/health/ready", guarded(core, "open", ready), methods=["GET"]),
        Route("/v2/models/stats", guarded(core, "admin", all_stats), methods=["GET"]),
        Route("/v2/repository/index", guarded(core, "admin", index), methods=["POST"]),
        *of_model("", "read", model, "GET"),
        *of_model("/ready", "open", model_ready, "GET"),
        *of_model("/config", "read", model_config, "GET"),
        *of_model("/stats", "admin", model_stats, "GET"),
        *of_model("/infer", "infer", infer, "POST"),
    ]
