"""A row may have as many bytes of strings as its engine takes: others are refused in every form."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnx import TensorProto

from cobatch.engines.onnxruntime import runs
from cobatch.server.settings.schema import ModelSettings
from cobatch.server.v2 import binary
from tests.server.predictions.test_forms import npy
from tests.support.http.in_process import Front, InProcess, in_process
from tests.support.models import models

INFER = "/v2/models/text/infer"
PREDICTIONS = "/v1/models/text/predictions"
LIMIT = 12


@pytest.fixture(autouse=True, params=[False, True], ids=["one", "front"])
def front(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run each test with one process, and with a front."""
    monkeypatch.setattr(Front, "wanted", request.param)


def as_json(rows: list[list[str]]) -> dict[str, Any]:
    data = [text for row in rows for text in row]
    tensor = {"name": "x", "shape": [len(rows), len(rows[0])], "datatype": "BYTES", "data": data}
    return {"url": INFER, "json": {"inputs": [tensor]}}


def elements(rows: list[list[str]]) -> bytes:
    return b"".join(len(text).to_bytes(4, "little") + text.encode() for row in rows for text in row)


def as_binary(rows: list[list[str]]) -> dict[str, Any]:
    return binary_of(len(rows), len(rows[0]), elements(rows))


def binary_of(rows: int, width: int, data: bytes) -> dict[str, Any]:
    parameters = {"binary_data_size": len(data)}
    tensor = {"name": "x", "shape": [rows, width], "datatype": "BYTES", "parameters": parameters}
    head = json.dumps({"inputs": [tensor]}).encode()
    headers = {"Inference-Header-Content-Length": str(len(head))}
    return {"url": INFER, "content": head + data, "headers": headers}


def as_prediction(rows: list[list[str]]) -> dict[str, Any]:
    return {"url": PREDICTIONS, "json": {"inputs": {"x": rows}}}


def as_base64(rows: list[list[str]]) -> dict[str, Any]:
    return base64_of(len(rows), len(rows[0]), elements(rows))


def base64_of(rows: int, width: int, data: bytes) -> dict[str, Any]:
    x = {"b64": base64.b64encode(data).decode(), "dtype": "BYTES", "shape": [rows, width]}
    return {"url": PREDICTIONS, "json": {"inputs": {"x": x}}}


def as_npy(rows: list[list[str]]) -> dict[str, Any]:
    headers = {"Content-Type": "application/x-npy"}
    return {"url": PREDICTIONS, "content": npy(np.array(rows)), "headers": headers}


async def ask(running: InProcess, request: dict[str, Any]) -> tuple[int, dict[str, Any]]:
    answer = await running.http.post(**request)
    return answer.status_code, answer.json()


@pytest.mark.parametrize("form", [as_json, as_binary, as_prediction, as_base64, as_npy])
async def test_each_form(form: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runs, "MOST_TEXT_BYTES", LIMIT)
    path = models.write(tmp_path, models.identity(TensorProto.STRING, "n"))
    async with in_process(ModelSettings(path=path, name="text", max_batch_size=4, threads=1)) as running:
        for rows in ([["a" * LIMIT]], [["a" * 8, "b" * 4]], [["a" * 8, "b" * 4], ["c" * 4, "d" * 8]]):
            status, body = await ask(running, form(rows))
            assert status == 200
            data = body["outputs"][0]["data"] if "model_name" in body else body["outputs"]["y"]["data"]
            assert np.ravel(data).tolist() == np.ravel(rows).tolist()
        for row, rows in ((0, [["a" * 8, "b" * 5]]), (1, [["c", "d"], ["a" * 7, "b" * 6]])):
            status, body = await ask(running, form(rows))
            assert (status, body["type"]) == (413, "/problems/text-too-long")
            assert (body["tensor"], body["limit_bytes"], body["actual_bytes"]) == ("x", LIMIT, LIMIT + 1)
            assert f"row {row} of input 'x'" in body["detail"]
        raw = {"url": INFER, "headers": {"Inference-Header-Content-Length": "0"}}
        assert (await ask(running, {**raw, "content": b"a" * (LIMIT + 1)}))[0] == 413


async def test_before_they_are_copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runs, "MOST_TEXT_BYTES", LIMIT)
    path = models.write(tmp_path, models.identity(TensorProto.STRING, "n"))
    async with in_process(ModelSettings(path=path, name="text", max_batch_size=4, threads=1)) as running:
        monkeypatch.setattr(binary, "read_elements", None)
        assert (await ask(running, as_binary([["a"], ["a" * (LIMIT + 1)]])))[0] == 413


@pytest.mark.parametrize(
    ("rows", "data"),
    [
        (2, b"\xff" * 4 + b"a" * LIMIT),
        (2, (8).to_bytes(4, "little") + b"a" * 8 + b"\0"),
        (1, (LIMIT + 9).to_bytes(4, "little") + b"a" * LIMIT),
        (1, elements([["a" * LIMIT]]) + b"more"),
    ],
    ids=["a length beyond the end", "an element is missing", "the last one is cut", "too many bytes"],
)
@pytest.mark.parametrize("form", ["binary", "base64"])
async def test_elements_that_do_not_fill_the_shape(
    form: str, rows: int, data: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are refused before they are copied."""
    monkeypatch.setattr(runs, "MOST_TEXT_BYTES", LIMIT)
    path = models.write(tmp_path, models.identity(TensorProto.STRING, "n"))
    request = binary_of(rows, 1, data) if form == "binary" else base64_of(rows, 1, data)
    async with in_process(ModelSettings(path=path, name="text", max_batch_size=4, threads=1)) as running:
        monkeypatch.setattr(binary, "read_elements", None)
        status, body = await ask(running, request)
        assert (status, body["type"]) == (422, "/problems/wrong-data")
        assert body["expected_elements"] == rows
