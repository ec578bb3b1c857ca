"""The forms of a prediction's tensors, valid and invalid: JSON, base64, .npy, raw, multipart."""

from __future__ import annotations

import io
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from cobatch.engines.base import TensorSpec
from cobatch.server.http.problem import Problem
from cobatch.server.predictions.npy import read_npy
from cobatch.server.v2.checks import MAX_STRINGS
from tests.support.http.predicting import App, b64, outputs, slug, small_models

F32 = np.float32

X = np.array([[1.5, -2, 3], [4, 5, 6]], F32)


@pytest.fixture
async def app(tmp_path: Path) -> AsyncIterator[App]:
    async with small_models(tmp_path) as made:
        yield made


def npy(array: np.ndarray[Any, Any]) -> bytes:
    file = io.BytesIO()
    np.save(file, array, allow_pickle=False)
    return file.getvalue()


def header(text: str, version: bytes = b"\x01\x00") -> bytes:
    """Build the beginning of a .npy file with any text as its header."""
    data = text.encode() + b"\n"
    return b"\x93NUMPY" + version + len(data).to_bytes(2 if version[0] == 1 else 4, "little") + data


async def post(app: App, model: str, body: bytes, media: str, query: str = "") -> httpx.Response:
    return await app.client.post(
        f"/v1/models/{model}/predictions{query}", content=body, headers={"Content-Type": media}
    )


# Forms of input


@pytest.mark.parametrize("dtype", ["float32", "FP32", "f4", "<f4"])
async def test_base64(app: App, dtype: str) -> None:
    answer = await app.predict("negate", {"inputs": {"x": b64(X, dtype)}})
    assert outputs(answer)["y"]["data"] == (-X).tolist()


async def test_datatypes_in_and_out(app: App) -> None:
    truth = outputs(await app.predict("truth", {"inputs": {"x": [[True, False]]}}))
    assert truth == {"y": {"dtype": "bool", "shape": [1, 2], "data": [[True, False]]}}
    text = outputs(await app.predict("text", {"inputs": {"x": [["ä", ""], ["b", "c"]]}}))
    assert text == {"y": {"dtype": "bytes", "shape": [2, 2], "data": [["ä", ""], ["b", "c"]]}}
    half = outputs(await app.predict("half", {"inputs": {"x": [[0.5, 1, -2]]}}))
    assert half == {"y": {"dtype": "float16", "shape": [1, 3], "data": [[0.5, 1, -2]]}}


@pytest.mark.parametrize(
    "array",
    [X, np.asfortranarray(X), X.astype(">f4"), np.asfortranarray(X.astype(">f4")), X[:1]],
    ids=["c", "fortran", "big-endian", "both", "one row"],
)
@pytest.mark.parametrize("media", ["application/x-npy", "application/octet-stream"])
async def test_npy_body(app: App, array: np.ndarray[Any, Any], media: str) -> None:
    answer = await post(app, "negate", npy(array), media, "?outputs=y")
    assert outputs(answer)["y"]["data"] == (-array).tolist()


async def test_npy_of_three_axes_in_fortran_order(app: App) -> None:
    x = np.asfortranarray(np.arange(24, dtype=F32).reshape(2, 3, 4))
    answer = await post(app, "any-size", npy(x), "application/x-npy")
    assert outputs(answer)["y"]["data"] == (-x).tolist()


@pytest.mark.parametrize("array", [np.array([["ä", "bc"]]), np.array([["ä".encode(), b"bc"]])])
async def test_npy_of_text(app: App, array: np.ndarray[Any, Any]) -> None:
    answer = await post(app, "text", npy(array), "application/x-npy")
    assert outputs(answer)["y"]["data"] == [["ä", "bc"]]


CODES = [0x110000, 0xFFFFFFFF, 0xD800, 0xDFFF]


@pytest.mark.parametrize("code", CODES, ids=hex)
@pytest.mark.parametrize("order", "<>")
@pytest.mark.parametrize("fortran", [True, False])
async def test_npy_of_text_beyond_unicode(app: App, code: int, order: str, fortran: bool) -> None:
    text = header(f"{{'descr': '{order}U1', 'fortran_order': {fortran}, 'shape': (1, 2)}}")
    body = text + np.array([code, 65], f"{order}u4").tobytes()
    answer = await post(app, "text", body, "application/x-npy")
    assert (answer.status_code, slug(answer)) == (422, "wrong-data")
    body = text + np.array([0x10FFFF, 65], f"{order}u4").tobytes()
    assert outputs(await post(app, "text", body, "application/x-npy"))["y"]["data"] == [["\U0010ffff", "A"]]


def test_npy_of_more_strings_than_a_tensor_may_have() -> None:
    spec = TensorSpec("x", "BYTES", (-1,))
    with pytest.raises(Problem, match="may have 131072"):
        read_npy(memoryview(npy(np.zeros((1, MAX_STRINGS + 1), "S1"))), spec)
    assert len(read_npy(memoryview(npy(np.zeros((1, MAX_STRINGS), "S1"))), spec)[1]) == MAX_STRINGS


async def test_raw_body_is_one_row_or_has_the_querys_shape(app: App) -> None:
    media = "application/octet-stream"
    one = await post(app, "negate", X[:1].tobytes(), media)
    assert outputs(one)["y"]["data"] == (-X[:1]).tolist()
    two = await post(app, "negate", X.tobytes(), media, "?shape=2,3&top_k=1&deadline_ms=10000&priority=1")
    assert outputs(two)["y"]["top_k"] == [[{"index": 1, "score": 2}], [{"index": 0, "score": -4}]]
    assert slug(await post(app, "negate", X.tobytes(), media)) == "wrong-data"
    assert slug(await post(app, "negate", X.tobytes(), media, "?shape=3,2")) == "wrong-shape"
    assert slug(await post(app, "negate", X.tobytes(), media, "?shape=2,-3")) == "bad-parameter"
    assert slug(await post(app, "negate", X.tobytes(), media, "?rows=2")) == "bad-parameter"
    assert slug(await post(app, "negate", X.tobytes(), media, "?top_k=1&top_k=2")) == "bad-parameter"
    assert slug(await post(app, "negate", npy(X), media, "?shape=2,3")) == "bad-parameter"
    assert slug(await post(app, "add", X.tobytes(), media)) == "bad-request"


async def test_a_form_with_every_kind_of_part(app: App) -> None:
    x = np.array([[1, 2], [3, 4]], F32)
    k = np.array([[10], [20]], np.int64)
    total = [[11, 12], [23, 24]]
    request = ("", '{"outputs": ["total"], "shapes": {"k": [2, 1]}}', "application/json")
    raw = ("k.bin", k.tobytes(), "application/octet-stream")
    path = "/v1/models/add/predictions"
    answer = await app.client.post(path, files={"x": ("x.npy", npy(x)), "k": raw, "request": request})
    assert outputs(answer) == {"total": {"dtype": "float32", "shape": [2, 2], "data": total}}
    encoded: Any = {"x": ("", str(b64(x)).replace("'", '"'), "application/json"), "k": ("", "[[10], [20]]")}
    assert outputs(await app.client.post(path, files=encoded))["total"]["data"] == total
    fields = {"x": (None, "[[1, 2], [3, 4]]"), "k": (None, "[[10], [20]]")}
    assert outputs(await app.client.post(path, files=fields))["total"]["data"] == total


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ([("x", (None, "[[1, 2, 3]]")), ("x", (None, "[[1, 2, 3]]"))], "duplicate-tensor"),
        ([("x", (None, "[[1, 2, 3]]")), ("z", (None, "[[1, 2, 3]]"))], "unknown-tensor"),
        ([("request", (None, "{}"))], "missing-tensor"),
        ([("x", (None, "[[1, 2, 3]]")), ("request", (None, "{}")), ("request", (None, "{}"))], "bad-request"),
        ([("x", (None, "[[1, 2, 3]]")), ("request", (None, '{"inputs": {}}'))], "bad-request"),
        ([("x", (None, "[[1, 2, 3]]")), ("request", (None, '{"shapes": {"z": [1]}}'))], "bad-parameter"),
        ([("x", ("x.png", b"png", "image/png"))], "unsupported-media-type"),
        ([("x", (None, "[[1, 2, 3"))], "wrong-data"),
        ([(f"x{n}", (None, "[]")) for n in range(300)], "bad-request"),
        ([("x" * 5000, (None, "[]"))], "bad-request"),
    ],
)
async def test_invalid_forms(app: App, files: Any, expected: str) -> None:
    answer = await app.client.post("/v1/models/negate/predictions", files=files)
    assert answer.status_code < 500
    assert slug(answer) == expected


@pytest.mark.parametrize(
    ("media", "body"),
    [
        ("multipart/form-data", b"--a\r\n"),
        ("multipart/form-data; boundary=a", b""),
        ("multipart/form-data; boundary=a", b"rubbish"),
        (
            "multipart/form-data; boundary=a",
            b'--a\r\ncontent-disposition: form-data; name="x"\r\n\r\n[[1,2,3]]',
        ),
        ("multipart/form-data; boundary=a", b"--a\r\n\r\n[[1,2,3]]\r\n--a--\r\n"),
        ("multipart/form-data; boundary=" + "a" * 300, b"--a"),
    ],
)
async def test_malformed_forms(app: App, media: str, body: bytes) -> None:
    assert slug(await post(app, "negate", body, media)) == "bad-request"


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        (b"{", "not-json"),
        (b"[]", "bad-request"),
        (b"{}", "bad-request"),
        (b'{"inputs": {}}', "missing-tensor"),
        (b'{"inputs": {"x": [[1,2,3]], "z": []}}', "unknown-tensor"),
        (b'{"inputs": {"x": [[1,2,3]]}, "outputs": ["z"]}', "unknown-tensor"),
        (b'{"inputs": {"x": [[1,2,3]]}, "outputs": ["y", "y"]}', "duplicate-tensor"),
        (b'{"inputs": {"x": [[1,2,3]]}, "topk": 1}', "bad-request"),
        (b'{"inputs": {"x": [[1,2,3]]}, "top_k": 0}', "bad-request"),
        (b'{"inputs": {"x": [[1,2,3]]}, "deadline_ms": 0}', "bad-request"),
        (b'{"inputs": {"x": [[1,2,3]]}, "priority": -1}', "bad-request"),
        (b'{"inputs": {"x": [1,2,3]}}', "wrong-shape"),
        (b'{"inputs": {"x": [[1,2]]}}', "wrong-shape"),
        (b'{"inputs": {"x": []}}', "wrong-shape"),
        (b'{"inputs": {"x": [[[1],[2],[3]]]}}', "wrong-shape"),
        (b'{"inputs": {"x": [[1,2,3],[1,2]]}}', "wrong-data"),
        (b'{"inputs": {"x": [[1,2,[3]]]}}', "wrong-data"),
        (b'{"inputs": {"x": [[1,2,null]]}}', "wrong-data"),
        (b'{"inputs": {"x": [[1,2,true]]}}', "wrong-data"),
        (b'{"inputs": {"x": [[1,2,1e39]]}}', "wrong-data"),
        (b'{"inputs": {"x": [[1,2,NaN]]}}', "not-json"),
        (b'{"inputs": {"x": 1}}', "wrong-data"),
        (b'{"inputs": {"x": {}}}', "bad-request"),
        (b'{"inputs": {"x": {"b64": "AAAA", "dtype": "float32", "shape": [1, 3]}}}', "wrong-data"),
        (b'{"inputs": {"x": {"b64": "!!!!", "dtype": "float32", "shape": [1, 3]}}}', "wrong-data"),
        (b'{"inputs": {"x": {"b64": "", "dtype": "float64", "shape": [1, 3]}}}', "wrong-datatype"),
        (b'{"inputs": {"x": {"b64": "", "dtype": "i4,i4", "shape": [1, 3]}}}', "wrong-datatype"),
        (b'{"inputs": {"x": {"b64": "", "dtype": "float32", "shape": [0, 3]}}}', "wrong-shape"),
        (
            b'{"inputs": {"x": {"b64": "", "dtype": "float32", "shape": [99999999999999999999, 3]}}}',
            "bad-request",
        ),
        (b'{"inputs": {"x": ' + b"[" * 20_000 + b"]" * 20_000 + b"}}", "not-json"),
    ],
)
async def test_invalid_json(app: App, body: bytes, expected: str) -> None:
    answer = await post(app, "negate", body, "application/json")
    assert answer.status_code in (400, 422), answer.text
    assert slug(answer) == expected


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        (npy(X.astype(np.float64)), "wrong-datatype"),
        (npy(X.astype(np.complex64)), "wrong-datatype"),
        (npy(np.array([["a", "b", "c"]])), "wrong-datatype"),
        (npy(np.zeros(2, "i4,i4")), "wrong-datatype"),
        (npy(X.reshape(3, 2)), "wrong-shape"),
        (npy(X)[:-1], "wrong-data"),
        (npy(X) + b"0", "wrong-data"),
        (npy(X)[:9], "wrong-data"),
        (header("{'descr': '|O', 'fortran_order': False, 'shape': (2, 3)}"), "wrong-datatype"),
        (header("{'descr': '|S0', 'fortran_order': False, 'shape': (1000000000000, 3)}"), "wrong-datatype"),
        (header("{'descr': '<f4', 'fortran_order': False, 'shape': (-1, -3)}") + bytes(12), "wrong-shape"),
        (header("{'descr': '<f4', 'fortran_order': False, 'shape': (9999999999, 3)}"), "wrong-data"),
        (header("{'descr': '<f4', 'fortran_order': False, 'shape': (2L, 3L)}") + bytes(24), "wrong-data"),
        (header("{'descr': (), 'fortran_order': False, 'shape': (2, 3)}") + bytes(24), "wrong-data"),
        (header("{'descr': ('<f4',), 'fortran_order': False, 'shape': (2, 3)}") + bytes(24), "wrong-data"),
        (header("__import__('os').abort()"), "wrong-data"),
        (header("(" * 1500), "wrong-data"),
        (header("'\\d'" + " " * 5000), "wrong-data"),
        (header("{'descr': '<f4', 'fortran_order': False, 'shape': (2, 3)}", b"\x03\x00"), "wrong-data"),
        (b"\x93NUMPY\x02\x00\xff\xff\xff\xff", "wrong-data"),
    ],
)
async def test_invalid_npy(app: App, body: bytes, expected: str) -> None:
    answer = await post(app, "negate", body, "application/x-npy")
    assert answer.status_code == 422, answer.text
    assert slug(answer) == expected


async def test_the_default_content_type_of_curl_is_json_if_the_body_is(app: App) -> None:
    form = "application/x-www-form-urlencoded"
    answer = await post(app, "negate", b'\n {"inputs": {"x": [[1, 2, 3]]}}', form)
    assert answer.json()["outputs"]["y"]["data"] == [[-1, -2, -3]]
    assert slug(await post(app, "negate", b"{]", form)) == "not-json"
    for body in (b"x=%5B1%5D", b"", b" " * 70 + b"{}"):
        assert slug(await post(app, "negate", body, form)) == "unsupported-media-type"


async def test_a_deadline_that_no_run_can_meet_is_not_answered(app: App) -> None:
    answer = await app.predict("negate", {"inputs": {"x": [[1, 2, 3]]}, "deadline_ms": 0.001})
    assert (answer.status_code, slug(answer)) in ((504, "expired"), (504, "deadline-too-short"))


async def test_other_refusals(app: App) -> None:
    assert slug(await post(app, "negate", b"{}", "text/plain")) == "unsupported-media-type"
    assert (
        slug(await app.client.post("/v1/models/negate/predictions", content=b"{}"))
        == "unsupported-media-type"
    )
    assert slug(await post(app, "negate", b"{}", "application/json", "?top_k=1")) == "bad-parameter"
    assert slug(await post(app, "negate", b" " * 100_001, "application/json")) == "body-too-large"
    assert slug(await app.predict("unknown", {})) == "unknown-model"
    assert slug(await app.client.get("/v1/models/negate/predictions")) == "method-not-allowed"
    too_many = await app.predict("negate", {"inputs": {"x": [[1, 2, 3]] * 51}})
    assert (too_many.status_code, slug(too_many)) == (413, "too-many-rows")
    differing = {"x": [[1, 2]], "k": [[1], [2]]}
    assert slug(await app.predict("add", {"inputs": differing})) == "wrong-shape"


async def test_a_zero_axis_beside_a_huge_one_is_refused(app: App) -> None:
    x = {"b64": "", "dtype": "float32", "shape": [1, 0, 2**31 - 1]}
    answer = await app.predict("any-size", {"inputs": {"x": x}})
    assert answer.status_code != 500, answer.text
