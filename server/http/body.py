"""Reading a request's body through ASGI, within its limit."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping

from starlette.requests import ClientDisconnect
from starlette.types import Message, Receive

from cobatch.server.http.compression import decompress
from cobatch.server.http.problem import too_large


async def read_body(headers: Mapping[bytes, bytes], receive: Receive, limit: int) -> bytes | bytearray:
    """Return the whole body, decompressed; at most `limit` bytes before and after.

    Raises Problem, and ClientDisconnect if the body is not complete.
    """
    length = headers.get(b"content-length", b"0")
    if length.isdigit() and (len(length) > 18 or int(length) > limit):
        raise too_large(int(length[:18]), limit)
    message = await receive()
    if message["type"] == "http.request" and not message.get("more_body", False):
        # A small body arrives at once; another coroutine would cost more than all of this.
        body: bytes | bytearray = message.get("body", b"")
        if len(body) > limit:
            raise too_large(len(body), limit)
    else:
        body = await _receive_all(message, receive, limit)
    coding = headers.get(b"content-encoding")
    if coding is None:
        return body
    # In a thread: unpacking a small body can take a large part of a second.
    return await asyncio.to_thread(decompress, body, coding, limit)


async def _receive_all(message: Message, receive: Receive, limit: int) -> bytearray:
    pieces = bytearray()
    while message["type"] == "http.request":
        pieces += message.get("body", b"")
        if len(pieces) > limit:
            raise too_large(len(pieces), limit)
        if not message.get("more_body", False):
            return pieces
        message = await receive()
    raise ClientDisconnect
