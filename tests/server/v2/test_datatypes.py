"""Every datatype of V2 in JSON and in binary, in and out; on the fast path and through ASGI."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from cobatch.engines.base import RowShapes, Signature, TensorSpec
from cobatch.server.settings.schema import ModelSettings
from tests.support.fronts.linked import WAYS, way
from tests.support.http import serving
from tests.support.http.serving import Answer, GatedEngine, Served, post
from tests.support.http.wire import ONNX_TYPES
from tests.support.models import models
from tests.support.virtual.loop import Array


class Bf16Engine(GatedEngine):
    """y = x, BF16 [rows, 2]; it stands in for an engine with that datatype, which no CPU engine here has."""

    def __init__(self) -> None:
        super().__init__()
        self.signature = Signature((TensorSpec("x", "BF16", (2,)),), (TensorSpec("y", "BF16", (2,)),))

    def inputs(self, slot: int, rows: int, row_shapes: RowShapes) -> tuple[Array, ...]:
        self.buffers[slot] = np.zeros((self.max_batch_size, 2), np.uint16)
        return (self.buffers[slot],)

    def wait(self, slot: int) -> tuple[Array, ...]:
        return (self.buffers[slot][: self._rows[slot]].copy(),)


@pytest.fixture(scope="module", params=WAYS)
def served(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("models")
    settings = [ModelSettings(path="bf16")]
    for name, kind in ONNX_TYPES.items():
        file = models.write(folder, models.identity(kind), f"same-{name}.onnx")
        settings.append(ModelSettings(path=file, max_batch_size=4, threads=1))
    engines = {"bf16": Bf16Engine()}
    with serving.serve(models=tuple(settings), engines=engines, **way(request.param)) as server:
        yield server


def tensor(datatype: str, shape: list[int], data: object = None, **parameters: object) -> dict[str, Any]:
    made: dict[str, Any] = {"name": "x", "datatype": datatype, "shape": shape}
    if data is not None:
        made["data"] = data
    return made | ({"parameters": parameters} if parameters else {})


def tails(answer: Answer) -> tuple[Any, bytes]:
    """A binary answer's JSON and its tail."""
    assert answer.status == 200, answer
    length = int(answer.headers["inference-header-content-length"])
    return json.loads(answer.body[:length]), answer.body[length:]


VALUES: dict[str, list[Any]] = {
    "BOOL": [True, False], "UINT8": [0, 255], "UINT16": [1, 2**16 - 1], "UINT32": [1, 2**32 - 1],
    "UINT64": [1, 2**64 - 1], "INT8": [-128, 127], "INT16": [-(2**15), 7], "INT32": [-(2**31), 7],
    "INT64": [-(2**63), 2**63 - 1], "FP16": [0.5, -2.0], "FP32": [0.25, -1e30], "FP64": [1e-300, 0.1],
    "BYTES": ["a", "grüße\x00"],
}  # fmt: skip


def as_bytes(datatype: str) -> bytes:
    values = VALUES[datatype]
    if datatype == "BYTES":
        return b"".join(struct.pack("<I", len(value.encode())) + value.encode() for value in values)
    names = {"BOOL": "?", "FP16": "<f2", "FP32": "<f4", "FP64": "<f8"}
    kind = names.get(datatype, datatype.replace("UINT", "<u").replace("INT", "<i"))
    if datatype not in names:
        kind = kind[:2] + str(int(kind[2:]) // 8)
    return np.array(values, kind).tobytes()


@pytest.mark.parametrize("binary_out", [False, True], ids=["json-out", "binary-out"])
@pytest.mark.parametrize("binary_in", [False, True], ids=["json-in", "binary-in"])
@pytest.mark.parametrize("datatype", VALUES)
def test_every_datatype_both_ways(served: Served, datatype: str, binary_in: bool, binary_out: bool) -> None:
    data = as_bytes(datatype)
    shape = [1, 2]
    given = tensor(datatype, shape, binary_data_size=len(data)) if binary_in else None
    given = given or tensor(datatype, shape, VALUES[datatype])
    message = {"id": datatype, "inputs": [given], "parameters": {"binary_data_output": binary_out}}
    text = json.dumps(message).encode()
    headers = {"Inference-Header-Content-Length": str(len(text))} if binary_in else None
    target = f"/v2/models/same-{datatype}/versions/1/infer"
    answer = served.ask(post(target, text + (data if binary_in else b""), headers))
    got, tail = tails(answer) if binary_out else (answer.json, b"")
    (output,) = got["outputs"]
    assert (got["id"], output["datatype"], output["shape"]) == (datatype, datatype, shape)
    assert tail == data if binary_out else output["data"] == VALUES[datatype]


@pytest.mark.parametrize(("datatype", "kind"), [("FP16", "<f2"), ("FP32", "<f4"), ("FP64", "<f8")])
def test_binary_keeps_infinity_and_nan_which_are_null_in_json(
    served: Served, datatype: str, kind: str
) -> None:
    data = np.array([[np.inf, -np.inf], [np.nan, 0.5]], kind).tobytes()
    inputs = [tensor(datatype, [2, 2], binary_data_size=len(data))]
    for binary in (False, True):
        text = json.dumps({"inputs": inputs, "parameters": {"binary_data_output": binary}}).encode()
        headers = {"Inference-Header-Content-Length": str(len(text))}
        answer = served.ask(post(f"/v2/models/same-{datatype}/infer", text + data, headers))
        if binary:
            assert tails(answer)[1] == data
        else:
            assert answer.json["outputs"][0]["data"] == [None, None, None, 0.5]


def test_bf16_is_binary_only(served: Served) -> None:
    data = struct.pack("<2H", 0x3F80, 0xC000)  # 1 and -2
    target = "/v2/models/bf16/infer"
    text = json.dumps(
        {
            "inputs": [tensor("BF16", [1, 2], binary_data_size=4)],
            "parameters": {"binary_data_output": True},
        }
    ).encode()
    answer = served.ask(post(target, text + data, {"Inference-Header-Content-Length": str(len(text))}))
    message, tail = tails(answer)
    assert (message["outputs"][0]["datatype"], tail) == ("BF16", data)
    for values in ([1, -2], [[1, 2]], [1.5, 2.5], [1] * 3000):
        answer = served.ask(post(target, {"inputs": [tensor("BF16", [1, 2], values)]}))
        assert (answer.status, answer.slug) == (422, "wrong-data")
