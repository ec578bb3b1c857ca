"""The process with scheduler, engines and all routes but infer: today's server, and links to the fronts."""

import asyncio
import contextlib
import logging
import os
import socket
import time
from collections.abc import Callable, Collection
from functools import partial
from typing import Any

from cobatch.batcher.batcher import Batcher
from cobatch.batcher.request import Batch
from cobatch.engines.link.channel import Channel
from cobatch.engines.link.messages import decode_from_front
from cobatch.engines.link.slab import SlabReader, SlabWriter
from cobatch.server.fronts.child_server import ChildServer
from cobatch.server.fronts.control import HEARTBEAT_S, EndFront, LinkEnds, Parent
from cobatch.server.fronts.reception import HomeConnection, Reception
from cobatch.server.fronts.reports import Reports
from cobatch.server.inference.model import Model
from cobatch.server.inference.service import Inference
from cobatch.server.links.accounts import HomeTenant, share_accounts
from cobatch.server.links.downlink import Downlink
from cobatch.server.links.page import Page
from cobatch.server.observability.output import LogStream
from cobatch.server.settings.schema import Settings

log = logging.getLogger("cobatch.fronts")

# An idle engine waits at most this long for requests that a front has announced. A front reads those of 64
# connections within it.
_LONGEST_WAIT_S = 0.001


class Downlinks:
    """The links to all fronts, by their number, and the page that the fronts read.

    `on_broken` is told of a front that sent a bad message, `on_none` that no link is left.
    """

    def __init__(self, inference: Inference) -> None:
        self.links: dict[int, Downlink] = {}
        self.on_broken: Callable[[int, str], None] = lambda front, why: None
        self.on_none: Callable[[], None] = lambda: None
        self._inference = inference
        self._models = list(inference.models.values())
        self._indices = {model.name: index for index, model in enumerate(self._models)}
        auth = inference.auth
        self._accounts = None if auth is None else share_accounts(auth.tenants, HomeTenant)
        self._page: Page | None = None
        self._beat_again: asyncio.TimerHandle | None = None
        self._held: dict[Batcher, None] = {}  # with requests about which nothing is decided yet
        self._awaited: set[Downlink] = set()  # for their decisions
        self._decision: asyncio.Handle | None = None
        self._reports = Reports(inference, self._ask)
        inference.on_loaded = self._on_loaded
        inference.observer.on_batch(self._on_batch)

    def add(self, front: int, ends: LinkEnds) -> None:
        """Use a link to a front; it replaces an earlier one."""
        loop = asyncio.get_running_loop()
        if self._page is None:
            self._page = Page(ends.page, len(self._models), self._accounts, writable=True)
            self._beat()
        else:
            os.close(ends.page)
        before = self.links.get(front)
        auth = self._inference.auth
        self.links[front] = link = Downlink(
            front,
            Channel(ends.messages, decode_from_front),
            SlabReader(ends.slab_in),
            SlabWriter(ends.slab_out),
            self._models,
            None if auth is None else auth.tenants,
            loop,
            held=self._held,
            on_received=self._on_received,
            on_ended=self._on_ended,
        )
        if before is not None:
            before.end("another one takes its place")
        link.on_report = partial(self._reports.on_report, front)

    def _ask(self, number: int) -> Collection[int]:
        """Ask all fronts for a report; return their numbers."""
        for link in self.links.values():
            link.collect(number)
        return self.links

    def close(self) -> None:
        """End all links."""
        if self._beat_again is not None:
            self._beat_again.cancel()
        for link in list(self.links.values()):
            link.end("home ends")

    def _on_ended(self, link: Downlink, why: str, broken: bool) -> None:
        if self.links.get(link.number) is link:
            del self.links[link.number]
            self._reports.gone(link.number)
        self._on_received(link)  # nothing more comes
        if broken:
            self.on_broken(link.number, why)
        if not self.links:
            self.on_none()

    # Decisions

    def _on_received(self, link: Downlink) -> None:
        """Decide about the requests of a datagram once those that fronts are about to send are there too."""
        if not self._held:
            self.update()
        elif self._decision is None:
            # After the other datagrams of this iteration.
            self._decision = asyncio.get_running_loop().call_soon(self._await_others)
        elif self._awaited:
            self._awaited.discard(link)
            if not self._may_wait():
                self._awaited.clear()
            if not self._awaited:
                self._decide()

    def _await_others(self) -> None:
        """Let an idle engine wait for the fronts that are reading requests: a batch costs as much as ten."""
        self._awaited = {link for link in self.links.values() if link.expected} if self._may_wait() else set()
        if self._awaited:
            self._decision = asyncio.get_running_loop().call_later(_LONGEST_WAIT_S, self._decide)
        else:
            self._decide()

    def _may_wait(self) -> bool:
        """Return True if engines are idle, and none of them has a full batch."""
        idle = [one for one in self._held if not one.running_batches]
        return bool(idle) and all(one.queue.rows < one.queue.full_rows for one in idle)

    def _decide(self) -> None:
        for link in self._awaited:  # in vain
            link.give_up()
        self._awaited.clear()
        if self._decision is not None:
            self._decision.cancel()
            self._decision = None
        held = list(self._held)
        self._held.clear()
        for batcher in held:
            batcher.decide()
        self.update()

    def _on_loaded(self, model: Model) -> None:
        self.update()
        for link in self.links.values():
            link.loaded(self._indices[model.name])

    # The page

    def _beat(self) -> None:
        self.update()
        if self._page is not None:
            self._page.heartbeat_s = time.monotonic()
        self._beat_again = asyncio.get_running_loop().call_later(HEARTBEAT_S, self._beat)

    def _on_batch(self, batcher: Batcher, batch: Batch) -> None:
        # The next batches leave the queue first.
        asyncio.get_running_loop().call_soon(self._update, self._indices[batcher.name])

    def update(self) -> None:
        """Write the page."""
        for index in range(len(self._models)):
            self._update(index)

    def _update(self, index: int) -> None:
        batcher = self._models[index].batcher
        if self._page is not None and batcher is not None:
            self._page.queues[index].update(batcher.queue, batcher.admission)


class Home(ChildServer):
    """The server of home. Its batchers take requests of fronts until all links have ended."""

    def __init__(self, settings: Settings, log_stream: LogStream | None, parent: Parent) -> None:
        super().__init__(settings, log_stream, parent)
        self._receptions: dict[int, Reception] = {}
        self._unlinked = asyncio.Event()
        self._unlinked.set()
        self.downlinks = Downlinks(self.inference)
        self.downlinks.on_broken = self._on_broken
        self.downlinks.on_none = self._unlinked.set

    def make_http(self, inference: Inference) -> Any:
        return partial(HomeConnection, inference)

    def add_link(self, front: int, ends: LinkEnds) -> None:
        self._unlinked.clear()
        before = self._receptions.pop(front, None)
        if before is not None:
            before.close()
        self._receptions[front] = Reception(ends.handover, self._new_connection)
        self.downlinks.add(front, ends)

    def _on_broken(self, front: int, why: str) -> None:
        log.error("front %d sent a bad message: %s", front, why)
        self.parent.send(EndFront(front))

    async def before_drain(self, timeout_s: float) -> float:
        """Wait until no front sends requests any more."""
        end_s = time.monotonic() + timeout_s
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                await self._last.wait()
                for connection in list(self.server_state.connections):
                    connection.shutdown()  # a front ends with its last connection
                await self._unlinked.wait()
        return max(0.0, end_s - time.monotonic())

    async def drained(self) -> None:
        """Wait for nothing: the supervisor has closed the listener already."""

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self.downlinks.close()
        for reception in self._receptions.values():
            reception.close()
        await super().shutdown(sockets)
