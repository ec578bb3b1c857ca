"""One HTTP/1.1 connection of the generator, and the parser of its answers.

The common answer arrives in one piece with a Content-Length and is parsed with a few searches. All others go
through httptools.
"""

from __future__ import annotations

import asyncio
import re
from time import monotonic
from typing import Protocol, cast

import httptools

from cobatch.server.loadtest.codec import error_message
from cobatch.server.loadtest.messages import PreparedRequest

_LENGTH = re.compile(rb"\r\n(content-length): *(\d+)\r\n", re.IGNORECASE)
_CHUNKED = re.compile(rb"\r\ntransfer-encoding:", re.IGNORECASE)
_PROBLEM = re.compile(rb'"type":\s*"[^"]*?([^"/]+)"')
_BATCH = re.compile(rb'batch;desc="?(\d+)')


class Malformed(Exception):
    """The bytes are no HTTP response, or more than one."""


class Answer:
    """One response, parsed incrementally. `head`: its lines with the final CRLF."""

    __slots__ = ("_buffer", "_length_prefix", "_need", "_parser", "body", "head", "status")

    def __init__(self) -> None:
        self.status = 0
        self.head = b""
        self.body = b""
        self._length_prefix = b"\r\ncontent-length: "
        self._buffer = bytearray()
        self._need = 0
        self._parser: _Parser | None = None

    def feed(self, data: bytes) -> bool:
        """Add received bytes; True when the answer is complete. Raises Malformed."""
        if self._parser is not None:
            return self._parse(data)
        if self._buffer:
            self._buffer += data
            if len(self._buffer) < self._need:
                return False
            data = bytes(self._buffer)
        end = data.find(b"\r\n\r\n")
        if end < 0:
            return self._keep(data, 0)
        length = self._length(data, end + 2)
        if length < 0:
            self._parser = _Parser()
            return self._parse(data)
        whole = end + 4 + length
        if len(data) != whole:
            if len(data) > whole:
                raise Malformed("bytes after the answer")
            return self._keep(data, whole)
        try:
            self.status = int(data[9:12])
        except ValueError:
            raise Malformed("no status line") from None
        self.head = data[: end + 2]
        self.body = data[end + 4 :]
        if self._buffer:
            self._buffer = bytearray()
            self._need = 0
        return True

    def _keep(self, data: bytes, need: int) -> bool:
        self._need = need
        if not self._buffer:
            self._buffer += data
        return False

    def _length(self, data: bytes, end: int) -> int:
        """Return the Content-Length; -1 if httptools must parse this answer."""
        at = data.find(self._length_prefix, 0, end)
        if at < 0:
            match = _LENGTH.search(data, 0, end)
            if match is None or _CHUNKED.search(data, 0, end) or data[9:10] == b"1":
                return -1
            # A server always spells the header the same way; later answers need no regular expression.
            self._length_prefix = data[match.start() : match.start(2)]
            return int(match[2])
        at += len(self._length_prefix)
        try:
            return int(data[at : data.index(b"\r", at)])
        except ValueError:
            raise Malformed("bad Content-Length") from None

    def _parse(self, data: bytes) -> bool:
        assert self._parser is not None
        if not self._parser.feed(data):
            return False
        self.status, self.head, self.body = self._parser.result()
        self._parser, self._buffer, self._need = None, bytearray(), 0
        return True

    def end(self) -> bool:
        """Handle the end of the connection; True if it completed the answer."""
        parser = self._parser
        if parser is None or not parser.until_closed:
            return False
        self.status, self.head, self.body = parser.result()
        self._parser = None
        return True

    @property
    def started(self) -> bool:
        """True if a part of the answer has arrived."""
        return bool(self._buffer) or self._parser is not None

    @property
    def batch(self) -> int:
        """Rows of the batch, from Server-Timing; 0 if unknown."""
        match = _BATCH.search(self.head)
        return int(match[1]) if match else 0

    @property
    def keep_alive(self) -> bool:
        """True if the connection may be used again."""
        return b"onnection: close" not in self.head and self.head[5:8] != b"1.0"

    def error_kind(self) -> str:
        """Return the status, with the problem type if there is one."""
        match = _PROBLEM.search(self.body)
        return f"{self.status} {match[1].decode('utf-8', 'replace')}" if match else f"status {self.status}"

    def error_message(self) -> str:
        """Return the server's error message."""
        return error_message(self.body)


class _Parser:
    """Collects what httptools parses; its `on_` methods are httptools' callbacks."""

    def __init__(self) -> None:
        self._parser = httptools.HttpResponseParser(self)
        self._lines: list[bytes] = []
        self._parts: list[bytes] = []
        self._complete = False
        self._has_length = False
        self.until_closed = False

    def feed(self, data: bytes) -> bool:
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError as error:
            raise Malformed(str(error)) from None
        return self._complete

    def on_message_begin(self) -> None:
        if self._complete:
            raise Malformed("bytes after the answer")
        self._lines, self._parts, self._has_length = [], [], False

    def on_header(self, name: bytes, value: bytes) -> None:
        self._lines.append(name + b": " + value)
        self._has_length = self._has_length or name.lower() in (b"content-length", b"transfer-encoding")

    def on_headers_complete(self) -> None:
        self.until_closed = not self._has_length

    def on_body(self, data: bytes) -> None:
        self._parts.append(data)

    def on_message_complete(self) -> None:
        # A 1xx response only announces the answer.
        self._complete = self._parser.get_status_code() >= 200

    def result(self) -> tuple[int, bytes, bytes]:
        """Return status, head, body."""
        status = self._parser.get_status_code()
        first = f"HTTP/{self._parser.get_http_version()} {status} ".encode()
        return status, b"\r\n".join([first, *self._lines, b""]), b"".join(self._parts)


class Owner(Protocol):
    """Receives a connection's events."""

    def on_answer(self, connection: Connection, now: float) -> None:
        """Handle `connection.answer` to `connection.request`; its last part arrived `now`."""
        ...

    def on_failure(self, connection: Connection, kind: str, message: str) -> None:
        """Handle a request that gets no answer. The connection is closing."""
        ...

    def on_closed(self, connection: Connection) -> None:
        """Handle the end of the connection."""
        ...


class Connection(asyncio.Protocol):
    """`request` is None while the connection is idle. `due`, `taken`, `sent`: as in `messages.COLUMNS`."""

    __slots__ = ("_owner", "_transport", "answer", "due", "request", "sent", "taken")

    def __init__(self, owner: Owner) -> None:
        self._owner = owner
        self._transport: asyncio.Transport
        self.answer = Answer()
        self.request: PreparedRequest | None = None
        self.due = self.taken = self.sent = 0.0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Keep the transport."""
        self._transport = cast("asyncio.Transport", transport)  # uvloop's has another base class

    def send(self, request: PreparedRequest, due: float, taken: float, now: float) -> None:
        """Send a request on an idle connection."""
        self.request = request
        self.due = due
        self.taken = taken
        self.sent = now
        self._transport.write(request.data)

    def data_received(self, data: bytes) -> None:
        """Parse a part of the answer."""
        now = monotonic()  # read before parsing, which takes a microsecond of the generator's time
        try:
            complete = self.answer.feed(data)
        except Malformed as error:
            self.give_up("malformed answer", str(error))
            return
        if not complete:
            return
        if self.request is None:  # a notice on an idle connection before the server closes it
            self._transport.close()
            return
        self._owner.on_answer(self, now)

    def connection_lost(self, error: Exception | None) -> None:
        """Finish the request under way."""
        if self.request is not None and self.answer.end():
            self._owner.on_answer(self, monotonic())
        if self.request is not None:
            kind = "connection closed within an answer" if self.answer.started else "connection closed"
            self._fail(kind, str(error or ""))
        self._owner.on_closed(self)

    def give_up(self, kind: str, message: str = "") -> None:
        """Fail the request and abort the connection."""
        self._fail(kind, message)
        self._transport.abort()

    def _fail(self, kind: str, message: str) -> None:
        if self.request is not None:
            self._owner.on_failure(self, kind, message)
            self.request = None

    def drop(self) -> None:
        """Abort the connection without reporting its request."""
        self.request = None
        self._transport.abort()

    def close(self) -> None:
        """Close the idle connection."""
        self._transport.close()

    @property
    def closing(self) -> bool:
        """True if no request can be sent any more."""
        return self._transport.is_closing()
