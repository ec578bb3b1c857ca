"""Slabs: shared memory that one process writes and another reads, in blocks.

A buddy allocator hands out the blocks. Theirs are powers of two times BLOCK_BYTES, at multiples of their own
size. A block's buddy is the other half of the block that it was split from: its offset differs in one bit.
Free buddies are merged at once, so that all memory is one block again after the last one is freed.
(D. E. Knuth, The Art of Computer Programming, volume 1, 2.5C.)

Blocks are credits: a full slab means that the receiver has not given back enough of them, and no side waits.

Behind the blocks is a word of the writer's, which the reader sees without a message (`SlabWriter.announce`).
"""

import fcntl
import mmap
import os
import struct
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

from cobatch.engines.errors import LinkError
from cobatch.engines.link.messages import INLINE_BYTES, Payload

BLOCK_BYTES = 2 * INLINE_BYTES
# Copied between two calls of `release`, in less than a millisecond.
PIECE_BYTES = 1 << 19
# A larger block gives its pages back when it is freed; so does the slab, if no other is in use and more of it
# was written. To fault pages in again costs as much as the copy.
KEPT_BYTES = 16 << 20

# It is written and read at once.
_WORD = struct.Struct("@q")

# Bytes, or an array that is contiguous.
Buffer = Any


class Arena:
    """A buddy allocator of `size` bytes, a power of two times BLOCK_BYTES."""

    __slots__ = ("_free", "_orders", "size")

    def __init__(self, size: int) -> None:
        top = (size // BLOCK_BYTES).bit_length() - 1
        if top < 0 or BLOCK_BYTES << top != size:
            raise ValueError(f"{size} is not a power of two times {BLOCK_BYTES}")
        self.size = size
        # Offsets of free blocks of each order. The one freed last is used first: it is in the CPU's cache.
        self._free: list[dict[int, None]] = [{} for _ in range(top + 1)]
        self._free[top][0] = None
        self._orders: dict[int, int] = {}

    @property
    def blocks(self) -> int:
        """The number of blocks in use."""
        return len(self._orders)

    def allocate(self, size: int) -> int | None:
        """Return the offset of a block of at least `size` bytes (1 or more), or None if there is none."""
        order = ((size - 1) // BLOCK_BYTES).bit_length()
        for found in range(order, len(self._free)):
            if self._free[found]:
                break
        else:
            return None
        offset, _ = self._free[found].popitem()
        while found > order:
            found -= 1
            self._free[found][offset + (BLOCK_BYTES << found)] = None
        self._orders[offset] = order
        return offset

    def free(self, offset: int) -> int:
        """Free the block at this offset and return its size. Raises LinkError if none in use is there."""
        order = self._orders.pop(offset, -1)
        if order < 0:
            raise LinkError(f"no block in use is at {offset}")
        size = freed = BLOCK_BYTES << order
        while (buddy := offset ^ size) in self._free[order]:
            del self._free[order][buddy]
            offset &= buddy
            size <<= 1
            order += 1
        self._free[order][offset] = None
        return freed


def create(name: str, size: int, *, growing: bool = False) -> int:
    """Return the descriptor of a new slab of at least `size` bytes. Pages take memory once they are written.

    It cannot shrink, which would end its reader by SIGBUS, nor grow, unless it is `growing`.
    """
    descriptor = os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    seals = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_SEAL | (0 if growing else fcntl.F_SEAL_GROW)
    with ExitStack() as stack:
        stack.callback(os.close, descriptor)
        os.ftruncate(descriptor, (BLOCK_BYTES << ((size - 1) // BLOCK_BYTES).bit_length()) + mmap.PAGESIZE)
        fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, seals)
        stack.pop_all()
    return descriptor


def for_reading(descriptor: int) -> int:
    """Return another descriptor of a slab, that cannot be mapped for writing."""
    return os.open(f"/proc/self/fd/{descriptor}", os.O_RDONLY | os.O_CLOEXEC)


def mapped(descriptor: int, protection: int = mmap.PROT_READ | mmap.PROT_WRITE) -> mmap.mmap:
    """Map all of a descriptor's memory; close the descriptor, also if that fails. Raises OSError."""
    try:
        return mmap.mmap(descriptor, 0, prot=protection)
    finally:
        os.close(descriptor)


class SlabWriter:
    """The writer's end of a slab. Closes the descriptor that it is made of."""

    __slots__ = ("_map", "_written", "arena", "size")

    def __init__(self, descriptor: int) -> None:
        self._map = mapped(descriptor)
        self.size = len(self._map) - mmap.PAGESIZE
        self.arena = Arena(self.size)
        self._written = 0  # the end of the bytes written since no block was in use

    def write(self, buffers: Sequence[Buffer]) -> int | None:
        """Copy the buffers, one after another, into a new block. Return its offset, or None if there is none.

        There never is one for more than `size` bytes.
        """
        sizes = [len(buffer) if type(buffer) is bytes else memoryview(buffer).nbytes for buffer in buffers]
        offset = self.reserve(sum(sizes))
        if offset is not None:
            start = offset
            for buffer, size in zip(buffers, sizes, strict=True):
                self._map[start : start + size] = buffer
                start += size
        return offset

    def reserve(self, size: int) -> int | None:
        """Return the offset of a new block, for `fill`, or None if there is none."""
        offset = self.arena.allocate(size)
        if offset is not None:
            self._written = max(self._written, offset + size)
        return offset

    def fill(self, offset: int, buffers: Sequence[Buffer], release: Callable[[], None]) -> None:
        """Copy the buffers into a block in pieces of less than a millisecond, and call `release` after each.

        May run in another thread, until which the block must not be freed.
        """
        for buffer in buffers:
            view = memoryview(buffer).cast("B")
            for at in range(0, len(view), PIECE_BYTES):
                piece = view[at : at + PIECE_BYTES]
                self._map[offset : offset + len(piece)] = piece
                offset += len(piece)
                release()

    def place(self, buffers: Sequence[Buffer], size: int) -> Payload | None:
        """Copy the buffers, `size` bytes together, into bytes for the message or into a block (its offset).

        None: the slab is full.
        """
        return b"".join(buffers) if size <= INLINE_BYTES else self.write(buffers)

    def free(self, offset: int) -> None:
        """Use the block at this offset again. Raises LinkError if none in use is there."""
        size = self.arena.free(offset)
        if not self.arena.blocks:
            offset, size, self._written = 0, self._written, 0
        if size > KEPT_BYTES:
            self._map.madvise(mmap.MADV_REMOVE, offset, size)

    def announce(self, number: int) -> None:
        """Tell the reader a number."""
        _WORD.pack_into(self._map, self.size, number)

    def close(self) -> None:
        """Unmap the slab."""
        self._map.close()


class SlabReader:
    """The reader's end of a slab. Closes the descriptor that it is made of.

    The slab is unmapped once this object and the last view are garbage.
    """

    __slots__ = ("_view", "_word")

    def __init__(self, descriptor: int) -> None:
        memory = memoryview(mapped(descriptor, mmap.PROT_READ))
        self._view, self._word = memory[: -mmap.PAGESIZE], memory[-mmap.PAGESIZE :]

    @property
    def announced(self) -> int:
        """The number that the writer announced last, 0 before."""
        number: int = _WORD.unpack_from(self._word)[0]
        return number

    def view(self, offset: int, size: int) -> memoryview:
        """Return a read-only view of a block. Raises LinkError if a part of it is outside the slab."""
        if not 0 <= offset <= len(self._view) - size:
            raise LinkError(f"{size} bytes at {offset} are outside the slab of {len(self._view)}")
        return self._view[offset : offset + size]

    def read(self, payload: Payload, size: int) -> memoryview:
        """Return a read-only view of a message's payload. Raises LinkError if it has not `size` bytes."""
        if isinstance(payload, int):
            return self.view(payload, size)
        view = memoryview(payload)
        if len(view) != size:
            raise LinkError(f"a payload of {len(view)} bytes where {size} were announced")
        return view
