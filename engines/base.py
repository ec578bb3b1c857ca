"""The interface of engines: tensors, signature, and the protocol that the worker drives."""

import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Any, Literal, Protocol, runtime_checkable

import numpy as np

from cobatch.engines.errors import EngineEndedError, EngineLoadError

Array = np.ndarray[Any, Any]
# The shape of one row of each input, in the signature's order; with batching off of the whole input.
RowShapes = tuple[tuple[int, ...], ...]

# Open Inference Protocol V2 datatypes. BYTES elements are Python objects (bytes or str). NumPy has no BF16,
# so uint16 carries its bits.
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


# The section that says how to export models, for messages.
EXPORT_DOCS = "docs/batching.md#how-to-export-a-model"


def available_cores() -> int:
    """Count the cores that this process may use, which in a container can be far below the machine's."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def batch_sizes(fixed_batch: int | None, max_batch_size: int) -> list[int]:
    """Return the sizes to time: powers of two and the largest; a fixed size alone."""
    if fixed_batch is not None:
        return [max_batch_size]
    return [*(1 << n for n in range(max_batch_size.bit_length()) if 1 << n < max_batch_size), max_batch_size]


def within(low: Sequence[int], shape: Sequence[int], high: Sequence[int]) -> bool:
    """Return True if each axis of a shape lies between those of two shapes with equally many axes."""
    return all(a <= b <= c for a, b, c in zip(low, shape, high, strict=True))


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """An input or output. `shape` is that of one row, without the batch axis; -1 marks a variable axis.

    With batching off (`batched` is False) a row is the whole tensor, and so is `shape`. `ranges`: pairs of
    the smallest and largest row shape that the engine accepts; a row must lie within one pair. If empty, only
    `shape` restricts rows. `axis_names`: the model's names of the axes, "" for none; axes of one name are
    equally long. `max_text_bytes`: of the strings of a row of an input, if the engine has a limit.
    """

    name: str
    datatype: str
    shape: tuple[int, ...]
    ranges: tuple[tuple[tuple[int, ...], tuple[int, ...]], ...] = ()
    batched: bool = True
    axis_names: tuple[str, ...] = ()
    max_text_bytes: int | None = None

    @property
    def dtype(self) -> np.dtype[Any]:
        """The NumPy dtype that carries `datatype`."""
        return DATATYPES[self.datatype]

    @property
    def least_row(self) -> tuple[int, ...]:
        """The smallest row shape; a variable axis without a range counts as 1."""
        return self.ranges[0][0] if self.ranges else tuple(abs(size) for size in self.shape)

    @property
    def row_elements(self) -> int:
        """Elements of a row, -1 if variable."""
        return -1 if -1 in self.shape else prod(self.shape)

    def tensor_shape(self, rows: int, row_shape: tuple[int, ...]) -> tuple[int, ...]:
        """Return the shape, for clients and engines, of this many rows; with batching off there is one."""
        return (rows, *row_shape) if self.batched else row_shape

    @property
    def full_shape(self) -> tuple[int, ...]:
        """The tensor's shape; -1 marks the batch axis and variable axes."""
        return self.tensor_shape(-1, self.shape)


@dataclass(frozen=True, slots=True)
class Batching:
    """The decision if a model's requests share runs, and its reason.

    The operator sets "on" or "off"; "auto" is not decided yet: `engines.proof` makes it "proven", "unproven"
    (batched as the signature says) or "disproved" (off).
    """

    verdict: Literal["auto", "on", "off", "proven", "unproven", "disproved"] = "auto"
    reason: str = ""

    @property
    def on(self) -> bool:
        """True if requests may share runs."""
        return self.verdict not in ("off", "disproved")


AUTO = Batching()


@dataclass(frozen=True, slots=True)
class Signature:
    """A model's tensors. `fixed_batch`: the batch axis's size if the model fixes it, else None."""

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    fixed_batch: int | None = None
    batching: Batching = Batching("on")

    @property
    def batching_note(self) -> str:
        """A line for the operator: how requests are batched, the reason, and the remedy if there is one."""
        verdict, reason = self.batching.verdict, self.batching.reason
        if verdict == "disproved":
            return f"off, requests run one at a time: {reason}; to change the export: {EXPORT_DOCS}"
        if verdict == "off":
            return f"off, requests run one at a time{reason and f': {reason}'}"
        if self.fixed_batch == 1:
            return f"fixed at 1 by the file; export it with a dynamic batch axis: {EXPORT_DOCS}"
        if verdict == "unproven":
            return f'on, but not proven: {reason}; set it to "off" if rows depend on each other, else to "on"'
        return "on, proven at load" if verdict == "proven" else "on, not tested"


def batched_signature(inputs: Sequence[TensorSpec], outputs: Sequence[TensorSpec]) -> Signature:
    """Return the signature of rows along the first axis. Raises EngineLoadError if that is none.

    The specs have whole shapes.
    """
    for kind, specs in (("input", inputs), ("output", outputs)):
        for spec in specs:
            if not spec.shape:
                raise EngineLoadError(f"{kind} {spec.name!r} is a scalar or of unknown rank")
    sizes = {spec.shape[0] for spec in inputs}
    if len(sizes) > 1:
        shown = ", ".join(f"{spec.name!r} {list(spec.shape)}" for spec in inputs)
        raise EngineLoadError(f"the inputs' first axes differ: {shown}")
    fixed = sizes.pop()
    if fixed == 0:
        raise EngineLoadError("the inputs' first axis is fixed at 0")
    for spec in outputs:
        if spec.shape[0] not in (fixed, -1):
            expected = "vary with the inputs'" if fixed == -1 else f"be {fixed}, as the inputs'"
            raise EngineLoadError(
                f"output {spec.name!r}: its first axis is {spec.shape[0]}, it should {expected}"
            )

    def by_rows(specs: Sequence[TensorSpec]) -> tuple[TensorSpec, ...]:
        return tuple(
            replace(spec, shape=spec.shape[1:], batched=True, axis_names=spec.axis_names[1:])
            for spec in specs
        )

    return Signature(by_rows(inputs), by_rows(outputs), None if fixed == -1 else fixed)


class Engine(Protocol):
    """Runs batches in slots: while one slot's batch runs, another's rows can be packed.

    `inputs` is called on the event loop's thread, only for an idle slot; all other methods on the worker
    thread. With batching off a batch is one row, the whole tensors: `max_batch_size` is 1, and buffers and
    outputs have a first axis of 1 that the model does not see. An engine whose batches run from `enqueue` on,
    not in `wait`, has an attribute `asynchronous = True`; one whose outputs stay valid has
    `outputs_last = True`.
    """

    platform: str
    slots: int
    max_batch_size: int

    @property
    def signature(self) -> Signature:
        """The model's tensors, known once the engine is open."""
        ...

    def open(self) -> None:
        """Load the model and allocate. Raises EngineLoadError."""
        ...

    def inputs(self, slot: int, rows: int, row_shapes: RowShapes) -> tuple[Array, ...]:
        """Return the slot's input buffers: C-contiguous [n, *row_shape] each, n >= rows."""
        ...

    def enqueue(self, slot: int, rows: int, row_shapes: RowShapes) -> None:
        """Start the batch in the slot's buffers. Raises EngineError."""
        ...

    def wait(self, slot: int) -> tuple[Array, ...]:
        """Wait for the outputs: [rows, ...], valid until the slot's next `enqueue`. Raises EngineError."""
        ...

    def close(self) -> None:
        """Free everything. Called once, also after a failed `open`."""
        ...


@runtime_checkable
class Endable(Protocol):
    """An engine with a process of its own, which may end at any time.

    `on_end` may be set; another thread calls it when the process has ended without `kill` or `close`.
    """

    on_end: Callable[[EngineEndedError], None]

    def kill(self, *, hung: bool = False) -> None:
        """End the process at once; `hung`: once it has told where it is. May be called by any thread."""
        ...


def _references(arrays: Sequence[Array], index: int) -> int:
    return sys.getrefcount(arrays[index])


# Not a number: versions of Python count differently.
_ALONE = _references([np.empty(1)], 0)


def is_alone(arrays: Sequence[Array], index: int) -> bool:
    """Return True if nothing but this sequence refers to an array, and no array is a view of it."""
    return _references(arrays, index) == _ALONE
