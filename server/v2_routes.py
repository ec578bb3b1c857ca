"""The V2 protocol's routes beside infer: server, health, models. Bodies as the protocol has them."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from engines.base import TensorSpec
from server import __version__
from server.core import Core
from server.model import Model
from server.problems import Problem
from server.reply import JSON

# Only what works.
EXTENSIONS = ["binary_tensor_data"]


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

    async def infer(request: Request) -> Response:
        raise AssertionError(f"InferRoutes serves {find(core, request).name}")

    return [
        Route("/v2", _problems(server), methods=["GET"]),
        Route("/v2/health/live", _problems(live), methods=["GET"]),
        Route("/v2/health/ready", _problems(ready), methods=["GET"]),
        Route("/v2/models/{name}", _problems(model), methods=["GET"]),
        Route("/v2/models/{name}/ready", _problems(model_ready), methods=["GET"]),
        Route("/v2/models/{name}/infer", _problems(infer), methods=["POST"]),
    ]


def json(value: object, status: int = 200) -> Response:
    """A JSON response."""
    return Response(msgspec.json.encode(value), status, media_type=JSON.decode())


def find(core: Core, request: Request) -> Model:
    """The model that the path names, or a Problem."""
    name = request.path_params["name"]
    model = core.models.get(name)
    if model is None:
        raise Problem("unknown-model", f"there is no model {name!r}", model=name, models=list(core.models))
    return model


def loaded(model: Model) -> Model:
    """The model, if it is loaded; else the Problem that says why not."""
    if model.batcher is None:
        problem = model.refusal()
        assert problem is not None
        raise problem
    return model


def metadata(model: Model) -> dict[str, object]:
    """The protocol's model metadata; the batch axis is the first, -1 where it may vary."""
    engine = model.engine_worker.engine
    return {
        "name": model.name,
        "platform": engine.platform,
        "inputs": [_tensor(spec) for spec in engine.signature.inputs],
        "outputs": [_tensor(spec) for spec in engine.signature.outputs],
    }


def _tensor(spec: TensorSpec) -> dict[str, object]:
    return {"name": spec.name, "datatype": spec.datatype, "shape": [-1, *spec.shape]}


Endpoint = Callable[[Request], Awaitable[Response]]


def _problems(endpoint: Endpoint) -> Endpoint:
    """Answer a Problem that the endpoint raises."""

    async def answer(request: Request) -> Response:
        try:
            return await endpoint(request)
        except Problem as problem:
            reply = problem.reply()
            response = Response(b"".join(reply.body), reply.status)
            response.raw_headers = reply.header_list()
            return response

    return answer
