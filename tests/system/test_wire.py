"""Infer requests over the wire; every test runs on the fast path and through ASGI.

Those answered with 200; `test_wire_refused` and `test_wire_busy` have the others.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from cobatch.engines.base import DATATYPES
from cobatch.server.edge.fast_path import FastExchange
from tests.support.fronts.linked import WAYS, way
from tests.support.http import wire
from tests.support.http.serving import Served, data_of, get, post
from tests.support.http.wire import ADD, BINARY, ONNX_TYPES, K, X, fp32, infer, parts, tensor


@pytest.fixture(scope="module", params=WAYS)
def served(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("models")
    with wire.serve_models(folder=folder, max_body_bytes=100_000, **way(request.param)) as served:
        yield served


def test_each_request_takes_the_expected_path(served: Served) -> None:
    with served.connect() as client:
        for _ in range(2):
            assert client.ask(post("/v2/models/add/infer", ADD)).status == 200
            (cycle,) = served.call(lambda: [protocol.cycle for protocol in served.connections()])
            assert (type(cycle) is FastExchange) == served.fast


@pytest.mark.parametrize("data", [[[1, 2, 3], [4, 5, 6]], [1, 2, 3, 4, 5, 6]], ids=["nested", "flat"])
def test_json_in_json_out(served: Served, data: object) -> None:
    answer = infer(served, "negate", {"inputs": [tensor("x", "FP32", [2, 3], data)]})
    assert answer.status == 200
    assert answer.headers["content-type"] == "application/json"
    assert "inference-header-content-length" not in answer.headers
    assert answer.json == {
        "model_name": "negate",
        "model_version": "1",
        "outputs": [{"name": "y", "datatype": "FP32", "shape": [2, 3], "data": [-1, -2, -3, -4, -5, -6]}],
    }


def test_the_date_and_no_server_header(served: Served) -> None:
    answer = infer(served, "add", ADD)
    assert answer.headers["date"].endswith(" GMT")
    assert "server" not in answer.headers
    assert "connection" not in answer.headers


def test_server_timing(served: Served) -> None:
    answer = infer(served, "negate", {"inputs": [tensor("x", "FP32", [3, 3], [1] * 9)]})
    match = re.fullmatch(
        r"queue;dur=(\d+\.\d{3}), compute;dur=(\d+\.\d{3}), batch;desc=3, reason;desc=(?:idle|full)",
        answer.headers["server-timing"],
    )
    assert match
    assert float(match[2]) >= 0


def test_two_inputs_in_any_order_two_outputs(served: Served) -> None:
    for inputs in ([X, K], [K, X]):
        outputs = infer(served, "add", {"inputs": inputs}).json["outputs"]
        assert [(o["name"], o["datatype"], o["shape"], o["data"]) for o in outputs] == [
            ("total", "FP32", [1, 2], [11.5, 8]),
            ("count", "INT64", [1, 1], [20]),
        ]


@pytest.mark.parametrize("given", ["7", "", 'ü"\\\n', "x" * 3000])
def test_the_id_is_echoed(served: Served, given: str) -> None:
    assert infer(served, "add", ADD | {"id": given}).json["id"] == given


def test_no_id_none_echoed(served: Served) -> None:
    assert "id" not in infer(served, "add", ADD).json


def test_only_the_outputs_asked_for_in_the_order_asked(served: Served) -> None:
    def names(*wanted: str) -> list[str]:
        message = ADD | {"outputs": [{"name": name} for name in wanted]}
        return [output["name"] for output in infer(served, "add", message).json["outputs"]]

    assert names("count") == ["count"]
    assert names("count", "total") == ["count", "total"]
    assert names() == ["total", "count"]


def test_binary_in_json_out(served: Served) -> None:
    x = tensor("x", "FP32", [2, 3], binary_data_size=24)
    answer = infer(served, "negate", {"inputs": [x]}, tail=fp32(1, 2, 3, 4, 5, 6))
    assert answer.headers["content-type"] == "application/json"
    assert data_of(answer) == [-1, -2, -3, -4, -5, -6]


def test_json_in_binary_out(served: Served) -> None:
    x = tensor("x", "FP32", [2, 3], [1, 2, 3, 4, 5, 6])
    message = {"inputs": [x], "parameters": {"binary_data_output": True}}
    head, tail = parts(infer(served, "negate", message))
    assert head["outputs"] == [
        {"name": "y", "datatype": "FP32", "shape": [2, 3], "parameters": {"binary_data_size": 24}}
    ]
    assert tail == fp32(-1, -2, -3, -4, -5, -6)


def test_both_inputs_and_outputs_binary(served: Served) -> None:
    message = {
        "id": "b",
        "inputs": [
            tensor("k", "INT64", [2, 1], binary_data_size=16),
            tensor("x", "FP32", [2, 2], binary_data_size=16),
        ],
        "parameters": {"binary_data_output": True},
    }
    head, tail = parts(infer(served, "add", message, tail=struct.pack("<qq", 1, 2) + fp32(1, 2, 3, 4)))
    assert head["id"] == "b"
    assert [output["parameters"] for output in head["outputs"]] == [
        {"binary_data_size": 16},
        {"binary_data_size": 16},
    ]
    assert tail == fp32(2, 3, 5, 6) + struct.pack("<qq", 2, 4)


def test_one_input_binary_the_other_json(served: Served) -> None:
    x = tensor("x", "FP32", [1, 2], binary_data_size=8)
    outputs = infer(served, "add", {"inputs": [x, K]}, tail=fp32(1, 2)).json["outputs"]
    assert outputs[0]["data"] == [11, 12]


def test_an_output_s_own_binary_data_wins(served: Served) -> None:
    message = ADD | {
        "parameters": {"binary_data_output": True},
        "outputs": [{"name": "total", "parameters": {"binary_data": False}}, {"name": "count"}],
    }
    head, tail = parts(infer(served, "add", message))
    assert head["outputs"][0]["data"] == [11.5, 8]
    assert head["outputs"][1]["parameters"] == {"binary_data_size": 8}
    assert tail == struct.pack("<q", 20)
    message = ADD | {"outputs": [{"name": "total", "parameters": {"binary_data": True}}, {"name": "count"}]}
    head, tail = parts(infer(served, "add", message))
    assert tail == fp32(11.5, 8)
    assert head["outputs"][1]["data"] == [20]


def test_a_header_with_the_whole_body_s_length_is_json(served: Served) -> None:
    assert infer(served, "add", ADD, BINARY).status == 200


# Datatypes


def extremes(datatype: str) -> list[Any]:
    dtype = DATATYPES[datatype]
    if datatype == "BOOL":
        return [True, False, True]
    if dtype.kind in "iu":
        return [int(np.iinfo(dtype).min), int(np.iinfo(dtype).max), 1]
    return [float(np.finfo(dtype).min), float(np.finfo(dtype).max), 0.5]


NUMBERS = [name for name in ONNX_TYPES if name != "BYTES"]


@pytest.mark.parametrize("count", [1, 500], ids=["small", "large"])
@pytest.mark.parametrize("datatype", NUMBERS)
def test_every_datatype_in_json(served: Served, datatype: str, count: int) -> None:
    values = extremes(datatype) * count
    for data in (values, [values[: len(values)]]):
        message = {"inputs": [tensor("x", datatype, [1, len(values)], data)]}
        output = infer(served, f"same-{datatype}", message).json["outputs"][0]
        assert output["datatype"] == datatype
        assert output["shape"] == [1, len(values)]
        dtype = DATATYPES[datatype]
        assert np.array_equal(np.array(output["data"], dtype), np.array(values, dtype))


@pytest.mark.parametrize("datatype", NUMBERS)
def test_every_datatype_in_binary(served: Served, datatype: str) -> None:
    data = np.array(extremes(datatype) * 2, DATATYPES[datatype]).tobytes()
    message = {
        "inputs": [tensor("x", datatype, [2, 3], binary_data_size=len(data))],
        "parameters": {"binary_data_output": True},
    }
    head, tail = parts(infer(served, f"same-{datatype}", message, tail=data))
    assert head["outputs"][0]["parameters"] == {"binary_data_size": len(data)}
    assert tail == data


STRINGS = ["", "a", "],[", "ü\0\n", '"\\', "x" * 300]


def bytes_tensor(values: list[str]) -> bytes:
    return b"".join(struct.pack("<I", len(value.encode())) + value.encode() for value in values)


def test_strings_in_json(served: Served) -> None:
    message = {"inputs": [tensor("x", "BYTES", [3, 2], STRINGS)]}
    assert data_of(infer(served, "same-BYTES", message)) == STRINGS


def test_strings_in_binary(served: Served) -> None:
    tail = bytes_tensor(STRINGS)
    message = {
        "inputs": [tensor("x", "BYTES", [2, 3], binary_data_size=len(tail))],
        "parameters": {"binary_data_output": True},
    }
    head, back = parts(infer(served, "same-BYTES", message, tail=tail))
    assert head["outputs"][0]["parameters"] == {"binary_data_size": len(tail)}
    assert back == tail


def test_infinities_travel_in_binary_and_are_null_in_json(served: Served) -> None:
    x = tensor("x", "FP32", [1, 3], binary_data_size=12)
    values = fp32(float("inf"), float("-inf"), 1)
    assert data_of(infer(served, "same-FP32", {"inputs": [x]}, tail=values)) == [None, None, 1]
    message = {"inputs": [x], "parameters": {"binary_data_output": True}}
    assert parts(infer(served, "same-FP32", message, tail=values))[1] == values


@pytest.mark.parametrize("datatype", ["FP32", "INT64", "BYTES"])
def test_no_elements_in_json(served: Served, datatype: str) -> None:
    message = {"inputs": [tensor("x", datatype, [2, 0], [])]}
    output = infer(served, f"same-{datatype}", message).json["outputs"][0]
    assert (output["shape"], output["data"]) == ([2, 0], [])


@pytest.mark.parametrize("datatype", ["FP32", "BYTES"])
def test_no_elements_in_binary(served: Served, datatype: str) -> None:
    message = {
        "inputs": [tensor("x", datatype, [2, 0], binary_data_size=0)],
        "parameters": {"binary_data_output": True},
    }
    head, tail = parts(infer(served, f"same-{datatype}", message, BINARY))
    assert head["outputs"][0]["parameters"] == {"binary_data_size": 0}
    assert tail == b""


# Shapes and rows


@pytest.mark.parametrize("width", [1, 7, 1000])
def test_a_variable_axis_takes_any_size(served: Served, width: int) -> None:
    data = [float(n) for n in range(2 * width)]
    answer = infer(served, "any-width", {"inputs": [tensor("x", "FP32", [2, width], data)]})
    assert answer.json["outputs"][0]["shape"] == [2, width]
    assert data_of(answer) == [-n for n in data]
    answer = infer(served, "sum", {"inputs": [tensor("x", "FP32", [2, width], data)]})
    assert data_of(answer) == [sum(data[:width]), sum(data[width:])]


@pytest.mark.parametrize("rows", [1, 4, 5, 8, 50])
@pytest.mark.parametrize("model", ["negate", "pairs"])
def test_more_rows_than_a_batch_takes(served: Served, rows: int, model: str) -> None:
    data = [float(n) for n in range(3 * rows)]
    message = {"inputs": [tensor("x", "FP32", [rows, 3], data)]}
    assert data_of(infer(served, model, message)) == [-n for n in data]
    packed = {
        "inputs": [tensor("x", "FP32", [rows, 3], binary_data_size=12 * rows)],
        "parameters": {"binary_data_output": True},
    }
    head, tail = parts(infer(served, model, packed, tail=fp32(*data)))
    assert head["outputs"][0]["shape"] == [rows, 3]
    assert tail == fp32(*[-n for n in data])


def test_a_body_read_in_many_pieces(served: Served) -> None:
    data = list(range(10_000))
    answer = infer(served, "any-width", {"inputs": [tensor("x", "FP32", [1, len(data)], data)]})
    assert data_of(answer) == [-n for n in data]


# Routes beside infer, which share the connection


def test_metadata(served: Served) -> None:
    assert served.ask(get("/v2")).json["name"] == "cobatch"
    answer = served.ask(get("/v2/models/add"))
    assert answer.json["inputs"] == [
        {"name": "x", "datatype": "FP32", "shape": [-1, 2]},
        {"name": "k", "datatype": "INT64", "shape": [-1, 1]},
    ]
    assert served.ask(get("/v2/models/add/ready")).json == {"name": "add", "ready": True}
    assert served.ask(get("/v2/models/nobody")).slug == "unknown-model"
