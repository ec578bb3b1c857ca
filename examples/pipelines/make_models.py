"""Makes the two models of `shapes.py`: `python make_models.py FOLDER`."""

import sys
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

CELL = 8
Tensor = tuple[str, list[int | str]]


def shapes() -> np.ndarray:
    """Return the three shapes, [3, 8, 8]."""
    square, cross, diagonal = np.zeros((3, CELL, CELL), np.float32)
    square[1:7, 1:7] = 1
    square[2:6, 2:6] = 0
    cross[3:5] = cross[:, 3:5] = 1
    diagonal[np.arange(CELL), np.arange(CELL)] = diagonal[np.arange(1, CELL), np.arange(CELL - 1)] = 1
    return np.stack([square, cross, diagonal])


def find() -> onnx.ModelProto:
    """Return the mean brightness of each cell: pixels [n, h, w] -> brightness [n, h/8, w/8]."""
    nodes = [
        helper.make_node("Unsqueeze", ["pixels", "one"], ["channel"]),
        helper.make_node("AveragePool", ["channel"], ["cells"], kernel_shape=[CELL] * 2, strides=[CELL] * 2),
        helper.make_node("Squeeze", ["cells", "one"], ["brightness"]),
    ]
    return _model(
        nodes, ("pixels", ["n", "h", "w"]), ("brightness", ["n", "rows", "columns"]), one=np.array([1])
    )


def name() -> onnx.ModelProto:
    """Return the likeness to each shape: crop [n, 8, 8] -> scores [n, 3]."""
    templates = shapes().reshape(len(shapes()), -1)
    templates /= np.linalg.norm(templates, axis=1, keepdims=True)
    nodes = [
        helper.make_node("Flatten", ["crop"], ["flat"]),
        helper.make_node("MatMul", ["flat", "templates"], ["scores"]),
    ]
    return _model(nodes, ("crop", ["n", CELL, CELL]), ("scores", ["n", 3]), templates=templates.T.copy())


def _model(
    nodes: list[onnx.NodeProto], takes: Tensor, gives: Tensor, **constants: np.ndarray
) -> onnx.ModelProto:
    graph = helper.make_graph(
        nodes,
        "example",
        [helper.make_tensor_value_info(takes[0], TensorProto.FLOAT, takes[1])],
        [helper.make_tensor_value_info(gives[0], TensorProto.FLOAT, gives[1])],
        [numpy_helper.from_array(value, key) for key, value in constants.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    onnx.save(find(), folder / "find.onnx")
    onnx.save(name(), folder / "name.onnx")
