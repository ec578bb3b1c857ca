"""What every engine is: tensors, signature, and the protocol that the worker drives."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, Protocol

import numpy as np

Array = np.ndarray[Any, Any]
# The concrete shape of one row of each input, in the signature's order.
RowShapes = tuple[tuple[int, ...], ...]

# Open Inference Protocol V2 datatypes. BYTES elements are Python objects (bytes or str). NumPy has
# no BF16, so its bits travel in uint16.
DATATYPES: dict[str, np.dtype[Any]] = {
    "BOOL": np.dtype(np.bool_),
    "UINT8": np.dtype(np.uint8),
    "UINT16": np.dtype(np.uint16),
    "UINT32": np.dtype(np.uint32),
    "UINT64": np.dtype(np.uint64),
    "INT8": np.dtype(np.int8),
    "INT16": np.dtype(np.int16),
    "INT32": np.dtype(np.int32),
    "INT64": np.dtype(np.int64),
    "FP16": np.dtype(np.float16),
    "FP32": np.dtype(np.float32),
    "FP64": np.dtype(np.float64),
    "BF16": np.dtype(np.uint16),
    "BYTES": np.dtype(object),
}


def within(low: Sequence[int], shape: Sequence[int], high: Sequence[int]) -> bool:
    """Whether each axis of a shape lies between those of two others of as many axes."""
    return all(a <= b <= c for a, b, c in zip(low, shape, high, strict=True))


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """An input or output. `shape` is that of one row, without the batch axis; -1: may vary.

    `ranges`: smallest and largest shapes of a row that the engine takes; a row must lie within one pair of
    them. Empty: whatever `shape` says.
    """

    name: str
    datatype: str
    shape: tuple[int, ...]
    ranges: tuple[tuple[tuple[int, ...], tuple[int, ...]], ...] = ()

    @property
    def dtype(self) -> np.dtype[Any]:
        """The NumPy dtype that carries `datatype`."""
        return DATATYPES[self.datatype]

    @property
    def least_row(self) -> tuple[int, ...]:
        """The smallest shape of a row: where an axis may vary, 1 or what the engine takes at least."""
        return self.ranges[0][0] if self.ranges else tuple(abs(size) for size in self.shape)

    @property
    def row_elements(self) -> int:
        """Elements in a row, or -1 where that may vary."""
        return -1 if -1 in self.shape else prod(self.shape)


@dataclass(frozen=True, slots=True)
class Signature:
    """A model's tensors. `fixed_batch`: the first axis's size where the model fixes it, else None."""

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    fixed_batch: int | None = None


class Engine(Protocol):
    """Runs batches in slots: while one slot's batch runs, another's rows can be packed.

    `inputs` is called on the event loop's thread and only for a slot that nothing runs in; all else
    on the one worker thread. An engine whose batches run from `enqueue` on, rather than in `wait`, says
    so with an attribute `asynchronous = True`.
    """

    platform: str
    slots: int
    max_batch_size: int

    @property
    def signature(self) -> Signature:
        """The model's tensors; there once the engine is open."""
        ...

    def open(self) -> None:
        """Load the model and allocate. Raises EngineLoadError."""
        ...

    def inputs(self, slot: int, rows: int, row_shapes: RowShapes) -> tuple[Array, ...]:
        """The slot's input buffers to write rows into: C-contiguous [n, *row_shape] each, n >= rows."""
        ...

    def enqueue(self, slot: int, rows: int, row_shapes: RowShapes) -> None:
        """Start the batch that lies in the slot's buffers. Raises EngineError."""
        ...

    def wait(self, slot: int) -> tuple[Array, ...]:
        """Wait for it. Outputs are [rows, ...], valid until the slot's next `enqueue`. Raises EngineError."""
        ...

    def close(self) -> None:
        """Free everything. Called once, also after a failed `open`."""
        ...
