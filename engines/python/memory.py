"""Tensors of a batch in memory that two processes share, and the input buffers of a slot.

A slot has a region for its inputs, which home writes, and one for its outputs, which the model's process
writes. A region is a file in memory without a name, so nothing is left of it once both processes have ended;
its writer makes it larger as needed.
"""

import mmap
import os
from collections.abc import Callable, Sequence
from math import prod
from typing import Any

import numpy as np

from cobatch.engines.base import Array, RowShapes, Signature, TensorSpec
from cobatch.engines.elements import read_elements, write_elements
from cobatch.engines.errors import EngineRunError, LinkError
from cobatch.engines.python.messages import Tensors

# Of a batch's inputs, or of its outputs.
MOST_BYTES = 4 << 30
# NumPy's and most libraries' vector instructions like whole cache lines.
_ALIGNMENT = 64
_KEPT_SHAPES = 256


class Region:
    """A process's end of a region. Keeps the descriptor, and closes it with `close`."""

    __slots__ = ("_view", "descriptor")

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor
        self._view = memoryview(b"")

    def reserve(self, size: int) -> memoryview:
        """Return a view for writing of at least `size` bytes. Views from before show the same memory."""
        if size > len(self._view):
            if size > MOST_BYTES:
                raise EngineRunError(f"the tensors of a batch have {size} bytes, at most {MOST_BYTES} fit")
            size = max(mmap.PAGESIZE, 1 << (size - 1).bit_length())
            if os.fstat(self.descriptor).st_size < size:
                os.ftruncate(self.descriptor, size)
            self._view = memoryview(mmap.mmap(self.descriptor, size))
        return self._view

    def view(self, size: int) -> memoryview:
        """Return a view of at least `size` bytes that the other process has written. Raises LinkError."""
        if size > len(self._view):
            if os.fstat(self.descriptor).st_size < size:
                raise LinkError(f"{size} bytes were announced, which the region does not have")
            self._view = memoryview(mmap.mmap(self.descriptor, 0))
        return self._view

    def number(self) -> Array:
        """Return the number, [1], that the region holds in place of tensors."""
        return np.ndarray((1,), np.uint64, self.reserve(8))

    def close(self) -> None:
        """Close the descriptor. The memory goes with the last view."""
        os.close(self.descriptor)


class SlotInputs:
    """The input buffers of a slot, which `reserve` gives memory to. Those for strings are apart from it."""

    def __init__(
        self, signature: Signature, max_batch_size: int, reserve: Callable[[int], memoryview]
    ) -> None:
        self._specs = signature.inputs
        self._most_rows = max_batch_size
        self._variable = any(spec.row_elements < 0 for spec in signature.inputs)
        self._reserve = reserve
        self._arrays: dict[RowShapes, tuple[Array, ...]] = {}
        self._strings: dict[int, Array] = {}

    def arrays(self, rows: int, row_shapes: RowShapes) -> tuple[Array, ...]:
        """Return [n, *row_shape] for each input, n >= rows: max_batch_size with fixed row shapes.

        One huge row must not reserve memory for a whole batch of such rows.
        """
        arrays = self._arrays.get(row_shapes)
        if arrays is None or len(arrays[0]) < rows:
            capacity = (
                min(self._most_rows, 1 << (rows - 1).bit_length()) if self._variable else self._most_rows
            )
            if len(self._arrays) >= _KEPT_SHAPES:
                self._arrays.clear()
            arrays = self._arrays[row_shapes] = self._make(capacity, row_shapes)
        return arrays

    def _make(self, capacity: int, row_shapes: RowShapes) -> tuple[Array, ...]:
        shapes = [(capacity, *row_shape) for row_shape in row_shapes]
        places, size = _places(self._specs, shapes)
        view = self._reserve(size)
        return tuple(
            self._string_buffer(index, shape)
            if spec.datatype == "BYTES"
            else np.ndarray(shape, spec.dtype, view, place)
            for index, (spec, shape, place) in enumerate(zip(self._specs, shapes, places, strict=True))
        )

    def _string_buffer(self, index: int, shape: tuple[int, ...]) -> Array:
        """Return a buffer in the memory that all shapes share."""
        count = prod(shape)
        memory = self._strings.get(index)
        if memory is None or memory.size < count:
            self._arrays.clear()  # they refer to the smaller memory
            memory = self._strings[index] = np.empty(count, object)
        return memory[:count].reshape(shape)


def _places(specs: Sequence[TensorSpec], shapes: Sequence[tuple[int, ...]]) -> tuple[list[int], int]:
    """Return the offset of each tensor of numbers, and the end of the last one."""
    places, end = [], 0
    for spec, shape in zip(specs, shapes, strict=True):
        places.append(end)
        if spec.datatype != "BYTES":
            end += -(-prod(shape) * spec.dtype.itemsize // _ALIGNMENT) * _ALIGNMENT
    return places, end


def write(specs: Sequence[TensorSpec], arrays: Sequence[Array], region: Region) -> Tensors:
    """Copy tensors into a region. Raises EngineRunError if they are too large, TypeError for bad elements."""
    strings = [write_elements(array) if array.dtype == object else b"" for array in arrays]
    places, end = _places(specs, [array.shape for array in arrays])
    view = region.reserve(end + sum(map(len, strings)))
    for spec, array, place in zip(specs, arrays, places, strict=True):
        if spec.datatype != "BYTES":
            np.ndarray(array.shape, spec.dtype, view, place)[...] = array
    return _with_strings(view, [array.shape for array in arrays], places, strings, end)


def write_strings(specs: Sequence[TensorSpec], arrays: Sequence[Array], rows: int, region: Region) -> Tensors:
    """Copy the strings of a slot's buffers behind the numbers, which lie in the region already."""
    places, end = _places(specs, [array.shape for array in arrays])
    shapes = [(rows, *array.shape[1:]) for array in arrays]
    strings = [write_elements(array[:rows]) if array.dtype == object else b"" for array in arrays]
    view = region.reserve(end + sum(map(len, strings))) if any(strings) else memoryview(b"")
    return _with_strings(view, shapes, places, strings, end)


def _with_strings(
    view: memoryview, shapes: list[tuple[int, ...]], places: list[int], strings: list[bytes], at: int
) -> Tensors:
    for index, text in enumerate(strings):
        if text:
            places[index] = at
            view[at : at + len(text)] = text
            at += len(text)
    return Tensors(tuple(shapes), tuple(places), tuple(map(len, strings)), at)


def read(specs: Sequence[TensorSpec], tensors: Tensors, region: Region) -> tuple[Array, ...]:
    """Return tensors in a region: numbers as views of it. Raises LinkError."""
    view = region.view(tensors.end)
    arrays: list[Array] = []
    parts: Any = zip(specs, tensors.shapes, tensors.places, tensors.strings, strict=True)
    for spec, shape, place, size in parts:
        if spec.datatype != "BYTES":
            arrays.append(np.ndarray(shape, spec.dtype, view, place))
            continue
        elements = np.empty(prod(shape), object)
        elements[:], _ = read_elements(view[place : place + size], elements.size)
        arrays.append(elements.reshape(shape))
    return tuple(arrays)
