"""The whole application in the test's event loop, through httpx: no sockets, and threads only for engines.

With a front, infer requests go to its application, and over a real link to home.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from unittest import mock

import httpx
import uvicorn
from starlette.applications import Starlette
from starlette.types import ASGIApp, Receive, Scope, Send
from uvicorn.lifespan.on import LifespanOn

import cobatch.server.inference.model
from cobatch.batcher.batcher import Batcher
from cobatch.engines.base import Engine
from cobatch.engines.errors import EngineError
from cobatch.engines.loader import EngineOptions, load_engine
from cobatch.server.app import build
from cobatch.server.auth.gate import Gate
from cobatch.server.edge.asgi import InferRoutes, ObservingMiddleware
from cobatch.server.fronts.app import front_app
from cobatch.server.fronts.front import Uplinks
from cobatch.server.fronts.home import Downlinks
from cobatch.server.fronts.leaving import is_infer
from cobatch.server.fronts.model import FrontModel
from cobatch.server.inference.service import Inference
from cobatch.server.links.hub import Hub
from cobatch.server.settings.auth import AuthSettings
from cobatch.server.settings.schema import ModelSettings, PipelineSettings, ServerSettings, Settings
from tests.support.fronts.linked import LinkMaker
from tests.support.http.serving import DEADLINE_S, GatedEngine


@dataclass
class InProcess:
    """A running application and a client for it. `edge` belongs to the process that decodes and encodes."""

    inference: Inference
    edge: Inference
    app: ASGIApp
    starlette: Starlette
    http: httpx.AsyncClient

    def batcher(self, name: str = "gate") -> Batcher:
        """Return a loaded model's batcher."""
        batcher = self.inference.models[name].batcher
        assert batcher is not None
        return batcher


class Front:
    """The application of a front beside that of home, which gets all requests but those to infer.

    `wanted`: servers have one; a fixture sets it.
    """

    wanted = False

    def __init__(self, home: Inference, app: ASGIApp) -> None:
        self._home, self._app = home, app
        self._maker = LinkMaker()
        self._downlinks = Downlinks(home, Hub(home))
        self._uplinks = Uplinks(home.settings, 1)
        self.inference = self._uplinks.make_inference(home.settings, None)
        self.inference.bodies = home.bodies
        self._front = front_app(self.inference)
        self._lifespan = LifespanOn(uvicorn.Config(self._front, lifespan="on"))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        infers = is_infer(self._home, scope["method"].encode(), scope["raw_path"])
        await (self._front if infers else self._app)(scope, receive, send)

    async def start(self) -> None:
        """Link it, and wait until it knows all models."""
        await self._lifespan.startup()
        self._downlinks.use_page(os.dup(self._maker.page))
        home, ends = self._maker.make()
        for end in (home.handover, ends.handover):
            end.close()
        self._downlinks.add(0, home)
        self._uplinks.use(ends)
        async with asyncio.timeout(DEADLINE_S):
            while not all(map(_is_told, self._uplinks.models)):  # noqa: ASYNC110 - by messages
                await asyncio.sleep(0)

    async def stop(self) -> None:
        """End the link and the application."""
        self._downlinks.hub.close()
        if self._uplinks.current is not None:
            self._uplinks.current.end("the test ends")
        await self._lifespan.shutdown()
        self._maker.close()


def _is_told(model: FrontModel) -> bool:
    return model.batcher is not None or model.load_error is not None


@contextlib.asynccontextmanager
async def in_process(
    *models: ModelSettings,
    engines: Mapping[str, Engine] | None = None,
    ready: bool = True,
    auth: AuthSettings | None = None,
    pipelines: Sequence[PipelineSettings] = (),
    wrap: Callable[[ASGIApp], ASGIApp] = lambda app: app,
    **settings: Any,
) -> AsyncIterator[InProcess]:
    """Run the application with its lifespan. `engines`, by path, replace the engines of model files; `wrap`
    puts a middleware around the application."""
    fakes = engines or {}

    def load(kind: str, path: str, max_batch_size: int, options: EngineOptions) -> Engine:
        return fakes.get(path) or load_engine(kind, path, max_batch_size, options)

    http_settings = ServerSettings(**{"drain_timeout_s": DEADLINE_S, **settings})
    all_settings = Settings(server=http_settings, models=models, pipelines=tuple(pipelines), auth=auth)
    inference = Inference(all_settings)
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
    front = Front(inference, app) if ready and Front.wanted else None
    transport = httpx.ASGITransport(wrap(front or app), raise_app_exceptions=False)
    with mock.patch.object(cobatch.server.inference.model, "load_engine", load):
        async with (
            starlette.router.lifespan_context(starlette),
            httpx.AsyncClient(transport=transport, base_url="http://test") as http,
        ):
            if ready:
                async with asyncio.timeout(DEADLINE_S):
                    await loaded.wait()
            if front is not None:
                await front.start()
            try:
                yield InProcess(inference, front.inference if front else inference, app, starlette, http)
            finally:
                for engine in fakes.values():
                    if isinstance(engine, GatedEngine):
                        engine.may_open.set()
                        engine.release()
                if front is not None:
                    await front.stop()


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
