"""Models in Python over the wire, in a process and in a thread: as any other model."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import pytest

from cobatch.server.settings.schema import ModelSettings, PadSettings, RunIn
from tests.support.fronts.linked import WAYS, way
from tests.support.http.serving import Served, data_of, get, post, serve
from tests.support.python_models import faulty

FOLDER = str(Path(faulty.__file__).parent)


@pytest.fixture(scope="module", params=WAYS)
def running(request: pytest.FixtureRequest) -> Iterator[Served]:
    def model(name: str, run_in: RunIn, **settings: Any) -> ModelSettings:
        return ModelSettings(
            name=f"{name}-{run_in}", python=f"faulty.py:{name}", python_path=FOLDER, run_in=run_in, **settings
        )

    pad = (PadSettings(input="x", outputs={"output": 0}),)
    models = [
        made
        for where in get_args(RunIn)
        for made in (model("upper", where, model_version="7"), model("double", where, pad=pad, instances=2))
    ]
    with serve(models=tuple(models), **way(request.param)) as served:
        yield served


each = pytest.mark.parametrize("where", ["process", "thread"])


@each
def test_metadata(running: Served, where: str) -> None:
    told = running.ask(get(f"/v2/models/upper-{where}/versions/7")).json
    assert told == {
        "name": f"upper-{where}",
        "versions": ["7"],
        "platform": "python",
        "inputs": [
            {"name": "text", "datatype": "BYTES", "shape": [-1, -1]},
            {"name": "times", "datatype": "INT64", "shape": [-1, 1]},
        ],
        "outputs": [{"name": "output", "datatype": "BYTES", "shape": [-1, -1]}],
    }


@each
def test_strings_in_json_and_binary(running: Served, where: str) -> None:
    text: dict[str, object] = {"name": "text", "shape": [1, 2], "datatype": "BYTES"}
    times = {"name": "times", "shape": [1, 1], "datatype": "INT64", "data": [2]}
    path = f"/v2/models/upper-{where}/infer"
    in_json = post(path, {"inputs": [text | {"data": ["ab", "\u00fc"]}, times]})
    assert data_of(running.ask(in_json)) == ["ABAB", "\u00fc\u00fc"]
    elements = struct.pack("<I2sI3s", 2, b"ab", 3, b"\xff\0a")
    text["parameters"] = {"binary_data_size": len(elements)}
    outputs = [{"name": "output", "parameters": {"binary_data": True}}]
    head = json.dumps({"inputs": [text, times], "outputs": outputs}).encode()
    answer = running.ask(post(path, head + elements, {"Inference-Header-Content-Length": str(len(head))}))
    assert answer.status == 200
    rest = answer.body[int(answer.headers["inference-header-content-length"]) :]
    assert rest == struct.pack("<I4sI6s", 4, b"ABAB", 6, b"\xff\0A\xff\0A")


@each
def test_rows_of_different_length_share_batches(running: Served, where: str) -> None:
    """They are padded, and their answers cut back."""
    for length in (3, 5, 300):
        x = {"name": "x", "shape": [2, length], "datatype": "FP32", "data": [1.5] * 2 * length}
        answer = running.ask(post(f"/v2/models/double-{where}/infer", {"inputs": [x]}))
        assert answer.json["outputs"][0]["shape"] == [2, length]
        assert data_of(answer) == [3.0] * 2 * length
    assert running.batcher(f"double-{where}").counters.padding


@each
def test_predictions_and_what_is_told_of_them(running: Served, where: str) -> None:
    inputs = {"inputs": {"x": [[1, 2], [3, 4]]}}
    path = f"/v1/models/double-{where}/predictions"
    answer = running.ask(post(path, inputs, {"Content-Type": "application/json"}))
    assert answer.json["outputs"]["output"]["data"] == [[2, 4], [6, 8]]
    told = running.ask(get(f"/v1/requests/{answer.headers['x-request-id']}")).json
    assert told["batches"][0]["rows"] == 2
