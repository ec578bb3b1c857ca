"""Home and a pipeline's end of a link in the test's event loop: steps without a process."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import numpy as np

from cobatch.batcher.batcher import Batcher
from cobatch.server.links import hub as hubs
from cobatch.server.links.downlink import Downlink
from cobatch.server.links.hub import Hub
from cobatch.server.links.step_end import StepEnd, linked_models
from cobatch.server.links.steps import CALLER, Caller
from cobatch.server.settings.auth import AuthSettings
from cobatch.server.settings.schema import ModelSettings
from tests.support.http.in_process import InProcess, in_process
from tests.support.http.serving import DEADLINE_S, GatedEngine

Outputs = dict[str, "np.ndarray[Any, Any]"]


@dataclass
class Stepping:
    """Home, its end of the link, and the far end."""

    home: InProcess
    hub: Hub
    end: StepEnd
    link: Downlink
    ended: list[str] = field(default_factory=list)

    def batcher(self, name: str = "gate") -> Batcher:
        """Return a model's batcher in home."""
        return self.home.batcher(name)

    def caller(self, **options: Any) -> Caller:
        """Return a call, and let the steps of this task be its own."""
        caller = Caller(self.end, **options)
        CALLER.set(caller)
        return caller

    async def until(self, condition: Any) -> None:
        """Let the loop run until a condition holds."""
        async with asyncio.timeout(DEADLINE_S):
            while not condition():  # noqa: ASYNC110 - messages between the ends take some iterations
                await asyncio.sleep(0)

    @property
    def blocks(self) -> int:
        """Blocks in use, of both slabs."""
        return self.end._uplink._slab_out.arena.blocks + self.link._slab_out.arena.blocks

    @property
    def idle(self) -> bool:
        """Nothing is open, in flight or in a block."""
        waiting = self.end._uplink._waiting or self.hub._room.waiting
        return not (self.blocks or self.end._uplink._flights.open or self.link.open or waiting)


@contextlib.asynccontextmanager
async def stepping(
    *models: ModelSettings,
    engine: GatedEngine | None = None,
    slab_bytes: int = 1 << 20,
    auth: AuthSettings | None = None,
    ready: bool = True,
    **model: Any,
) -> AsyncIterator[Stepping]:
    """Run home with these models, or with one, `gate`, on `engine`; link a pipeline's end to it."""
    gate = engine or GatedEngine()
    if not models:
        models = (ModelSettings(path="gate", max_batch_size=gate.max_batch_size, **model),)
    with mock.patch.object(hubs, "_SLAB_BYTES", slab_bytes):
        async with in_process(
            *models, engines={"gate": gate}, ready=ready, auth=auth, max_body_bytes=slab_bytes // 2
        ) as home:
            gate.ran.clear()
            hub = Hub(home.inference)
            ended: list[str] = []
            descriptors = hub.open_steps(lambda link, why, broken: ended.append(why))
            (link,) = hub.links
            end = StepEnd(descriptors, linked_models(models))
            both = Stepping(home, hub, end, link, ended)
            if ready:
                await both.until(lambda: all(one.batcher for one in end._models.values()))
            try:
                yield both
            finally:
                gate.release()
                end.close()
                hub.close()
