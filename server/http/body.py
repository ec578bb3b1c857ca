"""A request's body: joining its parts, and reading it through ASGI within its limit."""

import asyncio
from collections.abc import Mapping

from starlette.requests import ClientDisconnect
from starlette.types import Receive

from cobatch.server.http.compression import decompress
from cobatch.server.http.problem import too_large


def joined(body: bytes | bytearray, data: bytes) -> bytes | bytearray:
    """Return a body with its next part. A body of one part is not copied."""
    if not body:
        return data
    if type(body) is not bytearray:
        body = bytearray(body)
    body += data
    return body


async def read_body(headers: Mapping[bytes, bytes], receive: Receive, limit: int) -> bytes | bytearray:
    """Return the whole body, decompressed; at most `limit` bytes before and after.

    Raises Problem, and ClientDisconnect if the body is not complete.
    """
    length = headers.get(b"content-length", b"0")
    if length.isdigit() and (len(length) > 18 or int(length) > limit):
        raise too_large(int(length[:18]), limit)
    body: bytes | bytearray = b""
    more_body = True
    while more_body:
        message = await receive()
        if message["type"] != "http.request":
            raise ClientDisconnect
        data = message.get("body", b"")
        body = joined(body, data) if body else data
        if len(body) > limit:
            raise too_large(len(body), limit)
        more_body = message.get("more_body", False)
    coding = headers.get(b"content-encoding")
    if coding is None:
        return body
    # In a thread: unpacking a small body can take a large part of a second.
    return await asyncio.to_thread(decompress, body, coding, limit)
