"""Models for TensorRT plans, and the check for a builder that needs no GPU."""

from __future__ import annotations

from pathlib import Path

import magika
import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from tests.support.models import models

RTX = "tensorrt-rtx"


def require_builder() -> None:
    """Skip the test without the wheels of TensorRT for RTX, which exist for x86-64 Linux only."""
    pytest.importorskip("tensorrt_rtx_bindings", reason="tensorrt-rtx-cu13-bindings is not installed")


def magika_path() -> Path:
    """Return the path of Magika's file-type model: INT32 [batch, 2048] to FP32 [batch, 214]."""
    (path,) = Path(magika.__file__).parent.glob("models/*/model.onnx")
    return path


def convolution(
    batch: int | str = "batch",
    height: int | str = "height",
    width: int | str = "width",
    kind: int = models.FLOAT,
) -> bytes:
    """scores [batch, 8] of image [batch, 3, height, width]: a convolution, then the mean over each image."""
    weights = np.linspace(-1, 1, 8 * 3 * 3 * 3, dtype=np.float32).reshape(8, 3, 3, 3)
    values = weights.astype(helper.tensor_dtype_to_np_dtype(kind))
    return models.model(
        [
            helper.make_node("Conv", ["image", "weights"], ["c"], name="conv1", pads=[1, 1, 1, 1]),
            helper.make_node("Relu", ["c"], ["r"], name="relu1"),
            helper.make_node("GlobalAveragePool", ["r"], ["p"], name="pool1"),
            helper.make_node("Flatten", ["p"], ["scores"], name="flat1"),
        ],
        [("image", kind, [batch, 3, height, width])],
        [("scores", kind, [batch, 8])],
        [numpy_helper.from_array(values, "weights")],
    )


def unsupported() -> bytes:
    """Return a model with Det, which TensorRT does not support."""
    return models.model(
        [
            helper.make_node("Neg", ["x"], ["y"], name="first"),
            helper.make_node("Det", ["y"], ["z"], name="blocks.0/det"),
        ],
        [("x", models.FLOAT, ["batch", 4, 4])],
        [("z", models.FLOAT, ["batch"])],
    )


def write_with_weights_apart(folder: Path, scale: float, location: str = "model.weights") -> Path:
    """Write y = x * scale with external weights: the ONNX file is the same for every scale."""
    weights = numpy_helper.from_array(np.full((1, 1024), scale, np.float32), "weights")
    model = onnx.load_from_string(
        models.model(
            [helper.make_node("Mul", ["x", "weights"], ["y"])],
            [("x", models.FLOAT, ["batch", 1024])],
            [("y", models.FLOAT, ["batch", 1024])],
            [weights],
        )
    )
    path = folder / "model.onnx"
    (folder / location).unlink(missing_ok=True)
    onnx.save_model(model, str(path), save_as_external_data=True, location=location, size_threshold=0)
    return path
