"""One request passed to an ASGI application: its scope, `receive` and `send`."""

import asyncio
import logging
from collections.abc import Awaitable, Generator, MutableMapping
from http.client import responses
from math import inf
from typing import Any, Protocol

from starlette.types import ASGIApp, Message, Scope

from cobatch.server.http.problem import internal
from cobatch.server.http.reply import Reply

log = logging.getLogger("cobatch.edge")

# An unread body is buffered up to this size.
HIGH_WATER_BYTES = 65536
# Responses without a body, and without Content-Length.
_BODILESS = (204, 304)


class HeadBeginnings(dict[int, bytes]):
    """By status, the status line and uvicorn's default headers (the date), which change each second."""

    headers: list[tuple[bytes, bytes]] | None = None

    def __missing__(self, status: int) -> bytes:
        lines = [b"HTTP/1.1 %d %b\r\n" % (status, responses.get(status, "").encode())]
        lines += [b"%b: %b\r\n" % header for header in self.headers or ()]
        beginning = self[status] = b"".join(lines)
        return beginning


class _Sent:
    """An awaitable that is done."""

    def __await__(self) -> Generator[Any, Any, None]:
        return iter(())  # type: ignore[return-value]  # cheaper than a generator


_SENT = _Sent()


class Client(Protocol):
    """The connection, as far as a cycle uses it."""

    inference: Any
    transport: Any
    server_state: Any
    writable: asyncio.Event
    write_paused: bool

    def closes_now(self) -> bool: ...
    def head_beginnings(self) -> dict[int, bytes]: ...
    def close(self) -> None: ...
    def allow_body(self) -> None: ...
    def pause_reading(self) -> None: ...
    def resume_reading(self) -> None: ...
    def write_reply(self, reply: Reply, keep_alive: bool) -> float | None: ...
    def on_response_complete(self) -> None: ...
    def on_cycle_end(self, cycle: Any) -> None: ...


class AsgiCycle:
    """A request on its connection, from its headers to the end of its response."""

    __slots__ = (
        "_body", "_body_left", "_chunked", "_client", "_event", "_expects_continue", "_head", "_more_body",
        "_news", "_scope", "disconnected", "keep_alive", "response_complete", "response_started", "task",
    )  # fmt: skip

    def __init__(self, client: Client, scope: Scope, *, keep_alive: bool, expects_continue: bool) -> None:
        self._client = client
        self._scope = scope
        self.keep_alive = keep_alive
        self._expects_continue = expects_continue
        self.task: asyncio.Task[None] | None = None  # while it runs
        self.disconnected = False
        self._body: bytes | bytearray = b""
        self._more_body = True
        self._news = False  # there is something that `receive` has not returned yet
        self._event: asyncio.Event | None = None  # made when `receive` has to wait
        self.response_started = False
        self.response_complete = False
        self._head = b""
        self._chunked = False
        self._body_left: float = 0  # of Content-Length

    async def run(self, app: ASGIApp) -> None:
        """Let the application answer the request."""
        try:
            await app(self._scope, self.receive, self.send)
        except Exception:
            log.exception("the ASGI application failed")
        else:
            if not self.response_complete and not self.disconnected:
                log.error("the ASGI application returned without a complete response")
        finally:
            self._client.server_state.tasks.discard(self.task)
            self.task = None  # it refers to this object
            if self.disconnected:
                self._client.on_cycle_end(self)
            if self.disconnected or self.response_complete:
                pass
            elif self.response_started:
                self._client.transport.close()
            else:
                self.response_started = self.response_complete = True
                self._client.write_reply(internal().reply(), keep_alive=False)
            # Frames of the application may be in a reference cycle: the connection must not.
            self._client = None  # type: ignore[assignment]

    # From the connection

    @property
    def running(self) -> bool:
        """The application has the request, and its body."""
        return self.task is not None

    @property
    def content_length(self) -> int | None:
        """Bytes of the body, None if it comes in chunks."""
        return next((int(value) for name, value in self._scope["headers"] if name == b"content-length"), None)

    def on_body(self, data: bytes) -> None:
        """A part of the body has arrived."""
        if self.response_complete or self.disconnected:
            return
        body = self._body
        if not body:
            body = data
        elif type(body) is bytearray:
            body += data
        else:
            body = bytearray(body + data)
        self._body = body
        if len(body) > HIGH_WATER_BYTES:
            self._client.pause_reading()
        self._wake()

    def on_end(self) -> None:
        """The body is complete."""
        self._more_body = False
        self._wake()

    def on_disconnect(self) -> None:
        """The client is gone."""
        if not self.response_complete:
            self.disconnected = True
            self._body = b""
            self._wake()

    def _wake(self) -> None:
        self._news = True
        if self._event is not None:
            self._event.set()

    # From the application

    async def receive(self) -> Message:
        """Return the next part of the body; after its end, wait for the client to disconnect."""
        client = self._client
        if self._expects_continue and not self.response_started and not client.transport.is_closing():
            self._expects_continue = False
            client.allow_body()
        if not self._news and not self.response_complete:
            client.resume_reading()
            if self._event is None:
                self._event = asyncio.Event()
            await self._event.wait()
        if self.disconnected or self.response_complete:
            return {"type": "http.disconnect"}
        if self._event is not None:
            self._event.clear()
        self._news = False
        body, self._body = self._body, b""
        return {"type": "http.request", "body": bytes(body), "more_body": self._more_body}

    def send(self, message: MutableMapping[str, Any]) -> Awaitable[None]:
        """Write a part of the response. A coroutine only if the client is slow, as it would cost more."""
        if self._client.write_paused and not self.disconnected:
            return self._send_later(message)
        if not self.disconnected:
            self._send(message)
        return _SENT

    async def _send_later(self, message: MutableMapping[str, Any]) -> None:
        await self._client.writable.wait()
        if not self.disconnected:
            self._send(message)

    def _send(self, message: MutableMapping[str, Any]) -> None:
        kind = message["type"]
        if kind == "http.response.start" and not self.response_started:
            self._start(message)
        elif kind == "http.response.body" and self.response_started and not self.response_complete:
            self._write(message.get("body", b""), message.get("more_body", False))
        else:
            raise RuntimeError(f"unexpected ASGI message {kind!r}")

    def _start(self, message: MutableMapping[str, Any]) -> None:
        """Make the head. It is written with the body if that is of known length, else at once."""
        status = message["status"]
        length = None
        closes = False
        lines = []
        for name, value in message.get("headers", ()):
            if name == b"content-length":
                length = int(value)
            elif name == b"connection":
                closes = b"close" in value.lower()
            lines.append(b"%b: %b\r\n" % (name, value))
        old = self._scope["http_version"] == "1.0"
        if length is None and self._scope["method"] != "HEAD" and status not in _BODILESS:
            if old:
                self.keep_alive = False  # the end of the connection ends the body
                self._body_left = inf
            else:
                self._chunked = True
                lines.append(b"transfer-encoding: chunked\r\n")
        if closes:
            self.keep_alive = False
        elif not self.keep_alive or (self._client.inference.closing and self._client.closes_now()):
            self.keep_alive = False
            lines.append(b"connection: close\r\n")
        elif old:
            lines.append(b"connection: keep-alive\r\n")
        fields = b"".join(lines)
        if fields.count(b"\n") != len(lines) or fields.count(b"\r") != len(lines):
            raise RuntimeError("a line break in a response header")
        self.response_started = True
        head = b"%b%b\r\n" % (self._client.head_beginnings()[status], fields)
        if length:
            self._head = head
            self._body_left = 0 if self._scope["method"] == "HEAD" else length
        else:
            self._client.transport.write(head)

    def _write(self, body: bytes, more_body: bool) -> None:
        if self._chunked:
            data = b"%x\r\n%b\r\n" % (len(body), body) if body else b""
            data += b"" if more_body else b"0\r\n\r\n"
        elif self._scope["method"] == "HEAD":
            data = b""
        else:
            data = body
            self._body_left -= len(body)
            if self._body_left < 0 or (not more_body and 0 < self._body_left < inf):
                raise RuntimeError("the response's body is not as long as its Content-Length")
        if self._head:
            data, self._head = b"".join((self._head, data)), b""
        if data:
            self._client.transport.write(data)
        if not more_body:
            self.response_complete = True
            self._wake()
            if not self.keep_alive:
                self._client.close()
            self._client.on_response_complete()
