"""A plan's tensors and profiles, checked for tensors that cannot be served.

A profile limits the size of each input, batch axis included. A batch runs with the smallest batch size
("bucket") that is large enough and that a profile accepts with its row shapes.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import prod
from operator import sub
from typing import Any

from cobatch.engines.base import RowShapes, Signature, TensorSpec, batch_sizes, within
from cobatch.engines.errors import EngineLoadError, EngineRunError

# uint16 carries BF16's bits: TensorRT's `nptype` has no NumPy type for it.
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
    """The smallest, best and largest shape of each input, in signature order, with the batch axis.

    With batching off that axis is 1, and TensorRT does not see it.
    """

    index: int
    least: tuple[Shape, ...]
    best: tuple[Shape, ...]
    most: tuple[Shape, ...]

    @property
    def max_rows(self) -> int:
        """The largest batch size."""
        return min(shape[0] for shape in self.most)

    @property
    def min_rows(self) -> int:
        """The smallest batch size."""
        return max(shape[0] for shape in self.least)

    def accepts(self, rows: int, row_shapes: RowShapes) -> bool:
        """Return True if inputs of these shapes lie within the profile."""
        return all(
            len(low) == len(row_shape) + 1 and within(low, (rows, *row_shape), high)
            for low, row_shape, high in zip(self.least, row_shapes, self.most, strict=True)
        )

    def distance(self, rows: int, row_shapes: RowShapes) -> int:
        """Return how far inputs of these shapes are from those that its kernels were chosen for."""
        shapes = [(rows, *row_shape) for row_shape in row_shapes]
        return sum([sum(map(abs, map(sub, *pair))) for pair in zip(self.best, shapes, strict=True)])


def read_tensors(engine: Any) -> tuple[list[TensorSpec], list[TensorSpec]]:
    """Read a deserialised engine's whole inputs and outputs. Raises EngineLoadError that names the tensor."""
    inputs: list[TensorSpec] = []
    outputs: list[TensorSpec] = []
    for index in range(engine.num_io_tensors):
        name = engine.get_tensor_name(index)
        is_input = engine.get_tensor_mode(name).name == "INPUT"
        (inputs if is_input else outputs).append(_read(engine, "input" if is_input else "output", name))
    return inputs, outputs


def read_profiles(engine: Any, signature: Signature) -> tuple[Signature, tuple[Profile, ...]]:
    """Read the profiles; return the signature with the ranges that they accept, too."""
    profiles = tuple(_profile(engine, signature, n) for n in range(engine.num_optimization_profiles))
    ranged = tuple(_with_ranges(spec, index, profiles) for index, spec in enumerate(signature.inputs))
    return replace(signature, inputs=ranged), profiles


def _with_ranges(spec: TensorSpec, index: int, profiles: Sequence[Profile]) -> TensorSpec:
    """Add the row shapes that the profiles accept to an input with variable rows."""
    if spec.row_elements >= 0:
        return spec
    pairs = [(profile.least[index][1:], profile.most[index][1:]) for profile in profiles]
    return replace(spec, ranges=tuple(dict.fromkeys(pairs)))


def _read(engine: Any, kind: str, name: str) -> TensorSpec:
    shape = tuple(engine.get_tensor_shape(name))
    datatype_name = engine.get_tensor_dtype(name).name
    datatype = _DATATYPES.get(datatype_name)
    if datatype is None:
        raise EngineLoadError(f"{kind} {name!r} has type {datatype_name}, which the protocol does not have")
    if engine.is_shape_inference_io(name):
        raise EngineLoadError(
            f"{kind} {name!r} is a shape tensor, whose values are sizes of other tensors: not supported"
        )
    if engine.get_tensor_location(name).name != "DEVICE":
        raise EngineLoadError(f"{kind} {name!r} lies in host memory, which is not supported")
    for profile in range(engine.num_optimization_profiles):
        layout = engine.get_tensor_format(name, profile).name
        if layout != "LINEAR":
            raise EngineLoadError(f"{kind} {name!r} has format {layout}; only row-major linear can be served")
    if hasattr(engine, "get_aliased_input_tensor") and engine.get_aliased_input_tensor(name) is not None:
        raise EngineLoadError(f"{kind} {name!r} shares an input's memory, which is not supported")
    return TensorSpec(name, datatype, shape, batched=False)


def _profile(engine: Any, signature: Signature, index: int) -> Profile:
    shapes: list[list[Shape]] = []
    for spec in signature.inputs:
        shape = spec.tensor_shape(signature.fixed_batch or -1, spec.shape)
        if -1 in shape:
            ranges = [tuple(dims) for dims in engine.get_tensor_profile_shape(spec.name, index)]
        else:
            ranges = [shape] * 3
        shapes.append([as_batch(spec, one) for one in ranges])
    return Profile(index, *zip(*shapes, strict=True))


def as_batch(spec: TensorSpec, shape: Shape) -> Shape:
    """Return a shape of TensorRT's with the batch axis in front that it lacks if batching is off."""
    return shape if spec.batched else (1, *shape)


class Buckets:
    """Chooses the batch size and profile that a batch runs with."""

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
        # The largest bucket is the largest batch, or the next larger size that a profile accepts.
        candidates = [self.max_batch_size, *(profile.min_rows for profile in profiles)]
        top = min(size for size in candidates if size >= self.max_batch_size and self._covered(size))
        wanted = sizes or batch_sizes(None, self.max_batch_size)
        self.sizes = (*sorted({size for size in wanted if size < top and self._covered(size)}), top)

    def _covered(self, rows: int) -> bool:
        return any(profile.min_rows <= rows <= profile.max_rows for profile in self._profiles)

    def most_rows(self, profile: Profile) -> int:
        """Return the largest batch that this profile is used for."""
        return min(profile.max_rows, max(self.sizes[-1], profile.min_rows))

    def choose(self, rows: int, row_shapes: RowShapes) -> tuple[int, int]:
        """Return the bucket, and the index of the nearest profile. Raises EngineRunError that names the unfit
        input."""
        # With variable row shapes a profile may accept these at other sizes only.
        others = sorted({max(rows, profile.min_rows) for profile in self._profiles})
        for size in [*(size for size in self.sizes if size >= rows), *others]:
            fitting = [profile for profile in self._profiles if profile.accepts(size, row_shapes)]
            if fitting:
                return size, min(fitting, key=lambda one: one.distance(size, row_shapes)).index
        raise EngineRunError(self._refusal(rows, row_shapes))

    def _refusal(self, rows: int, row_shapes: RowShapes) -> str:
        for index, (spec, row_shape) in enumerate(zip(self._inputs, row_shapes, strict=True)):
            shape = (rows, *row_shape)
            ranges = [(profile.least[index], profile.most[index]) for profile in self._profiles]
            if not any(_within(low, shape, high) for low, high in ranges):
                shown = "; ".join(f"{list(low)} to {list(high)}" for low, high in ranges)
                return f"input {spec.name!r} of shape {list(shape)} fits no profile of the plan: {shown}"
        return f"no profile of the plan accepts {rows} rows of these shapes together: {list(row_shapes)}"


def _within(low: Shape, shape: Shape, high: Shape) -> bool:
    # Too few rows fit: they are padded.
    return shape[0] <= high[0] and within(low[1:], shape[1:], high[1:])


def estimate_buffers(signature: Signature, profiles: Sequence[Profile], buckets: Buckets) -> int:
    """Return the bytes of a slot's inputs and outputs that are known before TensorRT infers shapes."""
    size = 0
    for index, spec in enumerate(signature.inputs):
        most = [(buckets.most_rows(profile), *profile.most[index][1:]) for profile in profiles]
        size += max(map(prod, most)) * spec.dtype.itemsize
    for spec in signature.outputs:
        size += max(0, spec.row_elements) * buckets.sizes[-1] * spec.dtype.itemsize
    return size
