"""What all Starlette routes share: permissions, JSON responses, finding the model, answering Problems."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Literal

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from cobatch.server.auth.principal import Principal, principal_in
from cobatch.server.http.problem import Problem
from cobatch.server.http.reply import JSON, Reply, note_problem
from cobatch.server.inference.model import Model
from cobatch.server.inference.service import Inference
from cobatch.server.settings.auth import INFER, METADATA

Endpoint = Callable[[Request], Awaitable[Response]]
# What a route asks of its caller where callers are known. `open`: nothing, the gate lets everybody through
# (`server.auth.gate.OPEN`). `known`: only that he is. `read` and `infer`: that he may do so with the model
# in the path. `metadata` and `admin`: that permission.
Needs = Literal["open", "known", "read", "infer", "metadata", "admin"]


def json(value: object, status: int = 200) -> Response:
    """A JSON response."""
    return Response(msgspec.json.encode(value), status, media_type=JSON.decode())


def find(core: Inference, request: Request) -> Model:
    """The model that the path names, and its version if the path names one. Raises Problem."""
    names = request.path_params
    return find_model(core, principal_in(request.scope), names["name"], names.get("version"))


def find_model(core: Inference, principal: Principal | None, name: str, version: str | None) -> Model:
    """The model with this name, and this version unless it is None. Raises Problem."""
    model = core.models.get(name)
    if model is None:
        models = _seen(core, principal)
        raise Problem("unknown-model", f"there is no model {name!r}", model=name, models=models)
    if version not in (None, model.version):
        detail = f"model {name!r} has no version {version!r}; it has {model.version!r}"
        if core.auth is not None and principal is None:
            raise Problem("unknown-version", f"model {name!r} has no version {version!r}", model=name)
        raise Problem("unknown-version", detail, model=name, version=version, versions=[model.version])
    return model


def _seen(core: Inference, principal: Principal | None) -> list[str]:
    """The models that the caller may know of."""
    if core.auth is None:
        return list(core.models)
    return [name for name in core.models if principal is not None and principal.may_read(name)]


def loaded(model: Model) -> Model:
    """The model, if it is loaded; else the Problem that says why not."""
    if model.batcher is None:
        problem = model.refusal()
        assert problem is not None
        raise problem
    return model


def guarded(core: Inference, needs: Needs, endpoint: Endpoint) -> Endpoint:
    """The endpoint for callers who may use it; a Problem that it raises is answered."""

    async def answer(request: Request) -> Response:
        try:
            principal = principal_in(request.scope)
            if principal is not None:
                _check(core, needs, principal, request.path_params.get("name", ""))
            return await endpoint(request)
        except Problem as problem:
            model = core.models.get(request.path_params["name"]) if needs == "infer" else None
            if model is not None:
                model.traffic.count(problem.kind.status, problem.kind.slug, 0.0)
            return as_response(problem.reply(instance=request.url.path))

    return answer


def _check(core: Inference, needs: Needs, principal: Principal, model: str) -> None:
    """Raises Problem where the caller may not. Whether the model exists is not said before that."""
    match needs:
        case "open" | "known":
            return
        case "read":
            missing = None if principal.may_read(model) else METADATA
        case "infer":
            missing = None if principal.may_infer(model) else INFER
        case _:
            missing = None if needs in principal.permissions else needs
    if missing is not None:
        raise core.forbidden(missing, model if needs in ("read", "infer") else None)


class _ReplyResponse(Response):
    slug = ""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        note_problem(scope, self.slug)
        await super().__call__(scope, receive, send)


def as_response(reply: Reply) -> Response:
    """A reply for Starlette."""
    response = _ReplyResponse(b"".join(reply.body), reply.status)
    response.raw_headers = reply.header_list()
    response.slug = reply.slug
    return response
