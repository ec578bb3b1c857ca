"""Home and fronts in one process and one event loop, with real sockets and shared memory between them."""

from __future__ import annotations

import asyncio
import contextlib
import copy
import itertools
import os
import socket
from collections.abc import Iterator, Mapping
from typing import Any
from unittest import mock

import cobatch.server.inference.model
from cobatch.engines.base import Engine
from cobatch.engines.link import slab
from cobatch.engines.loader import EngineOptions, load_engine
from cobatch.server.edge.fast_path import make_protocol
from cobatch.server.fronts.app import front_app
from cobatch.server.fronts.control import PAGE_BYTES, LinkEnds
from cobatch.server.fronts.front import Uplinks
from cobatch.server.fronts.home import Downlinks
from cobatch.server.settings.auth import AuthSettings
from cobatch.server.settings.schema import ModelSettings, ServerSettings, Settings
from tests.support.http.serving import DEADLINE_S, GatedEngine, Served, _ThreadServer

SLAB_BYTES = 64 << 20


class LinkMaker:
    """Makes links to one life of home, as the supervisor does."""

    def __init__(self, slab_bytes: int = SLAB_BYTES) -> None:
        self.slab_bytes = slab_bytes
        self.page = slab.create("page", PAGE_BYTES)

    def make(self) -> tuple[LinkEnds, LinkEnds]:
        """Return home's end and the front's."""
        messages = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        handover = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        questions, answers = (slab.create("slab", self.slab_bytes) for _ in range(2))
        home = LinkEnds(messages[0], handover[0], slab.for_reading(questions), answers, os.dup(self.page))
        front = LinkEnds(
            messages[1], handover[1], slab.for_reading(answers), questions, slab.for_reading(self.page)
        )
        for end in handover:
            end.close()
        return home, front

    def close(self) -> None:
        """Close the page."""
        os.close(self.page)


class LinkedServer(_ThreadServer):
    """Its connections are the fronts', in turns; its models and batchers are home's."""

    def __init__(self, settings: Settings, fronts: int, slab_bytes: int) -> None:
        super().__init__(settings)
        self.fronts = [Uplinks(settings, fronts) for _ in range(fronts)]
        self.maker = LinkMaker(slab_bytes)
        self.downlinks = Downlinks(self.inference)
        self.broken: list[str] = []
        self.downlinks.on_broken = lambda front, why: self.broken.append(why)
        self._linked = 0
        self.config.http = self._next_connection  # type: ignore[assignment]
        self._makers = itertools.cycle([self._maker(front) for front in self.fronts])

    def _maker(self, front: Uplinks) -> Any:
        inference = front.make_inference(self.inference.settings, None)
        inference.on_ready = self._on_front_ready
        make = make_protocol(inference)
        config = copy.copy(self.config)
        config.loaded_app = front_app(inference)
        return lambda of_uvicorn: self.connections.watch(make(**{**of_uvicorn, "config": config}))

    def _next_connection(self, **of_uvicorn: Any) -> Any:
        return next(self._makers)(of_uvicorn)

    async def startup(self, sockets: object = None) -> None:
        loop = asyncio.get_running_loop()
        for number in range(len(self.fronts)):
            self.fronts[number].inference.loop = loop
            self.link(number)
        await super().startup(sockets)

    def link(self, number: int) -> None:
        """Give a front a new link."""
        home, front = self.maker.make()
        self.downlinks.add(number, home)
        self.fronts[number].use(front)

    def _on_ready(self) -> None:
        """Wait for the fronts."""

    def _on_front_ready(self) -> None:
        self._linked += 1
        if self._linked == len(self.fronts):
            self.ready.set()

    def handle_exit(self, sig: int, frame: Any) -> None:
        super().handle_exit(sig, frame)
        for front in self.fronts:
            front.inference.leaving = True
            front.inference.draining = front.inference.closing = self.inference.draining

    async def before_drain(self) -> None:
        batchers = [model.batcher for front in self.fronts for model in front.models if model.batcher]
        await asyncio.gather(*[batcher.drain(DEADLINE_S) for batcher in batchers])
        for front in self.fronts:
            if front.current is not None:
                front.current.end("it is drained")
        self.downlinks.close()
        self.maker.close()


@contextlib.contextmanager
def linked(
    fast: bool,
    models: tuple[ModelSettings, ...],
    *,
    fronts: int = 2,
    engines: Mapping[str, Engine] | None = None,
    auth: AuthSettings | None = None,
    slab_bytes: int = SLAB_BYTES,
    ready: bool = True,
    **settings: Any,
) -> Iterator[Served]:
    """Serve `models` through fronts; as `serving.serve`."""
    fakes = engines or {}

    def load(kind: str, path: str, max_batch_size: int, options: EngineOptions) -> Engine:
        return fakes.get(path) or load_engine(kind, path, max_batch_size, options)

    http = ServerSettings(fast_path=fast, **{"port": 0, "drain_timeout_s": DEADLINE_S, **settings})
    with mock.patch.object(cobatch.server.inference.model, "load_engine", load):
        server = LinkedServer(Settings(server=http, models=models, auth=auth), fronts, slab_bytes)
        served = Served(server, fast)
        served.start(ready)
    try:
        yield served
    finally:
        for engine in fakes.values():
            if isinstance(engine, GatedEngine):
                engine.may_open.set()
                engine.release()
        served.stop()
        served.stop()
        served.join()
