"""Wrong requests over the wire: the problem, its members, and that the connection goes on."""

from __future__ import annotations

import gzip
import json
import struct
from collections.abc import Iterator, Mapping

import pytest

from tests.support.fronts.linked import WAYS, way
from tests.support.http import wire
from tests.support.http.serving import Answer, Served, data_of, get, post
from tests.support.http.wire import ADD, K, X, fp32, infer, tensor


@pytest.fixture(scope="module", params=WAYS)
def served(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("models")
    with wire.serve_models(folder=folder, max_body_bytes=100_000, **way(request.param)) as served:
        yield served


Case = tuple[str, object, int, str, Mapping[str, object]]

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
    ("any-width", {"inputs": [tensor("x", "FP32", [2**40, 2**40], [1])]}, 413, "too-many-rows", {}),
    ("any-width", {"inputs": [tensor("x", "FP32", [2**63, 2], [1])]}, 413, "too-many-rows", {}),
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
def test_a_wrong_request_gets_the_right_problem(
    served: Served, model: str, message: object, status: int, slug: str, members: Mapping[str, object]
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
WRONG_BINARY: list[tuple[object, bytes, str | None, int, str, Mapping[str, object]]] = [
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
    members: Mapping[str, object],
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


def test_strings_that_the_model_cannot_return(served: Served) -> None:
    """ONNX Runtime takes any bytes, but returns UTF-8 only."""
    tail = struct.pack("<I", 2) + b"\xff\xfe"
    message = {"inputs": [tensor("x", "BYTES", [1, 1], binary_data_size=6)]}
    answer = infer(served, "same-BYTES", message, tail=tail)
    assert (answer.status, answer.slug) == (422, "input-rejected")
    assert data_of(infer(served, "same-BYTES", {"inputs": [tensor("x", "BYTES", [1, 1], ["a"])]})) == ["a"]


def test_an_unknown_model(served: Served) -> None:
    answer = infer(served, "nobody", ADD)
    assert (answer.status, answer.slug) == (404, "unknown-model")
    assert answer.json["model"] == "nobody"
    assert "add" in answer.json["models"]


@pytest.mark.parametrize(
    "target", ["/v2/models/add/infer/", "/v2/models/add/infer/x", "/v3", "/v2/models//infer"]
)
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
    [
        ("br", 415, "unsupported-encoding"),
        ("gzip, gzip", 415, "unsupported-encoding"),
        ("gzip", 400, "bad-encoding"),
    ],
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


def test_the_identity_encoding_changes_nothing(served: Served) -> None:
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


# Failures of the server or the engine


def test_a_failing_input_affects_its_client_only(served: Served, caplog: pytest.LogCaptureFixture) -> None:
    def pick(index: int) -> Answer:
        return infer(served, "pick", {"inputs": [tensor("x", "INT64", [1, 1], [index])]})

    answer = pick(7)
    assert (answer.status, answer.slug) == (422, "input-rejected")
    assert answer.json["model"] == "pick"
    assert answer.json["reference"] in answer.json["error"]
    assert any(answer.json["reference"] in record.getMessage() for record in caplog.records)
    assert "Gather" not in answer.body.decode()  # the engine's words stay in the log
    assert data_of(pick(1)) == [20]


def test_an_answer_that_cannot_be_encoded(
    served: Served, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for inference in served.server.inferences():
        monkeypatch.setattr(inference.served["add"].encoder, "encode", None)
    answer = infer(served, "add", ADD)
    assert (answer.status, answer.slug) == (500, "internal")
    assert "encoding an answer failed" in caplog.text


def test_a_request_that_the_server_fails_on(
    served: Served, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for inference in served.server.inferences():
        monkeypatch.setattr(inference.served["add"].decoder, "decode", None)
    answer = infer(served, "add", ADD)
    assert (answer.status, answer.slug) == (500, "internal")
    assert "an infer request failed" in caplog.text
    caplog.clear()  # its traceback refers to the connection
