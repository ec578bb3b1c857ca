"""Infer requests below ASGI: no scope, no task, no coroutine.

A plain POST to an infer route, with no request before it in the pipeline, gets a `FastExchange`. Its body
goes to `Inference.infer`, whose callback writes the whole response at once. Any other request goes through
ASGI.

If a header block that led here arrives again, to the byte and together with exactly its body, the parser is
not asked (`server.edge.header_cache`).
"""

from __future__ import annotations

import time
from collections.abc import Hashable
from functools import partial
from typing import Any

from cobatch.server.auth.tenants import rate_limit_headers
from cobatch.server.edge.connection import Connection
from cobatch.server.edge.exchange import Exchange, client_in
from cobatch.server.edge.framing import BODY
from cobatch.server.edge.header_cache import CachedHeaders, HeaderCache, match, store
from cobatch.server.http.body import Body, joined
from cobatch.server.http.body_memory import FREE_BYTES
from cobatch.server.http.problem import too_large
from cobatch.server.http.reply import Reply
from cobatch.server.inference.service import Inference
from cobatch.server.observability.record import INFER_ROUTE, RequestRecord


class FastExchange(Exchange, kw_only=True):
    """An infer request on its connection, from its headers to its response."""

    connection: FastConnection
    block: CachedHeaders
    keep_alive: bool
    body: Body = b""
    response_complete: bool = False

    @property
    def client(self) -> Hashable:
        return self.connection.client

    @property
    def running(self) -> bool:
        """The body is dropped with the request."""
        return False

    @property
    def response_started(self) -> bool:
        """The response is written in one piece."""
        return self.response_complete

    def make_record(self) -> RequestRecord:
        block = self.block
        record = self.record = RequestRecord("", "POST", block.path, self.received_s)
        record.route = INFER_ROUTE
        record.scheme = "https" if self.connection.config.is_ssl else "http"
        record.model = block.model.name
        if block.principal is not None:
            record.tenant = block.principal.tenant.name
        for name, value in block.marks:
            record.mark(name, value)
        return record

    @property
    def content_length(self) -> int:
        """Bytes of the body."""
        return self.block.length

    def on_body(self, data: bytes) -> None:
        """Keep a part of the body, unless the request is refused already."""
        if not self.response_complete:
            self.body = joined(self.body, data, self.connection.body_bytes, self.block.length)

    def on_end(self) -> None:
        """Infer with the whole body."""
        if not self.response_complete:
            block = self.block
            connection = self.connection
            if connection.chunk is not None:
                assert self.inference.auth is None or block.principal is not None
                store(connection.cache, connection.chunk, block)
            body, self.body = self.body, b""  # it is gone when it is decoded
            self.request = self.inference.infer(
                block.model, body, block.json_length, self.on_reply, block.principal
            )

    def deliver(self, reply: Reply) -> None:
        self.response_complete = True
        block = self.block
        principal = block.principal
        if principal is not None and self.inference.rate_limit_headers and principal.tenant.limited:
            reply.headers += rate_limit_headers(principal.tenant, time.monotonic())
        if self.record is not None or reply.request_id is None:
            self.add_id(reply)
        written_s = self.connection.write_reply(reply, self.keep_alive)
        if written_s is not None:
            self.finish(block.model, reply.status, reply.slug, written_s)

    def on_disconnect(self) -> None:
        """Drop the request, unless it is answered."""
        if not self.response_complete:
            self.response_complete = True
            self.body = b""
            self.leave(self.block.model, time.monotonic())


class FastConnection(Connection):
    """One connection with the fast path. `cache` is the server's."""

    __slots__ = ("cache", "chunk")

    def __init__(self, inference: Inference, cache: HeaderCache, **of_uvicorn: Any) -> None:
        super().__init__(inference, **of_uvicorn)
        self.cache = cache
        self.chunk: bytes | None = None  # the bytes being parsed, if a message begins there

    @property
    def client(self) -> Hashable:
        """The address and port of the other end, None for a Unix socket."""
        return client_in(self._scope)

    def data_received(self, data: bytes) -> None:
        if not self.receiving:
            cycle = self.cycle
            if cycle is None or (cycle.response_complete and not self.pipeline):
                end = data.find(b"\r\n\r\n") + 4
                block = self.cache.get(data[:end])
                if block is not None and len(data) - end == block.length:
                    principal = block.principal
                    if principal is None or principal.expires_s > time.time():
                        exchange = self._new_exchange(block)
                        exchange.request = self.inference.infer(
                            block.model, data[end:], block.json_length, exchange.on_reply, principal
                        )
                        return
                    del self.cache[data[:end]]
                self.chunk = data
        super().data_received(data)
        self.chunk = None

    def _new_exchange(self, block: CachedHeaders) -> FastExchange:
        exchange = FastExchange(
            self.inference,
            time.monotonic(),
            coding=block.coding,
            connection=self,
            block=block,
            keep_alive=block.keep_alive,
        )
        self.cycle = exchange
        if block.marks or self.inference.observer.watched:
            exchange.begin(bool(block.marks))
        return exchange

    def begin_request(self, last: dict[bytes, bytes]) -> None:
        before = self.cycle
        block = None
        if not self.pipeline and (before is None or before.response_complete):
            block = match(self.inference, self.parser, self.url, self.headers)
        if block is None:
            super().begin_request(last)
            return
        self.receiving = BODY
        self._allowed_bytes = FREE_BYTES
        exchange = self._new_exchange(block)
        problem = block.refusal or self.inference.admit(block.model, block.principal)
        limit = self.inference.settings.server.max_body_bytes
        if block.json_length is None:
            limit = self.inference.max_json_bytes
        too_long = block.length > limit
        if too_long and problem is None:
            problem = too_large(block.length, limit)
        if problem is not None:
            reply = problem.reply(instance=block.model.infer_path)
            reply.close |= too_long  # the body is not read
            # Without compression in a thread: the bytes that follow must find the request answered.
            exchange.deliver(reply)


def make_protocol(inference: Inference) -> Any:
    """Return the factory of connections, for uvicorn's `http`."""
    if not inference.settings.server.fast_path:
        return partial(Connection, inference)
    return partial(FastConnection, inference, {})
