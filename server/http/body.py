"""A request's body: its parts put together, and decompressed within its limit.

Sizes in the protocol, and the limits, are those of the decompressed body.
"""

import zlib
from collections.abc import Iterator

import numpy as np

from cobatch.server.http.compression import WINDOW
from cobatch.server.http.problem import Problem, too_large

# One part, or the view of a buffer.
Body = bytes | bytearray | memoryview
_UNBOUNDED_BYTES = 1 << 20
_MOST_TIMES = 128
_PIECE_BYTES = 1 << 16


def new_buffer(length: int) -> memoryview:
    """Return a buffer. The system gives its memory page by page, when it is written to."""
    return np.empty(length, np.uint8).data


def joined(body: Body, data: bytes, end: int, length: int) -> Body:
    """Return a body with its next part, which ends at `end`; a body of one part is not copied.

    `length`: of the whole body, or the most that it may have. Each part is copied once.
    """
    if not body:
        return data
    if not isinstance(body, memoryview):
        buffer = new_buffer(length)
        buffer[: len(body)] = body
        body = buffer
    body[end - len(data) : end] = data
    return body


def measure(body: Body, coding: bytes, limit: int) -> int:
    """Return the length of the body without its content coding. Raises Problem beyond `limit` bytes.

    No more than that is ever decompressed, nor, beyond 1 MiB, more than 128 times the body; and none is kept.
    """
    limit = min(limit, max(_UNBOUNDED_BYTES, _MOST_TIMES * len(body)))
    length = 0
    for piece in _decompressed(body, coding):
        length += len(piece)
        if length > limit:
            raise too_large(limit + 1, limit)
    return length


def decompress(body: Body, coding: bytes, length: int) -> memoryview:
    """Return the body without its content coding, which has this length."""
    plain, at = new_buffer(length), 0
    for piece in _decompressed(body, coding):
        plain[at : at + len(piece)] = piece
        at += len(piece)
    return plain


def _decompressed(body: Body, coding: bytes) -> Iterator[bytes]:
    """Yield the decompressed body in short pieces, since copies hold the interpreter lock. Raises Problem."""
    name = coding.decode("latin-1")
    if coding not in WINDOW:
        detail = f"the body's encoding {name!r} is not supported; gzip and deflate are"
        raise Problem("unsupported-encoding", detail, encoding=name, supported=["gzip", "deflate"])
    decompressor = zlib.decompressobj(WINDOW[coding])
    view, at = memoryview(body), 0
    try:
        while at < len(view) and not decompressor.eof:
            packed: bytes | memoryview = view[at : at + _PIECE_BYTES]
            at += _PIECE_BYTES
            full = True
            while (packed or full) and not decompressor.eof:
                piece = decompressor.decompress(packed, _PIECE_BYTES)
                packed, full = decompressor.unconsumed_tail, len(piece) == _PIECE_BYTES
                yield piece
    except zlib.error as error:
        raise Problem("bad-encoding", f"the body is not {name}: {error}") from None
    if not decompressor.eof or decompressor.unused_data or at < len(view):
        raise Problem("bad-encoding", f"the body is not one whole {name} stream")
