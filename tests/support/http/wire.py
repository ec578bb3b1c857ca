"""Real models behind a real server, and infer messages of the V2 protocol."""

from __future__ import annotations

import contextlib
import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from onnx import TensorProto, helper

from cobatch.server.settings.schema import ModelSettings
from tests.support.http import serving
from tests.support.http.serving import Answer, Served, post
from tests.support.models import models

ONNX_TYPES = {
    "BOOL": TensorProto.BOOL, "UINT8": TensorProto.UINT8, "UINT16": TensorProto.UINT16,
    "UINT32": TensorProto.UINT32, "UINT64": TensorProto.UINT64, "INT8": TensorProto.INT8,
    "INT16": TensorProto.INT16, "INT32": TensorProto.INT32, "INT64": TensorProto.INT64,
    "FP16": TensorProto.FLOAT16, "FP32": TensorProto.FLOAT, "FP64": TensorProto.DOUBLE,
    "BYTES": TensorProto.STRING,
}  # fmt: skip


def onnx_files() -> dict[str, bytes]:
    """Build the models, by name."""
    return {
        "add": models.two_inputs(),
        "negate": models.negate(width=3),
        "any-width": models.negate(width="width"),
        "any-size": any_size(),
        "sum": models.sum_rows(),
        "pick": models.pick(),
        "pairs": models.negate(batch=2, width=3),
        **{f"same-{name}": models.identity(kind, "width") for name, kind in ONNX_TYPES.items()},
    }


@contextlib.contextmanager
def serve_models(fast: bool, folder: Path, **settings: Any) -> Iterator[Served]:
    """Serve all models on ONNX Runtime: batches of at most 4 rows, a queue of 50 rows."""
    served_models = [
        ModelSettings(
            path=models.write(folder, data, f"{name}.onnx"), max_batch_size=4, max_queue_rows=50, threads=1
        )
        for name, data in onnx_files().items()
    ]
    with serving.serve(fast, tuple(served_models), **settings) as served:
        yield served


def any_size() -> bytes:
    """y = -x, FP32 [batch, any, any]."""
    shape = ["batch", "width", "height"]
    nodes = [helper.make_node("Neg", ["x"], ["y"])]
    return models.model(nodes, [("x", TensorProto.FLOAT, shape)], [("y", TensorProto.FLOAT, shape)])


def infer(
    served: Served, model: str, message: object, headers: dict[str, str] | None = None, tail: bytes = b""
) -> Answer:
    """Build an infer request, in the binary form if it has a `tail`."""
    data = message if isinstance(message, bytes) else json.dumps(message).encode()
    fields = {"Inference-Header-Content-Length": str(len(data))} if tail or headers == BINARY else headers
    return served.ask(post(f"/v2/models/{model}/infer", data + tail, fields))


BINARY: dict[str, str] = {"binary": "yes"}  # makes `infer` use the binary form for a body without a tail


def tensor(name: str, datatype: str, shape: list[int], data: object = None, **parameters: object) -> Any:
    """Return an input of an infer message."""
    tensor: dict[str, object] = {"name": name, "datatype": datatype, "shape": shape}
    if data is not None:
        tensor["data"] = data
    if parameters:
        tensor["parameters"] = parameters
    return tensor


def fp32(*values: float) -> bytes:
    return struct.pack(f"<{len(values)}f", *values)


def parts(answer: Answer) -> tuple[Any, bytes]:
    """Split a binary answer into its JSON and its tail."""
    assert answer.status == 200, answer
    assert answer.headers["content-type"] == "application/octet-stream"
    length = int(answer.headers["inference-header-content-length"])
    return json.loads(answer.body[:length]), answer.body[length:]


X = tensor("x", "FP32", [1, 2], [1.5, -2])
K = tensor("k", "INT64", [1, 1], [10])
ADD: dict[str, Any] = {"inputs": [X, K]}
