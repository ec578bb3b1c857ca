"""Content codings gzip and deflate (zlib's wrapper), both ways (RFC 9110, 8.4).

Sizes that the protocol speaks of, and the body limit, are those of the decompressed body.
"""

from __future__ import annotations

import asyncio
import zlib
from collections.abc import Sequence

from cobatch.server.http.problem import Problem, too_large
from cobatch.server.http.reply import Reply

# zlib's window bits for each coding.
_WINDOW = {b"gzip": 31, b"x-gzip": 31, b"deflate": 15}
# The cheapest level: tensors hardly compress better with more work.
_LEVEL = 1


def decompress(body: bytes | bytearray, coding: bytes, limit: int) -> bytes | bytearray:
    """The body without its content coding, at most `limit` bytes. Raises Problem.

    No more than `limit` is ever decompressed, however much is packed into the body.
    """
    coding = coding.strip().lower()
    if coding in (b"", b"identity"):
        return body
    if coding not in _WINDOW:
        name = coding.decode("latin-1")
        detail = f"the body's encoding {name!r} is not supported; gzip and deflate are"
        raise Problem("unsupported-encoding", detail, encoding=name, supported=["gzip", "deflate"])
    machine = zlib.decompressobj(_WINDOW[coding])
    try:
        plain = machine.decompress(body, limit + 1)
    except zlib.error as error:
        raise Problem("bad-encoding", f"the body is not {coding.decode()}: {error}") from None
    if len(plain) > limit:
        raise too_large(len(plain), limit)
    if not machine.eof or machine.unused_data:
        raise Problem("bad-encoding", f"the body is not one whole {coding.decode()} stream")
    return plain


def choose(accept: bytes) -> bytes | None:
    """The coding for a response to this Accept-Encoding: gzip before deflate, None for neither."""
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
    """The reply as a client with this Accept-Encoding gets it: compressed from `least_bytes` on."""
    coding = choose(accept)
    if coding is None or reply.length < least_bytes:
        return reply
    # In a thread: it would hold up everybody else.
    return await asyncio.to_thread(compress, reply, coding)


def compress(reply: Reply, coding: bytes) -> Reply:
    """The same reply with its body compressed. Takes about 5 ms a MiB: not for the event loop."""
    return Reply(
        reply.status,
        reply.content_type,
        (_pack(reply.body, coding),),
        timing=reply.timing,
        json_length=reply.json_length,
        request_id=reply.request_id,
        headers=(*reply.headers, (b"content-encoding", coding), (b"vary", b"accept-encoding")),
        close=reply.close,
        slug=reply.slug,
    )


def _pack(pieces: Sequence[bytes | memoryview], coding: bytes) -> bytes:
    machine = zlib.compressobj(_LEVEL, wbits=_WINDOW[coding])
    packed = [machine.compress(piece) for piece in pieces]
    packed.append(machine.flush())
    return b"".join(packed)
