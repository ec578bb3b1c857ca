"""Rows into the engine's input buffers: the one copy between a caller's body and the engine."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from batcher.request import Request


def pack(requests: Sequence[Request], buffers: Sequence[np.ndarray[Any, Any]]) -> None:
    """Copy each request's rows behind one another into `buffers` and note where they begin.

    `buffers` are the slot's inputs, C-contiguous [max_batch_size, ...]; the requests' row shapes are
    those of the buffers and their rows together fit.
    """
    first_row = 0
    for request in requests:
        request.first_row = first_row
        first_row += request.rows
    for index, buffer in enumerate(buffers):
        if buffer.dtype == object:
            _pack_elements(requests, index, buffer)
        elif buffer.size:
            _pack_bytes(requests, index, buffer.data.cast("B"), buffer.nbytes // len(buffer))


def _pack_bytes(requests: Sequence[Request], index: int, target: memoryview, row_bytes: int) -> None:
    for request in requests:
        at = request.first_row * row_bytes
        # Raises ValueError if the payload has another length: nobody's rows may end in another's place.
        target[at : at + request.rows * row_bytes] = request.payloads[index]  # type: ignore[assignment]


def _pack_elements(requests: Sequence[Request], index: int, buffer: np.ndarray[Any, Any]) -> None:
    flat = buffer.reshape(-1)
    row_elements = flat.size // len(buffer)
    for request in requests:
        at = request.first_row * row_elements
        flat[at : at + request.rows * row_elements] = request.payloads[index]
