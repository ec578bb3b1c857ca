"""Reading an answer off the wire, and judging it.

The usual answer comes in one piece with a Content-Length and takes a few searches. What is otherwise formed
goes through httptools.
"""

from __future__ import annotations

import re

import httptools

from cobatch.server.loadtest.messages import Expected
from cobatch.server.loadtest.target import words
from cobatch.server.loadtest.wire import decode, same

_LENGTH = re.compile(rb"\r\n(content-length): *(\d+)\r\n", re.IGNORECASE)
_CHUNKED = re.compile(rb"\r\ntransfer-encoding:", re.IGNORECASE)
_PROBLEM = re.compile(rb'"type":\s*"[^"]*?([^"/]+)"')
_BATCH = re.compile(rb'batch;desc="?(\d+)')
_REMEMBERED = 16


class Malformed(Exception):
    """Not HTTP, or more than was asked for."""


class Answer:
    """One response, read as it comes. `head`: its lines with the final CRLF; `batch`: 0 where not said."""

    __slots__ = ("_buffer", "_need", "_parser", "_spelling", "body", "head", "status")

    def __init__(self) -> None:
        self.status = 0
        self.head = b""
        self.body = b""
        self._spelling = b"\r\ncontent-length: "
        self._buffer = bytearray()
        self._need = 0
        self._parser: _Parser | None = None

    def feed(self, data: bytes) -> bool:
        """Take what came; True when the answer is whole. Raises Malformed."""
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
                raise Malformed("more than the answer")
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
        """Content-Length; -1 where there is none, or more to it."""
        at = data.find(self._spelling, 0, end)
        if at < 0:
            found = _LENGTH.search(data, 0, end)
            if found is None or _CHUNKED.search(data, 0, end) or data[9:10] == b"1":
                return -1
            # A server writes it one way; the next is found without the regular expression.
            self._spelling = data[found.start() : found.start(2)]
            return int(found[2])
        at += len(self._spelling)
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

    def ended(self) -> bool:
        """The connection is closed: whether that made the answer whole."""
        parser = self._parser
        if parser is None or not parser.until_closed:
            return False
        self.status, self.head, self.body = parser.result()
        self._parser = None
        return True

    @property
    def begun(self) -> bool:
        """Whether a part of it came."""
        return bool(self._buffer) or self._parser is not None

    @property
    def batch(self) -> int:
        """Rows of its batch, as Server-Timing says."""
        found = _BATCH.search(self.head)
        return int(found[1]) if found else 0

    @property
    def keeps(self) -> bool:
        """Whether the connection may be used again."""
        return b"onnection: close" not in self.head and self.head[5:8] != b"1.0"

    def kind(self) -> str:
        """What sort of refusal it is."""
        found = _PROBLEM.search(self.body)
        return f"{self.status} {found[1].decode('utf-8', 'replace')}" if found else f"status {self.status}"

    def said(self) -> str:
        """The server's words."""
        return words(self.body)


class _Parser:
    """httptools' parser, and what it found."""

    def __init__(self) -> None:
        self._parser = httptools.HttpResponseParser(self)
        self._lines: list[bytes] = []
        self._parts: list[bytes] = []
        self._whole = False
        self._counted = False
        self.until_closed = False

    def feed(self, data: bytes) -> bool:
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError as error:
            raise Malformed(str(error)) from None
        return self._whole

    def on_message_begin(self) -> None:
        """Of each message, those with 1xx included."""
        if self._whole:
            raise Malformed("more than the answer")
        self._lines, self._parts, self._counted = [], [], False

    def on_header(self, name: bytes, value: bytes) -> None:
        """A line."""
        self._lines.append(name + b": " + value)
        self._counted = self._counted or name.lower() in (b"content-length", b"transfer-encoding")

    def on_headers_complete(self) -> None:
        """The body is next, if there is one."""
        self.until_closed = not self._counted

    def on_body(self, data: bytes) -> None:
        """A part of it."""
        self._parts.append(data)

    def on_message_complete(self) -> None:
        """All is there, unless it was only a notice that the answer will come."""
        self._whole = self._parser.get_status_code() >= 200

    def result(self) -> tuple[int, bytes, bytes]:
        """Status, head, body."""
        status = self._parser.get_status_code()
        first = f"HTTP/{self._parser.get_http_version()} {status} ".encode()
        return status, b"\r\n".join([first, *self._lines, b""]), b"".join(self._parts)


class Checker:
    """Compares answers with those expected. A body that was right once is right when it comes again."""

    def __init__(self, expected: Expected) -> None:
        self._expected = expected
        self._right: dict[int, set[bytes]] = {}

    def wrong(self, example: int, answer: Answer) -> str | None:
        """None if the answer is right; else why not."""
        right = self._right.setdefault(example, set())
        if answer.body in right:
            return None
        expected = self._expected
        try:
            got = decode(answer.head, answer.body)
        except ValueError as error:
            return str(error)
        why = same(got, expected.answers[example], expected.rtol, expected.atol)
        if why is None and len(right) < _REMEMBERED:
            right.add(answer.body)
        return why
