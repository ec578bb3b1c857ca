"""Padding: rows of different lengths in one batch, padded to a bucket's length and cut back afterwards.

Rows that differ in one axis could not share a batch. If the configuration allows an axis to be padded, a
request is padded to the next bucket's length and grouped by the bucket; the queue knows nothing of it.

A batch has its bucket's shape, not that of its longest member. So the padding of a request depends on its
own length alone, sorting within a bucket would gain nothing, and the order of requests stays. It also keeps
the number of shapes small, for each of which engines keep memory, bindings and tuned kernels.

Outputs are cut back only along the axes that the configuration names. An output's axis that has the bucket's
size proves nothing: a model with 64 classes and a bucket of 64 would lose classes.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, NamedTuple

import numpy as np

from cobatch.batcher.errors import BatcherError, LengthMismatchError, TooLongError
from cobatch.batcher.request import Batch, InputPad, OutputCut, Pad, Request
from cobatch.batcher.statistics import Padded
from cobatch.engines.base import RowShapes, Signature

# Pads kept, one for each length that callers send.
_KEPT_PADS = 4096
# Bytes of padding that are kept ready; more is written by NumPy, which takes a microsecond to begin.
_LONGEST_TAIL = 2048
_ALL = slice(None)


class Where(NamedTuple):
    """An axis (of a row) of the tensor with this index in the signature."""

    tensor: int
    axis: int


class Mask(NamedTuple):
    """An input that marks padding. `row_shape` has -1 for the length; `one` is the element of a real
    position, as bytes."""

    tensor: int
    row_shape: tuple[int, ...]
    one: bytes


@dataclass(frozen=True, slots=True)
class Length:
    """A size that differs between requests, and every axis that has it.

    It is read from the first of `inputs`. `buckets` ascend; () stands for all powers of two.
    """

    inputs: tuple[Where, ...]
    outputs: tuple[Where, ...] = ()
    buckets: tuple[int, ...] = ()
    mask: Mask | None = None

    def bucket(self, size: int) -> int | None:
        """Return the smallest bucket of at least `size`, None if there is none."""
        if not self.buckets:
            return 1 << max(0, size - 1).bit_length()
        return next((bucket for bucket in self.buckets if bucket >= size), None)


class Padder:
    """Pads the requests of one model. `values`: the padding of each input."""

    def __init__(self, signature: Signature, lengths: Sequence[Length], values: Sequence[Any]) -> None:
        self.lengths = tuple(lengths)
        self.masks = tuple((one.inputs[0], one.mask) for one in lengths if one.mask is not None)
        self.inputs = tuple({where.tensor for one in lengths for where in one.inputs})
        self._signature = signature
        self._values = tuple(values)
        self._pads: dict[RowShapes, Pad] = {}

    def assign(self, request: Request) -> BatcherError | None:
        """Put a request, which has its own row shapes, into its bucket; return why that is impossible."""
        pad = self._pads.get(request.row_shapes)
        if pad is None:
            result = self._make(request.rows, request.row_shapes)
            if isinstance(result, BatcherError):
                return result
            if len(self._pads) >= _KEPT_PADS:
                self._pads.clear()
            pad = self._pads[request.row_shapes] = result
        if pad.row_shapes != request.row_shapes:
            request.pad = pad
        request.row_shapes = pad.row_shapes
        return None

    def add_masks(self, rows: int, row_shapes: list[tuple[int, ...]], payloads: list[Any]) -> None:
        """Add the masks that a caller left out (None in `payloads`): ones, of the length that they mask."""
        for told_from, mask in self.masks:
            if payloads[mask.tensor] is None:
                size = row_shapes[told_from.tensor][told_from.axis]
                row_shapes[mask.tensor] = shape = tuple(size if n == -1 else n for n in mask.row_shape)
                payloads[mask.tensor] = mask.one * (rows * prod(shape))

    def padded(self, batch: Batch) -> Padded:
        """Return the bucket of a batch and how much of it is padding."""
        shapes = batch.row_shapes
        bucket = tuple([shapes[one.inputs[0].tensor][one.inputs[0].axis] for one in self.lengths])
        elements = batch.rows * sum([prod(shapes[index]) for index in self.inputs])
        padding = sum([one.rows * one.pad.row_padding for one in batch.requests if one.pad is not None])
        return Padded(bucket, elements, padding)

    def _make(self, rows: int, own: RowShapes) -> Pad | BatcherError:
        shapes = [list(shape) for shape in own]
        cuts: dict[int, list[tuple[int, int, int]]] = {}
        for length in self.lengths:
            first = length.inputs[0]
            size = own[first.tensor][first.axis]
            bucket = length.bucket(size)
            if bucket is None:
                return TooLongError(*self._shapes(rows, own, first), first.axis + 1, length.buckets[-1])
            for where in length.inputs:
                if own[where.tensor][where.axis] != size:
                    other = self._signature.inputs[first.tensor].name
                    return LengthMismatchError(*self._shapes(rows, own, where), where.axis + 1, other, size)
                shapes[where.tensor][where.axis] = bucket
            for where in length.outputs if bucket != size else ():
                cuts.setdefault(where.tensor, []).append((1 + where.axis, size, bucket))
        row_shapes = tuple(tuple(shape) for shape in shapes)
        pairs = list(zip(own, row_shapes, self._values, strict=True))
        return Pad(
            row_shapes,
            tuple(None if short == full else _input_pad(short, full, value) for short, full, value in pairs),
            tuple(_output_cut(cuts.get(index)) for index in range(len(self._signature.outputs))),
            sum(prod(full) - prod(short) for short, full, _ in pairs),
        )

    def _shapes(self, rows: int, own: RowShapes, where: Where) -> tuple[str, list[int], list[int]]:
        """Return an input's name, expected shape and actual shape, for an error about it."""
        spec = self._signature.inputs[where.tensor]
        return spec.name, [-1, *spec.shape], [rows, *own[where.tensor]]


def _input_pad(short: tuple[int, ...], full: tuple[int, ...], value: Any) -> InputPad:
    body: list[slice] = [_ALL]
    rest = []
    for size, bucket in zip(short, full, strict=True):
        if size != bucket:
            rest.append((*body, slice(size, bucket)))
        body.append(_ALL if size == bucket else slice(size))
    size = (prod(full) - prod(short)) * getattr(value, "nbytes", _LONGEST_TAIL + 1)
    behind = short[1:] == full[1:] and size <= _LONGEST_TAIL
    tail = value.tobytes() * (prod(full) - prod(short)) if behind else None
    return InputPad(short, tuple(body), tuple(rest), value, tail)


def _output_cut(axes: list[tuple[int, int, int]] | None) -> OutputCut | None:
    if axes is None:
        return None
    body = [_ALL] * (1 + max(axis for axis, _, _ in axes))
    for axis, size, _ in axes:
        body[axis] = slice(size)
    return OutputCut(tuple(body), tuple((axis, bucket) for axis, _, bucket in axes))


def cut_back(request: Request, pad: Pad) -> Batch | None:
    """Give a request that ran a batch of its own whose outputs have the request's lengths; return it.

    None if there is nothing to cut. The outputs are valid only as long as the batch's. Raises ValueError if
    an output does not have the input's length, contrary to the configuration.
    """
    if not any(pad.outputs):
        return None
    batch = request.batch
    assert batch is not None
    own = batch.for_one((batch,))
    outputs = []
    for number, (output, cut) in enumerate(zip(batch.outputs, pad.outputs, strict=True)):
        rows = output[request.first_row : request.first_row + request.rows]
        outputs.append(rows if cut is None else _cut(rows, number, cut))
    own.outputs = outputs
    request.batch = own
    request.first_row = 0
    return own


def _cut(rows: np.ndarray[Any, Any], number: int, cut: OutputCut) -> np.ndarray[Any, Any]:
    for axis, bucket in cut.follows:
        if rows.ndim <= axis or rows.shape[axis] != bucket:
            shape = list(rows.shape)
            raise ValueError(f"output {number} has shape {shape}, axis {axis} should be {bucket} long")
    # Encoders need it contiguous.
    return np.ascontiguousarray(rows[cut.body])
