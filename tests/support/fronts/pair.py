"""Fronts and home in the test's event loop without HTTP: requests go into a front's batcher."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from cobatch.batcher.batcher import Batcher
from cobatch.batcher.request import Request
from cobatch.batcher.tenant import Tenant
from cobatch.server.fronts.front import Uplinks
from cobatch.server.fronts.home import Downlinks
from cobatch.server.links.downlink import Downlink
from cobatch.server.links.hub import Hub
from cobatch.server.links.remote import RemoteBatcher
from cobatch.server.links.uplink import Uplink
from cobatch.server.settings.auth import AuthSettings
from cobatch.server.settings.schema import ModelSettings
from tests.support.fronts.linked import LinkMaker
from tests.support.http.in_process import InProcess, in_process
from tests.support.http.serving import DEADLINE_S, GatedEngine

SLAB_BYTES = 1 << 20


class Probe(Request):
    """A request with rows of INT64 whose `answer` is awaited: a copy of its outputs, or the error."""

    def __init__(self, *rows: Sequence[int], caller: object = None, **options: Any) -> None:
        data = np.array(rows, np.int64)
        super().__init__(len(rows), (data.shape[1:],), [data.tobytes()], **options)
        self.answer: asyncio.Future[list[list[int]]] = asyncio.get_running_loop().create_future()
        self.answers = 0
        self._caller = caller

    @property
    def source(self) -> Any:
        return self.tenant or self._caller

    def done(self) -> None:
        self.answers += 1
        if self.error is not None:
            self.answer.set_exception(self.error)
            return
        assert self.batch is not None
        rows = self.batch.outputs[0][self.first_row : self.first_row + self.rows]
        self.answer.set_result(rows.tolist())


@dataclass
class FrontEnd:
    """A front of a pair."""

    uplinks: Uplinks

    @property
    def batcher(self) -> RemoteBatcher:
        """The batcher of the only model."""
        batcher = self.uplinks.models[0].batcher
        assert batcher is not None
        return batcher

    @property
    def uplink(self) -> Uplink:
        """The link to home; there must be one."""
        assert self.uplinks.current is not None
        return self.uplinks.current

    @property
    def blocks(self) -> int:
        """Blocks of its slab in use."""
        return self.uplink._slab_out.arena.blocks

    @property
    def flying(self) -> int:
        """The messages in flight."""
        return len(self.uplink._flights.open)

    def tenant(self, name: str) -> Tenant:
        """Return a tenant as this front knows it."""
        auth = self.uplinks.inference.auth
        assert auth is not None
        return auth.tenants.of(name, ())

    def submit(self, *rows: Sequence[int], **options: Any) -> Probe:
        """Submit a request."""
        probe = Probe(*rows, **options)
        self.batcher.submit(probe)
        return probe


@dataclass
class Pair:
    """Home, its engine, and the fronts."""

    home: InProcess
    engine: GatedEngine
    downlinks: Downlinks
    fronts: list[FrontEnd]
    maker: LinkMaker

    @property
    def batcher(self) -> Batcher:
        """Home's batcher."""
        return self.home.batcher()

    def link(self, number: int) -> Downlink:
        """Return home's end of a link."""
        return self.downlinks.links[number]

    def blocks_of_home(self, number: int = 0) -> int:
        """Blocks of home's slab to a front in use."""
        return self.link(number)._slab_out.arena.blocks

    async def join(self, number: int) -> None:
        """Give a front a new link, and wait until it is ready."""
        loaded = asyncio.Event()
        front = self.fronts[number].uplinks
        front.inference._was_ready = False
        front.inference.on_ready = loaded.set
        home, ends = self.maker.make()
        for end in (home.handover, ends.handover):
            end.close()
        self.downlinks.add(number, home)
        front.use(ends)
        async with asyncio.timeout(DEADLINE_S):
            await loaded.wait()

    async def until(self, condition: Any) -> None:
        """Let the loop run until a condition holds."""
        async with asyncio.timeout(DEADLINE_S):
            while not condition():  # noqa: ASYNC110 - messages between the ends take some iterations
                await asyncio.sleep(0)


@contextlib.asynccontextmanager
async def pair(
    fronts: int = 1,
    *,
    engine: GatedEngine | None = None,
    slab_bytes: int = SLAB_BYTES,
    auth: AuthSettings | None = None,
    max_queue_rows: int = 1000,
    **model: Any,
) -> AsyncIterator[Pair]:
    """Run home with one model, `gate`, and fronts."""
    engine = engine or GatedEngine(16)
    settings = ModelSettings(
        path="gate", max_batch_size=engine.max_batch_size, max_queue_rows=max_queue_rows, **model
    )
    async with in_process(settings, engines={"gate": engine}, auth=auth) as home:
        engine.ran.clear()
        downlinks, maker = Downlinks(home.inference, Hub(home.inference)), LinkMaker(slab_bytes)
        downlinks.use_page(os.dup(maker.page))
        ends = []
        for _ in range(fronts):
            uplinks = Uplinks(home.inference.settings, fronts)
            uplinks.make_inference(home.inference.settings, None)
            ends.append(FrontEnd(uplinks))
        both = Pair(home, engine, downlinks, ends, maker)
        for number in range(fronts):
            await both.join(number)
        try:
            yield both
        finally:
            engine.release()
            downlinks.hub.close()
            for front in ends:
                if front.uplinks.current is not None:
                    front.uplinks.current.end("the test ends")
            maker.close()
