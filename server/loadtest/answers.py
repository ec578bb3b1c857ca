"""The parser of HTTP/1.1 answers.

The common answer arrives in one piece with a Content-Length and is parsed with a few searches. All others go
through httptools.
"""

import re

import httptools

from cobatch.server.loadtest.codec import error_message

_LENGTH = re.compile(rb"\r\n(content-length): *(\d+)\r\n", re.IGNORECASE)
_CHUNKED = re.compile(rb"\r\ntransfer-encoding:", re.IGNORECASE)
_PROBLEM = re.compile(rb'"type":\s*"[^"]*?([^"/]+)"')
_BATCH = re.compile(rb'batch;desc="?(\d+)')


class Malformed(Exception):
    """The bytes are no HTTP response, or more than one."""


class Answer:
    """One response, parsed incrementally; the `on_` methods are httptools' callbacks.

    `head`: its lines with the final CRLF.
    """

    def __init__(self) -> None:
        self.status = 0
        self.head = b""
        self.body = b""
        self._length_prefix = b"\r\ncontent-length: "
        self._parser: httptools.HttpResponseParser | None = None  # of an answer that has begun
        self._complete = self._until_closed = False
        self._lines: list[bytes] = []
        self._parts: list[bytes] = []

    def feed(self, data: bytes) -> bool:
        """Add received bytes; True when the answer is complete. Raises Malformed."""
        if self._parser is None:
            end = data.find(b"\r\n\r\n")
            length = -1 if end < 0 else self._length(data, end + 2)
            if length >= 0 and len(data) == end + 4 + length:
                try:
                    self.status = int(data[9:12])
                except ValueError:
                    raise Malformed("no status line") from None
                self.head = data[: end + 2]
                self.body = data[end + 4 :]
                return True
            self._parser, self._complete = httptools.HttpResponseParser(self), False
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError as error:
            raise Malformed(str(error.__context__ or error)) from None
        return self._complete and self._take()

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

    def _take(self) -> bool:
        parser = self._parser
        assert parser is not None
        self.status = parser.get_status_code()
        first = f"HTTP/{parser.get_http_version()} {self.status} ".encode()
        self.head = b"\r\n".join([first, *self._lines, b""])
        self.body = b"".join(self._parts)
        self._parser = None
        return True

    def end(self) -> bool:
        """Handle the end of the connection; True if it completed the answer."""
        return self._parser is not None and self._until_closed and self._take()

    @property
    def started(self) -> bool:
        """True if a part of the answer has arrived."""
        return self._parser is not None

    def on_message_begin(self) -> None:
        if self._complete:
            raise Malformed("bytes after the answer")
        self._lines, self._parts, self._until_closed = [], [], False

    def on_header(self, name: bytes, value: bytes) -> None:
        self._lines.append(name + b": " + value)

    def on_headers_complete(self) -> None:
        lengths = (b"content-length:", b"transfer-encoding:")
        self._until_closed = not any(line.lower().startswith(lengths) for line in self._lines)

    def on_body(self, data: bytes) -> None:
        self._parts.append(data)

    def on_message_complete(self) -> None:
        # A 1xx response only announces the answer.
        assert self._parser is not None
        self._complete = self._parser.get_status_code() >= 200

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
        return error_message(self.body)
