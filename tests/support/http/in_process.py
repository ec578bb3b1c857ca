"""The whole application in the test's event loop, through httpx: no sockets, and threads only for engines."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass
from typing import Any
from unittest import mock

import httpx
from starlette.applications import Starlette
from starlette.types import ASGIApp

import cobatch.server.inference.model
from cobatch.batcher.batcher import Batcher
from cobatch.engines.base import Engine
from cobatch.engines.errors import EngineError
from cobatch.engines.loader import EngineOptions, load_engine
from cobatch.server.app import build
from cobatch.server.auth.gate import Gate
from cobatch.server.edge.asgi import InferRoutes, ObservingMiddleware
from cobatch.server.inference.service import Inference
from cobatch.server.settings.auth import AuthSettings
from cobatch.server.settings.schema import ModelSettings, ServerSettings, Settings
from tests.support.http.serving import DEADLINE_S, GatedEngine


@dataclass
class InProcess:
    """A running application and a client for it."""

    inference: Inference
    app: ASGIApp
    starlette: Starlette
    http: httpx.AsyncClient

    def batcher(self, name: str = "gate") -> Batcher:
        """Return a loaded model's batcher."""
        batcher = self.inference.models[name].batcher
        assert batcher is not None
        return batcher


@contextlib.asynccontextmanager
async def in_process(
    *models: ModelSettings,
    engines: Mapping[str, Engine] | None = None,
    ready: bool = True,
    auth: AuthSettings | None = None,
    wrap: Callable[[ASGIApp], ASGIApp] = lambda app: app,
    **settings: Any,
) -> AsyncIterator[InProcess]:
    """Run the application with its lifespan. `engines`, by path, replace the engines of model files; `wrap`
    puts a middleware around the application."""
    fakes = engines or {}

    def load(kind: str, path: str, max_batch_size: int, options: EngineOptions) -> Engine:
        return fakes.get(path) or load_engine(kind, path, max_batch_size, options)

    http_settings = ServerSettings(**{"drain_timeout_s": DEADLINE_S, **settings})
    inference = Inference(Settings(server=http_settings, models=models, auth=auth))
    loaded = asyncio.Event()
    inference.on_ready = loaded.set

    def failed(name: str, error: EngineError) -> None:
        loaded.set()

    inference.on_load_failed = failed
    app = build(inference)
    assert isinstance(app, ObservingMiddleware)
    inner = app.app._app if isinstance(app.app, Gate) else app.app
    assert isinstance(inner, InferRoutes)
    starlette: Any = inner.app
    # An exception becomes a response, as it does over a socket.
    transport = httpx.ASGITransport(wrap(app), raise_app_exceptions=False)
    with mock.patch.object(cobatch.server.inference.model, "load_engine", load):
        async with (
            starlette.router.lifespan_context(starlette),
            httpx.AsyncClient(transport=transport, base_url="http://test") as http,
        ):
            if ready:
                async with asyncio.timeout(DEADLINE_S):
                    await loaded.wait()
            try:
                yield InProcess(inference, app, starlette, http)
            finally:
                for engine in fakes.values():
                    if isinstance(engine, GatedEngine):
                        engine.may_open.set()
                        engine.release()


@contextlib.asynccontextmanager
async def gated(
    *, max_queue_rows: int = 1000, ready: bool = True, engine: GatedEngine | None = None, **settings: Any
) -> AsyncIterator[tuple[InProcess, GatedEngine]]:
    """Run one model, `gate`, with a GatedEngine and batches of at most 4 rows."""
    engine = engine or GatedEngine()
    model = ModelSettings(path="gate", max_batch_size=engine.max_batch_size, max_queue_rows=max_queue_rows)
    async with in_process(model, engines={"gate": engine}, ready=ready, **settings) as running:
        engine.ran.clear()  # the warm-up's runs
        yield running, engine
