"""Slabs: the buddy allocator against a model of it, and the two ends of shared memory."""

from __future__ import annotations

import fcntl
import mmap
import os
import weakref
from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, rule

from cobatch.engines.errors import LinkError
from cobatch.engines.link.messages import INLINE_BYTES
from cobatch.engines.link.slab import (
    BLOCK_BYTES,
    KEPT_BYTES,
    PIECE_BYTES,
    Arena,
    SlabReader,
    SlabWriter,
    create,
    for_reading,
)
from tests.support.examples import examples

BLOCKS = 16


class Allocated(RuleBasedStateMachine):
    """`used` is the owner of each smallest block, as it should be."""

    offsets: Bundle[int] = Bundle("offsets")

    def __init__(self) -> None:
        super().__init__()
        self.arena = Arena(BLOCKS * BLOCK_BYTES)
        self.used: list[int | None] = [None] * BLOCKS

    @rule(target=offsets, size=st.integers(1, BLOCKS * BLOCK_BYTES + 1))
    def allocate(self, size: int) -> int:
        offset = self.arena.allocate(size)
        blocks = -(-size // BLOCK_BYTES)
        width = 1 << (blocks - 1).bit_length()
        if offset is None:
            places = range(0, BLOCKS - width + 1, width)
            assert not any(self.used[at : at + width] == [None] * width for at in places)
            return -1
        first, rest = divmod(offset, BLOCK_BYTES)
        assert not rest
        assert not first % width
        assert self.used[first : first + width] == [None] * width
        self.used[first : first + width] = [first] * width
        return offset

    @rule(offset=consumes(offsets))
    def free(self, offset: int) -> None:
        if offset < 0:
            return
        first = offset // BLOCK_BYTES
        assert self.arena.free(offset) == self.used.count(first) * BLOCK_BYTES
        self.used = [None if owner == first else owner for owner in self.used]

    @rule(offset=st.integers(-1, BLOCKS * BLOCK_BYTES))
    def free_a_wrong_offset(self, offset: int) -> None:
        if offset % BLOCK_BYTES or offset // BLOCK_BYTES not in self.used:
            with pytest.raises(LinkError):
                self.arena.free(offset)

    @invariant()
    def blocks_in_use_are_counted(self) -> None:
        assert self.arena.blocks == len(set(self.used) - {None})


Allocated.TestCase.settings = examples(60, stateful_step_count=40)
TestAllocated = Allocated.TestCase


def test_an_empty_arena_is_one_block_again() -> None:
    arena = Arena(BLOCKS * BLOCK_BYTES)
    offsets = [arena.allocate(1) for _ in range(BLOCKS)]
    assert arena.allocate(1) is None
    for offset in offsets[::2] + offsets[1::2]:
        assert offset is not None
        arena.free(offset)
    assert arena.allocate(BLOCKS * BLOCK_BYTES) == 0


@pytest.mark.parametrize("size", [0, BLOCK_BYTES - 1, BLOCK_BYTES * 3])
def test_an_arena_is_a_power_of_two_blocks(size: int) -> None:
    with pytest.raises(ValueError, match="not a power of two"):
        Arena(size)


@pytest.fixture
def ends() -> Iterator[tuple[SlabWriter, SlabReader]]:
    descriptor = create("test", 3 << 20)
    reader = SlabReader(for_reading(descriptor))
    writer = SlabWriter(descriptor)
    yield writer, reader
    writer.close()


def test_buffers_of_any_type_are_read_as_written(ends: tuple[SlabWriter, SlabReader]) -> None:
    writer, reader = ends
    assert writer.size == 4 << 20
    rows = np.arange(12, dtype="<f4").reshape(3, 4)
    offset = writer.write([rows, b"bytes", bytearray(b"and"), memoryview(b""), np.ones((0, 3))])
    assert offset is not None
    view = reader.view(offset, 56)
    assert view == rows.tobytes() + b"bytesand"
    assert view.readonly


@pytest.mark.parametrize(("size", "inline"), [(0, True), (INLINE_BYTES, True), (INLINE_BYTES + 1, False)])
def test_short_payloads_are_in_the_message(
    ends: tuple[SlabWriter, SlabReader], size: int, inline: bool
) -> None:
    writer, reader = ends
    data = os.urandom(size)
    payload = writer.place([data[:5], data[5:]], size)
    assert payload is not None
    assert isinstance(payload, bytes) is inline
    assert reader.read(payload, size) == data
    assert writer.arena.blocks == (not inline)


def test_a_block_is_filled_in_pieces(ends: tuple[SlabWriter, SlabReader]) -> None:
    writer, reader = ends
    parts = [b"a" * (3 * PIECE_BYTES + 7), memoryview(b"some").cast("I"), b""]
    size = 3 * PIECE_BYTES + 7 + 4
    offset = writer.reserve(size)
    assert offset is not None
    pauses: list[None] = []
    writer.fill(offset, parts, lambda: pauses.append(None))
    assert reader.view(offset, size) == b"a" * (size - 4) + b"some"
    assert len(pauses) == 5


def test_a_full_slab_says_so(ends: tuple[SlabWriter, SlabReader]) -> None:
    writer, _ = ends
    half = bytes(writer.size // 2)
    offsets = [writer.write([half]), writer.write([half])]
    assert None not in offsets
    assert writer.write([b"x"]) is None
    assert writer.write([bytes(writer.size), b"x"]) is None
    writer.free(offsets[0] or 0)
    assert writer.write([b"x"]) == offsets[0]


def test_a_reader_sees_nothing_outside_the_slab(ends: tuple[SlabWriter, SlabReader]) -> None:
    writer, reader = ends
    assert len(reader.view(writer.size - 1, 1)) == 1
    for offset, size in [(writer.size - 1, 2), (writer.size, 1), (1 << 63, 1), (-1, 1), (0, writer.size + 1)]:
        with pytest.raises(LinkError):
            reader.view(offset, size)


def test_a_number_is_told_without_a_message(ends: tuple[SlabWriter, SlabReader]) -> None:
    writer, reader = ends
    assert reader.announced == 0
    offset = writer.write([bytes(writer.size)])
    assert offset is not None
    writer.announce(1 << 40)
    assert reader.announced == 1 << 40
    assert reader.view(offset, writer.size) == bytes(writer.size)


def test_a_payload_has_the_announced_size(ends: tuple[SlabWriter, SlabReader]) -> None:
    _, reader = ends
    for payload, size in ((b"abc", 4), (b"abc", 2), (b"", 1)):
        with pytest.raises(LinkError):
            reader.read(payload, size)


class Pages:
    """A slab of four times KEPT_BYTES, and how much memory it takes."""

    def __init__(self) -> None:
        descriptor = create("test", 4 * KEPT_BYTES)
        self._pages = os.dup(descriptor)
        self.writer = SlabWriter(descriptor)

    def bytes(self) -> int:
        return os.fstat(self._pages).st_blocks * 512

    def write(self, size: int) -> int:
        offset = self.writer.write([bytes(size)])
        assert offset is not None
        return offset

    def close(self) -> None:
        self.writer.close()
        os.close(self._pages)


@pytest.fixture
def pages() -> Iterator[Pages]:
    slab = Pages()
    yield slab
    slab.close()


def test_pages_of_large_blocks_are_given_back_and_others_used_again(pages: Pages) -> None:
    small, medium = pages.write(1), pages.write(KEPT_BYTES)
    large = pages.write(KEPT_BYTES + 1)
    pages.writer.free(large)
    assert 0 < pages.bytes() - KEPT_BYTES <= 2 * mmap.PAGESIZE
    pages.writer.free(medium)
    assert pages.bytes() > KEPT_BYTES
    pages.writer.free(small)
    assert pages.bytes() == 0


def test_an_idle_slab_keeps_a_bounded_amount(pages: Pages) -> None:
    for _ in range(2):
        pages.writer.free(pages.write(KEPT_BYTES))
        assert pages.bytes() == KEPT_BYTES
    offsets = [pages.write(KEPT_BYTES // 4) for _ in range(5)]
    for offset in offsets:
        pages.writer.free(offset)
    assert pages.bytes() == 0


def test_a_reader_cannot_write_and_a_writer_cannot_resize() -> None:
    descriptor = create("test", BLOCK_BYTES)
    reading = for_reading(descriptor)
    with pytest.raises(PermissionError):
        mmap.mmap(reading, 0)
    for size in (0, 2 * BLOCK_BYTES):
        with pytest.raises(PermissionError):
            os.ftruncate(descriptor, size)
    with pytest.raises(PermissionError):
        fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE)
    os.close(reading)
    os.close(descriptor)


def test_a_slab_is_unmapped_with_its_last_view() -> None:
    descriptor = create("test", BLOCK_BYTES)
    reader = SlabReader(for_reading(descriptor))
    writer = SlabWriter(descriptor)
    offset = writer.write([b"rows"])
    assert offset is not None
    view = reader.view(offset, 4)
    unmapped = weakref.ref(view.obj)
    del reader
    writer.close()
    assert bytes(view) == b"rows"
    assert unmapped() is not None
    del view
    assert unmapped() is None
