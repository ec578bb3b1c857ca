"""The layout of a batch in a slot's buffers: shapes, copies, and the outputs as arrays.

With batching off an output's shape may depend on the data. TensorRT tells it through an allocator while it
starts the run, so such an output is copied, and viewed, by `Late` after each start.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np

from cobatch.engines.base import Array, RowShapes, Signature, TensorSpec
from cobatch.engines.errors import EngineRunError, NoBatchAxisError
from cobatch.engines.tensorrt.cuda import Graph
from cobatch.engines.tensorrt.tensors import as_batch

Shape = tuple[int, ...]


class ProfileContext:
    """An execution context, and the layout that its shapes are set to, if known."""

    __slots__ = ("context", "layout")

    def __init__(self, context: Any) -> None:
        self.context = context
        self.layout: Layout | None = None


class Late:
    """An output whose shape is known once the run has started. `memory`: its device address.

    TensorRT calls `allocator`, which gives it that memory and hears the shape.
    """

    def __init__(self, trt: Any, spec: TensorSpec, host: Array, memory: int) -> None:
        self.memory = memory
        self.allocator = _make_allocator(trt, memory, len(host))
        self._spec = spec
        self._host = host

    def output(self) -> Array:
        """Return the part of the host buffer that the last run's output takes, with a first axis of 1."""
        shape = self.allocator.shape
        size = prod(shape) * self._spec.dtype.itemsize
        if size > len(self._host):
            raise EngineRunError(f"output {self._spec.name!r} of shape {list(shape)} is too large")
        return self._host[:size].view(self._spec.dtype).reshape(1, *shape)


def _make_allocator(trt: Any, address: int, limit: int) -> Any:
    class Allocator(trt.IOutputAllocator):  # type: ignore[misc]  # its base is known at run time only
        def __init__(self) -> None:
            trt.IOutputAllocator.__init__(self)
            self.shape: Shape = ()

        # Called from C++, by these names; an exception that left would end the process.
        def reallocate_output(self, tensor_name: str, memory: Any, size: int, alignment: int) -> int | None:  # noqa: ARG002
            return address if size <= limit else None

        def reallocate_output_async(
            self,
            tensor_name: str,
            memory: Any,
            size: int,
            alignment: int,
            stream: Any,  # noqa: ARG002
        ) -> int | None:
            return self.reallocate_output(tensor_name, memory, size, alignment)

        def notify_shape(self, tensor_name: str, shape: Sequence[int]) -> None:  # noqa: ARG002
            self.shape = tuple(shape)

    return Allocator()


@dataclass(slots=True, eq=False)
class Layout:
    """The layout of a batch of one bucket and row shape. Copies are (destination, source).

    `late` maps places in `outputs`, which hold nothing there, to outputs of unknown shape.
    """

    profile: ProfileContext
    shapes: list[tuple[str, tuple[int, ...]]]
    copies_in: list[tuple[int, Array]]
    copies_out: list[tuple[Array, int]]
    outputs: tuple[Array, ...]
    late: dict[int, Late]
    graph: Graph | None = None


def set_shapes(context: Any, shapes: Sequence[tuple[str, Shape]]) -> None:
    """Set the inputs' shapes. Raises EngineRunError that names the input whose shape is refused."""
    for name, shape in shapes:
        if not context.set_input_shape(name, shape):
            raise EngineRunError(f"TensorRT does not accept shape {list(shape)} for input {name!r}")


def infer(context: Any, shapes: Sequence[tuple[str, Shape]], outputs: Sequence[TensorSpec]) -> list[Shape]:
    """Set the inputs' shapes and return the outputs'. Raises EngineRunError that names the tensor."""
    set_shapes(context, shapes)
    try:
        missing = ", ".join(context.infer_shapes())
        why = f"{missing} are not specified" if missing else ""
    except RuntimeError as error:
        why = str(error)
    if why:
        raise EngineRunError(f"TensorRT cannot infer shapes: {why}")
    output_shapes = [tuple(context.get_tensor_shape(spec.name)) for spec in outputs]
    for spec, shape in zip(outputs, output_shapes, strict=True):
        if -1 in shape and spec.batched:
            raise NoBatchAxisError(
                f"output {spec.name!r} has a shape that depends on the data, {list(shape)}: "
                "its elements cannot be divided among the rows"
            )
    return output_shapes


def lay_out(
    profile: ProfileContext,
    signature: Signature,
    bucket: int,
    row_shapes: RowShapes,
    hosts: Sequence[Array],
    memory: Sequence[Any],
    late: Mapping[int, Late],
) -> Layout:
    """Lay out a batch of `bucket` rows and set the context to its shapes.

    `hosts`, `memory`: each tensor's host and device buffers, inputs first. `late`: the outputs of unknown
    shape, by the same numbers. Raises EngineRunError that names the tensor.
    """
    inputs, count = signature.inputs, len(signature.inputs)
    shapes = [
        (spec.name, spec.tensor_shape(bucket, shape)) for spec, shape in zip(inputs, row_shapes, strict=True)
    ]
    profile.layout = None
    output_shapes = infer(profile.context, shapes, signature.outputs)
    copies_in, copies_out, outputs = [], [], []
    for index, (spec, (_, shape)) in enumerate(zip(inputs, shapes, strict=True)):
        size = prod(shape) * spec.dtype.itemsize
        if size:
            copies_in.append((int(memory[index]), hosts[index][:size]))
    for index, (spec, shape) in enumerate(zip(signature.outputs, output_shapes, strict=True), count):
        if index in late:
            outputs.append(np.empty(0))
            continue
        size = prod(shape) * spec.dtype.itemsize
        batch = as_batch(spec, shape)
        if batch[:1] != (bucket,) or size > len(hosts[index]):
            raise NoBatchAxisError(
                f"output {spec.name!r} does not follow the batch axis, or outgrows the largest batch: "
                f"{bucket} rows give shape {list(shape)}"
            )
        if size:
            copies_out.append((hosts[index][:size], int(memory[index])))
        outputs.append(hosts[index][:size].view(spec.dtype).reshape(batch))
    places = {index - count: one for index, one in late.items()}
    profile.layout = layout = Layout(profile, shapes, copies_in, copies_out, tuple(outputs), places)
    return layout


def view_rows(host: Array, spec: TensorSpec, row_shape: tuple[int, ...]) -> Array:
    """Return the buffer as rows of this shape, as many as fit."""
    elements = prod(row_shape)
    items = host[: len(host) // spec.dtype.itemsize * spec.dtype.itemsize].view(spec.dtype)
    rows = len(items) // max(1, elements)
    return items[: rows * elements].reshape(rows, *row_shape)
