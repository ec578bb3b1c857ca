"""The binary tensor extension: tensors as bytes behind the JSON, in the JSON's order.

Little-endian, C order, no padding. A payload is a view of the body; the only copy is into the batch.
"""

from math import prod

import numpy as np

from cobatch.batcher.request import Payload
from cobatch.engines.base import Array, TensorSpec
from cobatch.engines.elements import read_elements, read_lengths
from cobatch.server.http.body import Body
from cobatch.server.http.problem import Problem
from cobatch.server.v2.checks import check_lengths, check_strings, wrong_data
from cobatch.server.v2.messages import InputTensor
from cobatch.server.v2.pieces import release

# More elements of an output take longer than a millisecond: a thread encodes them.
LONG_ELEMENTS = 1 << 15
LONG_TEXT = 1 << 20
# Characters of strings that are encoded in one piece.
TEXT_PIECE = 1 << 16
_FEW_ELEMENTS = 16


def cut_tail(tensor: InputTensor, tail: memoryview | None, offset: int) -> memoryview:
    """The bytes of a tensor with `binary_data_size`, from `offset` in the tail. Raises Problem."""
    name = tensor.name
    if tail is None:
        detail = f"input {name!r} has binary_data_size, but Inference-Header-Content-Length is missing"
        raise Problem("bad-binary", detail, tensor=name)
    assert tensor.parameters is not None
    size = tensor.parameters["binary_data_size"]
    if not isinstance(size, int) or isinstance(size, bool) or size < 0:
        raise Problem("bad-binary", f"input {name!r}: binary_data_size is {size!r}", tensor=name)
    left = len(tail) - offset
    if size > left:
        raise Problem(
            "bad-binary",
            f"input {name!r}: binary_data_size is {size}, the body has {left} bytes left",
            tensor=name,
            binary_data_size=size,
            left_bytes=left,
        )
    if len(tensor.data):
        raise Problem("bad-binary", f"input {name!r} has both data and binary_data_size", tensor=name)
    return tail[offset : offset + size]


def read_binary(spec: TensorSpec, data: memoryview, shape: list[int]) -> Payload:
    """A tensor's bytes, checked against its whole shape and its datatype. Raises Problem."""
    elements = prod(shape)
    if spec.datatype == "BYTES":
        return _read_strings(spec, data, shape[0] if spec.batched else 1, elements)
    expected = elements * spec.dtype.itemsize
    if len(data) != expected:
        detail = f"shape {shape} takes {expected} bytes, got {len(data)}"
        raise wrong_data(spec, detail, expected_bytes=expected, actual_bytes=len(data))
    check_bool(spec, data)
    return data


def check_bool(spec: TensorSpec, data: memoryview) -> None:
    """Raise Problem for a BOOL tensor with other bytes than 0 and 1."""
    if spec.datatype == "BOOL" and len(data) and np.frombuffer(data, np.uint8).max() > 1:
        raise wrong_data(spec, "bytes must be 0 or 1")


def read_raw(spec: TensorSpec, body: Body) -> tuple[tuple[int, ...], Payload]:
    """The row shape and the data of a body that is one row and nothing else. Raises Problem.

    A BYTES element is the whole body, without the length that elements have elsewhere.
    """
    fixed = prod(size for size in spec.shape if size != -1)
    variable = 1
    if spec.datatype == "BYTES":
        fits = fixed == 1
        check_lengths(spec, 1, [len(body)])
        payload: Payload = [bytes(body)]
    else:
        row_bytes = fixed * spec.dtype.itemsize
        if -1 in spec.shape and row_bytes:
            variable = len(body) // row_bytes
        fits = len(body) == variable * row_bytes
        payload = memoryview(body)
        check_bool(spec, payload)
    if not fits or spec.shape.count(-1) > 1:
        shape = list(spec.shape)
        detail = f"{len(body)} bytes are not one row of shape {shape} (-1: any, once)"
        raise wrong_data(spec, detail, expected=shape, actual_bytes=len(body))
    return tuple(variable if size == -1 else size for size in spec.shape), payload


def _read_strings(spec: TensorSpec, data: memoryview, rows: int, elements: int) -> list[bytes]:
    """BYTES in binary: each element is its length (u32, little-endian) and its bytes."""
    check_strings(spec, elements)
    if spec.max_text_bytes is not None and len(data) > spec.max_text_bytes:
        lengths, end = read_lengths(data, elements)  # before they are copied
        _check_whole(spec, data, elements, len(lengths), end)
        check_lengths(spec, rows, lengths)
    values, end = read_elements(data, elements)
    _check_whole(spec, data, elements, len(values), end)
    return values


def _check_whole(spec: TensorSpec, data: memoryview, elements: int, actual: int, end: int) -> None:
    """Raise Problem unless this number of elements, the last of which ends here, are all of the data."""
    if end != len(data) or actual != elements:
        detail = f"{len(data)} bytes do not hold exactly {elements} elements"
        raise wrong_data(spec, detail, expected_elements=elements, actual_elements=actual)


def characters(values: Array) -> int:
    """The characters, or bytes, of strings."""
    return sum(map(len, values.flat))


def bytes_tensor(values: Array) -> list[bytes]:
    """BYTES as binary, in pieces: each element its length (u32, little-endian) and its bytes."""
    joined: list[bytes] = []
    flat = values.reshape(-1)
    step = min(LONG_ELEMENTS, LONG_TEXT * len(flat) // (characters(flat) or 1)) or 1
    for first in range(0, len(flat), step):
        pieces: list[bytes] = []
        for value in flat[first : first + step]:
            data = [value] if isinstance(value, bytes) else _utf8(str(value))
            pieces += (sum(map(len, data)).to_bytes(4, "little"), *data)
        # Joining long elements would take longer than writing them one by one.
        joined += [b"".join(pieces)] if step > _FEW_ELEMENTS else pieces
        if first:
            release()
    return joined


def _utf8(text: str) -> list[bytes]:
    """A string as bytes, a long one in pieces."""
    if len(text) <= TEXT_PIECE:
        return [text.encode()]
    pieces = []
    for at in range(0, len(text), TEXT_PIECE):
        pieces.append(text[at : at + TEXT_PIECE].encode())
        release()
    return pieces
