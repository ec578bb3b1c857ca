"""Reading a request's body through ASGI within its limits, before anything is kept of it."""

from __future__ import annotations

from collections.abc import Mapping

from starlette.types import Receive

from server.problems import Problem


class BodyError(Exception):
    """The body cannot be had; `problem` is None when the client left before it was complete."""

    def __init__(self, problem: Problem | None) -> None:
        super().__init__("no body")
        self.problem = problem


def too_large(length: int, limit: int) -> Problem:
    """A body over the limit. The connection ends: reading the rest only to drop it would be the attack."""
    return Problem(
        "body-too-large",
        f"the body has {length} bytes or more, the limit is {limit}",
        close=True,
        body_bytes=length,
        limit_bytes=limit,
    )


async def read_body(headers: Mapping[bytes, bytes], receive: Receive, limit: int) -> bytes | bytearray:
    """The whole body, at most `limit` bytes. Raises BodyError."""
    length = headers.get(b"content-length", b"0")
    if length.isdigit() and int(length) > limit:
        raise BodyError(too_large(int(length), limit))
    encoding = headers.get(b"content-encoding", b"identity")
    if encoding.lower() != b"identity":
        detail = f"the body's encoding {encoding.decode('latin-1')!r} is not supported"
        raise BodyError(Problem("unsupported-encoding", detail, close=True))
    message = await receive()
    if message["type"] == "http.request" and not message.get("more_body", False):
        body: bytes = message.get("body", b"")
        if len(body) > limit:
            raise BodyError(too_large(len(body), limit))
        return body
    pieces = bytearray()
    while message["type"] == "http.request":
        pieces += message.get("body", b"")
        if len(pieces) > limit:
            raise BodyError(too_large(len(pieces), limit))
        if not message.get("more_body", False):
            return pieces
        message = await receive()
    raise BodyError(None)
