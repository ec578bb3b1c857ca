"""Bodies that come in parts, or compressed: put together and decompressed in pieces, each byte once."""

from __future__ import annotations

import gzip
import tracemalloc
import zlib
from collections.abc import Callable, Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st
from starlette.types import Message

from cobatch.server.http import body as bodies
from cobatch.server.http.asgi import read_body
from cobatch.server.http.body import Body, decompress, joined, measure
from cobatch.server.http.problem import Problem
from cobatch.server.v2.long_json import PIECE_BYTES, as_text

MIB = 1 << 20
PIECE = bodies._PIECE_BYTES


async def read(parts: Sequence[bytes], headers: dict[bytes, bytes], limit: int = MIB) -> Body:
    """Read a body of these parts, which needs no memory of the server's."""
    messages: list[Message] = [{"type": "http.request", "body": part, "more_body": True} for part in parts]
    messages.append({"type": "http.request"})

    async def receive() -> Message:
        return messages.pop(0)

    return await read_body(headers, receive, limit, None)


@given(
    parts=st.lists(st.binary(max_size=50), max_size=6),
    known=st.booleans(),
    blank=st.sampled_from([b"", b" "]),
)
async def test_parts_are_put_together(parts: list[bytes], known: bool, blank: bytes) -> None:
    whole = b"".join(parts)
    # httptools leaves blanks behind a value.
    headers = {b"content-length": b"%d%b" % (len(whole), blank)} if known else {}
    assert await read(parts, headers) == whole
    assert await read(parts, headers, len(whole)) == whole
    if whole:
        with pytest.raises(Problem, match="the limit is"):
            await read(parts, headers, len(whole) - 1)


def test_a_body_takes_its_length_from_its_second_part_on() -> None:
    """A `bytearray` that grows takes an eighth more, and in between the heap has holes."""
    part = bytes(MIB // 16)
    tracemalloc.start()
    try:
        body: Body = b""
        for number in range(1, 16):
            body = joined(body, part, number * len(part), MIB)
            if number > 1:
                assert abs(tracemalloc.get_traced_memory()[0] - MIB) < 10_000
    finally:
        tracemalloc.stop()
    assert len(body) == MIB


@pytest.mark.parametrize("pack", [gzip.compress, zlib.compress])
@pytest.mark.parametrize("size", [0, 1, PIECE - 1, PIECE, PIECE + 1, 2 * PIECE, 3 * PIECE + 5, 16 * PIECE])
@pytest.mark.parametrize("byte", [b"a", bytes(range(256))], ids=["same", "all"])
def test_a_body_is_decompressed_in_pieces(
    pack: Callable[[bytes], bytes], size: int, byte: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = (byte * size)[:size]
    coding = b"gzip" if pack is gzip.compress else b"deflate"
    monkeypatch.setattr(bodies, "_PIECE_BYTES", 1 << 10)
    lengths = [len(piece) for piece in bodies._decompressed(pack(plain), coding)]
    assert max(lengths) <= 1 << 10
    monkeypatch.undo()
    body = pack(plain)
    assert measure(body, coding, size) == size
    assert decompress(body, coding, size) == plain
    for wrong in (body + b"!" * (PIECE - len(body) % PIECE + 1), body[:-1], body + body):
        with pytest.raises(Problem, match="not one whole"):
            measure(wrong, coding, MIB)


@pytest.mark.parametrize("size", [0, 1, PIECE_BYTES - 1, PIECE_BYTES, 3 * PIECE_BYTES + 1])
def test_a_view_as_text(size: int) -> None:
    text = b"0123456789" * (size // 10 + 1)
    assert as_text(memoryview(text)[:size]) == text[:size]
    assert as_text(text) is text
