"""What all Starlette routes share: JSON responses, finding the model, answering Problems."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from server.core import Core
from server.model import Model
from server.problems import Problem
from server.reply import JSON, Reply

Endpoint = Callable[[Request], Awaitable[Response]]


def json(value: object, status: int = 200) -> Response:
    """A JSON response."""
    return Response(msgspec.json.encode(value), status, media_type=JSON.decode())


def find(core: Core, request: Request) -> Model:
    """The model that the path names, and its version if the path names one, or a Problem."""
    name = request.path_params["name"]
    model = core.models.get(name)
    if model is None:
        raise Problem("unknown-model", f"there is no model {name!r}", model=name, models=list(core.models))
    version = request.path_params.get("version", model.version)
    if version != model.version:
        detail = f"model {name!r} has no version {version!r}; it has {model.version!r}"
        raise Problem("unknown-version", detail, model=name, version=version, versions=[model.version])
    return model


def loaded(model: Model) -> Model:
    """The model, if it is loaded; else the Problem that says why not."""
    if model.batcher is None:
        problem = model.refusal()
        assert problem is not None
        raise problem
    return model


def problems_answered(endpoint: Endpoint) -> Endpoint:
    """Answer a Problem that the endpoint raises."""

    async def answer(request: Request) -> Response:
        try:
            return await endpoint(request)
        except Problem as problem:
            return as_response(problem.reply(instance=request.url.path))

    return answer


def as_response(reply: Reply) -> Response:
    """A reply for Starlette."""
    response = Response(b"".join(reply.body), reply.status)
    response.raw_headers = reply.header_list()
    return response
