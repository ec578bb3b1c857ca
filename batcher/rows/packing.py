"""Packing: the one copy of rows, from a caller's body to the engine's input buffers."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from cobatch.batcher.request import InputPad, Payload, Request

Array = np.ndarray[Any, Any]


def pack(requests: Sequence[Request], buffers: Sequence[Array]) -> None:
    """Copy the rows of all requests into `buffers` in order, and set `first_row` of each.

    `buffers` are the slot's inputs, C-contiguous [max_batch_size, ...], with the requests' row shapes beside
    padding, and room for all rows. Raises ValueError if a payload has the wrong length.
    """
    first_row = 0
    padded = False
    for request in requests:
        request.first_row = first_row
        first_row += request.rows
        if request.pad is not None:
            padded = True
    for index, buffer in enumerate(buffers):
        if padded:
            _pack_padded(requests, index, buffer)
        elif buffer.dtype == object:
            _pack_elements(requests, index, buffer)
        elif buffer.size:
            _pack_bytes(requests, index, buffer.data.cast("B"), buffer.nbytes // len(buffer))


def _pack_bytes(requests: Sequence[Request], index: int, target: memoryview, row_bytes: int) -> None:
    for request in requests:
        at = request.first_row * row_bytes
        # Assignment checks the length: no rows can end in the place of another request's.
        target[at : at + request.rows * row_bytes] = request.payloads[index]  # type: ignore[assignment]


def _pack_elements(requests: Sequence[Request], index: int, buffer: Array) -> None:
    flat = buffer.reshape(-1)
    row_elements = flat.size // len(buffer)
    for request in requests:
        at = request.first_row * row_elements
        flat[at : at + request.rows * row_elements] = request.payloads[index]


def _pack_padded(requests: Sequence[Request], index: int, buffer: Array) -> None:
    """Pack requests of which some are shorter than their place, and fill the rest of it."""
    target = buffer.data.cast("B") if buffer.dtype != object and buffer.size else None
    row_bytes = buffer.nbytes // len(buffer)
    for request in requests:
        pad: InputPad | None = None if request.pad is None else request.pad.inputs[index]
        payload = request.payloads[index]
        tail = b"" if pad is None else pad.tail if request.rows == 1 else None
        if tail is not None and target is not None:
            at, end = request.first_row * row_bytes, (request.first_row + request.rows) * row_bytes
            middle = end - len(tail)
            target[at:middle] = payload  # type: ignore[assignment]
            target[middle:end] = tail
            continue
        place = buffer[request.first_row : request.first_row + request.rows]
        if pad is None:
            place[...] = _array(payload, buffer.dtype, place.shape)
        else:
            place[pad.body] = _array(payload, buffer.dtype, (request.rows, *pad.row_shape))
            for box in pad.rest:
                place[box] = pad.value


def _array(payload: Payload, dtype: np.dtype[Any], shape: tuple[int, ...]) -> Array:
    """Return a payload as an array. Raises ValueError if it has another length."""
    if isinstance(payload, list):
        elements = np.empty(len(payload), object)
        elements[:] = payload
        return elements.reshape(shape)
    return np.frombuffer(payload, dtype).reshape(shape)
