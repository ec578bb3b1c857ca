"""The process with scheduler, engines and all routes but infer: today's server, and links to the fronts."""

import asyncio
import contextlib
import logging
import socket
import time
from collections.abc import Callable, Collection
from functools import partial
from typing import Any

from cobatch.engines.link.slab import SlabReader, SlabWriter
from cobatch.server.fronts.child_server import ChildServer
from cobatch.server.fronts.control import EndFront, LinkEnds, Parent
from cobatch.server.fronts.reception import HomeConnection, Reception
from cobatch.server.fronts.reports import Reports
from cobatch.server.inference.service import Inference
from cobatch.server.links.accounts import HomeTenant, share_accounts
from cobatch.server.links.downlink import Downlink
from cobatch.server.links.hub import Hub, hub_of
from cobatch.server.observability.output import LogStream
from cobatch.server.settings.schema import Settings

log = logging.getLogger("cobatch.fronts")


class Downlinks:
    """The links to all fronts, by their number.

    `on_broken` is told of a front that sent a bad message, `on_none` that no link is left.
    """

    def __init__(self, inference: Inference, hub: Hub) -> None:
        self.links: dict[int, Downlink] = {}
        self.on_broken: Callable[[int, str], None] = lambda front, why: None
        self.on_none: Callable[[], None] = lambda: None
        self.hub = hub
        auth = inference.auth
        self._accounts = None if auth is None else share_accounts(auth.tenants, HomeTenant)
        self._reports = Reports(inference, self._ask)

    def use_page(self, descriptor: int) -> None:
        """Write a page that fronts read, with each heartbeat too."""
        self.hub.add_page(descriptor, self._accounts)

    def add(self, front: int, ends: LinkEnds) -> None:
        """Use a link to a front; it replaces an earlier one."""
        before = self.links.get(front)
        slabs = SlabReader(ends.slab_in), SlabWriter(ends.slab_out)
        link = self.hub.add(front, ends.messages, *slabs, self._on_ended)
        self.links[front] = link
        if before is not None:
            before.end("another one takes its place")
        link.on_report = partial(self._reports.on_report, front)

    def close(self) -> None:
        """End all links."""
        for link in list(self.links.values()):
            link.end("home ends")

    def _ask(self, number: int) -> Collection[int]:
        """Ask all fronts for a report; return their numbers."""
        for link in self.links.values():
            link.collect(number)
        return self.links

    def _on_ended(self, link: Downlink, why: str, broken: bool) -> None:
        if self.links.get(link.number) is link:
            del self.links[link.number]
            self._reports.gone(link.number)
        if broken:
            self.on_broken(link.number, why)
        if not self.links:
            self.on_none()


class Home(ChildServer):
    """The server of home. Its batchers take requests of fronts until all links have ended."""

    def __init__(self, settings: Settings, log_stream: LogStream | None, parent: Parent) -> None:
        super().__init__(settings, log_stream, parent)
        self._receptions: dict[int, Reception] = {}
        self._unlinked = asyncio.Event()
        self._unlinked.set()
        self.downlinks = Downlinks(self.inference, hub_of(self.inference))
        self.downlinks.on_broken = self._on_broken
        self.downlinks.on_none = self._unlinked.set

    def make_http(self, inference: Inference) -> Any:
        return partial(HomeConnection, inference)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        self.downlinks.use_page(self.parent.page)
        await super().startup(sockets)

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
