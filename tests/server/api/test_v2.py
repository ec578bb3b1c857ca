"""The V2 protocol beyond plain infer requests, on the fast path and through ASGI.

`tests/system/test_wire.py` has plain infer requests; real clients are in `test_tritonclient.py` and
`scripts/perf-analyzer`.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from onnx import TensorProto

from cobatch.engines.base import Signature, TensorSpec
from cobatch.engines.errors import EngineRunError
from cobatch.server.http.problem import Problem
from cobatch.server.inference.model import Model
from cobatch.server.settings.schema import ModelSettings
from cobatch.server.v2.decode import Decoder
from tests.support.fronts.linked import WAYS, way
from tests.support.http import serving
from tests.support.http.serving import Answer, GatedEngine, Served, data_of, gate, gated, get, post
from tests.support.models import models

# The paths and methods of the Open Inference Protocol's OpenAPI document: repository
# kserve/open-inference-protocol, specification/protocol/open_inference_rest.yaml, version 2.0.
OPENAPI_PATHS = {
    "/v2/health/live": "GET",
    "/v2/health/ready": "GET",
    "/v2/models/${MODEL_NAME}/versions/${MODEL_VERSION}/ready": "GET",
    "/v2/": "GET",
    "/v2/models/${MODEL_NAME}/versions/${MODEL_VERSION}": "GET",
    "/v2/models/${MODEL_NAME}/versions/${MODEL_VERSION}/infer": "POST",
}


@pytest.fixture(scope="module", params=WAYS)
def path(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


@pytest.fixture(scope="module")
def served(path: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("models")
    files = {
        "negate": models.negate(width=3),
        "add": models.two_inputs(),
        "any-width": models.negate(width="width"),
        "flags": models.identity(TensorProto.BOOL),
        "text": models.identity(TensorProto.STRING),
        "any-text": models.identity(TensorProto.STRING, "width"),
    }
    settings = [
        ModelSettings(path=models.write(folder, data, f"{name}.onnx"), max_batch_size=4, threads=1)
        for name, data in files.items()
    ]
    settings.append(ModelSettings(path="gate", model_version="2.b"))
    with serving.serve(models=tuple(settings), engines={"gate": GatedEngine()}, **way(path)) as server:
        yield server


@pytest.fixture
def gated_server(path: str) -> Iterator[tuple[Served, GatedEngine]]:
    """Serve one model whose engine the test holds, with batches of at most 4 rows."""
    with gated(**way(path)) as pair:
        yield pair


def tensor(datatype: str, shape: list[int], data: object = None, **parameters: object) -> dict[str, Any]:
    result: dict[str, Any] = {"name": "x", "datatype": datatype, "shape": shape}
    if data is not None:
        result["data"] = data
    return result | ({"parameters": parameters} if parameters else {})


ONE = {"inputs": [tensor("FP32", [1, 3], [1, 2, 3])]}


def tails(answer: Answer) -> tuple[Any, bytes]:
    """Return JSON and binary data of a binary response."""
    assert answer.status == 200, answer
    length = int(answer.headers["inference-header-content-length"])
    return json.loads(answer.body[:length]), answer.body[length:]


# Paths


def test_paths_of_the_protocols_openapi_document(served: Served) -> None:
    for template, method in OPENAPI_PATHS.items():
        target = template.replace("${MODEL_NAME}", "negate").replace("${MODEL_VERSION}", "1")
        answer = served.ask(get(target) if method == "GET" else post(target, ONE))
        assert answer.status == 200, target
        assert answer.headers["content-type"] == "application/json"


@pytest.mark.parametrize("base", ["/v2/models/negate", "/v2/models/negate/versions/1"])
def test_paths_with_and_without_version(served: Served, base: str) -> None:
    for part in ("", "/ready", "/config", "/stats"):
        assert served.ask(get(base + part)).status == 200
    answer = served.ask(post(f"{base}/infer", ONE))
    assert (answer.json["model_name"], answer.json["model_version"]) == ("negate", "1")


@pytest.mark.parametrize("version", ["2", "01", "1.0", "latest"])
def test_unknown_versions(served: Served, version: str) -> None:
    base = f"/v2/models/negate/versions/{version}"
    for part in ("", "/ready", "/config", "/stats"):
        answer = served.ask(get(base + part))
        assert (answer.status, answer.slug) == (404, "unknown-version")
        assert answer.json["versions"] == ["1"]
    answer = served.ask(post(f"{base}/infer", ONE))
    assert (answer.status, answer.slug) == (404, "unknown-version")


def test_a_version_need_not_be_a_number(served: Served) -> None:
    assert served.ask(get("/v2/models/gate/versions/2.b")).json["versions"] == ["2.b"]
    assert served.ask(get("/v2/models/gate/versions/2")).slug == "unknown-version"


def test_server_metadata(served: Served) -> None:
    about = served.ask(get("/v2")).json
    assert about["name"] == "cobatch"
    assert set(about["extensions"]) >= {"binary_tensor_data", "model_repository", "parameters", "statistics"}


def test_repository_index_with_and_without_body(served: Served) -> None:
    for body in (b"", b"{}", b'{"ready":true}'):
        index = served.ask(post("/v2/repository/index", body)).json
        assert [entry["name"] for entry in index] == list(served.inference.models)
        assert {"name": "negate", "version": "1", "state": "READY", "reason": ""} in index


def test_repository_index_of_ready_models(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Model, "ready", property(lambda model: model.name == "add"))
    for body, shown in ((b'{"ready":true,"repository_name":""}', ["add"]), (b'{"ready":false}', None)):
        index = served.ask(post("/v2/repository/index", body)).json
        assert [entry["name"] for entry in index] == (shown or list(served.inference.models))
    assert served.ask(post("/v2/repository/index", b"{")).slug == "not-json"
    assert served.ask(post("/v2/repository/index", b'{"ready":1}')).slug == "bad-request"
    assert served.ask(post("/v2/repository/index", bytes(100_000))).slug == "body-too-large"


def test_model_configuration(served: Served) -> None:
    config = served.ask(get("/v2/models/add/config")).json
    assert config["max_batch_size"] == 4
    assert config["input"] == [
        {"name": "x", "data_type": "TYPE_FP32", "dims": [2]},
        {"name": "k", "data_type": "TYPE_INT64", "dims": [1]},
    ]
    assert [output["name"] for output in config["output"]] == ["total", "count"]
    assert served.ask(get("/v2/models/text/config")).json["input"][0]["data_type"] == "TYPE_STRING"
    assert served.ask(get("/v2/models/any-width/config")).json["input"][0]["dims"] == [-1]


# Statistics


def count_of(stats: Any, name: str) -> int:
    count: int = stats["inference_stats"][name]["count"]
    return count


def test_statistics_count_answers_and_failures(gated_server: tuple[Served, GatedEngine]) -> None:
    served, engine = gated_server
    with served.connect() as first, served.connect() as second, served.connect() as third:
        engine.hold()
        first.send(gate(1))
        engine.began.get(timeout=serving.DEADLINE_S)
        second.send(gate(2, 3, 4))
        third.send(gate(5))  # a full batch together with the three rows before
        served.until(lambda: served.batcher().counters.accepted == 3)
        engine.release()
        for client in (first, second, third):
            assert client.answer().status == 200
    engine.fails = lambda rows: EngineRunError("no")
    assert served.ask(gate(6)).status == 500
    (stats,) = served.ask(get("/v2/models/gate/stats")).json["model_stats"]
    assert (stats["name"], stats["version"]) == ("gate", "1")
    assert (stats["inference_count"], stats["execution_count"]) == (5, 2)
    assert (count_of(stats, "success"), count_of(stats, "fail")) == (3, 1)
    parts = ("queue", "compute_input", "compute_infer", "compute_output")
    assert all(count_of(stats, part) == 3 for part in parts)
    total_ns = sum(stats["inference_stats"][part]["ns"] for part in parts)
    assert abs(stats["inference_stats"]["success"]["ns"] - total_ns) <= len(parts)
    assert [(one["batch_size"], one["compute_infer"]["count"]) for one in stats["batch_stats"]] == [
        (1, 1),
        (4, 1),
    ]
    assert all(one[part]["ns"] > 0 for one in stats["batch_stats"] for part in parts[1:])
    assert stats["last_inference"] > 1.7e12
    assert served.ask(get("/v2/models/stats")).json == {"model_stats": [stats]}


def test_statistics_of_all_models(served: Served) -> None:
    listed = served.ask(get("/v2/models/stats")).json["model_stats"]
    assert [stats["name"] for stats in listed] == list(served.inference.models)


# Priority and timeout


def decode(parameters: dict[str, object]) -> tuple[int, float | None]:
    decoder = Decoder(Signature((TensorSpec("x", "FP32", (3,)),), (TensorSpec("y", "FP32", (3,)),)), 1 << 20)
    decoded = decoder.decode(json.dumps(ONE | {"parameters": parameters}).encode(), None)
    return decoded.options[:2]


def test_priority_and_timeout_reach_the_batcher() -> None:
    assert decode({}) == (0, None)
    assert decode({"priority": 1, "timeout": 2500}) == (1, 0.0025)
    assert decode({"priority": "3", "timeout": "0"}) == (3, None)
    for priority in (-(2**63), -1, 2**32, 2**63 - 1, 2**64 - 1):
        assert decode({"priority": priority}) == decode({"priority": str(priority)}) == (priority, None)
    assert decode({"sequence_id": 0, "whatever": "x"}) == (0, None)


@pytest.mark.parametrize(
    ("name", "value"),
    [("priority", value) for value in (1.5, True, "high", "--1", "-", 2**64, -(2**63) - 1, "")]
    + [("timeout", value) for value in (-1, 0.5, False, "1s", 10**18, "1" * 30)]
    + [("sequence_id", 5), ("sequence_start", True), ("triton_enable", 1), ("headers", "x")],
)
def test_invalid_parameters(served: Served, name: str, value: object) -> None:
    with pytest.raises(Problem):
        decode({name: value})
    answer = served.ask(post("/v2/models/negate/infer", ONE | {"parameters": {name: value}}))
    assert (answer.status, answer.slug, answer.json["parameter"]) == (400, "bad-parameter", name)


def test_a_request_expires_in_the_queue(gated_server: tuple[Served, GatedEngine]) -> None:
    served, engine = gated_server
    with served.connect() as first, served.connect() as late, served.connect() as patient:
        engine.hold()
        first.send(gate(1))
        engine.began.get(timeout=serving.DEADLINE_S)
        answer = late.ask(gate(2, parameters={"timeout": 1000}))
        assert (answer.status, answer.slug, answer.json["timeout_ms"]) == (504, "expired", 1.0)
        patient.send(gate(3, parameters={"timeout": 60_000_000}))
        served.until(lambda: served.batcher().counters.accepted == 3)
        engine.release()
        assert [data_of(client.answer()) for client in (first, patient)] == [[2], [6]]
    assert engine.ran[-2:] == [[1], [3]]


# Raw requests


def raw(served: Served, model: str, body: bytes) -> Answer:
    return served.ask(post(f"/v2/models/{model}/infer", body, {"Inference-Header-Content-Length": "0"}))


def test_a_raw_request_is_one_row_with_a_binary_response(served: Served) -> None:
    message, tail = tails(raw(served, "negate", struct.pack("<3f", 1, 2, 3)))
    assert message["outputs"] == [
        {"name": "y", "datatype": "FP32", "shape": [1, 3], "parameters": {"binary_data_size": 12}}
    ]
    assert struct.unpack("<3f", tail) == (-1, -2, -3)


@pytest.mark.parametrize("width", [0, 1, 9])
def test_a_raw_request_of_any_width(served: Served, width: int) -> None:
    message, tail = tails(raw(served, "any-width", np.ones(width, "<f4").tobytes()))
    assert message["outputs"][0]["shape"] == [1, width]
    assert np.frombuffer(tail, "<f4").tolist() == [-1] * width


def test_a_raw_request_of_text(served: Served) -> None:
    message, tail = tails(raw(served, "any-text", "grüße".encode()))
    assert message["outputs"][0]["shape"] == [1, 1]
    assert tail == struct.pack("<I", 7) + "grüße".encode()


@pytest.mark.parametrize(
    ("model", "body", "status", "slug"),
    [
        ("negate", bytes(11), 422, "wrong-data"),
        ("negate", bytes(24), 422, "wrong-data"),
        ("negate", b"", 422, "wrong-data"),
        ("any-width", bytes(5), 422, "wrong-data"),
        ("add", bytes(16), 400, "bad-binary"),
        ("text", b"two elements", 422, "wrong-data"),
        ("flags", b"\x01\x02", 422, "wrong-data"),
    ],
)
def test_invalid_raw_requests(served: Served, model: str, body: bytes, status: int, slug: str) -> None:
    answer = raw(served, model, body)
    assert (answer.status, answer.slug) == (status, slug)


def test_usage_is_in_the_body_only_on_request(gated_server: tuple[Served, GatedEngine]) -> None:
    served, _ = gated_server
    usage = served.ask(gate(7, 8, parameters={"usage": True})).json["parameters"]
    assert usage["batch_rows"] == 2
    assert set(usage) == {"batch_rows", "queue_us", "compute_us"}
    assert all(type(value) is int and value >= 0 for value in usage.values())
    for parameters in ({}, {"usage": False}, {"priority": 1}):
        assert "parameters" not in served.ask(gate(7, parameters=parameters)).json
    assert served.ask(gate(7, parameters={"usage": "yes"})).slug == "bad-parameter"
