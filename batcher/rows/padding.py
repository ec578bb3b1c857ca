"""Rows of different lengths in one batch: padded to a bucket's length, and cut back afterwards.

Rows that differ in one axis could not share a batch. Where a model's configuration says that an axis may be
padded, a request is filled up to the next bucket's length, and the bucket is what it is grouped by: the
queue and its order know nothing of all this.

A batch has its bucket's shape, not that of its longest member. So what a request wastes depends on its own
length alone, not on whom it rides with, and sorting within a bucket would gain nothing: the buckets are the
sorting, and whose turn it is stays as it was. It also keeps few shapes alive, which engines are grateful
for: memory, bindings and tuned kernels are kept for each.

Outputs are cut back only along the axes that the configuration names. That an output's axis has the bucket's
size says nothing: a model with 64 classes and a bucket of 64 would lose classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, NamedTuple

import numpy as np

from cobatch.batcher.errors import BatcherError, LengthMismatchError, TooLongError
from cobatch.batcher.request import Batch, InputPad, OutputCut, Pad, Request
from cobatch.batcher.statistics import Padded
from cobatch.engines.base import RowShapes, Signature

# Of the pads that are kept: there are as many as lengths that callers send.
_KEPT_PADS = 4096
# Padding that is kept as bytes; longer ones are written by NumPy, which takes a microsecond to begin.
_LONGEST_TAIL = 2048
_ALL = slice(None)


class Where(NamedTuple):
    """An axis (of a row) of the tensor with this index in the signature."""

    tensor: int
    axis: int


class Mask(NamedTuple):
    """An input that tells rows from padding. `row_shape`: its row's, with -1 for the length; `one`: its
    element's bytes for what is no padding."""

    tensor: int
    row_shape: tuple[int, ...]
    one: bytes


@dataclass(frozen=True, slots=True)
class Length:
    """A size that differs from caller to caller, and every axis that has it.

    The first of `inputs` is what it is told from. `buckets` ascend, () for the powers of two without end.
    """

    inputs: tuple[Where, ...]
    outputs: tuple[Where, ...] = ()
    buckets: tuple[int, ...] = ()
    mask: Mask | None = None

    def bucket(self, size: int) -> int | None:
        """The least bucket that holds it, None if none does."""
        if not self.buckets:
            return 1 << max(0, size - 1).bit_length()
        return next((bucket for bucket in self.buckets if bucket >= size), None)


class Padder:
    """What may be padded of one model. `values`: of its inputs, what they are padded with."""

    def __init__(self, signature: Signature, lengths: Sequence[Length], values: Sequence[Any]) -> None:
        self.lengths = tuple(lengths)
        self.masks = tuple((one.inputs[0], one.mask) for one in lengths if one.mask is not None)
        self.inputs = tuple({where.tensor for one in lengths for where in one.inputs})
        self._signature = signature
        self._values = tuple(values)
        self._pads: dict[RowShapes, Pad] = {}

    def assign(self, request: Request) -> BatcherError | None:
        """Put a request, which comes with its own row shapes, into its bucket; why that is not possible."""
        pad = self._pads.get(request.row_shapes)
        if pad is None:
            made = self._make(request.rows, request.row_shapes)
            if isinstance(made, BatcherError):
                return made
            if len(self._pads) >= _KEPT_PADS:
                self._pads.clear()
            pad = self._pads[request.row_shapes] = made
        if pad.row_shapes != request.row_shapes:
            request.pad = pad
        request.row_shapes = pad.row_shapes
        return None

    def add_masks(self, rows: int, row_shapes: list[tuple[int, ...]], payloads: list[Any]) -> None:
        """Make the masks that a caller left out, None in `payloads`: all ones, as long as what they mask."""
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
                return TooLongError(*self._words(rows, own, first), first.axis + 1, length.buckets[-1])
            for where in length.inputs:
                if own[where.tensor][where.axis] != size:
                    other = self._signature.inputs[first.tensor].name
                    return LengthMismatchError(*self._words(rows, own, where), where.axis + 1, other, size)
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

    def _words(self, rows: int, own: RowShapes, where: Where) -> tuple[str, list[int], list[int]]:
        """For an error about an input: its name, what the model takes, what came."""
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
    """Give a request that ran a batch of its own, in which its outputs have its own lengths.

    None where there is nothing to cut. They are valid only as long as the batch's. Raises ValueError where an
    output does not follow the input, as the configuration says that it does.
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
    # In one piece: whoever encodes it counts on that.
    return np.ascontiguousarray(rows[cut.body])
