"""Home and fronts in one process and one event loop, with real sockets and shared memory between them."""

from __future__ import annotations

import asyncio
import contextlib
import copy
import itertools
import os
import socket
from collections.abc import Iterator
from functools import partial
from typing import Any

from uvicorn.lifespan.on import LifespanOn

from cobatch.engines.link import slab
from cobatch.server.fronts.app import front_app
from cobatch.server.fronts.control import PAGE_BYTES, LinkEnds
from cobatch.server.fronts.front import Uplinks
from cobatch.server.fronts.hand_over import HandOver
from cobatch.server.fronts.home import Downlinks
from cobatch.server.fronts.reception import HomeConnection, Reception
from cobatch.server.fronts.relay import front_protocol
from cobatch.server.inference.service import Inference
from cobatch.server.links.hub import Hub
from cobatch.server.settings.schema import ModelSettings, Settings
from cobatch.server.settings.values import SettingsError
from tests.support.http import serving
from tests.support.http.clock import Clock
from tests.support.http.serving import Served, ThreadServer

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
        home = LinkEnds(messages[0], handover[0], slab.for_reading(questions), answers)
        front = LinkEnds(
            messages[1], handover[1], slab.for_reading(answers), questions, slab.for_reading(self.page)
        )
        return home, front

    def close(self) -> None:
        """Close the page."""
        os.close(self.page)


class LinkedServer(ThreadServer):
    """Its connections are the fronts', in turns; its models and batchers are home's."""

    def __init__(
        self, settings: Settings, clock: Clock | None, *, fronts: int = 2, slab_bytes: int = SLAB_BYTES
    ) -> None:
        super().__init__(settings, clock)
        self.fronts = [Uplinks(settings, fronts) for _ in range(fronts)]
        self.maker = LinkMaker(slab_bytes)
        self.downlinks = Downlinks(self.inference, Hub(self.inference))
        self.broken: list[str] = []
        self.downlinks.on_broken = lambda front, why: self.broken.append(why)
        self.hand_overs = [HandOver(front.is_alive) for front in self.fronts]
        self.relayed = 0  # connections
        self._receptions: dict[int, Reception] = {}
        self._linked = 0
        self._lifespans: list[LifespanOn] = []
        self.config.http = self._next_connection  # type: ignore[assignment]
        self._makers = itertools.cycle([self._maker(number) for number in range(fronts)])

    def inferences(self) -> list[Inference]:
        return [front.inference for front in self.fronts]

    def _maker(self, number: int) -> Any:
        inference = self.fronts[number].make_inference(self.inference.settings, None)
        inference.on_ready = self._on_front_ready
        inference.bodies = self.inference.bodies
        make = front_protocol(inference, self.hand_overs[number])
        config = copy.copy(self.config)
        config.app = front_app(inference)
        self._lifespans.append(LifespanOn(config))
        return lambda of_uvicorn: self.watch(make(**{**of_uvicorn, "config": config}))

    def _next_connection(self, **of_uvicorn: Any) -> Any:
        return next(self._makers)(of_uvicorn)

    def _home_connection(self) -> HomeConnection:
        self.relayed += 1
        connection = HomeConnection(
            self.inference,
            config=self.config,
            server_state=self.server_state,
            app_state=self.lifespan.state,
        )
        return self.watch(connection)

    async def startup(self, sockets: object = None) -> None:
        for lifespan in self._lifespans:
            await lifespan.startup()
        self.downlinks.use_page(os.dup(self.maker.page))
        self.link_all()
        await super().startup(sockets)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        await super().shutdown(sockets)
        for hand_over in self.hand_overs:
            hand_over.detach()
        for reception in self._receptions.values():
            reception.close()
        self._unlink_all()
        self.maker.close()
        for lifespan in self._lifespans:
            await lifespan.shutdown()

    def link(self, number: int) -> None:
        """Give a front a new link."""
        home, front = self.maker.make()
        if number in self._receptions:
            self._receptions[number].close()
        self._receptions[number] = Reception(home.handover, self._home_connection)
        self.downlinks.add(number, home)
        self.hand_overs[number].attach(front.handover)
        self.fronts[number].use(front)

    def link_all(self) -> None:
        """Give every front a new link."""
        for number in range(len(self.fronts)):
            self.link(number)

    def unlink(self) -> None:
        """End home as the fronts see it, but not its connections."""
        for front, hand_over in zip(self.fronts, self.hand_overs, strict=True):
            hand_over.detach()
            assert front.current is not None
            front.current.end("home is gone")

    def _on_ready(self) -> None:
        """Wait for the fronts."""

    def _on_front_ready(self) -> None:
        self._linked += 1
        if self._linked == len(self.fronts):
            self.ready.set()

    async def reload(self) -> None:
        await super().reload()
        for auth in [front.inference.auth for front in self.fronts]:
            for reload in {} if auth is None else auth.reloads().values():
                with contextlib.suppress(SettingsError):  # home has logged it
                    await reload()

    def handle_exit(self, sig: int, frame: Any) -> None:
        super().handle_exit(sig, frame)
        self._tell_fronts()

    def _leave(self, now_s: float) -> None:
        super()._leave(now_s)
        self._tell_fronts()

    def _tell_fronts(self) -> None:
        home = self.inference
        for front in self.fronts:
            inference = front.inference
            inference.leaving, inference.closing = home.leaving, home.closing
            inference.draining = home.draining

    async def before_drain(self, timeout_s: float) -> float:
        batchers = [model.batcher for front in self.fronts for model in front.models if model.batcher]
        await asyncio.gather(*[batcher.drain(timeout_s) for batcher in batchers])
        self._unlink_all()
        return timeout_s

    def _unlink_all(self) -> None:
        for front in self.fronts:
            if front.current is not None:
                front.current.end("it is drained")
        self.downlinks.hub.close()


@contextlib.contextmanager
def linked(
    fast: bool,
    models: tuple[ModelSettings, ...],
    *,
    fronts: int = 2,
    slab_bytes: int = SLAB_BYTES,
    **settings: Any,
) -> Iterator[Served]:
    """Serve `models` through fronts; as `serving.serve`."""
    make = partial(LinkedServer, fronts=fronts, slab_bytes=slab_bytes)
    with serving.serve(fast, models, make_server=make, **settings) as served:
        yield served


WAYS = ["fast", "asgi", "fronts"]


def way(name: str) -> dict[str, Any]:
    """Return the arguments of `serving.serve` for one process, with the fast path or not, or for fronts."""
    return {"fast": name != "asgi", "make_server": LinkedServer if name == "fronts" else None}
