"""The bytes that arrive on a connection: httptools parses them, and requests that it accepts are checked.

httptools takes other protocols and versions, any number of Host headers, and any transfer coding before
`chunked`; it stops at a request to upgrade. Headers and framing are bounded here, bodies elsewhere.
"""

import asyncio
import time
from abc import abstractmethod
from collections import defaultdict
from typing import Any

import httptools

from cobatch.server.http.problem import Problem, invalid

# A single read may bring more.
_HEADERS_BYTES = 65536
# Bytes on the wire per byte of a body: a chunk of one byte takes six more.
_FRAMING = 16
_VERSIONS = ("1.0", "1.1")
_OTHERS = (b"RTSP/", b"ICE/")
# The part of a request being received.
NOTHING, HEADERS, BODY = range(3)


class Framing(asyncio.Protocol):
    """The request that is being received, from its first byte to the last of its body.

    `since_s`: when it began, or when the last response was complete.
    """

    # Python finds attributes slowly where an object has more than 30 without slots.
    __slots__ = (
        "_head", "_headers_bytes", "_line_at", "_raw_bytes", "body_bytes", "expects_continue", "headers",
        "method", "parser", "receiving", "since_s", "url", "version",
    )  # fmt: skip

    def __init__(self) -> None:
        self.parser = self._new_parser()
        self.receiving = NOTHING
        self.method = self.url = b""
        self.version = ""
        self.headers: list[tuple[bytes, bytes]] = []
        self.expects_continue = False
        self._head = b""  # the reads since its first byte, while its headers are parsed
        self._line_at = 0  # there, its request line is not before this place
        self._headers_bytes = 0
        self._raw_bytes = 0  # of the body, with its framing
        self.body_bytes = 0
        self.since_s = time.monotonic()

    @abstractmethod
    def begin_request(self, last: dict[bytes, bytes]) -> None:
        """Begin a request whose headers are complete. `last`: the last of each name."""

    @abstractmethod
    def end(self, problem: Problem) -> None:
        """End the connection with a problem."""

    def data_received(self, data: bytes) -> None:
        if self.receiving == HEADERS:
            self._headers_bytes += len(data)  # `on_message_begin` makes it 0 again
            self._head += data
        else:
            self._head = data
            self._line_at = 0
            if self.receiving == BODY:
                self._raw_bytes += len(data)
        try:
            try:
                self.parser.feed_data(data)
            except httptools.HttpParserUpgrade as upgrade:
                self._ignore_upgrade(memoryview(data)[upgrade.args[0] :])
        except httptools.HttpParserError as error:
            self.receiving = self.receiving or HEADERS
            self.end(_problem_of(error))
        if self.receiving == HEADERS:
            if self._headers_bytes > _HEADERS_BYTES:
                detail = f"the headers have more than {_HEADERS_BYTES} bytes"
                self.end(Problem("headers-too-large", detail, close=True))
            return
        self._head = b""
        if self.receiving == BODY and self._raw_bytes > _HEADERS_BYTES + _FRAMING * self.body_bytes:
            # Endless trailers or chunk extensions.
            detail = f"the body's framing has more than {_HEADERS_BYTES} bytes"
            self.end(Problem("headers-too-large", detail, close=True))

    def _new_parser(self) -> Any:
        parser = httptools.HttpRequestParser(self)
        # A request behind one with `Connection: close` must not turn that one into an error.
        parser.set_dangerous_leniencies(lenient_data_after_close=True)
        return parser

    def _ignore_upgrade(self, rest: memoryview) -> None:
        """Parse a request to upgrade as one that is not (RFC 9110, 7.8), and the rest of the bytes.

        A parser ends at the headers of such a request, so another one goes on.
        """
        while True:
            lines = [b"%b: %b\r\n" % header for header in self.headers if header[0] != b"upgrade"]
            minor = self.version[2:].encode()
            self.parser = self._new_parser()
            self.parser.feed_data(b"%b%b\r\n%b\r\n" % (self._request_line(), minor, b"".join(lines)))
            try:
                self.parser.feed_data(rest)
                return
            except httptools.HttpParserUpgrade as upgrade:
                rest = rest[upgrade.args[0] :]

    def on_message_begin(self) -> None:
        self.receiving = HEADERS
        self.url = b""
        self.headers = []
        self.expects_continue = False
        self._headers_bytes = self._raw_bytes = self.body_bytes = 0
        self.since_s = time.monotonic()

    def on_url(self, url: bytes) -> None:
        self.url += url

    def on_header(self, name: bytes, value: bytes) -> None:
        # Trailers come through this callback too; they are not kept.
        if self.receiving == HEADERS:
            self.headers.append((name.lower(), value))

    def on_headers_complete(self) -> None:
        """Refuse a request whose headers the parser accepts but HTTP/1.1 does not; begin any other."""
        parser = self.parser
        self.method = method = parser.get_method()
        at = len(method) + 1 + len(self.url)
        if not self._line_at and self._head[at : at + 11] == b" HTTP/1.1\r\n":
            self.version = "1.1"  # the usual line, at the beginning of a read
        else:
            self.version = parser.get_http_version()
            if self.version not in _VERSIONS or not self._is_http():
                raise invalid("the request line is not METHOD TARGET HTTP/1.1")
        if parser.should_upgrade():
            if method == b"CONNECT":
                raise invalid("this is no proxy: it does not take CONNECT")
            return  # `_ignore_upgrade` goes on
        names = dict(self.headers)
        usual = b"host" in names and b"expect" not in names and b"transfer-encoding" not in names
        if not usual or len(names) != len(self.headers):
            self._check_headers()
        self.begin_request(names)

    def _is_http(self) -> bool:
        """Return False if the request names another protocol, which the parser takes too (RTSP, ICE).

        The bytes before its line belong to earlier requests.
        """
        line, head, start = self._request_line(), self._head, self._line_at
        self._line_at = at = head.find(line, start)
        return at == start or (
            at > start and not any(head.find(line[:-7] + other, start, at) >= 0 for other in _OTHERS)
        )

    def _request_line(self) -> bytes:
        """Return the request line up to the minor version."""
        return b"".join((self.method, b" ", self.url, b" HTTP/1."))

    def _check_headers(self) -> None:
        """Check Host (RFC 9112, 3.2) and Transfer-Encoding (6.1); read Expect."""
        values: defaultdict[bytes, list[bytes]] = defaultdict(list)
        for name, value in self.headers:
            values[name].append(value.lower())
        hosts, codings = len(values[b"host"]), b",".join(values[b"transfer-encoding"]).strip()
        if hosts > 1 or (not hosts and self.version == "1.1"):
            raise invalid(f"the request has {hosts} Host headers, it must have one")
        self.expects_continue = b"100-continue" in values[b"expect"]
        if not values[b"transfer-encoding"]:
            return
        if self.version == "1.0":
            raise invalid("a request of HTTP/1.0 cannot have Transfer-Encoding")
        if not codings.endswith(b"chunked"):
            raise invalid("the last of Transfer-Encoding is not chunked: the body has no end")
        if codings != b"chunked":
            detail = f"the transfer coding {codings.decode('latin-1')!r} is not supported; chunked is"
            raise Problem("unsupported-transfer-coding", detail, close=True)


def _problem_of(error: httptools.HttpParserError) -> Problem:
    # A method of the connection raised it, through the parser. Kept in a frame of the connection, it would be
    # in a reference cycle with that frame.
    cause = error.__context__
    return cause if isinstance(cause, Problem) else invalid("the request is not valid HTTP/1.1")
