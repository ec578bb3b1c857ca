"""The infer routes below ASGI: uvicorn's own HTTP protocol with a short cut.

Uvicorn's httptools protocol stays in charge of the connection: parsing, pipelining, keep-alive,
flow control, shutdown. When a request's headers are complete and it is a plain POST to an infer
route with nothing before it in the pipeline, it gets a `FastCycle` in place of uvicorn's
`RequestResponseCycle`: no scope, no task, no coroutine; the body goes to the handler core, whose
callback writes the whole response in one piece. Anything else takes uvicorn's way into the
Starlette application.

A second short cut: clients repeat their headers to the byte. A header block that httptools has
parsed and that led to the fast path is remembered with what it said, and when the same bytes arrive
again at a message's start, together with exactly its body, the parser is not asked again. The same
bytes mean the same thing, so this decides nothing that httptools has not decided before.

One timer per connection, armed for the nearest of its limits and late by design: it looks at what
the connection has been doing and arms itself again, so a request costs no timer.
"""

from __future__ import annotations

import asyncio
import time
from typing import Any

from uvicorn.config import Config
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol
from uvicorn.server import ServerState

from server.compression import choose, compress
from server.core import Core, InferRequest
from server.model import Model
from server.problems import Problem, too_large
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

    __slots__ = ("coding", "json_length", "keep_alive", "length", "model")

    def __init__(
        self, model: Model, length: int, json_length: int | None, keep_alive: bool, coding: bytes | None
    ) -> None:
        self.model = model
        self.length = length
        self.json_length = json_length
        self.keep_alive = keep_alive
        self.coding = coding

    def without_coding(self) -> Known:
        """The same for a request that takes no compressed answer."""
        return Known(self.model, self.length, self.json_length, self.keep_alive, None)


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
        "request",
        "response_complete",
    )

    def __init__(self, protocol: FastProtocol, known: Known) -> None:
        self.protocol = protocol
        self.known = known
        self.keep_alive = known.keep_alive
        self.disconnected = False
        self.response_complete = False
        self.message_event = _NO_EVENT
        self.body: bytes | bytearray = b""
        self.more_body = True
        self.request: InferRequest | None = None

    def reply(self, reply: Reply) -> None:
        """Write the response. Called once, unless the connection was lost first."""
        protocol = self.protocol
        self.request = None  # or the two would keep each other until the next garbage collection
        coding = self.known.coding
        if coding is not None and reply.length >= protocol.core.settings.server.compress_min_bytes:
            # In a thread, as it would hold up everybody else; this comes back with the result.
            self.known = self.known.without_coding()
            packing = protocol.loop.run_in_executor(None, compress, reply, coding)
            packing.add_done_callback(lambda done: self.reply(done.result()))
            return
        self.response_complete = True
        if not self.disconnected:
            protocol.write_reply(reply, self.keep_alive)


class FastProtocol(HttpToolsProtocol):
    """One connection. `core` is set by `make_protocol`."""

    core: Core
    known_blocks: dict[bytes, Known]
    _date_headers: tuple[list[tuple[bytes, bytes]] | None, bytes] = (None, b"")

    def __init__(
        self,
        config: Config,
        server_state: ServerState,
        app_state: dict[str, Any],
        _loop: asyncio.AbstractEventLoop | None = None,
    ) -> None:
        super().__init__(config, server_state, app_state, _loop)
        self._mid_message = False
        self._chunk: bytes | None = None
        self._since_s = time.monotonic()
        self._timer: asyncio.TimerHandle | None = None

    # The connection

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._tick()

    def connection_lost(self, exc: Exception | None) -> None:
        cycle = self.cycle
        super().connection_lost(exc)
        if self._timer is not None:
            self._timer.cancel()
        if isinstance(cycle, FastCycle) and cycle.request is not None and not cycle.response_complete:
            self.core.cancel(cycle.request)

    def _tick(self) -> None:
        """Close the connection if it has been idle, or receiving one request, for too long."""
        if self.transport.is_closing():
            return
        settings = self.core.settings.server
        cycle = self.cycle
        answering = cycle is not None and not cycle.response_complete and not self._mid_message
        receiving = self._mid_message or cycle is None  # the first request has yet to come
        limit_s = settings.receive_timeout_s if receiving or answering else settings.keep_alive_s
        left_s = limit_s if answering else self._since_s + limit_s - time.monotonic()
        if left_s > 0:
            # A message that begins while this sleeps is looked at no later than its own limit asks.
            self._timer = self.loop.call_later(min(left_s, settings.receive_timeout_s), self._tick)
            return
        if self._mid_message and (isinstance(cycle, FastCycle) or cycle is None or cycle.response_complete):
            # Nobody else answers: its headers have not come, or the fast path waits for its body.
            late = Problem("receive-timeout", f"the request did not arrive within {limit_s:g} s", close=True)
            self.write_reply(late.reply(), keep_alive=False)
        self.transport.close()

    # Bytes in

    def data_received(self, data: bytes) -> None:
        if not self._mid_message:
            cycle = self.cycle
            if cycle is None or (cycle.response_complete and not self.pipeline):
                end = data.find(b"\r\n\r\n") + 4
                known = self.known_blocks.get(data[:end])
                if known is not None and len(data) - end == known.length:
                    self._serve(known, data[end:])
                    return
                self._chunk = data
        super().data_received(data)
        self._chunk = None

    def _serve(self, known: Known, body: bytes) -> None:
        cycle = FastCycle(self, known)
        self.cycle = cycle  # type: ignore[assignment]
        cycle.request = self.core.infer(known.model, body, known.json_length, cycle.reply)

    # The parser's callbacks

    def on_message_begin(self) -> None:
        # Uvicorn makes the ASGI scope here; `_take_long_way` does so when it is needed.
        self._mid_message = True
        self._since_s = time.monotonic()
        self.url = b""
        self.expect_100_continue = False
        self.headers = []

    def on_headers_complete(self) -> None:
        known = self._recognise()
        if known is None:
            self._take_long_way()
            return
        cycle = FastCycle(self, known)
        self.cycle = cycle  # type: ignore[assignment]
        refusal = self.core.refusal(known.model)
        if refusal is not None:
            cycle.reply(refusal)
        elif known.length > (limit := self.core.settings.server.max_body_bytes):
            cycle.reply(too_large(known.length, limit).reply())

    def _take_long_way(self) -> None:
        url, headers, expect = self.url, self.headers, self.expect_100_continue
        super().on_message_begin()
        self.url = url
        self.headers.extend(headers)
        self.expect_100_continue = expect
        super().on_headers_complete()

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
        for name, value in self.headers:
            if name == b"content-length":
                length = int(value)
            elif name == b"inference-header-content-length":
                if json_length is not None or not value.isdigit() or len(value) > 18:
                    return None
                json_length = int(value)
            elif name == b"accept-encoding":
                coding = choose(value)
            elif name in _UNUSUAL:
                return None
        if length < 0 or json_length == 0 or self.parser.get_http_version() != "1.1":
            return None
        return Known(model, length, json_length, self.parser.should_keep_alive(), coding)

    def on_body(self, body: bytes) -> None:
        cycle = self.cycle
        if not isinstance(cycle, FastCycle):
            super().on_body(body)
        elif not cycle.response_complete:
            if not cycle.body:
                cycle.body = body
            elif type(cycle.body) is bytearray:
                cycle.body += body
            else:
                cycle.body = bytearray(cycle.body)
                cycle.body += body

    def on_message_complete(self) -> None:
        self._mid_message = False
        cycle = self.cycle
        if not isinstance(cycle, FastCycle):
            super().on_message_complete()
        elif not cycle.response_complete:
            cycle.more_body = False
            self._remember(cycle)
            known = cycle.known
            cycle.request = self.core.infer(known.model, cycle.body, known.json_length, cycle.reply)

    def _remember(self, cycle: FastCycle) -> None:
        """Keep the header block if this message came in one chunk with nothing else in it."""
        chunk = self._chunk
        if chunk is None or not cycle.keep_alive:
            return
        end = chunk.find(b"\r\n\r\n") + 4
        if end > _KNOWN_BLOCK_BYTES or len(chunk) - end != cycle.known.length:
            return
        blocks = self.known_blocks
        if len(blocks) >= _KNOWN_BLOCKS:
            del blocks[next(iter(blocks))]
        blocks[chunk[:end]] = cycle.known

    # Bytes out

    def write_reply(self, reply: Reply, keep_alive: bool) -> None:
        """Write a whole response and go on with the connection, or end it."""
        transport = self.transport
        if transport.is_closing():
            return
        pieces: list[bytes | memoryview] = [STATUS_LINE[reply.status], self._default_headers()]
        pieces.append(b"content-type: %b\r\ncontent-length: %d\r\n" % (reply.content_type, reply.length))
        if reply.timing is not None:
            pieces.append(b"server-timing: %b\r\n" % reply.timing)
        if reply.json_length is not None:
            pieces.append(b"inference-header-content-length: %d\r\n" % reply.json_length)
        if reply.headers:
            pieces.extend([b"%b: %b\r\n" % header for header in reply.headers])
        if reply.close or not keep_alive:
            keep_alive = False
            pieces.append(b"connection: close\r\n")
        pieces.append(b"\r\n")
        pieces.extend(reply.body)
        transport.write(b"".join(pieces))
        if not keep_alive:
            transport.close()
        self.on_response_complete()

    def send_400_response(self, msg: str) -> None:
        self.write_reply(Problem("bad-http", msg, close=True).reply(), keep_alive=False)

    def _default_headers(self) -> bytes:
        """Uvicorn's default headers (the date) as bytes; made anew when uvicorn does, each second."""
        headers = self.server_state.default_headers
        cls = type(self)
        if cls._date_headers[0] is not headers:
            cls._date_headers = (headers, b"".join([b"%b: %b\r\n" % header for header in headers]))
        return cls._date_headers[1]

    def on_response_complete(self) -> None:
        # Uvicorn arms a keep-alive timer here for each response; `_tick` needs only the time.
        self.server_state.total_requests += 1
        self._since_s = time.monotonic()
        if self.transport.is_closing():
            return
        if not self.flow.write_paused:
            self.flow.resume_reading()
        if self.pipeline:
            cycle, app = self.pipeline.pop()
            self._start_asgi_task(cycle, app)

    def pause_writing(self) -> None:
        # The client does not read its answers: take no more requests from it until it does.
        super().pause_writing()
        self.flow.pause_reading()

    def resume_writing(self) -> None:
        super().resume_writing()
        if not self.pipeline:
            self.flow.resume_reading()


def make_protocol(core: Core) -> type[FastProtocol]:
    """The protocol class for one server, to be given to uvicorn as `http`."""
    return type("CobatchProtocol", (FastProtocol,), {"core": core, "known_blocks": {}})
