"""The models of the benchmarks and tests, made from a seed: no download, no stored weights.

*tiny* (16 floats in, 8 out) costs next to nothing to run, so the server's cost is measured. *wide* (512 ->
4096 -> 4096 -> 16, 73 MiB of weights, far beyond a CPU's cache) reads all its weights for one row as for 64,
so batching pays on a CPU about as it does on a GPU. *deep* has five such layers and a quarter of the speed,
so that HTTP costs little in comparison. *magika*, the file-type model of the magika package, hardly gains
from batching.

`python -m benchmarks.common.models [DIR]` writes tiny and wide and prints where.
"""

from __future__ import annotations

import os
import sys
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

OUT = Path(__file__).parents[1] / "out"
MODELS = OUT / "models"
SEED = 20_261_124
# Widths of the layers: MatMul and bias, and Relu between layers.
LAYERS = {"tiny": (16, 8), "wide": (512, 4096, 4096, 16), "deep": (512, *[4096] * 5, 16)}
_MAGIKA = Path("models") / "standard_v3_3" / "model.onnx"


def model_path(name: str, folder: Path = MODELS) -> Path:
    """Return the file of a model; all but *magika* are written into `folder` if missing."""
    if name == "magika":
        return magika_model_path()
    path = folder / f"{name}.onnx"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        # Renamed when complete: an interrupted run leaves no partial model.
        partial = path.with_suffix(f".{os.getpid()}.tmp")
        partial.write_bytes(make(LAYERS[name]).SerializeToString())
        partial.replace(path)
    return path


def magika_model_path() -> Path:
    """Return the model's file in the installed `magika` package. Raises FileNotFoundError.

    Input "bytes" INT32 [batch, 2048], output "target_label" FP32 [batch, 214].
    """
    # An import would load magika's own session.
    spec = find_spec("magika")
    if spec is None or spec.origin is None:
        raise FileNotFoundError("the magika package is not installed (pip install magika)")
    path = Path(spec.origin).parent / _MAGIKA
    if path.exists():
        return path
    candidates = sorted(path.parents[1].glob("*/model.onnx"))
    if not candidates:
        raise FileNotFoundError(f"this magika package has no {_MAGIKA}")
    return candidates[-1]


def make(widths: tuple[int, ...], seed: int = SEED) -> onnx.ModelProto:
    """Return an FP32 MLP: input "x" [batch, widths[0]], output "y" [batch, widths[-1]].

    The same widths and seed give the same bytes. A single layer ends in a Relu, several have Relus between
    them; weights are scaled so that activations stay near 1 in every layer.
    """
    rng = np.random.default_rng(seed)
    nodes, weights = [], []
    value = "x"
    last = len(widths) - 2
    for layer, (fan_in, fan_out) in enumerate(pairwise(widths)):
        scale = np.float32((2 / fan_in) ** 0.5)
        weight = rng.standard_normal((fan_in, fan_out), dtype=np.float32) * scale
        bias = rng.standard_normal(fan_out, dtype=np.float32) * np.float32(0.1)
        weights += [numpy_helper.from_array(weight, f"w{layer}"), numpy_helper.from_array(bias, f"b{layer}")]
        ends = layer == last and last > 0
        total = "y" if ends else f"z{layer}"
        nodes.append(helper.make_node("MatMul", [value, f"w{layer}"], [f"m{layer}"]))
        nodes.append(helper.make_node("Add", [f"m{layer}", f"b{layer}"], [total]))
        if not ends:
            value = "y" if layer == last else f"a{layer}"
            nodes.append(helper.make_node("Relu", [total], [value]))
    graph = helper.make_graph(
        nodes,
        "mlp",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", widths[0]])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", widths[-1]])],
        weights,
    )
    # Older runtimes can load this opset and IR version too.
    model = helper.make_model(
        graph, ir_version=9, opset_imports=[helper.make_opsetid("", 17)], producer_name="cobatch"
    )
    onnx.checker.check_model(model)
    return model


def main(arguments: list[str]) -> int:
    """Write tiny and wide into a folder (default: benchmarks/out/models)."""
    if len(arguments) > 1 or any(argument.startswith("-") for argument in arguments):
        print("usage: python -m benchmarks.common.models [DIR]", file=sys.stderr)
        return 2
    folder = Path(arguments[0]) if arguments else MODELS
    for name in ("tiny", "wide"):
        print(model_path(name, folder))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
