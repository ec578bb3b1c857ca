"""A response before it is written as HTTP/1.1 or sent through ASGI."""

from collections.abc import Sequence

import msgspec

JSON = b"application/json"
OCTETS = b"application/octet-stream"
# Longer bodies are written in their pieces, which need not be joined.
LONG_BYTES = 1 << 18
# Of a long body, in one iteration of the event loop.
PART_BYTES = 1 << 18


class Reply(msgspec.Struct, eq=False, gc=False):
    """A response: status, content type, body in pieces, and optional headers.

    `timing` is Server-Timing, `json_length` the V2 binary extension's Inference-Header-Content-Length,
    `request_id` X-Request-Id if the client has none of its own. `headers` are further ones, names in lower
    case. `close` ends the connection after this response. `slug`: the kind of problem in it.

    `gc=False`: nothing in it refers back to it.
    """

    status: int
    content_type: bytes
    body: Sequence[bytes | memoryview]
    timing: bytes | None = None
    json_length: int | None = None
    request_id: bytes | None = None
    headers: tuple[tuple[bytes, bytes], ...] = ()
    close: bool = False
    slug: str = ""

    @property
    def length(self) -> int:
        """Bytes of the body."""
        return sum(map(len, self.body))

    def header_list(self, length: int | None = None) -> list[tuple[bytes, bytes]]:
        """Return all headers for ASGI. `length`: the body's, if it is known."""
        length = self.length if length is None else length
        headers = [(b"content-type", self.content_type), (b"content-length", b"%d" % length)]
        if self.timing is not None:
            headers.append((b"server-timing", self.timing))
        if self.json_length is not None:
            headers.append((b"inference-header-content-length", b"%d" % self.json_length))
        headers.extend(self.headers)
        if self.close:
            headers.append((b"connection", b"close"))
        return headers
