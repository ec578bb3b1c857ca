"""Elements of BYTES tensors in V2's binary form: each is its length (u32, little-endian) and its bytes."""

import struct
from collections.abc import Iterable
from typing import Any

import numpy as np

_LENGTH = struct.Struct("<I")


def read_elements(data: memoryview, most: int) -> tuple[list[bytes], int]:
    """Return the elements, at most `most`, and the place behind the last whole one."""
    values: list[bytes] = []
    at, end = 0, len(data)
    while at + 4 <= end and len(values) < most:
        (size,) = _LENGTH.unpack_from(data, at)
        if size > end - at - 4:
            break
        at += 4 + size
        values.append(bytes(data[at - size : at]))
    return values, at


def read_lengths(data: memoryview, most: int) -> tuple[list[int], int]:
    """Return the lengths of these elements, and the place behind the last whole one."""
    lengths: list[int] = []
    at, end = 0, len(data)
    while at + 4 <= end and len(lengths) < most:
        (size,) = _LENGTH.unpack_from(data, at)
        if size > end - at - 4:
            break
        at += 4 + size
        lengths.append(size)
    return lengths, at


def write_elements(values: np.ndarray[Any, Any]) -> bytes:
    """Return the elements in binary; text becomes UTF-8. Raises TypeError for other objects."""
    pieces: list[bytes] = []
    for value in values.reshape(-1).tolist():
        data = value.encode() if isinstance(value, str) else value
        if not isinstance(data, bytes):
            raise TypeError(f"an element is {type(value).__name__}, expected bytes or str")
        pieces += (_LENGTH.pack(len(data)), data)
    return b"".join(pieces)


def let_go(buffers: Iterable[np.ndarray[Any, Any]], rows: int) -> None:
    """Replace the strings of a slot's batch, which its buffers would keep until others take their place."""
    for buffer in buffers:
        if buffer.dtype == object:
            buffer[:rows] = b""
