"""The infer routes below ASGI: uvicorn's own HTTP protocol with a short cut.

The connection keeps its rules (`server.edge.connection`): parsing, pipelining, limits, the end. When a
request's headers are complete and it is a plain POST to an infer route with nothing before it in the
pipeline, it gets a `FastCycle` (`server.edge.fast_cycle`) in place of uvicorn's `RequestResponseCycle`: no
scope, no task, no coroutine; the body goes to the handler core, whose callback writes the whole response in
one piece. Anything else takes uvicorn's way into the Starlette application.

A second short cut: where a header block that led to the fast path arrives again at a message's start, to the
byte and together with exactly its body, the parser is not asked again (`server.edge.header_cache`).
"""

from __future__ import annotations

import asyncio
import time
from typing import Any

from uvicorn.config import Config
from uvicorn.server import ServerState

from cobatch.server.edge.connection import BODY, NOTHING, Connection
from cobatch.server.edge.fast_cycle import FastCycle
from cobatch.server.edge.header_cache import Known, recognise, remember
from cobatch.server.http.problem import too_large
from cobatch.server.http.reply import Reply
from cobatch.server.inference.service import Inference
from cobatch.server.observability.observer import Observer


class FastProtocol(Connection):
    """One connection. `core`, `observer` and `known_blocks` are set by `make_protocol`."""

    observer: Observer
    known_blocks: dict[bytes, Known]

    def __init__(
        self,
        config: Config,
        server_state: ServerState,
        app_state: dict[str, Any],
        _loop: asyncio.AbstractEventLoop | None = None,
    ) -> None:
        super().__init__(config, server_state, app_state, _loop)
        # Its class has them; what is the object's own is found with fewer steps.
        self.observer = self.observer
        self.known_blocks = self.known_blocks
        self._chunk: bytes | None = None

    def connection_lost(self, exc: Exception | None) -> None:
        cycles = dict.fromkeys((self.cycle, self.ahead))
        super().connection_lost(exc)
        for cycle in cycles:
            if isinstance(cycle, FastCycle) and not cycle.response_complete:
                cycle.leave()

    def data_received(self, data: bytes) -> None:
        if not self.receiving:
            cycle = self.cycle
            if cycle is None or (cycle.response_complete and not self.pipeline):
                end = data.find(b"\r\n\r\n") + 4
                known = self.known_blocks.get(data[:end])
                if known is not None and len(data) - end == known.length:
                    principal = known.principal
                    if principal is None or principal.expires_s > time.time():
                        self._serve(known, data[end:])
                        return
                    del self.known_blocks[data[:end]]
                self._chunk = data
        super().data_received(data)
        self._chunk = None

    def _serve(self, known: Known, body: bytes) -> None:
        cycle = FastCycle(self, known, known.keep_alive, time.monotonic())
        self.cycle = cycle  # type: ignore[assignment]
        if self.observer.watched:
            cycle.begin()
        cycle.request = self.core.infer(
            known.model, body, known.json_length, cycle.reply, known.principal, cycle.record
        )

    # The parser's callbacks

    def on_message_begin(self) -> None:
        # Uvicorn makes the ASGI scope here; `_take_long_way` does so when it is needed.
        self.begin_receiving()
        self.url = b""
        self.expect_100_continue = False
        self.headers = []

    def _take_long_way(self) -> None:
        url, headers, expect = self.url, self.headers, self.expect_100_continue
        super().on_message_begin()
        self.url = url
        self.headers.extend(headers)
        self.expect_100_continue = expect
        super().on_headers_complete()

    def on_headers_complete(self) -> None:
        before = self.cycle
        known = None
        if not self.pipeline and (before is None or before.response_complete):
            known = recognise(self.core, self.parser, self.url, self.headers)
        if known is None:
            self._take_long_way()
            return
        self.receiving = BODY
        cycle = FastCycle(self, known, known.keep_alive, time.monotonic())
        self.cycle = cycle  # type: ignore[assignment]
        if known.marks or self.observer.watched:
            cycle.begin()
        refusal = self._refusal(known)
        if refusal is not None:
            # At once, not compressed in a thread: what follows must find the request answered.
            cycle.refuse(refusal)

    def _refusal(self, known: Known) -> Reply | None:
        """The answer to a request whose body need not be read, or None."""
        problem = known.refusal or self.core.admit(known.model, known.principal)
        limit = self.core.settings.server.max_body_bytes
        too_long = known.length > limit
        if too_long and problem is None:
            problem = too_large(known.length, limit)
        if problem is None:
            return None
        reply = problem.reply(instance=known.model.infer_path)
        reply.close |= too_long  # reading so much only to drop it would be the attack
        return reply

    def on_body(self, body: bytes) -> None:
        cycle = self.cycle
        if not isinstance(cycle, FastCycle):
            super().on_body(body)
            return
        self._body_bytes += len(body)
        if not cycle.response_complete:
            if not cycle.body:
                cycle.body = body
            elif type(cycle.body) is bytearray:
                cycle.body += body
            else:
                cycle.body = bytearray(cycle.body)
                cycle.body += body

    def on_message_complete(self) -> None:
        cycle = self.cycle
        if not isinstance(cycle, FastCycle):
            super().on_message_complete()
            return
        self.receiving = NOTHING
        if not cycle.response_complete:
            cycle.more_body = False
            known = cycle.known
            if self._chunk is not None:
                assert self.core.auth is None or known.principal is not None
                remember(self.known_blocks, self._chunk, known)
            cycle.request = self.core.infer(
                known.model, cycle.body, known.json_length, cycle.reply, known.principal, cycle.record
            )


def make_protocol(core: Inference) -> type[FastProtocol]:
    """The protocol class for one server, to be given to uvicorn as `http`."""
    return type(
        "CobatchProtocol", (FastProtocol,), {"core": core, "observer": core.observer, "known_blocks": {}}
    )
