"""Small ONNX models, each for one case that an engine must handle or refuse."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import onnx
from onnx import NodeProto, TensorProto, helper

FLOAT = TensorProto.FLOAT
Axes = Sequence[int | str | None] | None
Value = tuple[str, int, Axes]

# Old enough for runtimes of several years ago.
IR_VERSION = 9
OPSET = 17


def model(
    nodes: Sequence[NodeProto],
    inputs: Sequence[Value],
    outputs: Sequence[Value],
    constants: Sequence[TensorProto] = (),
    opset: int = OPSET,
) -> bytes:
    """Serialise a model of these nodes. A value is (name, TensorProto type, shape)."""
    graph = helper.make_graph(
        list(nodes),
        "graph",
        [helper.make_tensor_value_info(*value) for value in inputs],
        [helper.make_tensor_value_info(*value) for value in outputs],
        list(constants),
    )
    built = helper.make_model(graph, ir_version=IR_VERSION, opset_imports=[helper.make_opsetid("", opset)])
    onnx.checker.check_model(built)
    return bytes(built.SerializeToString())


def write(folder: Path, data: bytes, name: str = "model.onnx") -> str:
    """Write a model; return its path."""
    path = folder / name
    path.write_bytes(data)
    return str(path)


def _int64s(name: str, values: Sequence[int]) -> TensorProto:
    return helper.make_tensor(name, TensorProto.INT64, [len(values)], list(values))


def negate(batch: int | str | None = "batch", width: int | str = 3, datatype: int = FLOAT) -> bytes:
    """y = -x, [batch, width]. An int fixes an axis, a str leaves it variable."""
    shape: Axes = [batch, width]
    return model([helper.make_node("Neg", ["x"], ["y"])], [("x", datatype, shape)], [("y", datatype, shape)])


def identity(datatype: int, width: int | str = 2) -> bytes:
    """y = x of any type, also strings: [batch, width]."""
    shape: Axes = ["batch", width]
    return model(
        [helper.make_node("Identity", ["x"], ["y"])], [("x", datatype, shape)], [("y", datatype, shape)]
    )


def equal_strings() -> bytes:
    """Equality of the two strings of each row: x [batch, 2] -> y [batch, 1]."""
    nodes = [
        helper.make_node("Gather", ["x", "first"], ["a"], axis=1),
        helper.make_node("Gather", ["x", "second"], ["b"], axis=1),
        helper.make_node("Equal", ["a", "b"], ["y"]),
    ]
    x: Value = ("x", TensorProto.STRING, ["batch", 2])
    y: Value = ("y", TensorProto.BOOL, ["batch", 1])
    return model(nodes, [x], [y], [_int64s("first", [0]), _int64s("second", [1])], opset=19)


def sum_rows(batch: int | str | None = "batch") -> bytes:
    """y[r] = sum of row r, [batch, 1], of x [batch, any]: a variable input and a fixed output."""
    return model(
        [helper.make_node("ReduceSum", ["x", "axes"], ["y"], keepdims=1)],
        [("x", FLOAT, [batch, "width"])],
        [("y", FLOAT, [batch, 1])],
        [_int64s("axes", [1])],
    )


def two_inputs(first: int | str = "batch", second: int | str = "batch") -> bytes:
    """total = x + k, FP32 [batch, 2], from x FP32 [batch, 2] and k INT64 [batch, 1]; count = k + k."""
    return model(
        [
            helper.make_node("Cast", ["k"], ["kf"], to=FLOAT),
            helper.make_node("Add", ["x", "kf"], ["total"]),
            helper.make_node("Add", ["k", "k"], ["count"]),
        ],
        [("x", FLOAT, [first, 2]), ("k", TensorProto.INT64, [second, 1])],
        [("total", FLOAT, [first, 2]), ("count", TensorProto.INT64, [second, 1])],
    )


def pick() -> bytes:
    """y[r] = (10, 20, 30)[x[r]], INT64 [batch, 1]; an index outside -3..2 fails the whole run."""
    return model(
        [helper.make_node("Gather", ["table", "x"], ["y"])],
        [("x", TensorProto.INT64, ["batch", 1])],
        [("y", TensorProto.INT64, ["batch", 1])],
        [_int64s("table", [10, 20, 30])],
    )


def never_zero() -> bytes:
    """y[r] = 10 for x[r] = 1, INT64 [batch, 1]; the warm-up's zeros fail the run."""
    return model(
        [helper.make_node("Sub", ["x", "far"], ["at"]), helper.make_node("Gather", ["table", "at"], ["y"])],
        [("x", TensorProto.INT64, ["batch", 1])],
        [("y", TensorProto.INT64, ["batch", 1])],
        [_int64s("far", [2]), _int64s("table", [10])],
    )


def value_sets_width() -> bytes:
    """y = zeros, FP32 [batch, max(x)], of x FP32 [batch, 1]: equal input shapes, different output shapes."""
    return model(
        [
            helper.make_node("ReduceMax", ["x"], ["most"], keepdims=0),
            helper.make_node("Cast", ["most"], ["width"], to=TensorProto.INT64),
            helper.make_node("Unsqueeze", ["width", "axis"], ["widths"]),
            helper.make_node("Shape", ["x"], ["rows"], start=0, end=1),
            helper.make_node("Concat", ["rows", "widths"], ["shape"], axis=0),
            helper.make_node("ConstantOfShape", ["shape"], ["y"]),
        ],
        [("x", FLOAT, ["batch", 1])],
        [("y", FLOAT, ["batch", "width"])],
        [_int64s("axis", [0])],
    )


def total_only() -> bytes:
    """y = the sum over the batch, [1, 3]: the output has no row for each input row."""
    return model(
        [helper.make_node("ReduceSum", ["x", "axes"], ["y"], keepdims=1)],
        [("x", FLOAT, ["batch", 3])],
        [("y", FLOAT, ["total", 3])],
        [_int64s("axes", [0])],
    )


def two_rows_each() -> bytes:
    """y = x [batch, 6] as [2 * batch, 3]: only a run shows that the first axis is not the batch."""
    return model(
        [helper.make_node("Reshape", ["x", "shape"], ["y"])],
        [("x", FLOAT, ["batch", 6])],
        [("y", FLOAT, ["rows", 3])],
        [_int64s("shape", [-1, 3])],
    )


def every_pair() -> bytes:
    """y = x @ t.T, [batch, n]: inputs with unrelated first axes; y's rows grow with t."""
    return model(
        [
            helper.make_node("Transpose", ["t"], ["tt"], perm=[1, 0]),
            helper.make_node("MatMul", ["x", "tt"], ["y"]),
        ],
        [("x", FLOAT, ["batch", 4]), ("t", FLOAT, ["n", 4])],
        [("y", FLOAT, ["batch", "n"])],
    )


def scalar() -> bytes:
    """y = x + s with a scalar input s: no batch axis."""
    return model(
        [helper.make_node("Add", ["x", "s"], ["y"])],
        [("x", FLOAT, ["batch", 3]), ("s", FLOAT, [])],
        [("y", FLOAT, ["batch", 3])],
    )
