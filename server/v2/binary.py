"""The binary tensor extension: tensors as bytes behind the JSON, in the JSON's order.

Little-endian, C order, no padding. What is read stays a view of the body; the one copy is into the batch.
"""

from __future__ import annotations

from math import prod

import numpy as np

from cobatch.batcher.request import Payload
from cobatch.engines.base import TensorSpec
from cobatch.server.http.problem import Problem
from cobatch.server.v2.messages import InputTensor


def binary_size(tensor: InputTensor, tail: memoryview | None, offset: int) -> int:
    """The tensor's `binary_data_size`, checked against what the tail has left. Raises Problem."""
    if tail is None:
        raise Problem(
            "bad-binary",
            f"input {tensor.name!r} has binary_data_size, but Inference-Header-Content-Length is missing",
            tensor=tensor.name,
        )
    left = len(tail) - offset
    assert tensor.parameters is not None
    size = tensor.parameters["binary_data_size"]
    if not isinstance(size, int) or isinstance(size, bool) or size < 0:
        raise Problem(
            "bad-binary", f"input {tensor.name!r}: binary_data_size is {size!r}", tensor=tensor.name
        )
    if size > left:
        raise Problem(
            "bad-binary",
            f"input {tensor.name!r}: binary_data_size is {size}, the body has {left} bytes left",
            tensor=tensor.name,
            binary_data_size=size,
            left_bytes=left,
        )
    if len(tensor.data):
        raise Problem(
            "bad-binary", f"input {tensor.name!r} has both data and binary_data_size", tensor=tensor.name
        )
    return size


def read_binary(tensor: InputTensor, spec: TensorSpec, data: memoryview, elements: int) -> Payload:
    """A tensor's bytes, checked against its shape and datatype. Raises Problem."""
    if spec.datatype == "BYTES":
        return _read_bytes_tensor(data, elements, spec)
    expected = elements * spec.dtype.itemsize
    if len(data) != expected:
        raise Problem(
            "wrong-data",
            f"input {spec.name!r} ({spec.datatype}): shape {tensor.shape} takes {expected} bytes, "
            f"got {len(data)}",
            tensor=spec.name,
            expected_bytes=expected,
            actual_bytes=len(data),
        )
    _check_truth(data, spec)
    return data


def _check_truth(data: memoryview, spec: TensorSpec) -> None:
    if spec.datatype == "BOOL" and len(data) and np.frombuffer(data, np.uint8).max() > 1:
        raise Problem("wrong-data", f"input {spec.name!r} (BOOL): bytes must be 0 or 1", tensor=spec.name)


def read_raw(body: bytes | bytearray, spec: TensorSpec) -> tuple[tuple[int, ...], Payload]:
    """A body that is the data of one row and nothing else: the row's shape and the data.

    A BYTES element is the whole body, without the length that elements have elsewhere.
    """
    fixed = prod(size for size in spec.shape if size != -1)
    variable = 1
    if spec.datatype == "BYTES":
        fits = fixed == 1
        payload: Payload = [_utf8(bytes(body), spec)]
    else:
        row_bytes = fixed * spec.dtype.itemsize
        if -1 in spec.shape and row_bytes:
            variable = len(body) // row_bytes
        fits = len(body) == variable * row_bytes
        payload = memoryview(body)
        _check_truth(payload, spec)
    if not fits or spec.shape.count(-1) > 1:
        shape = list(spec.shape)
        raise Problem(
            "wrong-data",
            f"input {spec.name!r} ({spec.datatype}): {len(body)} bytes are not one row of shape {shape} "
            "(-1: any, once)",
            tensor=spec.name,
            expected=shape,
            actual_bytes=len(body),
        )
    return tuple(variable if size == -1 else size for size in spec.shape), payload


def _read_bytes_tensor(data: memoryview, elements: int, spec: TensorSpec) -> list[bytes]:
    """BYTES in binary: each element is its length (u32, little-endian) and its bytes."""
    values: list[bytes] = []
    at = 0
    while at + 4 <= len(data) and len(values) < elements:
        size = int.from_bytes(data[at : at + 4], "little")
        if size > len(data) - at - 4:
            break
        values.append(_utf8(bytes(data[at + 4 : at + 4 + size]), spec))
        at += 4 + size
    if at != len(data) or len(values) != elements:
        raise Problem(
            "wrong-data",
            f"input {spec.name!r} (BYTES): {len(data)} bytes do not hold exactly {elements} elements",
            tensor=spec.name,
            expected_elements=elements,
            actual_elements=len(values),
        )
    return values


def _utf8(value: bytes, spec: TensorSpec) -> bytes:
    """Engines take strings. One that is none would fail the whole batch's run; here it fails alone."""
    try:
        value.decode()
    except UnicodeDecodeError as error:
        detail = f"input {spec.name!r} (BYTES): an element is not UTF-8: {error.reason}"
        raise Problem("wrong-data", detail, tensor=spec.name) from None
    return value
