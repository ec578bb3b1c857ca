"""One HTTP/1.1 connection over httptools, with the limits that an open port needs.

* Time and size: a request must arrive whole within `receive_timeout_s`, after that time the client must have
  taken its response or take it at a rate, headers are bounded (`server.edge.framing`), and memory is
  granted before a body is read (`server.edge.receiver`).
* Order at the end: on bad bytes, a limit or the server's stop, earlier requests are answered first; then the
  client is told the reason, once, as a problem, which no reset takes from it (`server.edge.lingering`).

A connection has one timer. It does not follow each request: it looks at the state when it is due and arms
itself again.

Uvicorn listens, makes the connections and stops them; of its objects only its configuration and
`server_state` (`connections`, `tasks`, `total_requests`, `default_headers`) are used.
"""

import asyncio
import time
from typing import Any
from urllib.parse import unquote

import httptools
from starlette.types import Scope
from uvicorn.config import Config
from uvicorn.protocols.utils import get_local_addr, get_remote_addr, is_ssl
from uvicorn.server import ServerState

from cobatch.server.edge.cycle import AsgiCycle, HeadBeginnings
from cobatch.server.edge.exchange import HEADERS_BY_NAME
from cobatch.server.edge.framing import BODY, HEADERS, NOTHING
from cobatch.server.edge.lingering import LingeringClose
from cobatch.server.edge.long_write import LongWrite
from cobatch.server.edge.receiver import Cycle, Receiver
from cobatch.server.http.body_memory import FREE_BYTES, client_of
from cobatch.server.http.problem import Problem, no_memory, stopping
from cobatch.server.http.reply import LONG_BYTES, Reply
from cobatch.server.inference.service import Inference

_ANSWERED = b"content-type: %b\r\ncontent-length: %d\r\nx-request-id: %b\r\nserver-timing: %b\r\n"
_SHORTEST_TICK_S = 0.05
_ASGI = {"version": "3.0", "spec_version": "2.3"}
_BEGINNINGS = HeadBeginnings()


class Connection(Receiver):
    """One connection whose requests go to the ASGI application."""

    __slots__ = (
        "__weakref__", "_ahead", "_app_state", "_farewell", "_scope", "_timer", "config", "loop",
        "server_state",
    )  # fmt: skip

    def __init__(
        self,
        inference: Inference,
        config: Config,
        server_state: ServerState,
        app_state: dict[str, Any],
        _loop: asyncio.AbstractEventLoop | None = None,
    ) -> None:
        super().__init__(inference)
        self.config = config
        self.server_state = server_state
        self.loop = _loop or asyncio.get_event_loop()
        self._app_state = app_state
        # The request being answered if it is not the newest one.
        self._ahead: Cycle | None = None
        # The last response, to be written once earlier requests are answered.
        self._farewell: Reply | None = None
        self._timer: asyncio.TimerHandle | None = None

    # Begin and end

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport
        self.server_state.connections.add(self)  # type: ignore[arg-type]  # uvicorn names its own classes
        self._scope: Scope = {
            "type": "http",
            "asgi": _ASGI,
            "server": get_local_addr(self.transport),
            "client": get_remote_addr(self.transport),
            "scheme": "https" if is_ssl(self.transport) else "http",
            "root_path": self.config.root_path,
        }
        self.address = client_of(self._scope["client"])
        self._tick()

    def connection_lost(self, exc: Exception | None) -> None:
        self.server_state.connections.discard(self)
        if self._timer is not None:
            self._timer.cancel()
        self._drop_requests()
        # They refer to this object.
        self.parser = self.cycle = self._ahead = None
        self.pipeline.clear()

    def _drop_requests(self) -> None:
        for cycle in dict.fromkeys((self._ahead, self.cycle)):
            if cycle is not None:
                cycle.on_disconnect()
        self.writable.set()
        if self._waits:
            self._stop_waiting()  # first: it could be given the memory that it returns
        self._release_memory([cycle for cycle in self._held if not cycle.running])

    def close(self) -> None:
        """End the connection when the written bytes are sent; read on, since the client may be sending.

        Over TLS, which cannot be closed in one direction, it reads on only in the middle of a request.
        """
        if self.transport.is_closing() or not (self.receiving or self.transport.can_write_eof()):
            self.transport.close()
            return
        assert self._timer is not None
        self._timer.cancel()
        timeout_s = self.inference.settings.server.receive_timeout_s
        self._timer = self.loop.call_later(timeout_s, self._tick)
        self.transport = LingeringClose(self, self.transport, self.loop, self.inference.draining)
        self._drop_requests()

    def shutdown(self) -> None:
        """Stop: answer requests that have arrived, refuse one that has not arrived in full."""
        if self.transport.is_closing():
            return
        if self._owes_response():
            self.cycle.keep_alive = False  # type: ignore[union-attr]  # it is the one that has no response
        elif self.receiving:
            self.end(stopping())
        else:
            self.close()

    def closes_now(self) -> bool:
        """Return True if the next response is the last: the server leaves, and no request is behind it."""
        return self.inference.closing and not self.pipeline and not self.receiving

    def _owes_response(self) -> bool:
        """Return True if a request has arrived whole and is not answered yet."""
        cycle = self.cycle
        if self.receiving == BODY:
            ahead = self._ahead
            return ahead is not None and ahead is not cycle and not ahead.response_complete
        return cycle is not None and not cycle.response_complete

    def end(self, problem: Problem) -> None:
        """End the connection with a problem, unless this request is answered."""
        if self._farewell is not None or self.transport.is_closing():
            return
        if self._owes_response():
            self._farewell = self._last_reply(problem)
            if self.receiving == BODY:
                self.pipeline.popleft()  # the newest: the request that has the problem
            self.pause_reading()
        elif self.receiving == BODY and self.cycle is not None and self.cycle.response_started:
            self.close()
        else:
            self.write_reply(self._last_reply(problem), keep_alive=False)

    def _last_reply(self, problem: Problem) -> Reply:
        self.inference.observer.http["", "", problem.kind.status, problem.kind.slug] += 1
        return problem.reply()

    # Time limits

    def _tick(self) -> None:
        """Close the connection if it has been idle, or receiving one request, for too long."""
        settings = self.inference.settings.server
        timeout_s = settings.receive_timeout_s
        if self._is_stuck(timeout_s):
            self.transport.abort()
            return
        if self.transport.is_closing():
            # It closes when its last response is taken, or when it is found stuck.
            self._timer = self.loop.call_later(timeout_s, self._tick)
            return
        if self._owes_response():
            limit_s = left_s = timeout_s
        else:
            limit_s = timeout_s if self.receiving or self.cycle is None else settings.keep_alive_s
            left_s = self.since_s + limit_s - time.monotonic()
        if left_s > 0:
            # Something that begins meanwhile is looked at no later than its own limit asks.
            sleep_s = min(left_s, timeout_s, settings.keep_alive_s)
            self._timer = self.loop.call_later(max(sleep_s, _SHORTEST_TICK_S), self._tick)
            return
        if self._waits:
            self.end(no_memory(limit_s))
        elif self.receiving:
            detail = f"the request did not arrive within {limit_s:g} s"
            self.end(Problem("receive-timeout", detail, close=True))
        self.transport.close()

    # Requests

    def begin_request(self, last: dict[bytes, bytes]) -> None:
        """Pass the request to the ASGI application, behind those that came before it."""
        before = self.cycle
        keep_alive = self.parser.should_keep_alive()
        scope = self._new_scope(last)
        cycle = AsgiCycle(self, scope, keep_alive=keep_alive, expects_continue=self.expects_continue)
        self.cycle = cycle
        self.receiving = BODY
        self._allowed_bytes = FREE_BYTES
        if before is None or before.response_complete:
            self._run(cycle)
            return
        self.pause_reading()
        self.pipeline.appendleft(cycle)
        if len(self.pipeline) == 1:
            self._ahead = before

    def _new_scope(self, last: dict[bytes, bytes]) -> Scope:
        url = path = self.url
        query = b""
        if not url.startswith(b"/") or b"?" in url or b"#" in url:
            target = httptools.parse_url(url)
            path, query = target.path, target.query or b""
        root = self.config.root_path
        text = path.decode("ascii")
        headers, self.headers = self.headers, []
        return {
            **self._scope,
            "http_version": self.version,
            "method": self.method.decode("ascii"),
            "path": root + (unquote(text) if "%" in text else text),
            "raw_path": root.encode("ascii") + path if root else path,
            "query_string": query,
            "headers": headers,
            HEADERS_BY_NAME: last,
            "state": self._app_state.copy(),
        }

    def _run(self, cycle: AsgiCycle) -> None:
        cycle.task = task = self.loop.create_task(cycle.run(self.config.loaded_app))
        self.server_state.tasks.add(task)

    def on_message_complete(self) -> None:
        if self.receiving == HEADERS:
            return  # a request to upgrade, see `_ignore_upgrade`
        self._line_at += 1
        self.receiving = NOTHING
        if self._waits:
            self._stop_waiting()  # the last read had it all
        self.cycle.on_end()  # type: ignore[union-attr]  # as above

    # Bytes out

    def head_beginnings(self) -> dict[int, bytes]:
        """Return the beginnings of responses, by status."""
        headers = self.server_state.default_headers
        if _BEGINNINGS.headers is not headers:
            _BEGINNINGS.clear()
            _BEGINNINGS.headers = headers
        return _BEGINNINGS

    def allow_body(self) -> None:
        """Ask the client for the body that it holds back (RFC 9110, 10.1.1)."""
        self.transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")

    def write_reply(self, reply: Reply, keep_alive: bool) -> float | None:
        """Write a whole response and go on with the connection, or end it.

        Returns the time at which it was written, None if the client has disconnected.
        """
        transport = self.transport
        if transport.is_closing():
            return None
        length = 0
        for piece in reply.body:  # `sum` takes longer for a few
            length += len(piece)
        request_id, timing = reply.request_id, reply.timing
        if request_id is not None and timing is not None:
            # The response to a good infer request: one step instead of three.
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
        if reply.close or not keep_alive or (self.inference.closing and self.closes_now()):
            keep_alive = False
            head += b"connection: close\r\n"
        current = _BEGINNINGS.headers is self.server_state.default_headers
        beginning = (_BEGINNINGS if current else self.head_beginnings())[reply.status]
        if length < LONG_BYTES:
            transport.write(b"".join((beginning, head, b"\r\n", *reply.body)))
        else:
            LongWrite(self, transport, self.loop, (beginning, head, b"\r\n", *reply.body))
        if not keep_alive:
            self.close()
        self.on_response_complete()
        return self.since_s

    def on_response_complete(self) -> None:
        """Go on with the next request, if there is one."""
        self.server_state.total_requests += 1
        self.since_s = time.monotonic()
        if self._held:
            self._release_memory([cycle for cycle in self._held if cycle.response_complete])
        # While requests wait in the pipeline, reading is paused.
        if (not self._read_paused and self._farewell is None) or self.transport.is_closing():
            return
        if self.pipeline:
            self._ahead = cycle = self.pipeline.pop()
            self._run(cycle)
        elif self._farewell is not None:
            self.write_reply(self._farewell, keep_alive=False)
            return
        if self._read_paused:
            if self._waits and self.cycle is not None and self.cycle.response_complete:
                self._stop_waiting()
            self.resume_reading()
