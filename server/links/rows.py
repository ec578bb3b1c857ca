"""Rows in the payload of a message: written in one process, checked and read in the other.

Little-endian tensors one after another; an element of a BYTES tensor is its length (u32) and its bytes.
"""

import math
from collections.abc import Sequence
from math import prod
from typing import Any

import numpy as np

from cobatch.batcher.request import Payload
from cobatch.engines.base import Array, RowShapes, Signature, TensorSpec
from cobatch.engines.elements import read_elements
from cobatch.engines.errors import LinkError
from cobatch.engines.link.messages import Answers, Submit
from cobatch.engines.link.slab import PIECE_BYTES
from cobatch.server.http.problem import Problem
from cobatch.server.v2.binary import bytes_tensor, read_binary
from cobatch.server.v2.checks import OutputSizes, check_tensor
from cobatch.server.v2.pieces import release

Buffer = bytes | bytearray | memoryview


# More than this is copied in the thread that decodes and encodes.
LARGE_BYTES = 1 << 20
# More of them take longer than a millisecond to write, and longer ones to read: a thread does.
MANY_STRINGS = 1 << 12
_LONG_STRINGS_BYTES = 1 << 14


def written(payload: Payload) -> Payload:
    """Return the rows of one input as they are sent, those of a BYTES input in pieces."""
    if not isinstance(payload, list):
        return payload
    values = np.empty(len(payload), object)
    values[:] = payload
    return bytes_tensor(values)


def has_strings(specs: Sequence[TensorSpec]) -> bool:
    """Return whether a tensor is of BYTES."""
    return any(spec.datatype == "BYTES" for spec in specs)


def is_plain(signature: Signature) -> bool:
    """Return whether rows of all inputs have one length and no byte that needs a check."""
    return all(spec.row_elements >= 0 and spec.datatype not in ("BOOL", "BYTES") for spec in signature.inputs)


class InputReader:
    """Reads the requests of one model. A front is trusted no further than its own rows."""

    def __init__(self, signature: Signature) -> None:
        self._specs = specs = signature.inputs
        self._row_shapes: RowShapes = tuple(spec.shape for spec in specs)
        self._fixed = all(spec.row_elements >= 0 for spec in specs)
        self.plain = is_plain(signature)
        flags = any(spec.datatype == "BOOL" for spec in specs)
        self._short_bytes = _LONG_STRINGS_BYTES if has_strings(specs) else LARGE_BYTES if flags else math.inf
        # Bytes of a row.
        self._row_bytes = tuple(spec.row_elements * spec.dtype.itemsize for spec in specs)
        self._output_sizes = OutputSizes(signature)

    def is_long(self, submit: Submit) -> bool:
        """Return whether a request has many bytes that are looked at: strings or flags."""
        return sum(submit.sizes) > self._short_bytes

    def read(self, submit: Submit, payload: Buffer) -> tuple[RowShapes, Sequence[Payload]]:
        """Return the shapes of a request's rows, and views of its tensors. Raises LinkError."""
        sizes, rows = submit.sizes, submit.rows
        if self.plain and submit.shapes is None:
            expected = self._row_bytes if rows == 1 else tuple([size * rows for size in self._row_bytes])
            if sizes != expected:
                raise LinkError(f"the inputs have {sizes} bytes, {rows} rows have {expected}")
            return self._row_shapes, (payload,) if len(sizes) == 1 else cut(payload, sizes)
        shapes = self._row_shapes if submit.shapes is None else submit.shapes
        if len(sizes) != len(self._specs) or len(shapes) != len(self._specs):
            raise LinkError(f"a request with {len(sizes)} inputs, the model has {len(self._specs)}")
        try:
            tensors = [
                _read(spec, rows, shape, tensor)
                for spec, shape, tensor in zip(self._specs, shapes, cut(payload, sizes), strict=True)
            ]
            self._output_sizes.check(rows, shapes)
        except Problem as problem:
            raise LinkError(f"a request that is not of the model: {problem.detail}") from None
        return self._row_shapes if self._fixed else shapes, tensors


def _read(spec: TensorSpec, rows: int, row_shape: tuple[int, ...], data: memoryview) -> Payload:
    if not spec.batched and rows != 1:
        raise LinkError(f"{rows} rows for a model without batches")
    shape = list(spec.tensor_shape(rows, row_shape))
    check_tensor(spec, spec.datatype, shape)
    return read_binary(spec, data, shape)


def cut(payload: Buffer, sizes: Sequence[int]) -> list[memoryview]:
    """Return views of tensors that lie one after another."""
    view = memoryview(payload)
    views = []
    at = 0
    for size in sizes:
        views.append(view[at : at + size])
        at += size
    return views


def output_bytes(output: Array) -> Buffer:
    """Return rows of an output as they are sent; contiguous numbers are not copied."""
    pieces = output_pieces(output)
    return pieces[0] if len(pieces) == 1 else b"".join(pieces)


def output_pieces(output: Array) -> Sequence[Buffer]:
    """The same; many or long strings in pieces."""
    if output.dtype == object:
        return bytes_tensor(output)
    return [np.ascontiguousarray(output).reshape(-1).view(np.uint8).data]


def is_long(dtypes: Sequence[np.dtype[Any]], answers: Answers) -> bool:
    """Return whether the outputs of an answer are read in the thread: then they are copies."""
    size = sum(answers.sizes)
    return size > LARGE_BYTES or (size > _LONG_STRINGS_BYTES and any(dtype.hasobject for dtype in dtypes))


def read_outputs(
    dtypes: Sequence[np.dtype[Any]], answers: Answers, rows: int, payload: Buffer
) -> list[Array]:
    """Return the outputs of an answer, of `rows` rows together: strings, or views of the payload.

    Of more than LARGE_BYTES they are copies.
    """
    lasting = is_long(dtypes, answers)
    outputs = []
    at = 0
    for dtype, row_shape, size in zip(dtypes, answers.shapes, answers.sizes, strict=True):
        shape = (rows, *row_shape)
        if dtype.hasobject:
            output: np.ndarray[Any, Any] = np.empty(prod(shape), object)
            output[:], _ = read_elements(memoryview(payload)[at : at + size], output.size)
            outputs.append(output.reshape(shape))
        else:
            view: np.ndarray[Any, Any] = np.ndarray(shape, dtype, payload, at)
            outputs.append(_copied(view) if lasting else view)
        at += size
    return outputs


def _copied(view: Array) -> Array:
    """Return a copy, made in pieces."""
    copy = np.empty_like(view)
    source, target = view.reshape(-1), copy.reshape(-1)
    step = PIECE_BYTES // view.itemsize
    for at in range(0, len(source), step):
        target[at : at + step] = source[at : at + step]
        release()
    return copy
