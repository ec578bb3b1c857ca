"""Checks of tensors against a model's signature, for every request format.

Each raises a Problem that names the tensor, the expected and the given value.
"""

from collections.abc import Sequence
from math import prod
from typing import Any

from cobatch.batcher.request import Payload
from cobatch.batcher.rows.padding import Padder
from cobatch.engines.base import Signature, TensorSpec, within
from cobatch.server.http.problem import Problem

# Of the other axes of a tensor without elements, which no data bounds: a model's outputs can have them too.
_MAX_EMPTY_BYTES = 1 << 26
_MAX_OUTPUT_BYTES = 1 << 30
# Each element is a Python object, and engines take them one by one.
MAX_STRINGS = 1 << 17


class TensorNames:
    """The names of a model's tensors. A client may leave out the masks that the padder makes itself."""

    def __init__(self, signature: Signature, padder: Padder | None) -> None:
        masks = set() if padder is None else {mask.tensor for _, mask in padder.masks}
        self.required = [spec for index, spec in enumerate(signature.inputs) if index not in masks]
        self.inputs = [spec.name for spec in signature.inputs]
        self._outputs = [spec.name for spec in signature.outputs]

    def check_inputs(self, names: Sequence[str]) -> None:
        """Raise Problem unless the names are the inputs', each once; masks may be missing."""
        _check_names("input", names, self.inputs)
        for spec in self.required:
            if spec.name not in names:
                raise Problem("missing-tensor", f"input {spec.name!r} is missing", tensor=spec.name)

    def output_indices(self, names: Sequence[str]) -> list[int]:
        """Where these outputs stand in the signature. Raises Problem."""
        _check_names("output", names, self._outputs)
        return [self._outputs.index(name) for name in names]


def _check_names(kind: str, names: Sequence[str], known: list[str]) -> None:
    for position, name in enumerate(names):
        if name not in known:
            detail = f"the model has no {kind} {name!r}; its {kind}s are {', '.join(known)}"
            members: dict[str, Any] = {f"{kind}s": known}
            raise Problem("unknown-tensor", detail, tensor=name, **members)
        if name in names[:position]:
            raise Problem("duplicate-tensor", f"{kind} {name!r} is named twice", tensor=name)


def check_tensor(spec: TensorSpec, datatype: str, shape: list[int]) -> None:
    """Raise Problem unless datatype and the whole shape are an input's."""
    if datatype != spec.datatype:
        raise Problem(
            "wrong-datatype",
            f"input {spec.name!r} must be {spec.datatype}, got {datatype!r}",
            tensor=spec.name,
            expected=spec.datatype,
            actual=datatype,
        )
    if len(shape) != len(spec.full_shape):
        raise wrong_shape(spec, shape, f"it needs {len(spec.full_shape)} axes")
    if spec.batched and shape[0] < 1:
        raise wrong_shape(spec, shape, "it needs at least one row")
    row_shape = shape[1:] if spec.batched else shape
    for size, expected in zip(row_shape, spec.shape, strict=True):
        if size < 0 or expected not in (size, -1):
            raise wrong_shape(spec, shape)
    if spec.ranges and not any(within(low, row_shape, high) for low, high in spec.ranges):
        shown = " or ".join(f"{list(low)} to {list(high)}" for low, high in spec.ranges)
        raise wrong_shape(spec, shape, f"the engine takes {'rows of ' if spec.batched else ''}{shown}")
    if not prod(shape) and prod(size or 1 for size in shape) * spec.dtype.itemsize > _MAX_EMPTY_BYTES:
        raise wrong_shape(spec, shape, f"without its empty axes it has more than {_MAX_EMPTY_BYTES} bytes")


def check_strings(spec: TensorSpec, elements: int, kind: str = "input") -> None:
    """Raise Problem for a BYTES tensor with too many elements."""
    if elements > MAX_STRINGS:
        detail = f"{kind} {spec.name!r} has {elements} elements; a BYTES tensor may have {MAX_STRINGS}"
        raise Problem("too-many-elements", detail, tensor=spec.name, limit=MAX_STRINGS)


def check_text(spec: TensorSpec, rows: int, payload: Payload) -> None:
    """Raise Problem if a row of these strings, if they are any, has more bytes than the engine takes."""
    if spec.max_text_bytes is not None and isinstance(payload, list):
        check_lengths(spec, rows, list(map(len, payload)))


def check_lengths(spec: TensorSpec, rows: int, lengths: Sequence[int]) -> None:
    """Raise Problem for strings of these lengths if a row of them has more bytes than the engine takes.

    All rows have the same number of strings.
    """
    limit, size = spec.max_text_bytes, len(lengths) // (rows or 1)
    if limit is None or sum(lengths) <= limit:
        return
    for first in range(0, len(lengths), size):
        actual = sum(lengths[first : first + size])
        if actual > limit:
            row = first // size
            detail = (
                f"row {row} of input {spec.name!r} has {actual} bytes of strings; the engine takes {limit}"
            )
            raise Problem("text-too-long", detail, tensor=spec.name, limit_bytes=limit, actual_bytes=actual)


class OutputSizes:
    """The sizes of a model's outputs, if all their variable axes have the names of inputs' axes."""

    def __init__(self, signature: Signature) -> None:
        inputs = {
            name: (index, axis)
            for index, spec in enumerate(signature.inputs)
            for axis, name in enumerate(spec.axis_names)
            if name
        }
        # Of each output its spec, its elements without variable axes, and where these are among the inputs.
        self._known = []
        for spec in signature.outputs:
            names = [name for size, name in zip(spec.shape, spec.axis_names, strict=False) if size == -1]
            if names and all(name in inputs for name in names):
                fixed = prod(size for size in spec.shape if size != -1)
                self._known.append((spec, fixed, [inputs[name] for name in names]))

    def check(self, rows: int, row_shapes: Sequence[tuple[int, ...]]) -> None:
        """Raise Problem if an output of these rows would be too large."""
        for spec, fixed, axes in self._known:
            elements = rows * fixed * prod(row_shapes[index][axis] for index, axis in axes)
            if spec.datatype == "BYTES":
                check_strings(spec, elements, "output")
            output_bytes = elements * spec.dtype.itemsize
            if output_bytes > _MAX_OUTPUT_BYTES:
                detail = (
                    f"output {spec.name!r} would have {output_bytes} bytes, the limit is {_MAX_OUTPUT_BYTES}"
                )
                raise Problem("wrong-shape", detail, tensor=spec.name, limit=_MAX_OUTPUT_BYTES)


def wrong_shape(spec: TensorSpec, shape: list[int], why: str | None = None) -> Problem:
    """The Problem of an input whose shape is not the model's."""
    expected = list(spec.full_shape)
    reason = "" if why is None else f": {why}"
    detail = f"input {spec.name!r} must have shape {expected} (-1: any), got {shape}{reason}"
    return Problem("wrong-shape", detail, tensor=spec.name, expected=expected, actual=shape)


def wrong_data(spec: TensorSpec, why: str, **members: Any) -> Problem:
    """The Problem of an input whose data does not fit its shape and datatype."""
    detail = f"input {spec.name!r} ({spec.datatype}): {why}"
    return Problem("wrong-data", detail, tensor=spec.name, datatype=spec.datatype, **members)
