"""A connection's rules: uvicorn's own HTTP protocol, with limits that a server open to anybody needs.

Uvicorn's httptools protocol stays in charge: parsing, pipelining, the ASGI cycle, keep-alive. Added are

* limits in time and size: a request must arrive whole within `receive_timeout_s`, a client must take
  some of its answer in that time, headers must not be endless, and a client that sends faster than it
  is answered is not read until it is;
* order at the end: whatever ends a connection (bad bytes, a limit, the server's stop), the requests
  before it are answered first, and then the client is told why, once and in the table's words.

One timer per connection, late by design: it looks at what the connection has been doing and arms
itself again, so a request costs no timer.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sized
from typing import Any

from uvicorn.config import Config
from uvicorn.protocols.http.flow_control import FlowControl
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol, RequestResponseCycle
from uvicorn.server import ServerState

from cobatch.server.http.problem import Problem, stopping
from cobatch.server.http.reply import Reply
from cobatch.server.inference.service import Inference

# Past this, headers that are still coming are refused. What one read brings may be more.
_HEADERS_BYTES = 65536
# So many times its own size may a body's framing be: a chunk of one byte takes six more.
_FRAMING = 16
_ANSWERED = b"content-type: %b\r\ncontent-length: %d\r\nx-request-id: %b\r\nserver-timing: %b\r\n"
# A connection's timer never runs more often.
_LEAST_TICK_S = 0.05
# What is being received: nothing, a request's headers, or its body.
NOTHING, HEADERS, BODY = range(3)


class _Flow(FlowControl):
    """Uvicorn's flow control that goes on reading only when nothing waits to be answered or written.

    Uvicorn's cycle resumes reading whenever an application asks for a body, so that a client that
    sends faster than it is answered would fill the pipeline without end.
    """

    def __init__(self, transport: asyncio.Transport, pipeline: Sized) -> None:
        super().__init__(transport)
        self._pipeline = pipeline

    def resume_reading(self) -> None:
        if self.read_paused and not self.write_paused and not self._pipeline:
            super().resume_reading()


class _Defaults:
    """Uvicorn's default headers (the date) as bytes; made anew when uvicorn does, each second."""

    __slots__ = ("headers", "text")

    def __init__(self) -> None:
        self.headers: list[tuple[bytes, bytes]] | None = None
        self.text = b""

    def renew(self, headers: list[tuple[bytes, bytes]]) -> None:
        """From now on these."""
        self.text = b"".join([b"%b: %b\r\n" % header for header in headers])
        self.headers = headers


_DEFAULTS = _Defaults()


class Connection(HttpToolsProtocol):
    """One connection. `core` is set by whoever makes the class for a server."""

    core: Inference

    def __init__(
        self,
        config: Config,
        server_state: ServerState,
        app_state: dict[str, Any],
        _loop: asyncio.AbstractEventLoop | None = None,
    ) -> None:
        super().__init__(config, server_state, app_state, _loop)
        self.core = self.core  # found with fewer steps than the class's
        self.receiving = NOTHING
        # With requests in the pipeline, `cycle` is the newest; this is the one being answered.
        self.ahead: RequestResponseCycle | None = None
        self._headers_bytes = 0
        # Of the body: bytes that came while it was read, and what they held without the framing.
        self._raw_bytes = 0
        self._body_bytes = 0
        # The last thing to write, once what was asked before is answered.
        self._farewell: Reply | None = None
        self._since_s = time.monotonic()
        self._unsent = 0
        self._unsent_since_s = 0.0
        self._timer: asyncio.TimerHandle | None = None

    # Its life

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self.flow = _Flow(transport, self.pipeline)
        self._tick()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        if self._timer is not None:
            self._timer.cancel()
        # Uvicorn tells the newest request.
        if self.ahead is not None and not self.ahead.response_complete:
            self.ahead.disconnected = True
            self.ahead.message_event.set()

    def _tick(self) -> None:
        """Close the connection if it has been idle, or receiving one request, for too long."""
        settings = self.core.settings.server
        if self._is_stuck(settings.receive_timeout_s):
            self.transport.abort()
            return
        if self.transport.is_closing():
            # It closes when its last answer is taken, or when it is found stuck.
            self._timer = self.loop.call_later(settings.receive_timeout_s, self._tick)
            return
        if self._owes_answer():
            limit_s = left_s = settings.receive_timeout_s
        else:
            # The first request has yet to come, or has yet to end, or the next may come.
            receiving = self.receiving or self.cycle is None
            limit_s = settings.receive_timeout_s if receiving else settings.keep_alive_s
            left_s = self._since_s + limit_s - time.monotonic()
        if left_s > 0:
            # What begins while this sleeps is looked at no later than its own limit asks.
            sleep_s = min(left_s, settings.receive_timeout_s, settings.keep_alive_s)
            self._timer = self.loop.call_later(max(sleep_s, _LEAST_TICK_S), self._tick)
            return
        if self.receiving:
            self._end(
                Problem("receive-timeout", f"the request did not arrive within {limit_s:g} s", close=True)
            )
        self.transport.close()

    def _is_stuck(self, limit_s: float) -> bool:
        """Whether the client has not taken a byte of what is to be sent for so long."""
        unsent = self.transport.get_write_buffer_size()
        now_s = time.monotonic()
        if unsent == 0 or unsent != self._unsent:
            self._unsent = unsent
            self._unsent_since_s = now_s
        return unsent > 0 and now_s - self._unsent_since_s >= limit_s

    def shutdown(self) -> None:
        """The server stops: what was asked is answered; what has not been asked in full is refused."""
        if self.receiving and not self._owes_answer():
            self._end(stopping())
        else:
            super().shutdown()

    def _owes_answer(self) -> bool:
        """Whether a request that has arrived whole is not answered yet."""
        cycle = self.cycle
        if self.receiving == BODY:
            ahead = self.ahead
            return ahead is not None and ahead is not cycle and not ahead.response_complete
        return cycle is not None and not cycle.response_complete

    def _end(self, problem: Problem) -> None:
        """Say why the connection ends, after what is owed, unless this request is answered already."""
        if self._farewell is not None:
            return
        if self._owes_answer():
            self._farewell = self._last_reply(problem)
            if self.receiving == BODY:
                self.pipeline.popleft()  # the request that this is about, the newest
            self.flow.pause_reading()
        elif self.receiving == BODY and self.cycle.response_started:
            self.transport.close()
        else:
            self.write_reply(self._last_reply(problem), keep_alive=False)

    def _last_reply(self, problem: Problem) -> Reply:
        self.core.observer.http["", "", problem.kind.status, problem.kind.slug] += 1
        return problem.reply()

    # Bytes in

    def data_received(self, data: bytes) -> None:
        if self.receiving == HEADERS:
            self._headers_bytes += len(data)  # `on_message_begin` makes it 0 again
        elif self.receiving == BODY:
            self._raw_bytes += len(data)
        super().data_received(data)
        if self.receiving == HEADERS and self._headers_bytes > _HEADERS_BYTES:
            detail = f"the headers have more than {_HEADERS_BYTES} bytes"
            self._end(Problem("headers-too-large", detail, close=True))
        elif self.receiving == BODY and self._raw_bytes > _HEADERS_BYTES + _FRAMING * self._body_bytes:
            # Endless trailers or chunk extensions.
            detail = f"the body's framing has more than {_HEADERS_BYTES} bytes"
            self._end(Problem("headers-too-large", detail, close=True))
            self.transport.close()

    def on_message_begin(self) -> None:
        self.begin_receiving()
        super().on_message_begin()

    def begin_receiving(self) -> None:
        """A request's first bytes are there: its limits begin to count."""
        self.receiving = HEADERS
        self._headers_bytes = 0
        self._raw_bytes = 0
        self._body_bytes = 0
        self._since_s = time.monotonic()

    def on_headers_complete(self) -> None:
        """Give the request whose headers are there to the ASGI application."""
        before = self.cycle
        super().on_headers_complete()
        # The scope has the list. Trailers come through the same callback and are no headers.
        self.headers = []
        if len(self.pipeline) == 1:
            self.ahead = before
        if self.parser.should_upgrade():
            # Not taken up, but the parser stops here: what follows is no request of ours.
            self.cycle.keep_alive = False
        self.receiving = BODY

    def on_header(self, name: bytes, value: bytes) -> None:
        # Behind the body they are trailers: nobody looks at them, so nobody keeps them.
        if self.receiving == HEADERS:
            super().on_header(name, value)

    def on_body(self, body: bytes) -> None:
        self._body_bytes += len(body)
        super().on_body(body)

    def on_message_complete(self) -> None:
        self.receiving = NOTHING
        super().on_message_complete()

    def send_400_response(self, msg: str) -> None:
        self._end(Problem("bad-http", msg, close=True))

    # Bytes out

    def write_reply(self, reply: Reply, keep_alive: bool) -> float | None:
        """Write a whole response and go on with the connection, or end it. When it was written, None where
        nobody is there to read it."""
        transport = self.transport
        if transport.is_closing():
            return None
        if _DEFAULTS.headers is not self.server_state.default_headers:
            _DEFAULTS.renew(self.server_state.default_headers)
        length = sum(map(len, reply.body))
        request_id, timing = reply.request_id, reply.timing
        if request_id is not None and timing is not None:
            # An infer request's good answer: one step instead of three.
            head = _ANSWERED % (reply.content_type, length, request_id, timing)
        else:
            head = b"content-type: %b\r\ncontent-length: %d\r\n" % (reply.content_type, length)
            if timing is not None:
                head += b"server-timing: %b\r\n" % timing
            if request_id is not None:
                head += b"x-request-id: %b\r\n" % request_id
        if reply.json_length is not None:
            head += b"inference-header-content-length: %d\r\n" % reply.json_length
        if reply.headers:
            head += b"".join([b"%b: %b\r\n" % header for header in reply.headers])
        if reply.close or not keep_alive:
            keep_alive = False
            head += b"connection: close\r\n"
        transport.write(b"".join((STATUS_LINE[reply.status], _DEFAULTS.text, head, b"\r\n", *reply.body)))
        if not keep_alive:
            transport.close()
        self.on_response_complete()
        return self._since_s

    def on_response_complete(self) -> None:
        # Uvicorn arms a keep-alive timer here for each response; `_tick` needs only the time.
        self.server_state.total_requests += 1
        self._since_s = time.monotonic()
        if self.transport.is_closing():
            return
        if self.pipeline:
            self.ahead, app = self.pipeline.pop()
            self._start_asgi_task(self.ahead, app)
        elif self._farewell is not None:
            self.write_reply(self._farewell, keep_alive=False)
            return
        if self.flow.read_paused:
            self.flow.resume_reading()

    def pause_writing(self) -> None:
        # The client does not read its answers: take no more requests from it until it does.
        super().pause_writing()
        self.flow.pause_reading()

    def resume_writing(self) -> None:
        super().resume_writing()
        self.flow.resume_reading()
