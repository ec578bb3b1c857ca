"""The models of the oracle's trial, with random inputs for each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import numpy as np
import onnx
import onnxruntime
from onnx import NodeProto, TensorProto, helper

from benchmarks.common.models import LAYERS, make
from benchmarks.common.wire import Array

# By V2 datatype: ONNX's type and NumPy's. Elements of BYTES are str.
TYPES: dict[str, tuple[int, Any]] = {
    "BOOL": (TensorProto.BOOL, np.bool_),
    "UINT8": (TensorProto.UINT8, np.uint8),
    "UINT16": (TensorProto.UINT16, np.uint16),
    "UINT32": (TensorProto.UINT32, np.uint32),
    "UINT64": (TensorProto.UINT64, np.uint64),
    "INT8": (TensorProto.INT8, np.int8),
    "INT16": (TensorProto.INT16, np.int16),
    "INT32": (TensorProto.INT32, np.int32),
    "INT64": (TensorProto.INT64, np.int64),
    "FP16": (TensorProto.FLOAT16, np.float16),
    "FP32": (TensorProto.FLOAT, np.float32),
    "FP64": (TensorProto.DOUBLE, np.float64),
    "BYTES": (TensorProto.STRING, object),
}
ROWS = "rows"  # the batch axis
MAX_BATCH_SIZE = 8
_MOST_ROWS, _MOST_LENGTH = 20, 6
_LONG_REQUESTS = 0.05  # of more rows than a batch takes
_WORDS = ("", "a", "],[", 'q"\\', "ü€\n", "0", "x" * 300)
_node = helper.make_node


@dataclass(frozen=True, slots=True)
class Tensor:
    """A tensor of a model: name, V2 datatype, and axes by length or name.

    With `top`, integers are 0 to top - 1, and any of them is larger once in a while.
    """

    name: str
    datatype: str
    shape: tuple[int | str, ...]
    top: int | None = None


@dataclass(frozen=True)
class Case:
    """A model, and its settings in TOML. Inputs in `optional` are made by the server if absent."""

    name: str
    content: bytes = field(repr=False)
    inputs: tuple[Tensor, ...]
    outputs: tuple[str, ...]
    settings: str = ""
    optional: tuple[str, ...] = ()
    poison: float = 0.0
    session: Any = field(init=False, repr=False)

    def __post_init__(self) -> None:
        """Open the model, on one thread."""
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        options.log_severity_level = 4  # requests are meant to fail
        providers = ["CPUExecutionProvider"]
        session = onnxruntime.InferenceSession(self.content, options, providers=providers)
        object.__setattr__(self, "session", session)

    @property
    def batched(self) -> bool:
        """True if a raw body is one row."""
        return all(tensor.shape[:1] == (ROWS,) for tensor in self.inputs)

    def feed(self, rng: np.random.Generator) -> dict[str, Array]:
        """Return random inputs."""
        lengths: dict[str, int] = {}
        for tensor in self.inputs:
            for axis in tensor.shape:
                if isinstance(axis, str) and axis not in lengths:
                    most = _MOST_ROWS if rng.random() < _LONG_REQUESTS else 3
                    rows = axis == ROWS
                    lengths[axis] = int(rng.integers(1, most + 1) if rows else rng.integers(0, _MOST_LENGTH))
        feed = {}
        for tensor in self.inputs:
            feed[tensor.name] = _values(
                tensor, [lengths[axis] if isinstance(axis, str) else axis for axis in tensor.shape], rng
            )
            if self.poison and feed[tensor.name].size and rng.random() < self.poison:
                feed[tensor.name].flat[0] = 1000
        if self.optional:
            feed.update({name: np.ones_like(feed[name]) for name in self.optional})
        return feed

    def alone(self, feed: Mapping[str, Array]) -> dict[str, Array] | None:
        """Run the model by itself; None if it refuses the input."""
        try:
            return dict(zip(self.outputs, self.session.run(list(self.outputs), dict(feed)), strict=True))
        except Exception:  # noqa: BLE001 - ONNX Runtime's errors have no common class
            return None


def _values(tensor: Tensor, shape: Sequence[int], rng: np.random.Generator) -> Array:
    dtype = TYPES[tensor.datatype][1]
    if tensor.datatype == "BYTES":
        words = [_WORDS[n] + str(rng.integers(1000)) for n in rng.integers(len(_WORDS), size=shape).flat]
        values = np.empty(len(words), object)
        values[:] = words
        return values.reshape(shape)
    if tensor.datatype == "BOOL":
        return np.asarray(rng.random(shape) < 0.5)
    if tensor.datatype.startswith("FP"):
        return np.asarray(rng.standard_normal(shape)).astype(dtype)
    limits = np.iinfo(dtype)
    low, high = (0, tensor.top - 1) if tensor.top else (int(limits.min), int(limits.max))
    return np.asarray(rng.integers(low, high, shape, dtype, endpoint=True))


def _graph(
    nodes: Sequence[NodeProto], inputs: Sequence[Tensor], outputs: Sequence[Tensor], **held: Any
) -> bytes:
    """Return a model. `held`: its constants, of INT64."""
    takes, gives = [
        [helper.make_tensor_value_info(one.name, TYPES[one.datatype][0], one.shape) for one in tensors]
        for tensors in (inputs, outputs)
    ]
    constants = [
        helper.make_tensor(name, TensorProto.INT64, np.shape(value), np.ravel(value).tolist())
        for name, value in held.items()
    ]
    graph = helper.make_graph(list(nodes), "graph", takes, gives, constants)
    model = helper.make_model(graph, ir_version=9, opset_imports=[helper.make_opsetid("", 19)])
    onnx.checker.check_model(model)
    return bytes(model.SerializeToString())


def _case(
    name: str,
    nodes: Sequence[NodeProto],
    inputs: Sequence[Tensor],
    outputs: Sequence[Tensor],
    settings: str = "",
    optional: tuple[str, ...] = (),
    poison: float = 0.0,
    **held: Any,
) -> Case:
    content = _graph(nodes, inputs, outputs, **held)
    names = tuple(output.name for output in outputs)
    return Case(name, content, tuple(inputs), names, settings, optional, poison)


def _row_wise() -> list[Case]:
    """Models whose rows are independent."""
    same = [
        _case(
            f"same-{kind}",
            [_node("Identity", ["x"], ["y"])],
            [Tensor("x", kind, (ROWS, "w"))],
            [Tensor("y", kind, (ROWS, "w"))],
        )
        for kind in TYPES
    ]
    add = [
        _node("Cast", ["k"], ["f"], to=1),
        _node("Add", ["x", "f"], ["total"]),
        _node("Neg", ["k"], ["minus"]),
    ]
    x, k = Tensor("x", "FP32", (ROWS, 2)), Tensor("k", "INT64", (ROWS, 1), top=1000)
    pick = [_node("Gather", ["table", "x"], ["y"])]
    equal = [
        _node("Gather", ["x", "zero"], ["a"], axis=1),
        _node("Gather", ["x", "one"], ["b"], axis=1),
        _node("Equal", ["a", "b"], ["y"]),
    ]
    encoder = [
        _node("Mul", ["ids", "mask"], ["kept"]),
        _node("Cast", ["kept"], ["tokens"], to=1),
        _node("ReduceSum", ["tokens", "axis"], ["pooled"], keepdims=1),
    ]
    pads = 'input = "ids"\nvalue = 7\nmask = "mask"\nbuckets = [2, 4, 8]\noutputs = { tokens = 0 }'
    ids = Tensor("ids", "INT64", (ROWS, "w"), top=1000)
    mask = Tensor("mask", "INT64", (ROWS, "w"), top=2)
    words = Tensor("x", "BYTES", (ROWS, 2))
    index = Tensor("x", "INT64", (ROWS, 1), top=5)
    tiny = Tensor("x", "FP32", (ROWS, LAYERS["tiny"][0]))
    return [
        *same,
        Case("mlp", make(LAYERS["tiny"]).SerializeToString(), (tiny,), ("y",)),
        _case("add", add, [x, k], [Tensor("total", "FP32", (ROWS, 2)), Tensor("minus", "INT64", (ROWS, 1))]),
        _case("equal", equal, [words], [Tensor("y", "BOOL", (ROWS, 1))], zero=[0], one=[1]),
        _case("pick", pick, [index], [Tensor("y", "INT64", (ROWS, 1))], poison=0.2, table=[3, 1, 4, 1, 5]),
        _case(
            "padded",
            encoder,
            [ids, mask],
            [Tensor("tokens", "FP32", (ROWS, "w")), Tensor("pooled", "FP32", (ROWS, 1))],
            f"[[models.pad]]\n{pads}",
            ("mask",),
            axis=[1],
        ),
    ]


def _whole() -> list[Case]:
    """Models without a batch axis."""
    joined = [_node("Concat", ["t", "t"], ["y"], axis=0), _node("Identity", ["s"], ["same"])]
    s, k = Tensor("s", "FP32", ()), Tensor("k", "FP32", ())
    a, b = Tensor("a", "FP32", (2, 3)), Tensor("b", "FP32", (3, "m"))
    n3 = Tensor("x", "FP32", ("n", 3))
    return [
        _case(
            "cumsum",
            [_node("CumSum", ["x", "axis"], ["y"])],
            [Tensor("x", "FP32", ("n",))],
            [Tensor("y", "FP32", ("n",))],
            axis=0,
        ),
        _case("softmax", [_node("Softmax", ["x"], ["y"], axis=0)], [n3], [Tensor("y", "FP32", ("n", 3))]),
        _case(
            "nonzero",
            [_node("NonZero", ["x"], ["y"])],
            [Tensor("x", "INT32", ("n", "m"), top=3)],
            [Tensor("y", "INT64", ("axes", "found"))],
        ),
        _case("scalars", [_node("Add", ["s", "k"], ["y"])], [s, k], [Tensor("y", "FP32", ())]),
        _case("product", [_node("MatMul", ["a", "b"], ["y"])], [a, b], [Tensor("y", "FP32", (2, "m"))]),
        _case(
            "joined",
            joined,
            [Tensor("t", "BYTES", ("n",)), Tensor("s", "BYTES", ())],
            [Tensor("y", "BYTES", ("twice",)), Tensor("same", "BYTES", ())],
        ),
    ]


@cache
def cases() -> tuple[Case, ...]:
    """Return all models."""
    return (*_row_wise(), *_whole())
