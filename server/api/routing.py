"""Parts of all Starlette routes: permissions, Problems as responses, JSON, compression, models of paths."""

from collections.abc import Awaitable, Callable
from typing import Literal

import msgspec
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from cobatch.server.auth.principal import Principal, principal_in
from cobatch.server.http.asgi import note_problem, send_body
from cobatch.server.http.compression import compressed
from cobatch.server.http.problem import Problem
from cobatch.server.http.reply import JSON, Reply
from cobatch.server.inference.model import Model
from cobatch.server.inference.served import ServedPipeline
from cobatch.server.inference.service import Inference
from cobatch.server.settings.auth import INFER, METADATA

Endpoint = Callable[[Request], Awaitable[Response]]
# The demand of a route, where authentication is on. `open`: nothing (`server.auth.gate.OPEN` agrees).
# `known`: credentials, no permission. `read`, `infer`: the right to do so with the model in the path.
# `metadata`, `admin`: that permission.
Needs = Literal["open", "known", "read", "infer", "metadata", "admin"]


def json(value: object, status: int = 200) -> Response:
    """Return a JSON response."""
    return Response(msgspec.json.encode(value), status, media_type=JSON.decode())


def find(inference: Inference, request: Request) -> Model:
    """Return the model in the path. Raises Problem if it, or the version in the path, does not exist."""
    path = request.path_params
    return find_model(inference, principal_in(request.scope), path["name"], path.get("version"))


def find_target(inference: Inference, request: Request) -> Model | ServedPipeline:
    """Return the pipeline in the path, or else the model as `find` does."""
    target = inference.targets.get(request.path_params["name"])
    return find(inference, request) if target is None or isinstance(target, Model) else target


def find_model(inference: Inference, principal: Principal | None, name: str, version: str | None) -> Model:
    """Return the model with this name, and this version if not None. Raises Problem if there is none."""
    known = inference.auth is None or principal is not None
    model = inference.models.get(name)
    if model is None:
        models = [one for one in inference.models if principal is None or principal.may_read(one)]
        detail = f"there is no model {name!r}"
        pipeline = inference.pipelines.get(name)
        if pipeline is not None and (principal is None or principal.may_infer(name)) and known:
            detail = f"{name!r} is a pipeline: POST {pipeline.path}"
        raise Problem("unknown-model", detail, model=name, models=models if known else [])
    if version not in (None, model.version):
        detail = f"model {name!r} has no version {version!r}"
        if not known:
            raise Problem("unknown-version", detail, model=name)
        detail += f"; it has {model.version!r}"
        raise Problem("unknown-version", detail, model=name, version=version, versions=[model.version])
    return model


def loaded(model: Model) -> Model:
    """Return the model. Raises Problem if it is not loaded."""
    if model.batcher is None:
        raise model.unavailable()
    return model


def guarded(inference: Inference, needs: Needs, endpoint: Endpoint) -> Endpoint:
    """Return the endpoint with a check of permissions before it, and with Problems as responses."""

    async def answer(request: Request) -> Response:
        try:
            principal = principal_in(request.scope)
            if principal is not None:
                _check(inference, needs, principal, request.path_params.get("name", ""))
            return await endpoint(request)
        except ClientDisconnect:
            return Response()  # no client reads it
        except Problem as problem:
            name = request.path_params["name"] if needs == "infer" else ""
            target = inference.models.get(name) or inference.pipelines.get(name)
            if target is not None:
                target.traffic.count(problem.kind.status, problem.kind.slug, 0.0)
            return as_response(problem.reply(instance=request.url.path))

    return answer


def _check(inference: Inference, needs: Needs, principal: Principal, model: str) -> None:
    """Raise Problem if the client lacks the permission. Does not reveal whether the model exists."""
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
        raise inference.forbidden(missing, model if needs in ("read", "infer") else None)


class _ReplyResponse(Response):
    """A reply as Starlette's response."""

    def __init__(self, reply: Reply) -> None:
        super().__init__(status_code=reply.status)
        self.raw_headers = reply.header_list()
        self._reply = reply

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        note_problem(scope, self._reply.slug)
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        await send_body(self._reply, send)


def as_response(reply: Reply) -> Response:
    """Return a reply as Starlette's response."""
    return _ReplyResponse(reply)


async def compressed_response(inference: Inference, request: Request, reply: Reply) -> Response:
    """Return a reply as Starlette's response, compressed if it is large and the client accepts that."""
    accept = request.headers.get("accept-encoding", "").encode("latin-1")
    return as_response(await compressed(reply, accept, inference.settings.server.compress_min_bytes))
