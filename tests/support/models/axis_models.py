"""Models whose first axis is no batch axis, and a family of random models of which some mix their rows.

Each mixing step makes a row's answer depend on other rows, or on its place among them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
from onnx import NodeProto, TensorProto, helper, numpy_helper

from tests.support.models.models import FLOAT, Value, model

INT64 = TensorProto.INT64
node = helper.make_node
Step = tuple[list[NodeProto], list[TensorProto]]


def constant(name: str, values: Any, dtype: Any = np.int64) -> TensorProto:
    """Make a constant."""
    return numpy_helper.from_array(np.asarray(values, dtype), name)


def _one(operator: str, *inputs: str, constants: Sequence[TensorProto] = (), **attributes: Any) -> Step:
    return [node(operator, ["x", *inputs], ["y"], **attributes)], list(constants)


def _reduced(operator: str, join: str) -> Step:
    """`join` of x with a reduction of x over axis 0."""
    if operator == "ReduceSum":
        return [node(operator, ["x", "axis0"], ["r"]), node(join, ["x", "r"], ["y"])], [
            constant("axis0", [0])
        ]
    return [node(operator, ["x"], ["r"], axes=[0]), node(join, ["x", "r"], ["y"])], []


def _turned() -> Step:
    edges = [constant("from", [-1]), constant("to", [-(2**62)]), constant("axis", [0]), constant("by", [-1])]
    return _one("Slice", "from", "to", "axis", "by", constants=edges)


def _place() -> Step:
    nodes = [
        node("Shape", ["x"], ["n1"], start=0, end=1),
        node("Squeeze", ["n1", "axis0"], ["n"]),
        node("Range", ["zero", "n", "one"], ["places"]),
        node("Cast", ["places"], ["place"], to=FLOAT),
        node("Unsqueeze", ["place", "axis1"], ["column"]),
        node("Add", ["x", "column"], ["y"]),
    ]
    scalars = [constant("zero", 0), constant("one", 1), constant("axis0", [0]), constant("axis1", [1])]
    return nodes, scalars


def _neighbour() -> Step:
    """Add the row before, or zeros."""
    nodes = [
        node("Pad", ["x", "pads"], ["p"]),
        node("Slice", ["p", "first", "last", "axis0"], ["s"]),
        node("Add", ["x", "s"], ["y"]),
    ]
    return nodes, [
        constant("pads", [1, 0, 0, 0]),
        *map(constant, ("first", "last", "axis0"), ([0], [-1], [0])),
    ]


# From x to y, FP32 [n, width] both.
MIXING: dict[str, Callable[[], Step]] = {
    "cumulative sum": lambda: _one("CumSum", "axis", constants=[constant("axis", 0)]),
    "softmax": lambda: _one("Softmax", axis=0),
    "mean": lambda: _reduced("ReduceMean", "Sub"),
    "sum": lambda: _reduced("ReduceSum", "Add"),
    "maximum": lambda: _reduced("ReduceMax", "Add"),
    "minimum": lambda: _reduced("ReduceMin", "Sub"),
    "norm": lambda: _reduced("ReduceL2", "Div"),
    "reverse": _turned,
    "place": _place,
    "neighbour": _neighbour,
}


def _linear(random: np.random.Generator, width: int) -> Step:
    weights = random.normal(size=(width, width)) / np.sqrt(width)
    return _one("MatMul", "w", constants=[constant("w", weights, np.float32)])


def _bias(random: np.random.Generator, width: int) -> Step:
    return _one("Add", "b", constants=[constant("b", random.normal(size=width), np.float32)])


# From x to y as above, row by row.
ROW_WISE: dict[str, Callable[[np.random.Generator, int], Step]] = {
    "linear": _linear,
    "bias": _bias,
    "negate": lambda random, width: _one("Neg"),
    "leaky": lambda random, width: _one("LeakyRelu", alpha=0.1),
    "tanh": lambda random, width: _one("Tanh"),
    "softmax of a row": lambda random, width: _one("Softmax", axis=1),
    "sum of a row": lambda random, width: _one("CumSum", "axis", constants=[constant("axis", 1)]),
}


def chain(steps: Sequence[str], width: int, seed: int, batch: int | str = "n") -> bytes:
    """Return a model of these steps, one after another, FP32 [batch, width] to the same."""
    random = np.random.default_rng(seed)
    nodes: list[NodeProto] = []
    constants: list[TensorProto] = []
    for number, name in enumerate(steps):
        made, values = MIXING[name]() if name in MIXING else ROW_WISE[name](random, width)
        names = {"x": f"t{number}", "y": f"t{number + 1}"}

        def rename(name: str, names: dict[str, str] = names, number: int = number) -> str:
            return names.setdefault(name, f"{name}.{number}")

        for one in made:
            one.input[:] = map(rename, one.input)
            one.output[:] = map(rename, one.output)
        for value in values:
            value.name = rename(value.name)
        nodes += made
        constants += values
    shape = [batch, width]
    return model(nodes, [("t0", FLOAT, shape)], [(f"t{len(steps)}", FLOAT, shape)], constants)


def cumulative(batch: int | str = "n") -> bytes:
    """y = the cumulative sum of x, FP32 [n]: a sequence, not a batch."""
    return model(
        [node("CumSum", ["x", "axis"], ["y"])],
        [("x", FLOAT, [batch])],
        [("y", FLOAT, [batch])],
        [constant("axis", 0)],
    )


def nonzero(rows: int | str = "n", columns: int | str = "m") -> bytes:
    """y = the indices of the elements that are not 0 in x [rows, columns], INT64 [2, found]."""
    inputs: list[Value] = [("x", FLOAT, [rows, columns])]
    return model([node("NonZero", ["x"], ["y"])], inputs, [("y", INT64, ["axes", "found"])])


def scalars() -> bytes:
    """total = s + k, FP32 [], and both = (s, s), FP32 [2], from the scalars s FP32 and k FP32."""
    return model(
        [
            node("Add", ["s", "k"], ["total"]),
            node("Unsqueeze", ["s", "axis"], ["one"]),
            node("Concat", ["one", "one"], ["both"], axis=0),
        ],
        [("s", FLOAT, []), ("k", FLOAT, [])],
        [("total", FLOAT, []), ("both", FLOAT, [2])],
        [constant("axis", [0])],
    )


def product() -> bytes:
    """y = a @ b, FP32 [2, m], from a [2, 3] and b [3, m]: first axes that differ."""
    inputs: list[Value] = [("a", FLOAT, [2, 3]), ("b", FLOAT, [3, "m"])]
    return model([node("MatMul", ["a", "b"], ["y"])], inputs, [("y", FLOAT, [2, "m"])])


def joined_text() -> bytes:
    """y = t followed by t, BYTES [2n], and same = s, a BYTES scalar."""
    return model(
        [node("Concat", ["t", "t"], ["y"], axis=0), node("Identity", ["s"], ["same"])],
        [("t", TensorProto.STRING, ["n"]), ("s", TensorProto.STRING, [])],
        [("y", TensorProto.STRING, ["twice"]), ("same", TensorProto.STRING, [])],
    )


def alone(data: bytes | Path | str, **inputs: Any) -> list[Any]:
    """Return the answers of a model run by itself."""
    session = ort.InferenceSession(
        data if isinstance(data, bytes) else str(data), providers=["CPUExecutionProvider"]
    )
    return [np.asarray(output) for output in session.run(None, inputs)]
