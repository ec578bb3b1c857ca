"""A plan's tensors and profiles: what can be served, and by name what cannot and why.

A profile says how large each input may be, batch axis included. A batch of `rows` rows of some shape is
run in the first of the smallest batch sizes ("buckets") that some profile takes with that shape.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Any

from cobatch.engines.base import RowShapes, Signature, TensorSpec, within
from cobatch.engines.errors import EngineLoadError, EngineRunError

# BF16's bits travel in uint16: TensorRT's own `nptype` knows no NumPy type for it.
_DATATYPES = {
    "FLOAT": "FP32",
    "HALF": "FP16",
    "BF16": "BF16",
    "INT8": "INT8",
    "INT32": "INT32",
    "INT64": "INT64",
    "UINT8": "UINT8",
    "BOOL": "BOOL",
}

Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Profile:
    """The smallest and largest shape of each input, with the batch axis, in the signature's order."""

    index: int
    least: tuple[Shape, ...]
    most: tuple[Shape, ...]

    @property
    def max_rows(self) -> int:
        """The largest batch."""
        return min(shape[0] for shape in self.most)

    @property
    def min_rows(self) -> int:
        """The smallest."""
        return max(shape[0] for shape in self.least)

    def takes(self, rows: int, row_shapes: RowShapes) -> bool:
        """Whether inputs of these shapes lie within it."""
        return all(
            len(low) == len(row_shape) + 1
            and all(a <= b <= c for a, b, c in zip(low, (rows, *row_shape), high, strict=True))
            for low, row_shape, high in zip(self.least, row_shapes, self.most, strict=True)
        )


def read_tensors(engine: Any) -> tuple[Signature, tuple[Profile, ...]]:
    """What a deserialised engine takes and gives. Raises EngineLoadError that names the tensor."""
    inputs: list[TensorSpec] = []
    outputs: list[TensorSpec] = []
    firsts: dict[str, int] = {}
    for index in range(engine.num_io_tensors):
        name = engine.get_tensor_name(index)
        is_input = engine.get_tensor_mode(name).name == "INPUT"
        spec, firsts[name] = _read(engine, "input" if is_input else "output", name)
        (inputs if is_input else outputs).append(spec)
    if not inputs or not outputs:
        raise EngineLoadError("the plan has no inputs or no outputs")
    sizes = {firsts[spec.name] for spec in inputs}
    if len(sizes) > 1:
        shown = ", ".join(f"{spec.name!r} {firsts[spec.name]}" for spec in inputs)
        raise EngineLoadError(f"the inputs' first axes differ, so none is the batch axis: {shown}")
    first = sizes.pop()
    for spec in outputs:
        if firsts[spec.name] not in (first, -1):
            expected = "vary with the batch" if first == -1 else f"be {first}, as the inputs'"
            raise EngineLoadError(
                f"output {spec.name!r}: its first axis is {firsts[spec.name]}, it should {expected}"
            )
    signature = Signature(tuple(inputs), tuple(outputs), None if first == -1 else first)
    profiles = tuple(_profile(engine, signature, n) for n in range(engine.num_optimization_profiles))
    ranged = tuple(_with_ranges(spec, index, profiles) for index, spec in enumerate(inputs))
    return replace(signature, inputs=ranged), profiles


def _with_ranges(spec: TensorSpec, index: int, profiles: Sequence[Profile]) -> TensorSpec:
    """The input with the row shapes that the profiles take, where they vary."""
    if spec.row_elements >= 0:
        return spec
    pairs = [(profile.least[index][1:], profile.most[index][1:]) for profile in profiles]
    return replace(spec, ranges=tuple(dict.fromkeys(pairs)))


def _read(engine: Any, what: str, name: str) -> tuple[TensorSpec, int]:
    """The spec and the first axis's size, -1 where it varies."""
    shape = tuple(engine.get_tensor_shape(name))
    datatype = _DATATYPES.get(engine.get_tensor_dtype(name).name)
    if datatype is None:
        kind = engine.get_tensor_dtype(name).name
        raise EngineLoadError(f"{what} {name!r} has type {kind}, which has no counterpart in the protocol")
    if engine.is_shape_inference_io(name):
        raise EngineLoadError(
            f"{what} {name!r} is a shape tensor: its values are sizes of other tensors, one for a whole "
            "batch, so rows of different callers cannot share it"
        )
    if engine.get_tensor_location(name).name != "DEVICE":
        raise EngineLoadError(f"{what} {name!r} lies in host memory, which is not supported")
    for profile in range(engine.num_optimization_profiles):
        layout = engine.get_tensor_format(name, profile).name
        if layout != "LINEAR":
            raise EngineLoadError(f"{what} {name!r} has format {layout}; only row-major linear can be served")
    if hasattr(engine, "get_aliased_input_tensor") and engine.get_aliased_input_tensor(name) is not None:
        raise EngineLoadError(f"{what} {name!r} shares an input's memory, which is not supported")
    if not shape:
        raise EngineLoadError(f"{what} {name!r} is a scalar: no axis to batch along")
    if shape[0] == 0:
        raise EngineLoadError(f"{what} {name!r}: its first axis is fixed at 0, no row fits")
    return TensorSpec(name, datatype, shape[1:]), shape[0]


def _profile(engine: Any, signature: Signature, index: int) -> Profile:
    least, most = [], []
    for spec in signature.inputs:
        first = -1 if signature.fixed_batch is None else signature.fixed_batch
        shape = (first, *spec.shape)
        if -1 in shape:
            low, _, high = (tuple(dims) for dims in engine.get_tensor_profile_shape(spec.name, index))
        else:
            low = high = shape
        least.append(low)
        most.append(high)
    return Profile(index, tuple(least), tuple(most))


def default_buckets(max_batch_size: int) -> tuple[int, ...]:
    """Powers of two, and the largest batch."""
    powers = [1 << n for n in range(max_batch_size.bit_length()) if 1 << n < max_batch_size]
    return (*powers, max_batch_size)


class Buckets:
    """Which batch size and which profile a batch is run with."""

    def __init__(
        self,
        signature: Signature,
        profiles: Sequence[Profile],
        max_batch_size: int,
        sizes: Sequence[int] | None,
    ) -> None:
        self._inputs = signature.inputs
        self._profiles = profiles
        if signature.fixed_batch is not None:
            self.max_batch_size = signature.fixed_batch
            self.sizes: tuple[int, ...] = (signature.fixed_batch,)
            return
        self.max_batch_size = min(max_batch_size, max(profile.max_rows for profile in profiles))
        # The largest is our own largest batch, or where no profile takes that the next that one does.
        tops = [self.max_batch_size, *(profile.min_rows for profile in profiles)]
        top = min(size for size in tops if size >= self.max_batch_size and self._covered(size))
        wanted = sizes or default_buckets(self.max_batch_size)
        self.sizes = (*sorted({size for size in wanted if size < top and self._covered(size)}), top)

    def _covered(self, rows: int) -> bool:
        return any(profile.min_rows <= rows <= profile.max_rows for profile in self._profiles)

    def most_rows(self, profile: Profile) -> int:
        """The largest batch that this profile is ever used for."""
        return min(profile.max_rows, max(self.sizes[-1], profile.min_rows))

    def choose(self, rows: int, row_shapes: RowShapes) -> tuple[int, int]:
        """The bucket and the profile's index. Raises EngineRunError that names what fits no profile."""
        for size in self.sizes:
            if size < rows:
                continue
            for profile in self._profiles:
                if profile.takes(size, row_shapes):
                    return size, profile.index
        # Where the rows' shapes vary, a profile may take these at other sizes only.
        for profile in self._profiles:
            size = max(rows, profile.min_rows)
            if profile.takes(size, row_shapes):
                return size, profile.index
        raise EngineRunError(self._refusal(rows, row_shapes))

    def _refusal(self, rows: int, row_shapes: RowShapes) -> str:
        for index, (spec, row_shape) in enumerate(zip(self._inputs, row_shapes, strict=True)):
            shape = (rows, *row_shape)
            ranges = [(profile.least[index], profile.most[index]) for profile in self._profiles]
            if not any(_within(low, shape, high) for low, high in ranges):
                shown = "; ".join(f"{list(low)} to {list(high)}" for low, high in ranges)
                return f"input {spec.name!r} of shape {list(shape)} fits no profile of the plan: {shown}"
        return f"no profile of the plan takes {rows} rows of these shapes together: {list(row_shapes)}"


def _within(low: Shape, shape: Shape, high: Shape) -> bool:
    # Too few rows are no reason: missing ones are added.
    return shape[0] <= high[0] and within(low[1:], shape[1:], high[1:])


def estimate_buffers(signature: Signature, profiles: Sequence[Profile], buckets: Buckets) -> int:
    """Bytes of a slot's inputs and outputs, as far as they are known before TensorRT infers shapes."""
    size = 0
    for index, spec in enumerate(signature.inputs):
        most = [(buckets.most_rows(profile), *profile.most[index][1:]) for profile in profiles]
        size += max(map(prod, most)) * spec.dtype.itemsize
    for spec in signature.outputs:
        size += max(0, spec.row_elements) * buckets.sizes[-1] * spec.dtype.itemsize
    return size
