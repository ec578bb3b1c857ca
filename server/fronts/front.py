"""A front-end process: HTTP, authentication, decoding and encoding of infer requests. Home runs them."""

import asyncio
import logging
import os
import socket
from collections.abc import Callable
from functools import partial
from typing import Any

from starlette.types import ASGIApp

from cobatch.engines.link.channel import Channel
from cobatch.engines.link.messages import decode_to_front
from cobatch.engines.link.slab import SlabReader, SlabWriter
from cobatch.server.fronts.app import front_app
from cobatch.server.fronts.child_server import ChildServer
from cobatch.server.fronts.control import HEARTBEAT_S, LinkEnds, Parent
from cobatch.server.fronts.hand_over import HandOver
from cobatch.server.fronts.model import FrontModel
from cobatch.server.fronts.relay import front_protocol
from cobatch.server.fronts.reports import Reporter
from cobatch.server.inference.service import Inference
from cobatch.server.links.accounts import FrontTenant, share_accounts
from cobatch.server.links.page import Page
from cobatch.server.links.uplink import Uplink
from cobatch.server.observability.output import LogStream
from cobatch.server.settings.schema import Settings

log = logging.getLogger("cobatch.fronts")


class Uplinks:
    """The link to home, and the models that it gives access to. `on_broken` is called at a bad message."""

    def __init__(self, settings: Settings, fronts: int, connections: Callable[[], int] = lambda: 0) -> None:
        self.models = [FrontModel(model, index, fronts) for index, model in enumerate(settings.models)]
        self.current: Uplink | None = None
        self.on_broken: Callable[[], None] = lambda: None
        self._connections = connections

    def make_inference(self, settings: Settings, log_stream: LogStream | None) -> Inference:
        """Return the front's models."""
        self.inference = Inference(settings, log_stream, self.models)
        auth = self.inference.auth
        self._accounts = None if auth is None else share_accounts(auth.tenants, FrontTenant)
        self._reporter = Reporter(self.inference, self._connections)
        return self.inference

    def use(self, ends: LinkEnds) -> None:
        """Use a link to home; it replaces an earlier one."""
        if self.current is not None:
            self.current.end("another one takes its place")
        self.current = uplink = Uplink(
            Channel(ends.messages, decode_to_front),
            SlabReader(ends.slab_in),
            SlabWriter(ends.slab_out),
            Page(ends.page, len(self.models), self._accounts, writable=False),
            self.models,
            asyncio.get_running_loop(),
            on_loaded=self.inference.tell_if_ready,
            on_ended=self._on_ended,
        )
        uplink.on_collect = self.report
        self.inference.tell_if_ready()  # there may be no models, only pipelines

    def report(self, asked: int = 0) -> None:
        """Tell home what this front has counted."""
        if self.current is not None:
            self._reporter.report(self.current.report, asked)

    def report_news(self) -> None:
        """Tell home if there is something new, so that it is not lost with this process."""
        if self._reporter.has_news():
            self.report()

    def is_alive(self) -> bool:
        """Return False while there is no home, or its event loop does not run."""
        return self.current is not None and not self.current.stalled

    def _on_ended(self, why: str, broken: bool) -> None:
        self.current = None
        if broken:
            log.critical("the link to the engine process cannot be used any more: %s", why)
            self.on_broken()


class Front(ChildServer):
    """The server of a front."""

    def __init__(self, settings: Settings, log_stream: LogStream | None, parent: Parent) -> None:
        self.uplinks = Uplinks(settings, parent.start.fronts, lambda: len(self.server_state.connections))
        self.uplinks.on_broken = partial(os._exit, 1)  # the supervisor starts another front
        self.hand_over = HandOver(self.uplinks.is_alive)
        super().__init__(settings, log_stream, parent)

    def make_inference(self, settings: Settings, log_stream: LogStream | None) -> Inference:
        return self.uplinks.make_inference(settings, log_stream)

    def make_app(self, inference: Inference) -> ASGIApp:
        return front_app(inference)

    def make_http(self, inference: Inference) -> Any:
        return front_protocol(inference, self.hand_over)

    def add_link(self, front: int, ends: LinkEnds) -> None:
        self.hand_over.attach(ends.handover)
        self.uplinks.use(ends)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._beat()

    def _beat(self) -> None:
        self.parent.beat(self.closed_connections)
        self.uplinks.report_news()
        asyncio.get_running_loop().call_later(HEARTBEAT_S, self._beat)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        await super().shutdown(sockets)
        self.uplinks.report()
