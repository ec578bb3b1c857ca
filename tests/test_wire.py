"""What goes over the wire for the infer routes; every test runs on the fast path and through ASGI."""

from __future__ import annotations

import contextlib
import gzip
import json
import re
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnx import TensorProto, helper

from engines.base import DATATYPES
from engines.errors import EngineDeadError, EngineLoadError, EngineRunError
from server.fastpath import FastCycle
from server.settings import ModelSettings
from tests import models, serving
from tests.serving import Answer, GatedEngine, Served, data_of, gate, gated, get, post, rows_of

ONNX_TYPES = {
    "BOOL": TensorProto.BOOL, "UINT8": TensorProto.UINT8, "UINT16": TensorProto.UINT16,
    "UINT32": TensorProto.UINT32, "UINT64": TensorProto.UINT64, "INT8": TensorProto.INT8,
    "INT16": TensorProto.INT16, "INT32": TensorProto.INT32, "INT64": TensorProto.INT64,
    "FP16": TensorProto.FLOAT16, "FP32": TensorProto.FLOAT, "FP64": TensorProto.DOUBLE,
    "BYTES": TensorProto.STRING,
}  # fmt: skip


@pytest.fixture(scope="module", params=["fast", "asgi"])
def path(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


@pytest.fixture(scope="module")
def served(path: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """Real models on ONNX Runtime."""
    folder = tmp_path_factory.mktemp("models")
    files = {
        "add": models.two_inputs(),
        "negate": models.negate(width=3),
        "any-width": models.negate(width="width"),
        "any-size": any_size(),
        "sum": models.sum_rows(),
        "pick": models.pick(),
        "pairs": models.negate(batch=2, width=3),
        **{f"same-{name}": models.identity(kind, "width") for name, kind in ONNX_TYPES.items()},
    }
    settings = [
        ModelSettings(
            path=models.write(folder, data, f"{name}.onnx"), max_batch_size=4, max_queue_rows=50, threads=1
        )
        for name, data in files.items()
    ]
    with serving.serve(path == "fast", tuple(settings), max_body_bytes=100_000) as server:
        yield server


@pytest.fixture(scope="module")
def held_server(path: str) -> Iterator[tuple[Served, GatedEngine]]:
    with gated(path == "fast", max_queue_rows=8) as pair:
        yield pair


@pytest.fixture
def held(held_server: tuple[Served, GatedEngine]) -> Iterator[tuple[Served, GatedEngine]]:
    """One model whose batches the test holds, at most 4 rows each; 8 rows may wait."""
    served, engine = held_server
    yield served, engine
    engine.fails = lambda rows: None
    engine.release()


def infer(
    served: Served, model: str, message: object, headers: dict[str, str] | None = None, tail: bytes = b""
) -> Answer:
    """One infer request; with a `tail`, in the binary form."""
    data = message if isinstance(message, bytes) else json.dumps(message).encode()
    fields = {"Inference-Header-Content-Length": str(len(data))} if tail or headers == BINARY else headers
    return served.ask(post(f"/v2/models/{model}/infer", data + tail, fields))


BINARY: dict[str, str] = {"binary": "yes"}  # asks `infer` for the binary form of a body without a tail


def tensor(name: str, datatype: str, shape: list[int], data: object = None, **parameters: object) -> Any:
    """An input of an infer message."""
    made: dict[str, object] = {"name": name, "datatype": datatype, "shape": shape}
    if data is not None:
        made["data"] = data
    if parameters:
        made["parameters"] = parameters
    return made


def fp32(*values: float) -> bytes:
    return struct.pack(f"<{len(values)}f", *values)


def parts(answer: Answer) -> tuple[Any, bytes]:
    """A binary answer's JSON and its tail."""
    assert answer.status == 200, answer
    assert answer.headers["content-type"] == "application/octet-stream"
    length = int(answer.headers["inference-header-content-length"])
    return json.loads(answer.body[:length]), answer.body[length:]


X = tensor("x", "FP32", [1, 2], [1.5, -2])
K = tensor("k", "INT64", [1, 1], [10])
ADD = {"inputs": [X, K]}


def any_size() -> bytes:
    """y = -x, FP32 [batch, any, any]."""
    shape = ["batch", "width", "height"]
    nodes = [helper.make_node("Neg", ["x"], ["y"])]
    return models.model(nodes, [("x", TensorProto.FLOAT, shape)], [("y", TensorProto.FLOAT, shape)])


# Good requests


def test_each_path_takes_its_own_way(served: Served) -> None:
    with served.connect() as client:
        for _ in range(2):
            assert client.ask(post("/v2/models/add/infer", ADD)).status == 200
            (cycle,) = served.call(lambda: [protocol.cycle for protocol in served.connections()])
            assert (type(cycle) is FastCycle) == served.fast


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
        r"queue;dur=(\d+\.\d{3}), compute;dur=(\d+\.\d{3}), batch;desc=3", answer.headers["server-timing"]
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


def test_callers_in_one_batch_get_their_own_rows(held: tuple[Served, GatedEngine]) -> None:
    served, engine = held
    engine.hold()
    with contextlib.ExitStack() as stack:
        first, *others = [stack.enter_context(served.connect()) for _ in range(5)]
        first.send(gate(1))
        assert engine.began.get(timeout=serving.DEADLINE_S) == [1]
        taken = served.batcher().counters.accepted
        for n, client in enumerate(others):
            client.send(gate(10 * n, id=str(n)))
        served.until(lambda: served.batcher().counters.accepted == taken + 4)
        engine.release()
        assert data_of(first.answer()) == [2]
        for n, client in enumerate(others):
            answer = client.answer()
            assert data_of(answer) == [20 * n]
            assert answer.json["id"] == str(n)
            assert "batch;desc=4" in answer.headers["server-timing"]


# Requests that are refused


Case = tuple[str, object, int, str, dict[str, object]]

WRONG: list[Case] = [
    ("add", b"", 400, "not-json", {}),
    ("add", b"\xff\xfe", 400, "not-json", {}),
    ("add", b'{"inputs":[', 400, "not-json", {}),
    ("add", b"[" * 2000, 400, "bad-request", {}),
    ("add", b'{"inputs":' + b"[" * 2000, 400, "bad-request", {}),
    ("add", b'{"parameters":' + b'{"a":' * 2000, 400, "bad-request", {}),
    ("add", b"[]", 400, "bad-request", {}),
    ("add", {}, 400, "bad-request", {}),
    ("add", ADD | {"id": 7}, 400, "bad-request", {}),
    ("add", {"inputs": [X | {"shape": [1.5]}]}, 400, "bad-request", {}),
    ("add", ADD | {"parameters": {"a": [1]}}, 400, "bad-request", {}),
    ("add", ADD | {"parameters": {"triton_x": 1}}, 400, "bad-parameter", {"parameter": "triton_x"}),
    ("add", ADD | {"parameters": {"headers": 1}}, 400, "bad-parameter", {"parameter": "headers"}),
    (
        "add",
        ADD | {"parameters": {"binary_data_output": "yes"}},
        400,
        "bad-parameter",
        {"parameter": "binary_data_output"},
    ),
    (
        "add",
        ADD | {"outputs": [{"name": "total", "parameters": {"binary_data": 1}}]},
        400,
        "bad-parameter",
        {"parameter": "binary_data"},
    ),
    (
        "add",
        ADD | {"outputs": [{"name": "total", "parameters": {"classification": 2}}]},
        400,
        "bad-parameter",
        {"parameter": "classification"},
    ),
    ("add", {"inputs": []}, 400, "missing-tensor", {"tensor": "x"}),
    ("add", {"inputs": [X]}, 400, "missing-tensor", {"tensor": "k"}),
    ("add", {"inputs": [tensor("x", "FP32", [1, 2]), K]}, 400, "missing-tensor", {"tensor": "x"}),
    ("add", {"inputs": [X, X]}, 400, "duplicate-tensor", {"tensor": "x"}),
    ("add", {"inputs": [X, K, K]}, 400, "duplicate-tensor", {"tensor": "k"}),
    (
        "add",
        ADD | {"outputs": [{"name": "total"}, {"name": "total"}]},
        400,
        "duplicate-tensor",
        {"tensor": "total"},
    ),
    (
        "add",
        {"inputs": [X | {"name": "z"}, K]},
        400,
        "unknown-tensor",
        {"tensor": "z", "inputs": ["x", "k"]},
    ),
    (
        "add",
        ADD | {"outputs": [{"name": "z"}]},
        400,
        "unknown-tensor",
        {"tensor": "z", "outputs": ["total", "count"]},
    ),
    (
        "add",
        {"inputs": [tensor("x", "FP32", [1, 2], binary_data_size=8), K]},
        400,
        "bad-binary",
        {"tensor": "x"},
    ),
    (
        "add",
        {"inputs": [X | {"datatype": "FP64"}, K]},
        422,
        "wrong-datatype",
        {"tensor": "x", "expected": "FP32", "actual": "FP64"},
    ),
    ("add", {"inputs": [X | {"datatype": "FLOAT"}, K]}, 422, "wrong-datatype", {"actual": "FLOAT"}),
    *[
        (
            "add",
            {"inputs": [X | {"shape": shape}, K]},
            422,
            "wrong-shape",
            {"tensor": "x", "expected": [-1, 2], "actual": shape},
        )
        for shape in ([], [1], [1, 3], [1, 2, 1], [0, 2], [-1, 2], [1, -2])
    ],
    ("add", {"inputs": [X, K | {"shape": [2, 1], "data": [1, 2]}]}, 422, "wrong-shape", {"tensor": "k"}),
    ("any-width", {"inputs": [tensor("x", "FP32", [1, -1], [])]}, 422, "wrong-shape", {"expected": [-1, -1]}),
    ("any-size", {"inputs": [tensor("x", "FP32", [1, -1, -1], [1])]}, 422, "wrong-shape", {}),
    ("any-size", {"inputs": [tensor("x", "FP32", [1, -2, -2], [1] * 4)]}, 422, "wrong-shape", {}),
    (
        "add",
        {"inputs": [X | {"data": [1]}, K]},
        422,
        "wrong-data",
        {"shape": [1, 2], "expected_elements": 2, "actual_elements": 1, "datatype": "FP32"},
    ),
    ("add", {"inputs": [X | {"data": [1, 2, 3]}, K]}, 422, "wrong-data", {"actual_elements": 3}),
    ("add", {"inputs": [X | {"data": [[1, 2], [3]]}, K]}, 422, "wrong-data", {"tensor": "x"}),
    ("add", {"inputs": [X | {"data": [1, [2]]}, K]}, 422, "wrong-data", {}),
    ("add", {"inputs": [X | {"data": [[[1, 2]]]}, K]}, 422, "wrong-data", {}),
    *[
        ("add", {"inputs": [X | {"data": data}, K]}, 422, "wrong-data", {"tensor": "x"})
        for data in (["1", 2], [None, 2], [True, 2], [{}, 2], "12", 12, {"a": 1}, [1e39, 0])
    ],
    *[
        ("add", {"inputs": [X, K | {"data": data}]}, 422, "wrong-data", {"tensor": "k"})
        for data in ([1.5], ["1"], [True], [2**63], [2**64], [10**30])
    ],
    ("same-UINT8", {"inputs": [tensor("x", "UINT8", [1, 1], [256])]}, 422, "wrong-data", {}),
    ("same-UINT8", {"inputs": [tensor("x", "UINT8", [1, 1], [-1])]}, 422, "wrong-data", {}),
    ("same-UINT8", {"inputs": [tensor("x", "UINT8", [1, 1500], [1] * 1499 + [256])]}, 422, "wrong-data", {}),
    ("same-FP16", {"inputs": [tensor("x", "FP16", [1, 1], [1e6])]}, 422, "wrong-data", {}),
    ("same-BOOL", {"inputs": [tensor("x", "BOOL", [1, 1], [1])]}, 422, "wrong-data", {}),
    ("same-BYTES", {"inputs": [tensor("x", "BYTES", [1, 1], [1])]}, 422, "wrong-data", {}),
    (
        "add",
        b'{"inputs":[{"name":"x","datatype":"FP32","shape":[1,2],"data":[NaN,1]}]}',
        400,
        "not-json",
        {},
    ),
    ("any-width", {"inputs": [tensor("x", "FP32", [2**40, 2**40], [1])]}, 422, "wrong-data", {}),
    ("any-width", {"inputs": [tensor("x", "FP32", [2**63, 2], [1])]}, 422, "wrong-data", {}),
    (
        "negate",
        {"inputs": [tensor("x", "FP32", [51, 3], [1] * 153)]},
        413,
        "too-many-rows",
        {"rows": 51, "limit": 50},
    ),
]


def _case_id(case: Case) -> str:
    text = case[1][:20].decode("latin-1") if isinstance(case[1], bytes) else json.dumps(case[1])
    return f"{case[3]}-{text[:60]}"


@pytest.mark.parametrize(("model", "message", "status", "slug", "members"), WRONG, ids=map(_case_id, WRONG))
def test_a_wrong_request_is_told_what_is_wrong(
    served: Served, model: str, message: object, status: int, slug: str, members: dict[str, object]
) -> None:
    with served.connect() as client:
        answer = client.ask(post(f"/v2/models/{model}/infer", message))
        assert (answer.status, answer.slug) == (status, slug)
        assert answer.json.items() >= members.items()
        # The connection goes on, and so does the model.
        assert client.ask(post("/v2/models/add/infer", ADD)).status == 200


def binary(*inputs: dict[str, object]) -> dict[str, object]:
    return {"inputs": list(inputs)}


X8 = tensor("x", "FP32", [1, 2], binary_data_size=8)
WRONG_BINARY: list[tuple[object, bytes, str | None, int, str, dict[str, object]]] = [
    (binary(X8, K), fp32(1, 2) + b"!", None, 400, "bad-binary", {"left_over_bytes": 1}),
    (binary(X8, K), fp32(1), None, 400, "bad-binary", {"binary_data_size": 8, "left_bytes": 4}),
    (ADD, b"abc", None, 400, "bad-binary", {"left_over_bytes": 3}),
    (ADD, b"", "100000", 400, "bad-binary", {"header_length": 100000}),
    (ADD, b"", "0", 400, "bad-binary", {}),
    (ADD, b"", "-1", 400, "bad-binary", {}),
    (ADD, b"", "1e3", 400, "bad-binary", {}),
    (ADD, b"", "9" * 400, 400, "bad-binary", {}),
    (ADD, b"", "5", 400, "not-json", {}),
    (binary(X8 | {"parameters": {"binary_data_size": -8}}, K), b"", None, 400, "bad-binary", {}),
    (binary(X8 | {"parameters": {"binary_data_size": True}}, K), b"ab", None, 400, "bad-binary", {}),
    (binary(X8 | {"parameters": {"binary_data_size": "8"}}, K), fp32(1, 2), None, 400, "bad-binary", {}),
    (binary(X8 | {"parameters": {"binary_data_size": 2**70}}, K), fp32(1, 2), None, 400, "bad-binary", {}),
    (binary(X8 | {"data": [1, 2]}, K), fp32(1, 2), None, 400, "bad-binary", {"tensor": "x"}),
    (
        binary(X8 | {"parameters": {"binary_data_size": 4}}, K),
        fp32(1),
        None,
        422,
        "wrong-data",
        {"expected_bytes": 8, "actual_bytes": 4},
    ),
]


@pytest.mark.parametrize(("message", "tail", "length", "status", "slug", "members"), WRONG_BINARY)
def test_a_wrong_binary_body(
    served: Served,
    message: object,
    tail: bytes,
    length: str | None,
    status: int,
    slug: str,
    members: dict[str, object],
) -> None:
    data = json.dumps(message).encode()
    headers = {"Inference-Header-Content-Length": length or str(len(data))}
    with served.connect() as client:
        answer = client.ask(post("/v2/models/add/infer", data + tail, headers))
        assert (answer.status, answer.slug) == (status, slug)
        assert answer.json.items() >= members.items()
        assert client.ask(post("/v2/models/add/infer", ADD)).status == 200


@pytest.mark.parametrize(
    "tail",
    [
        b"\x05\0\0\0abc",  # says 5, has 3
        b"\x01\0\0\0a",  # one element, two expected
        b"\0\0\0\0" * 3,  # three
        b"\0\0\0\0\0\0\0\0\0",  # two and a byte
        b"\xff\xff\xff\xff\0\0\0\0",
        b"\0",
    ],
)
def test_wrong_strings_in_binary(served: Served, tail: bytes) -> None:
    message = {"inputs": [tensor("x", "BYTES", [2, 1], binary_data_size=len(tail))]}
    answer = infer(served, "same-BYTES", message, tail=tail)
    assert (answer.status, answer.slug) == (422, "wrong-data")
    assert answer.json["expected_elements"] == 2


def test_binary_truth_is_0_or_1(served: Served) -> None:
    message = {"inputs": [tensor("x", "BOOL", [1, 2], binary_data_size=2)]}
    assert infer(served, "same-BOOL", message, tail=b"\1\2").slug == "wrong-data"


def test_strings_must_be_text_where_the_model_needs_text(served: Served) -> None:
    """ONNX Runtime's strings are UTF-8; what is not is this caller's mistake and harms no other."""
    tail = struct.pack("<I", 2) + b"\xff\xfe"
    message = {"inputs": [tensor("x", "BYTES", [1, 1], binary_data_size=6)]}
    answer = infer(served, "same-BYTES", message, tail=tail)
    assert answer.status in {200, 422, 500}
    assert data_of(infer(served, "same-BYTES", {"inputs": [tensor("x", "BYTES", [1, 1], ["a"])]})) == ["a"]


def test_an_unknown_model(served: Served) -> None:
    answer = infer(served, "nobody", ADD)
    assert (answer.status, answer.slug) == (404, "unknown-model")
    assert answer.json["model"] == "nobody"
    assert "add" in answer.json["models"]


@pytest.mark.parametrize("target", ["/v2/models/add/infer/", "/v2/models/add/infer/x", "/", "/v2/models//infer"])
def test_nothing_there(served: Served, target: str) -> None:
    answer = served.ask(post(target, ADD))
    assert (answer.status, answer.slug) == (404, "not-found")


@pytest.mark.parametrize("method", ["GET", "PUT", "DELETE", "PATCH", "OPTIONS"])
def test_only_post(served: Served, method: str) -> None:
    answer = served.ask(get("/v2/models/add/infer", method))
    assert (answer.status, answer.slug) == (405, "method-not-allowed")
    assert answer.headers["allow"] == "POST"


def test_post_where_only_get_is(served: Served) -> None:
    answer = served.ask(post("/v2/health/live", b""))
    assert (answer.status, answer.slug) == (405, "method-not-allowed")
    assert {method.strip() for method in answer.headers["allow"].split(",")} == {"GET", "HEAD"}


@pytest.mark.parametrize(
    ("encoding", "status", "slug"),
    [("br", 415, "unsupported-encoding"), ("gzip, gzip", 415, "unsupported-encoding"), ("gzip", 400, "bad-encoding")],
)
def test_a_body_in_another_encoding(served: Served, encoding: str, status: int, slug: str) -> None:
    answer = served.ask(post("/v2/models/add/infer", ADD, {"Content-Encoding": encoding}))
    assert (answer.status, answer.slug) == (status, slug)


def test_a_compressed_body(served: Served) -> None:
    body = gzip.compress(json.dumps(ADD).encode())
    assert served.ask(post("/v2/models/add/infer", body, {"Content-Encoding": "gzip"})).status == 200


def test_a_small_body_that_becomes_a_large_one(served: Served) -> None:
    body = gzip.compress(b" " * 10_000_000)
    answer = served.ask(post("/v2/models/add/infer", body, {"Content-Encoding": "gzip"}))
    assert (answer.status, answer.slug) == (413, "body-too-large")


def test_the_identity_encoding_is_none(served: Served) -> None:
    assert served.ask(post("/v2/models/add/infer", ADD, {"Content-Encoding": "identity"})).status == 200


def test_too_large_a_body(served: Served) -> None:
    with served.connect() as client:
        # Only the headers: the answer does not wait for the body.
        answer = client.ask(post("/v2/models/add/infer", b"", {"Content-Length": "100001"}))
        assert (answer.status, answer.slug) == (413, "body-too-large")
        assert answer.json.items() >= {"body_bytes": 100_001, "limit_bytes": 100_000}.items()
        assert answer.headers["connection"] == "close"
        assert client.closed()


def test_the_largest_body(served: Served) -> None:
    body = json.dumps(ADD).encode().ljust(100_000)
    assert served.ask(post("/v2/models/add/infer", body)).status == 200


# The engine fails


def test_a_failing_input_is_its_caller_s_alone(served: Served, caplog: pytest.LogCaptureFixture) -> None:
    def pick(index: int) -> Answer:
        return infer(served, "pick", {"inputs": [tensor("x", "INT64", [1, 1], [index])]})

    answer = pick(7)
    assert (answer.status, answer.slug) == (500, "run-failed")
    assert answer.json["model"] == "pick"
    assert answer.json["reference"] in answer.json["error"]
    assert any(answer.json["reference"] in record.getMessage() for record in caplog.records)
    assert "Gather" not in answer.body.decode()  # the engine's words stay in the log
    assert data_of(pick(1)) == [20]


def test_others_in_a_failing_batch_are_answered(
    held: tuple[Served, GatedEngine], caplog: pytest.LogCaptureFixture
) -> None:
    served, engine = held
    engine.fails = lambda rows: EngineRunError("13 is unlucky") if 13 in rows else None
    engine.hold()
    with contextlib.ExitStack() as stack:
        first, *others = [stack.enter_context(served.connect()) for _ in range(5)]
        first.send(gate(1))
        assert engine.began.get(timeout=serving.DEADLINE_S) == [1]
        taken = served.batcher().counters.accepted
        for n, client in zip((11, 12, 13, 14), others, strict=True):
            client.send(gate(n))
        served.until(lambda: served.batcher().counters.accepted == taken + 4)
        engine.release()
        assert data_of(first.answer()) == [2]
        answers = [client.answer() for client in others]
    assert [answer.status for answer in answers] == [200, 200, 500, 200]
    assert answers[2].slug == "run-failed"
    assert [data_of(answer) for answer in answers if answer.status == 200] == [[22], [24], [28]]
    assert answers[2].json["reference"] in caplog.text


def test_an_answer_that_cannot_be_encoded(
    served: Served, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    encoder = served.core.models["add"].encoder
    monkeypatch.setattr(encoder, "encode", None)
    answer = infer(served, "add", ADD)
    assert (answer.status, answer.slug) == (500, "internal")
    assert "encoding an answer failed" in caplog.text


def test_a_request_that_the_server_fails_on(
    served: Served, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    decoder = served.core.models["add"].decoder
    monkeypatch.setattr(decoder, "decode", None)
    answer = infer(served, "add", ADD)
    assert (answer.status, answer.slug) == (500, "internal")
    assert "an infer request failed" in caplog.text


def test_a_dead_engine(path: str, caplog: pytest.LogCaptureFixture) -> None:
    with gated(path == "fast") as (served, engine):
        engine.fails = lambda rows: EngineDeadError("the device fell off")
        answer = served.ask(gate(1))
        assert (answer.status, answer.slug) == (503, "engine-dead")
        assert answer.json["reference"] in caplog.text
        engine.fails = lambda rows: None
        again = served.ask(gate(2))
        assert again.slug == "engine-dead"
        assert again.json["reference"] == answer.json["reference"]
        assert served.ask(get("/v2/health/live")).status == 503


# Refused before the body is read


def fill(stack: contextlib.ExitStack, served: Served, engine: GatedEngine) -> list[serving.Client]:
    """Hold the engine and send requests until no row more fits the queue."""
    engine.hold()
    batcher = served.batcher()
    clients = []
    while not batcher.full:
        client = stack.enter_context(served.connect())
        before = batcher.counters.accepted
        client.send(gate(*[len(clients)] * min(4, 8 - batcher.queued_rows)))
        served.until(lambda before=before: batcher.counters.accepted > before)  # type: ignore[misc]
        clients.append(client)
        if len(clients) == 1:
            engine.began.get(timeout=serving.DEADLINE_S)
    return clients


def test_a_full_queue_refuses_before_the_body(held: tuple[Served, GatedEngine]) -> None:
    served, engine = held
    with contextlib.ExitStack() as stack:
        waiting = fill(stack, served, engine)
        client = stack.enter_context(served.connect())
        request = gate(5)
        end = request.index(b"\r\n\r\n") + 4
        answer = client.ask(request[:end])
        assert (answer.status, answer.slug) == (429, "queue-full")
        assert int(answer.headers["retry-after"]) >= 1
        assert answer.json["retry_after_ms"] >= 1
        assert answer.json.items() >= {"queued_rows": 8, "limit": 8}.items()
        assert "connection" not in answer.headers
        engine.release()
        for n, other in enumerate(waiting):
            assert set(data_of(other.answer())) == {2 * n}
        # The body that nobody wanted is passed over, and the connection goes on.
        client.send(request[end:])
        assert data_of(client.ask(gate(6))) == [12]


def test_a_full_queue_and_a_known_header_block(held: tuple[Served, GatedEngine]) -> None:
    served, engine = held
    with contextlib.ExitStack() as stack:
        client = stack.enter_context(served.connect())
        assert data_of(client.ask(gate(5))) == [10]
        waiting = fill(stack, served, engine)
        assert client.ask(gate(5)).slug == "queue-full"
        assert client.ask(gate(5)).slug == "queue-full"
        engine.release()
        for other in waiting:
            assert other.answer().status == 200
        assert data_of(client.ask(gate(6))) == [12]


def test_more_rows_than_there_is_room_for(held: tuple[Served, GatedEngine]) -> None:
    """The headers do not say how many rows will come, so this is refused after the body."""
    served, engine = held
    with contextlib.ExitStack() as stack:
        first, second = stack.enter_context(served.connect()), stack.enter_context(served.connect())
        engine.hold()
        first.send(gate(1))
        engine.began.get(timeout=serving.DEADLINE_S)
        taken = served.batcher().counters.accepted
        second.send(gate(2, 2))
        served.until(lambda: served.batcher().counters.accepted > taken)
        answer = served.ask(gate(*[3] * 8))
        assert answer.slug == "queue-full"
        assert "retry-after" in answer.headers
        engine.release()
        assert first.answer().status == second.answer().status == 200
        assert served.batcher().counters.refused >= 1


def test_while_the_model_is_being_loaded(path: str) -> None:
    engine = GatedEngine()
    engine.may_open.clear()
    model = ModelSettings(path="gate", max_batch_size=4)
    with serving.serve(path == "fast", (model,), engines={"gate": engine}, ready=False) as served:
        with served.connect() as client:
            request = gate(1)
            answer = client.ask(request[: request.index(b"\r\n\r\n") + 4])
            assert (answer.status, answer.slug) == (503, "starting")
            assert answer.headers["retry-after"] == "1"
            assert "connection" not in answer.headers
            client.send(request[request.index(b"\r\n\r\n") + 4 :])
            assert client.ask(get("/v2/health/live")).status == 200
            assert client.ask(get("/v2/health/ready")).status == 503
            assert client.ask(get("/v2/models/gate")).slug == "starting"
            engine.may_open.set()
            assert served.server.ready.wait(serving.DEADLINE_S)
            assert client.ask(get("/v2/health/ready")).status == 200
            assert data_of(client.ask(request)) == [2]


def test_a_model_that_cannot_be_loaded(path: str) -> None:
    engine = GatedEngine()
    model = ModelSettings(path="gate", max_batch_size=4)
    failed = EngineLoadError("the file is a poem")

    def fail() -> None:
        raise failed

    engine.open = fail  # type: ignore[method-assign]
    with serving.serve(path == "fast", (model,), engines={"gate": engine}, ready=False) as served:
        served.join()
        assert served.server.status == 1


def test_draining(path: str) -> None:
    with gated(path == "fast") as (served, engine):
        engine.hold()
        with served.connect() as running, served.connect() as idle, served.connect() as late:
            assert idle.ask(get("/v2/health/ready")).status == 200
            running.send(gate(1))
            engine.began.get(timeout=serving.DEADLINE_S)
            served.stop()
            assert idle.ask(get("/v2/health/ready")).status == 503
            request = gate(2)
            for client in (late, idle):
                answer = client.ask(request[: request.index(b"\r\n\r\n") + 4])
                assert (answer.status, answer.slug) == (503, "draining")
                assert answer.headers["retry-after"] == "1"
                assert answer.headers["connection"] == "close"
                assert client.closed()
            engine.release()
            assert data_of(running.answer()) == [2]
            assert running.closed()
        served.join()
        assert served.server.status == 0


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


def test_rows_of_makes_what_the_gate_takes(held: tuple[Served, GatedEngine]) -> None:
    served, _ = held
    assert data_of(served.ask(post(serving.GATE, rows_of(1, 2, 3, 4, 5)))) == [2, 4, 6, 8, 10]
