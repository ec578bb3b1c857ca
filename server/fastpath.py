"""The infer routes below ASGI: uvicorn's own HTTP protocol with a short cut.

The connection keeps its rules (`server.connection`): parsing, pipelining, limits, the end. When a
request's headers are complete and it is a plain POST to an infer route with nothing before it in the
pipeline, it gets a `FastCycle` in place of uvicorn's `RequestResponseCycle`: no scope, no task, no
coroutine; the body goes to the handler core, whose callback writes the whole response in one piece.
Anything else takes uvicorn's way into the Starlette application.

A second short cut: clients repeat their headers to the byte. A header block that httptools has
parsed and that led to the fast path is remembered with what it said, and when the same bytes arrive
again at a message's start, together with exactly its body, the parser is not asked again. The same
bytes mean the same thing, so this decides nothing that httptools has not decided before.
"""

from __future__ import annotations

import asyncio
import time
from typing import Any

from uvicorn.config import Config
from uvicorn.server import ServerState

from server.auth.authenticator import Authenticator
from server.auth.bearer import credential_in
from server.auth.principal import Principal
from server.auth.standing import standing
from server.compression import choose, compress
from server.connection import BODY, NOTHING, Connection
from server.core import Core, InferRequest, instance_of
from server.model import Model
from server.observe import LEFT, LEFT_SLUG, Observer
from server.problems import Problem, too_large
from server.record import INFER_ROUTE, MARKS, Record, reply_headers
from server.reply import Reply

_KNOWN_BLOCKS = 4096
_KNOWN_BLOCK_BYTES = 4096
# Headers that make a request take the long way.
_UNUSUAL = frozenset((b"content-encoding", b"upgrade", b"transfer-encoding", b"expect"))


class _NoEvent:
    """Stands where uvicorn sets an event to wake a waiting coroutine: the fast path has none."""

    def set(self) -> None:
        pass


_NO_EVENT = _NoEvent()


class Known:
    """What a header block said: all that the fast path needs to know of it."""

    __slots__ = (
        "coding",
        "json_length",
        "keep_alive",
        "length",
        "marks",
        "model",
        "path",
        "principal",
        "refusal",
    )

    def __init__(
        self,
        model: Model,
        length: int,
        json_length: int | None,
        keep_alive: bool,
        coding: bytes | None,
        path: str,
    ) -> None:
        self.model = model
        self.principal: Principal | None = None
        self.refusal: Problem | None = None
        self.length = length
        self.json_length = json_length
        self.keep_alive = keep_alive
        self.coding = coding
        self.path = path
        # Headers that are another request's no more: under which name the caller knows this one.
        self.marks: list[tuple[bytes, bytes]] = []


class FastCycle:
    """One request on the fast path; has what the protocol reads of uvicorn's cycle."""

    __slots__ = (
        "body",
        "disconnected",
        "keep_alive",
        "known",
        "message_event",
        "more_body",
        "protocol",
        "received_s",
        "record",
        "request",
        "response_complete",
    )

    def __init__(self, protocol: FastProtocol, known: Known) -> None:
        self.protocol = protocol
        self.known = known
        self.keep_alive = known.keep_alive
        self.received_s = time.monotonic()
        # Only where somebody wants it.
        self.record = self._begin() if known.marks or protocol.observer.watched else None
        self.disconnected = False
        self.response_complete = False
        self.message_event = _NO_EVENT
        self.body: bytes | bytearray = b""
        self.more_body = True
        self.request: InferRequest | None = None

    @property
    def response_started(self) -> bool:
        """It is written in one piece."""
        return self.response_complete

    def reply(self, reply: Reply) -> None:
        """Answer the request. Called once, unless the connection was lost first."""
        protocol = self.protocol
        if reply.request_id is None and self.record is None:
            # Not an answer that says by its id where it rode.
            self.record = self._new_record()
            if self.request is not None:
                self.record.ran(self.request)
        self.request = None  # or the two would keep each other until the next garbage collection
        coding = self.known.coding
        if coding is None or reply.length < protocol.core.settings.server.compress_min_bytes:
            self._write(reply)
            return
        # In a thread: it would hold up everybody else.
        packing = protocol.loop.run_in_executor(None, compress, reply, coding)
        packing.add_done_callback(lambda done: self._write(reply if done.exception() else done.result()))

    def _begin(self) -> Record | None:
        marks, observer = self.known.marks, self.protocol.observer
        drawn = observer.draw()
        if not (drawn or marks or observer.each):
            return None
        record = self._new_record()
        for name, value in marks:
            record.mark(name, value)
        observer.begin(record, drawn)
        return record

    def _new_record(self) -> Record:
        known = self.known
        record = Record("", "POST", known.path, self.received_s)
        record.route = INFER_ROUTE
        record.scheme = "https" if self.protocol.config.is_ssl else "http"
        record.model = known.model.name
        if known.principal is not None:
            record.tenant = known.principal.tenant.name
        return record

    def refuse(self, refusal: Reply) -> None:
        """Answer before the body is read, which is dropped then."""
        if self.record is None:
            self.record = self._new_record()
        self._write(refusal)

    def _write(self, reply: Reply) -> None:
        self.response_complete = True
        principal = self.known.principal
        if principal is not None and self.protocol.core.shows_standing and principal.tenant.limited:
            reply.headers += standing(principal.tenant, time.monotonic())
        if self.record is not None:
            self._name(reply, self.record)
        written_s = None if self.disconnected else self.protocol.write_reply(reply, self.keep_alive)
        if written_s is not None:
            self.known.model.fast_traffic.count(reply.status, reply.slug, written_s - self.received_s)
            if self.record is not None:
                self._tell(self.record, reply.status, reply.slug, written_s)

    @staticmethod
    def _name(reply: Reply, record: Record) -> None:
        """The caller's id goes before ours."""
        if not record.request_id and reply.request_id is not None:
            record.request_id = reply.request_id.decode()
        reply.request_id = None
        reply.headers += reply_headers(record)

    def leave(self) -> None:
        """The client is gone before it was answered."""
        core = self.protocol.core
        if self.request is not None:
            core.cancel(self.request)
        self.known.model.fast_traffic.count(LEFT, LEFT_SLUG, 0.0)
        self._tell(self.record or self._new_record(), LEFT, LEFT_SLUG, time.monotonic())

    def _tell(self, record: Record, status: int, slug: str, answered_s: float) -> None:
        record.status, record.slug, record.answered_s = status, slug, answered_s
        self.protocol.observer.request_done(record)


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
        cycle = FastCycle(self, known)
        self.cycle = cycle  # type: ignore[assignment]
        core = self.core
        cycle.request = core.infer(
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
        known = self._recognise()
        if known is None:
            self._take_long_way()
            return
        self.receiving = BODY
        cycle = FastCycle(self, known)
        self.cycle = cycle  # type: ignore[assignment]
        refusal: Reply | None
        if known.refusal is not None:
            refusal = known.refusal.reply(instance=instance_of(known.model))
        else:
            refusal = self.core.refusal(known.model, known.principal)
        limit = self.core.settings.server.max_body_bytes
        if refusal is not None and known.length > limit:
            refusal.close = True  # nobody reads so much only to drop it
        elif known.length > limit:
            refusal = too_large(known.length, limit).reply(instance=instance_of(known.model))
        if refusal is not None:
            # At once, not compressed in a thread: what follows must find the request answered.
            cycle.refuse(refusal)

    def _recognise(self) -> Known | None:
        """What a plain request to an infer route says in its headers; None for any other request."""
        cycle = self.cycle
        if self.pipeline or not (cycle is None or cycle.response_complete):
            return None
        model = self.core.infer_targets.get(self.url)
        if model is None or self.parser.get_method() != b"POST":
            return None
        length = -1
        json_length: int | None = None
        coding: bytes | None = None
        marks: list[tuple[bytes, bytes]] = []
        for name, value in self.headers:
            if name == b"content-length":
                length = int(value)
            elif name == b"inference-header-content-length":
                if json_length is not None or not value.isdigit() or len(value) > 18:
                    return None
                json_length = int(value)
            elif name == b"accept-encoding":
                coding = choose(value)
            elif name in MARKS:
                marks.append((name, value))
            elif name in _UNUSUAL:
                return None
        if length < 0 or json_length == 0 or self.parser.get_http_version() != "1.1":
            return None
        keep_alive = self.parser.should_keep_alive()
        known = Known(model, length, json_length, keep_alive, coding, self.url.decode("ascii"))
        known.marks = marks
        return known if self.core.auth is None or self._recall_caller(self.core.auth, known) else None

    def _recall_caller(self, auth: Authenticator, known: Known) -> bool:
        """Note who calls, or why he may not. False where a signature has to be checked: that can wait
        for the issuer's keys, which the long way does."""
        recalled: Principal | Problem | None
        try:
            recalled = auth.recall(credential_in(self.headers, b"", auth.challenges))
        except Problem as problem:
            recalled = problem
        if isinstance(recalled, Principal):
            known.principal = recalled
        else:
            known.refusal = recalled
        return recalled is not None

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
            self._remember(cycle)
            known = cycle.known
            cycle.request = self.core.infer(
                known.model, cycle.body, known.json_length, cycle.reply, known.principal, cycle.record
            )

    def _remember(self, cycle: FastCycle) -> None:
        """Keep the header block if this message came in one chunk with nothing else in it."""
        chunk = self._chunk
        if chunk is None or not cycle.keep_alive or cycle.known.marks:
            return
        assert self.core.auth is None or cycle.known.principal is not None
        end = chunk.find(b"\r\n\r\n") + 4
        if end > _KNOWN_BLOCK_BYTES or len(chunk) - end != cycle.known.length:
            return
        blocks = self.known_blocks
        if len(blocks) >= _KNOWN_BLOCKS:
            del blocks[next(iter(blocks))]
        blocks[chunk[:end]] = cycle.known


def make_protocol(core: Core) -> type[FastProtocol]:
    """The protocol class for one server, to be given to uvicorn as `http`."""
    return type(
        "CobatchProtocol", (FastProtocol,), {"core": core, "observer": core.observer, "known_blocks": {}}
    )
