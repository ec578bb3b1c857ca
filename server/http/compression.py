"""Content codings gzip and deflate (zlib's wrapper) of responses (RFC 9110, 8.4)."""

import asyncio
import zlib

import msgspec

from cobatch.server.http.reply import Reply

# zlib's window bits for each coding.
WINDOW = {b"gzip": 31, b"x-gzip": 31, b"deflate": 15}
# A response is compressed if a part of it shrinks to this ratio (random floats: 0.9), and it is not too long.
_RATIO = 0.75
_TRIED_BYTES = 1 << 16
_MOST_BYTES = 1 << 24
# More work hardly compresses tensors better.
_LEVEL = 1


def choose(accept: bytes) -> bytes | None:
    """Return the coding for a response to this Accept-Encoding: gzip before deflate, else None."""
    accept = accept.lower()
    if b"gzip" not in accept and b"deflate" not in accept:
        return None
    allowed = set()
    for item in accept.split(b","):
        name, _, weight = item.partition(b";")
        if weight.replace(b" ", b"") not in (b"q=0", b"q=0.0", b"q=0.00", b"q=0.000"):
            allowed.add(name.strip())
    return next((coding for coding in (b"gzip", b"deflate") if coding in allowed), None)


async def compressed(reply: Reply, accept: bytes, least_bytes: int) -> Reply:
    """Return the reply for a client with this Accept-Encoding: compressed from `least_bytes` on."""
    coding = choose(accept)
    if coding is None or reply.length < least_bytes:
        return reply
    # In a thread, since it would block the loop.
    return await asyncio.to_thread(compress, reply, coding)


def compress(reply: Reply, coding: bytes) -> Reply:
    """Return the reply with its body compressed; unchanged if it is very long or a part of it hardly shrinks.

    Takes about 5 ms per MiB, random floats 300 ms: not for the event loop.
    """
    if reply.length > _MOST_BYTES or not _shrinks(reply):
        return reply
    compressor = zlib.compressobj(_LEVEL, wbits=WINDOW[coding])
    pieces = [compressor.compress(piece) for piece in reply.body]
    headers = (*reply.headers, (b"content-encoding", coding), (b"vary", b"accept-encoding"))
    return msgspec.structs.replace(reply, body=(b"".join([*pieces, compressor.flush()]),), headers=headers)


def _shrinks(reply: Reply) -> bool:
    longest = max(reply.body, key=len, default=b"")
    middle = max(0, len(longest) - _TRIED_BYTES) // 2
    tried = longest[middle : middle + _TRIED_BYTES]
    return len(zlib.compress(tried, _LEVEL)) < _RATIO * len(tried)
