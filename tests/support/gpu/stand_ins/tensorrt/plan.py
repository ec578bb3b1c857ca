"""A plan of the stand-ins: a line of JSON, and the model as ONNX."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import onnx
import onnxruntime as ort
from onnx import TensorProto

from .versions import package

_MAGIC = b"cobatch stand-in plan\n"
# TensorRT's types by ONNX's; other types are not supported.
DATA_TYPES = {
    TensorProto.FLOAT: "FLOAT",
    TensorProto.FLOAT16: "HALF",
    TensorProto.BFLOAT16: "BF16",
    TensorProto.INT8: "INT8",
    TensorProto.INT32: "INT32",
    TensorProto.INT64: "INT64",
    TensorProto.UINT8: "UINT8",
    TensorProto.BOOL: "BOOL",
    TensorProto.FLOAT8E4M3FN: "FP8",
    TensorProto.INT4: "INT4",
}
_BYTES = {
    "FLOAT": 4,
    "HALF": 2,
    "BF16": 2,
    "INT8": 1,
    "INT32": 4,
    "INT64": 8,
    "UINT8": 1,
    "BOOL": 1,
    "FP8": 1,
}

Shape = tuple[int, ...]
# The min, opt and max shape of each input with a dynamic axis.
Profile = dict[str, tuple[Shape, Shape, Shape]]


class PlanError(Exception):
    """The bytes are no plan; the text is TensorRT's log message."""


@dataclass(frozen=True, slots=True)
class Tensor:
    """An input or output. Tests can set properties that a real engine may have and the stand-ins never do."""

    name: str
    is_input: bool
    shape: Shape
    dtype: str
    element: int
    format: str = "LINEAR"
    location: str = "DEVICE"
    is_shape: bool = False
    aliased: str | None = None
    largest: int = 1 << 16  # the upper bound of its bytes, of an output whose shape depends on the data

    @property
    def item_bytes(self) -> int:
        return _BYTES.get(self.dtype, 1)


@dataclass(frozen=True, slots=True)
class Plan:
    """A plan. `model` is ONNX; `tensors` overrides properties of its inputs and outputs by name."""

    model: bytes
    profiles: list[Profile]
    version: str
    version_compatible: bool = False
    compute_capability: str = "9.0"
    hardware_compatible: bool = False
    tensors: dict[str, dict[str, Any]] = field(default_factory=dict)

    def to_bytes(self) -> bytes:
        """Return the file's contents."""
        fields = {name: getattr(self, name) for name in self.__dataclass_fields__ if name != "model"}
        return _MAGIC + json.dumps(fields).encode() + b"\n" + self.model

    @classmethod
    def from_bytes(cls, data: bytes) -> Plan:
        """Parse a file's contents. Raises PlanError."""
        # Without the first line the second is not JSON.
        head, _, rest = data.removeprefix(_MAGIC).partition(b"\n")
        try:
            fields = json.loads(head)
            fields["profiles"] = [
                {name: tuple(map(tuple, shapes)) for name, shapes in profile.items()}
                for profile in fields["profiles"]
            ]
            return cls(model=rest, **fields)
        except (ValueError, TypeError, KeyError):
            raise PlanError(
                "Serialization assertion stdVersionRead == kSERIALIZATION_VERSION failed."
            ) from None


def make_plan(
    model: bytes,
    profiles: Sequence[Mapping[str, tuple[Sequence[int], Sequence[int], Sequence[int]]]] = (),
    *,
    tensors: dict[str, dict[str, Any]] | None = None,
    version: str | None = None,
    max_batch_size: int = 8,
) -> bytes:
    """Return a plan's bytes without a build. Default profile: dynamic axes from 1 to `max_batch_size`."""
    ranges: list[Profile] = [
        {name: (tuple(low), tuple(best), tuple(high)) for name, (low, best, high) in profile.items()}
        for profile in profiles
    ]
    if not ranges:
        inputs = [tensor for tensor in read_tensors(model) if tensor.is_input and -1 in tensor.shape]
        ranges = [{tensor.name: _ranges(tensor.shape, max_batch_size) for tensor in inputs}]
    return Plan(model, ranges, version or package().__version__, tensors=tensors or {}).to_bytes()


def altered(plan: bytes, **changes: Any) -> bytes:
    """Return the plan with other fields of `Plan`, such as `tensors={"x": {"dtype": "FP8"}}`."""
    return replace(Plan.from_bytes(plan), **changes).to_bytes()


def _ranges(shape: Shape, most: int) -> tuple[Shape, Shape, Shape]:
    low, high = (tuple(size if axis < 0 else axis for axis in shape) for size in (1, most))
    return low, high, high


def read_tensors(model: bytes, overrides: Mapping[str, dict[str, Any]] | None = None) -> list[Tensor]:
    """Return the model's inputs and outputs. Raises KeyError for a type that TensorRT lacks."""
    graph = onnx.load_from_string(model).graph
    constants = {constant.name for constant in graph.initializer}
    tensors = []
    for is_input, values in ((True, graph.input), (False, graph.output)):
        for value in values:
            if value.name in constants:
                continue
            kind = value.type.tensor_type
            shape = tuple(axis.dim_value if axis.HasField("dim_value") else -1 for axis in kind.shape.dim)
            fields = {
                "shape": shape,
                "dtype": DATA_TYPES.get(kind.elem_type, "FLOAT"),
                **(overrides or {}).get(value.name, {}),
            }
            tensors.append(Tensor(value.name, is_input, element=kind.elem_type, **fields))
    return tensors


@functools.lru_cache(maxsize=64)
def session_of(model: bytes) -> ort.InferenceSession:
    """Return ONNX Runtime's session of a model, cached for the next test."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.log_severity_level = 4
    return ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])


@functools.lru_cache(maxsize=1024)
def output_shapes(model: bytes, inputs: tuple[tuple[str, Shape], ...]) -> dict[str, Shape]:
    """Infer the outputs' shapes; -1 marks an axis that depends on the data."""
    loaded = onnx.load_from_string(model)
    sizes = dict(inputs)
    for value in loaded.graph.input:
        for axis, size in zip(value.type.tensor_type.shape.dim, sizes.get(value.name, ()), strict=False):
            axis.dim_value = size
    for value in loaded.graph.output:
        for axis in value.type.tensor_type.shape.dim:
            if not axis.HasField("dim_value"):
                axis.Clear()
    # Sizes inferred earlier, without inputs, would be used instead.
    del loaded.graph.value_info[:]
    inferred = onnx.shape_inference.infer_shapes(loaded, data_prop=True)
    return {
        value.name: tuple(
            axis.dim_value if axis.HasField("dim_value") else -1 for axis in value.type.tensor_type.shape.dim
        )
        for value in inferred.graph.output
    }
