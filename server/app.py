"""The composition root: settings in, an ASGI application out, rooms joined."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp

from cobatch.engines.errors import EngineError
from cobatch.server.api.metrics import metrics_routes
from cobatch.server.api.oauth import auth_routes
from cobatch.server.api.problems import problem_pages
from cobatch.server.api.profile import profile_routes
from cobatch.server.api.routing import as_response
from cobatch.server.api.v2 import v2_routes
from cobatch.server.auth.gate import Gate
from cobatch.server.batch.routes import BATCH, BatchRoute, batch_routes
from cobatch.server.batch.spans import ItemsSeen
from cobatch.server.dashboard import dashboard_routes
from cobatch.server.dashboard.feed import Live
from cobatch.server.edge.asgi import InferRoutes
from cobatch.server.edge.observed import Observed
from cobatch.server.http.problem import Problem
from cobatch.server.inference.service import Inference
from cobatch.server.observability.gpu import Gpus
from cobatch.server.observability.history import explain_routes
from cobatch.server.openapi import openapi_routes
from cobatch.server.predictions.routes import v1_routes
from cobatch.server.settings.schema import Settings
from cobatch.server.watchers import Watchers

log = logging.getLogger("cobatch.server")


def create_app(settings: Settings) -> ASGIApp:
    """The whole server as one ASGI application; its lifespan loads the models and stops them."""
    return build(Inference(settings))


def build(core: Inference) -> ASGIApp:
    """The application around a core that the caller keeps."""
    watchers = Watchers(core)
    gpus = Gpus()
    live = Live(core, watchers.recent)
    core.on_draining.append(live.close)

    @contextlib.asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        core.loop = asyncio.get_running_loop()
        watchers.start()
        core.observer.lag.start(core.loop)
        await asyncio.to_thread(gpus.open)
        if core.auth is not None:
            await core.auth.start(core.tell_if_ready)
        # In the background: health must answer while a large model is being loaded.
        ticking = asyncio.create_task(live.run())
        loading = [asyncio.create_task(_load(core, name)) for name in core.models]
        try:
            yield
        finally:
            core.draining = True
            live.close()
            for task in (ticking, *loading):
                task.cancel()
            await asyncio.gather(ticking, *loading, return_exceptions=True)
            timeout_s = core.settings.server.drain_timeout_s
            await asyncio.gather(*[model.stop(timeout_s) for model in core.models.values()])
            if core.auth is not None:
                await core.auth.stop()
            await watchers.stop()
            core.observer.lag.stop()
            gpus.close()

    handlers = {HTTPException: _http_error, Exception: _server_error}
    routes = [*v2_routes(core), *batch_routes(), *v1_routes(core), *problem_pages(core)]
    routes += [*openapi_routes(core), *auth_routes(core), *metrics_routes(core, gpus)]
    routes += [*explain_routes(core, watchers.recent), *profile_routes(core), *dashboard_routes(core, live)]
    app = Starlette(routes=routes, exception_handlers=handlers, lifespan=lifespan)
    app.router.redirect_slashes = False
    # Inside the gate: the items of a batch go through `app` as the caller of the batch.
    routes_app = InferRoutes(
        app, core, {BATCH: BatchRoute(core, app, ItemsSeen(watchers.recent, watchers.tracing))}
    )
    if core.auth is not None:
        gate = Gate(routes_app, core.auth, open_metrics=core.settings.server.metrics_open)
        return Observed(gate, core)
    return Observed(routes_app, core)


async def _load(core: Inference, name: str) -> None:
    try:
        await core.models[name].load()
    except EngineError as error:
        core.on_load_failed(name, error)
    else:
        core.observer.watch(core.models[name])
        core.tell_if_ready()


async def _http_error(request: Request, error: Exception) -> Response:
    """What the router says, in our words."""
    assert isinstance(error, HTTPException)
    path = request.url.path
    if error.status_code == 405:
        allowed = sorted((error.headers or {}).get("Allow", "").split(", "))
        detail = f"{path} takes {', '.join(allowed)}, got {request.method}"
        return as_response(Problem("method-not-allowed", detail, allowed=allowed).reply(instance=path))
    return as_response(Problem("not-found", f"there is nothing at {path}").reply(instance=path))


async def _server_error(request: Request, error: Exception) -> Response:
    # Starlette logs the traceback through the server after this.
    problem = Problem("internal", "the server failed on this request; its log says why")
    return as_response(problem.reply(instance=request.url.path))
