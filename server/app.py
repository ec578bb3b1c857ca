"""The composition root: settings in, an ASGI application out."""

import asyncio
import contextlib
import importlib.util
from collections.abc import AsyncIterator, Sequence
from typing import NamedTuple

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp

from cobatch.engines.errors import EngineError
from cobatch.server.api.metrics import metrics_routes
from cobatch.server.api.oauth import auth_routes
from cobatch.server.api.pages import page_routes
from cobatch.server.api.profile import profile_routes
from cobatch.server.api.requests import request_routes
from cobatch.server.api.routing import as_response
from cobatch.server.api.v2 import v2_routes
from cobatch.server.auth.gate import Gate
from cobatch.server.batch.routes import BATCH, BatchRoute
from cobatch.server.dashboard import dashboard_routes
from cobatch.server.dashboard.feed import Feed
from cobatch.server.edge.asgi import InferRoutes, ObservingMiddleware
from cobatch.server.http.problem import Problem, internal
from cobatch.server.inference.model import Model
from cobatch.server.inference.served import ServedPipeline
from cobatch.server.inference.service import Inference
from cobatch.server.observability.access_log import LEVELS, AccessLog
from cobatch.server.observability.gpu import Gpus
from cobatch.server.observability.history import History
from cobatch.server.observability.observer import Tracer
from cobatch.server.openapi import openapi_routes
from cobatch.server.predictions.routes import v1_routes
from cobatch.server.settings.schema import ServerSettings, Settings
from cobatch.server.settings.values import SettingsError


def create_app(settings: Settings) -> ASGIApp:
    """Return the whole server as one ASGI application; its lifespan loads the models and stops them."""
    return build(Inference(settings))


def build(inference: Inference) -> ASGIApp:
    """Return the application around an `Inference`. Raises SettingsError if a library is missing."""
    settings, observer = inference.settings.server, inference.observer
    history = History(len(inference.settings.names))
    observer.on_request(history.on_request)
    observer.keep = history.on_request
    observer.on_batch(history.on_batch)
    sinks = make_sinks(inference)
    pipeline_routes = _pipeline_routes(inference)
    for kind, targets in (("models", inference.settings.models), ("pipelines", inference.settings.pipelines)):
        if any(target.reload for target in targets):
            _need("watchfiles", f"{kind}[*].reload: needs watchfiles: pip install 'cobatch[reload]'")
    gpus = Gpus()
    feed = Feed(inference, history)
    inference.on_draining.append(feed.close)

    @contextlib.asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        async with contextlib.AsyncExitStack() as stack:
            stack.callback(gpus.close)
            await asyncio.to_thread(gpus.open)
            await stack.enter_async_context(observing(inference, sinks))
            stack.push_async_callback(_stop_models, inference)
            # In the background: health must answer while a large model is being loaded.
            tasks = [asyncio.create_task(feed.run())]
            tasks += [asyncio.create_task(_load(inference, name)) for name in inference.models]
            pipelines = list(inference.pipelines.values())
            tasks += [asyncio.create_task(_load_pipeline(inference, one)) for one in pipelines]
            stack.push_async_callback(_cancel, tasks)
            stack.callback(_begin_draining, inference, feed)
            yield

    handlers = {HTTPException: _http_error, Exception: _server_error}
    batch = BatchRoute(inference, history, sinks.tracer)
    routes = [
        Route(BATCH, batch, methods=["POST"]),
        *v2_routes(inference), *v1_routes(inference), *page_routes(inference),
        *openapi_routes(inference), *auth_routes(inference), *metrics_routes(inference, gpus),
        *request_routes(inference, history), *profile_routes(inference), *dashboard_routes(inference, feed),
        *pipeline_routes,
    ]  # fmt: skip
    starlette = Starlette(routes=routes, exception_handlers=handlers, lifespan=lifespan)
    starlette.router.redirect_slashes = False
    app: ASGIApp = InferRoutes(starlette, inference, {BATCH: batch})
    if inference.auth is not None:
        app = Gate(app, inference.auth, open_metrics=settings.metrics_open)
    return ObservingMiddleware(app, inference)


class Sinks(NamedTuple):
    """The subscribers of a process that write elsewhere."""

    access_log: AccessLog | None
    tracer: Tracer | None


def make_sinks(inference: Inference) -> Sinks:
    """Subscribe the access log and the tracer, if there are any. Raises SettingsError."""
    settings, observer = inference.settings.server, inference.observer
    access_log = None
    if settings.access_log != "off":
        access_log = AccessLog(LEVELS[settings.access_log_level], observer.log_stream)
        # Records exist of all warnings and errors; only lines about good requests need more.
        observer.on_request(access_log.request_done, each=settings.access_log_level == "info")
    tracer = _tracer(settings) if settings.tracing else None
    if tracer is not None:
        observer.trace(tracer)
    return Sinks(access_log, tracer)


@contextlib.asynccontextmanager
async def observing(inference: Inference, sinks: Sinks) -> AsyncIterator[None]:
    """Run what observes and authenticates requests, the same in every process that answers some."""
    observer = inference.observer
    inference.loop = loop = asyncio.get_running_loop()
    async with contextlib.AsyncExitStack() as stack:
        observer.lag.start(loop)
        stack.callback(observer.lag.stop)
        if observer.log_stream.start():
            stack.push_async_callback(asyncio.to_thread, observer.log_stream.stop)
        for sink in sinks:
            if sink is not None:
                sink.start(loop)
                stack.push_async_callback(asyncio.to_thread, sink.stop)
        if inference.auth is not None:
            await inference.auth.start(inference.tell_if_ready)
            stack.push_async_callback(inference.auth.stop)
        yield


def _need(library: str, why: str) -> None:
    if importlib.util.find_spec(library) is None:
        raise SettingsError(why)


def _tracer(settings: ServerSettings) -> Tracer:
    _need("opentelemetry", "server.tracing: needs OpenTelemetry's libraries: pip install 'cobatch[otel]'")
    from cobatch.server.observability.tracing import Tracing  # noqa: PLC0415 - an extra, and heavy

    return Tracing(settings.trace_sample, settings.trace_endpoint)


def _pipeline_routes(inference: Inference) -> Sequence[Route]:
    """Make the pipelines, if there are any, or a model may get one; return their routes."""
    settings = inference.settings
    if not settings.pipelines and all(model.python is None for model in settings.models):
        return ()
    from cobatch.server.pipelines.routes import pipeline_routes  # noqa: PLC0415 - others pay nothing for them

    return pipeline_routes(inference)


async def _load(inference: Inference, name: str) -> None:
    model = inference.models[name]
    try:
        await model.load()
    except EngineError as error:
        inference.on_load_failed(name, error)
    else:
        inference.observer.watch(model.loaded_batcher, model.infer_traffic.durations)
        inference.on_loaded(model)
        if model.settings.python is not None:
            await _load_around(inference, model)
        inference.tell_if_ready()


async def _load_around(inference: Inference, model: Model) -> None:
    from cobatch.server.pipelines.routes import make_around  # noqa: PLC0415

    pipeline = make_around(inference, model)
    if pipeline is not None:
        await _load_pipeline(inference, pipeline)


async def _load_pipeline(inference: Inference, pipeline: ServedPipeline) -> None:
    try:
        await pipeline.load()
    except EngineError as error:
        inference.on_load_failed(pipeline.name, error)
    else:
        inference.observer.watch(pipeline.loaded_batcher, pipeline.traffic.durations)
        inference.tell_if_ready()


def _begin_draining(inference: Inference, feed: Feed) -> None:
    inference.leaving = inference.draining = True
    feed.close()


async def _stop_models(inference: Inference) -> None:
    timeout_s = inference.settings.server.drain_timeout_s
    # Their steps are requests to the models.
    await asyncio.gather(*[pipeline.stop(timeout_s) for pipeline in inference.pipelines.values()])
    inference.close_links()
    await asyncio.gather(*[model.stop(timeout_s) for model in inference.models.values()])


async def _cancel(tasks: Sequence[asyncio.Task[None]]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


async def _http_error(request: Request, error: Exception) -> Response:
    """Answer the router's own errors as problems."""
    assert isinstance(error, HTTPException)
    path = request.url.path
    if error.status_code == 405:
        allowed = sorted((error.headers or {}).get("Allow", "").split(", "))
        detail = f"{path} takes {', '.join(allowed)}, got {request.method}"
        return as_response(Problem("method-not-allowed", detail, allowed=allowed).reply(instance=path))
    hint = "; POST /v2/repository/index lists the models" if path == "/v2/models" else ""
    return as_response(Problem("not-found", f"there is nothing at {path}{hint}").reply(instance=path))


async def _server_error(request: Request, error: Exception) -> Response:
    # Starlette logs the traceback through the server after this.
    return as_response(internal().reply(instance=request.url.path))
