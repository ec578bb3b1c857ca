"""Hostile input: refused with the right problem, at once, and the next request is served; on both paths.

Never a 5xx, never a stall: a client here waits `DEADLINE_S` for an answer, and after each case an ordinary
request on a new connection is answered. Bombs are in `test_compression`.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from onnx import TensorProto

from cobatch.server.settings.schema import ModelSettings
from tests.support.fronts.linked import WAYS, way
from tests.support.http import serving
from tests.support.http.serving import Served, data_of, post
from tests.support.http.wire import any_size
from tests.support.models import models

LIMIT = 200_000
# The decoder has one path for this many numbers, and one for a few.
MANY = 3000


@pytest.fixture(scope="module", params=WAYS)
def served(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("models")
    files = {
        "negate": models.negate(width=2),
        "width": models.negate(width="width"),
        "size": any_size(),
        "add": models.two_inputs(),
        "long": models.identity(TensorProto.INT64, "width"),
        "half": models.identity(TensorProto.FLOAT16, "width"),
        "text": models.identity(TensorProto.STRING, "width"),
    }
    settings = [
        ModelSettings(path=models.write(folder, data, f"{name}.onnx"), max_batch_size=4, threads=1)
        for name, data in files.items()
    ]
    with serving.serve(**way(request.param), models=tuple(settings), max_body_bytes=LIMIT) as server:
        yield server
        good(server)


def good(served: Served) -> None:
    """An ordinary request on a new connection is answered."""
    assert data_of(served.ask(post("/v2/models/negate/infer", x("FP32", [1, 2], [1, 2])))) == [-1, -2]


def x(datatype: str, shape: list[int], data: object = None, **parameters: object) -> dict[str, Any]:
    """A message with one input."""
    made: dict[str, Any] = {"name": "x", "datatype": datatype, "shape": shape}
    if data is not None:
        made["data"] = data
    return {"inputs": [made | ({"parameters": parameters} if parameters else {})]}


def text_of(shape: str, data: str, datatype: str = "FP32") -> bytes:
    """The same as text, for JSON that Python would not write."""
    return f'{{"inputs":[{{"name":"x","datatype":"{datatype}","shape":{shape},"data":{data}}}]}}'.encode()


def refused(
    served: Served, model: str, body: object, *, tail: bytes | None = None, length: int | str | None = None
) -> tuple[int, str]:
    """Return the problem's status and kind; check that the next request is served. `tail`: binary."""
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    headers = {}
    if tail is not None or length is not None:
        headers["Inference-Header-Content-Length"] = str(len(data) if length is None else length)
    answer = served.ask(post(f"/v2/models/{model}/infer", data + (tail or b""), headers))
    good(served)
    assert len(answer.body) < 30_000, "it quotes too much of what was sent"
    return answer.status, answer.slug


@pytest.mark.parametrize("depth", [101, 1000, 30_000])
def test_nesting_deeper_than_100(served: Served, depth: int) -> None:
    deep = "[" * depth + "1" + "]" * depth
    kinds = {(422, "wrong-data"), (400, "not-json")}
    assert refused(served, "negate", text_of("[1,2]", deep)) in kinds
    assert refused(served, "size", text_of("[1,1,1]", deep)) in kinds
    assert refused(served, "text", text_of("[1,1]", deep, "BYTES")) in kinds
    assert refused(served, "negate", text_of(deep, "[1,2]")) == (400, "bad-request")
    objects = '{"a":' * depth + "1" + "}" * depth
    for field in ("inputs", "outputs", "parameters", "id"):
        for value in (deep, objects):
            message = f'{{"{field}":{value}}}'.encode()
            # Beside the tensors' data, 64 KiB of JSON are parsed.
            expected = (400, "bad-request") if len(message) < 1 << 16 else (413, "body-too-large")
            assert refused(served, "negate", message) == expected
    for unclosed in ("[" * depth, '{"inputs":' + "[" * depth, '{"unknown":' + '{"a":' * depth):
        assert refused(served, "negate", unclosed.encode())[0] == (400 if len(unclosed) < 1 << 16 else 413)


@pytest.mark.parametrize(
    "shape",
    [
        [1, 2**32, 2**32], [1, 2**63, 2], [1, 2**32 + 1, 2**32 - 1], [1, 2**64, 1], [1, 2**64 + 1, 2**64 - 1],
        [2**22, 2**21, 2**21], [1, 0, 2**62], [1, 2**62, 0], [1, 2**70, 0], [1, 0, 2**33],
        [1, 10**30, 10**30],
    ],
)  # fmt: skip
def test_shape_products_over_64_bits(served: Served, shape: list[int]) -> None:
    kind = {(422, "wrong-shape"), (422, "wrong-data"), (413, "too-many-rows")}
    assert refused(served, "size", x("FP32", shape, [])) in kind
    assert refused(served, "size", x("FP32", shape, [1])) in kind
    assert refused(served, "size", x("FP32", shape, [1] * MANY)) in kind
    for size in (0, 4):
        message = x("FP32", shape, binary_data_size=size)
        assert refused(served, "size", message, tail=bytes(size)) in kind


def test_rows_beyond_64_bits(served: Served) -> None:
    for rows in (2**40, 2**64, 2**70):
        assert refused(served, "width", x("FP32", [rows, 0], [])) in {
            (413, "too-many-rows"),
            (422, "wrong-shape"),
        }
        assert refused(served, "negate", x("FP32", [rows, 2], [1, 2])) == (413, "too-many-rows")


@pytest.mark.parametrize(
    "shape", [[-1, 2], [1, -2], [-1, -2], [-2, -1], [0, 2], [-(2**63), 2], [-(2**70), 2]]
)
def test_negative_dimensions(served: Served, shape: list[int]) -> None:
    for model in ("negate", "width"):
        assert refused(served, model, x("FP32", shape, [1, 2])) == (422, "wrong-shape")
        message = x("FP32", shape, binary_data_size=8)
        assert refused(served, model, message, tail=bytes(8)) == (422, "wrong-shape")


def test_duplicates(served: Served) -> None:
    one, two = x("FP32", [1, 2], [1, 2])["inputs"][0], x("FP32", [1, 2], [3, 4])["inputs"][0]
    assert refused(served, "negate", {"inputs": [one, two]}) == (400, "duplicate-tensor")
    assert refused(served, "negate", {"inputs": [one] * 600}) == (400, "duplicate-tensor")
    assert refused(served, "negate", {"inputs": [one] * 2000}) == (413, "body-too-large")
    for count in (2, 3000):
        message = {"inputs": [one], "outputs": [{"name": "y"}] * count}
        assert refused(served, "negate", message) == (400, "duplicate-tensor")


@pytest.mark.parametrize("padding", [0, 5000], ids=["small", "large"])
def test_a_name_given_twice_in_an_object_means_the_last(served: Served, padding: int) -> None:
    """As in most JSON parsers, for short and long messages alike."""
    spaces = " " * padding
    tensor = '{"name":"z","name":"x","datatype":"FP32","shape":[7],"shape":[1,2],"data":[8],"data":[1,2]}'
    body = f'{{"inputs":[],{spaces}"id":"a","inputs":[{tensor}],"id":"b"}}'.encode()
    answer = served.ask(post("/v2/models/negate/infer", body))
    assert (data_of(answer), answer.json["id"]) == ([-1, -2], "b")


@pytest.mark.parametrize("count", [0, 1, 3, MANY])
@pytest.mark.parametrize("model", ["negate", "width", "text"])
def test_wrong_counts(served: Served, model: str, count: int) -> None:
    datatype, value = ("BYTES", "a") if model == "text" else ("FP32", 1)
    for data in ([value] * count, [[value] * count], [[value]] * count):
        assert refused(served, model, x(datatype, [1, 2], data)) == (422, "wrong-data")
    message = x(datatype, [1, 2], binary_data_size=4 * count)
    assert refused(served, model, message, tail=bytes(4 * count)) == (422, "wrong-data")


@pytest.mark.parametrize(
    "data",
    [[[1, 2], [3]], [[1], [2, 3]], [1, [2, 3, 4]], [[1, 2], 3, 4], [[[1, 2]], [3, 4]], [[], [1, 2, 3, 4]]],
)
def test_ragged_data(served: Served, data: list[object]) -> None:
    assert refused(served, "width", x("FP32", [2, 2], data)) == (422, "wrong-data")
    many = {"inputs": [*x("FP32", [2, 2], data)["inputs"]], "padding": [1] * MANY}
    assert refused(served, "width", many) == (422, "wrong-data")


@pytest.mark.parametrize(
    "number", ["NaN", "Infinity", "-Infinity", "nan", "1e400", "-1e400", "1e39", "-1e39"]
)
@pytest.mark.parametrize("count", [1, MANY])
def test_numbers_that_are_not_finite(served: Served, number: str, count: int) -> None:
    allowed = {(400, "not-json"), (422, "wrong-data"), (400, "bad-request")}
    data = ",".join([number] * count)
    assert refused(served, "width", text_of(f"[1,{count}]", f"[{data}]")) in allowed
    assert refused(served, "width", text_of(f"[1,{count}]", f"[[{data}]]")) in allowed
    assert refused(served, "half", text_of(f"[1,{count}]", f"[{data}]", "FP16")) in allowed
    assert refused(served, "long", text_of(f"[1,{count}]", f"[{data}]", "INT64")) in allowed
    assert refused(served, "width", text_of(f"[{number}]", "[1]")) in allowed


@pytest.mark.parametrize("digits", [20, 400, 5000])
@pytest.mark.parametrize("sign", ["", "-"])
def test_numbers_of_many_digits(served: Served, digits: int, sign: str) -> None:
    number = sign + "9" * digits
    allowed = {(400, "not-json"), (422, "wrong-data"), (400, "bad-request")}
    assert refused(served, "long", text_of("[1,1]", f"[{number}]", "INT64")) in allowed
    assert refused(served, "long", text_of("[1,1]", f"[[{number}]]", "INT64")) in allowed
    if digits > 38:
        assert refused(served, "width", text_of("[1,1]", f"[{number}]")) in allowed
    assert refused(served, "width", text_of(f"[1,{number}]", "[1]"))[0] in (400, 422)
    body = b'{"parameters":{"priority":%b},%b' % (number.encode(), text_of("[1,1]", "[1]")[1:])
    assert refused(served, "width", body)[0] == 400
    assert refused(served, "width", x("FP32", [1, 1], [1]), length=number)[0] == 400


@pytest.mark.parametrize(
    "text", [b'"\xff"', b'"a\xc3"', b'"\xed\xa0\x80"', b'"\\ud800"', b'"\x00"', b'"\\x"']
)
@pytest.mark.parametrize("count", [1, MANY])
def test_invalid_text(served: Served, text: bytes, count: int) -> None:
    data = b"[%b]" % b",".join([text] * count)
    shape = f"[1,{count}]".encode()
    for model, datatype in (("text", b"BYTES"), ("width", b"FP32")):
        for form in (data, b"[%b]" % data):
            tensor = b'{"name":"x","datatype":"%b","shape":%b,"data":%b}' % (datatype, shape, form)
            assert refused(served, model, b'{"inputs":[%b]}' % tensor)[0] in (400, 422)
    body = b'{"id":%b,%b' % (text, text_of("[1,1]", "[1]")[1:])
    assert refused(served, "width", body) == (400, "not-json")


def test_a_header_that_lies_about_the_json(served: Served) -> None:
    message = x("FP32", [1, 2], binary_data_size=8)
    size = len(json.dumps(message))
    tail = np.ones(2, "<f4").tobytes()
    for length in (1, size - 1, size // 2, size + 1, size + 7, size + 8):
        assert refused(served, "negate", message, tail=tail, length=length)[0] == 400
    for beyond in (size + 9, 2**31, 2**63, 10**17):
        assert refused(served, "negate", message, tail=tail, length=beyond) == (400, "bad-binary")
    for odd in ("-1", "+5", "0x10", "1e2", " ", "1 2", "1,2", "\xb2", "9" * 19):
        assert refused(served, "negate", message, tail=tail, length=odd) == (400, "bad-binary")
    # Length 0 means a raw body, for which it is too long.
    assert refused(served, "negate", message, tail=tail, length=0) == (422, "wrong-data")


def test_a_size_that_lies_about_the_binary(served: Served) -> None:
    tail = np.ones(2, "<f4").tobytes()
    for size in (9, 100, 2**31, 2**63, 2**64, -1, -8, True, "8", 8.0, 1.5):
        message = x("FP32", [1, 2], binary_data_size=size)
        assert refused(served, "negate", message, tail=tail) == (400, "bad-binary")
    for size in (0, 4, 7):
        message = x("FP32", [1, 2], binary_data_size=size)
        assert refused(served, "negate", message, tail=tail)[0] in (400, 422)
        assert refused(served, "negate", message, tail=tail[:size]) == (422, "wrong-data")
    for wrong in (tail + b"!", b""):
        message = x("FP32", [1, 2], binary_data_size=8)
        assert refused(served, "negate", message, tail=wrong) == (400, "bad-binary")


@pytest.mark.parametrize("size", [0, 1, 3, 5, 2**31 - 1, 2**31, 2**32 - 1])
def test_an_element_that_lies_about_its_length(served: Served, size: int) -> None:
    tail = size.to_bytes(4, "little") + b"ab"
    message = x("BYTES", [1, 1], binary_data_size=len(tail))
    assert refused(served, "text", message, tail=tail) == (422, "wrong-data")


def test_long_names_are_not_sent_back(served: Served) -> None:
    long = "\x01" * 20_000
    one = x("FP32", [1, 2], [1, 2])
    for message in (
        {"inputs": [one["inputs"][0] | {"name": long}]},
        {"inputs": [one["inputs"][0] | {"datatype": long}]},
        {"inputs": [one["inputs"][0] | {"shape": [1] * 20_000}]},
        one | {"outputs": [{"name": long}]},
        one | {"parameters": {"priority": long}},
        one | {"parameters": {"triton_" + long: 1}},
        x("FP32", [1, 2], binary_data_size=long),
    ):
        assert refused(served, "negate", message, length=len(json.dumps(message)))[0] in (400, 413, 422)


def chunks(body: bytes, size: int, **headers: str) -> bytes:
    """Return the body in chunks of `size` bytes."""
    lines = ["POST /v2/models/negate/infer HTTP/1.1", "Host: test", "Transfer-Encoding: chunked"]
    lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
    pieces = [body[at : at + size] for at in range(0, len(body), size)]
    framed = b"".join(b"%x\r\n%b\r\n" % (len(piece), piece) for piece in pieces)
    return "\r\n".join([*lines, "", ""]).encode() + framed + b"0\r\n\r\n"


def test_thousands_of_tiny_chunks(served: Served) -> None:
    body = json.dumps(x("FP32", [1, 2], [1, 2])).encode() + b" " * 20_000
    assert data_of(served.ask(chunks(body, 1))) == [-1, -2]
    assert data_of(served.ask(chunks(zlib.compress(body, 0), 1, Content_Encoding="deflate"))) == [-1, -2]
    assert served.ask(chunks(b"[" * 20_000, 1)).status == 400
    good(served)


@pytest.mark.parametrize("length", [LIMIT + 1, 2**31, 2**63, 10**18])
def test_a_body_over_the_limit_by_its_length(served: Served, length: int) -> None:
    head = post("/v2/models/negate/infer", b"", {"Content-Length": str(length)})
    with served.connect() as client:
        answer = client.ask(head)  # none of the body is waited for
        assert (answer.status, answer.slug) == (413, "body-too-large")
        assert client.closed()
    good(served)


@pytest.mark.parametrize("size", [1000, LIMIT])
def test_a_body_over_the_limit_in_chunks(served: Served, size: int) -> None:
    answer = served.ask(chunks(bytes(LIMIT + 1), size))
    assert (answer.status, answer.slug) == (413, "body-too-large")
    good(served)
