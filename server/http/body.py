"""Reading a request's body through ASGI within its limits, before anything is kept of it."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping

from starlette.types import Message, Receive

from cobatch.server.http.compression import decompress
from cobatch.server.http.problem import Problem, too_large


class BodyError(Exception):
    """The body cannot be had; `problem` is None when the client left before it was complete."""

    def __init__(self, problem: Problem | None) -> None:
        super().__init__("no body")
        self.problem = problem


async def read_body(headers: Mapping[bytes, bytes], receive: Receive, limit: int) -> bytes | bytearray:
    """The whole body, decompressed, at most `limit` bytes as it came and after. Raises BodyError."""
    length = headers.get(b"content-length", b"0")
    if length.isdigit() and (len(length) > 18 or int(length) > limit):
        raise BodyError(too_large(int(length[:18]), limit))
    message = await receive()
    if message["type"] == "http.request" and not message.get("more_body", False):
        # At once, as small ones come; another coroutine would cost more than all of this.
        body: bytes | bytearray = message.get("body", b"")
        if len(body) > limit:
            raise BodyError(too_large(len(body), limit))
    else:
        body = await _receive_all(message, receive, limit)
    coding = headers.get(b"content-encoding")
    if coding is None:
        return body
    try:
        # In a thread: a small body can be a good part of a second to unpack.
        return await asyncio.to_thread(decompress, body, coding, limit)
    except Problem as problem:
        raise BodyError(problem) from None


async def _receive_all(message: Message, receive: Receive, limit: int) -> bytearray:
    pieces = bytearray()
    while message["type"] == "http.request":
        pieces += message.get("body", b"")
        if len(pieces) > limit:
            raise BodyError(too_large(len(pieces), limit))
        if not message.get("more_body", False):
            return pieces
        message = await receive()
    raise BodyError(None)
