"""Long answers are encoded in pieces in a thread, on every route, with the values of short ones."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any
from unittest import mock

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto

from cobatch.batcher.request import Batch, Request
from cobatch.engines.base import Array, Signature, TensorSpec
from cobatch.server.predictions import encode as predictions_encode
from cobatch.server.settings.schema import ModelSettings
from cobatch.server.v2 import binary, encode
from tests.support.http.in_process import Front, InProcess, gated, in_process
from tests.support.http.serving import GATE, GatedEngine, rows_of
from tests.support.models import models

WIDTH = binary.LONG_ELEMENTS * 2 + 5


@pytest.fixture(params=[False, True], ids=["one", "front"])
async def running(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[InProcess]:
    monkeypatch.setattr(Front, "wanted", request.param)
    files = {"negate": models.negate(width="n"), "text": models.identity(TensorProto.STRING, "n")}
    settings = [
        ModelSettings(path=models.write(tmp_path, data, f"{name}.onnx"), max_batch_size=4, threads=1)
        for name, data in files.items()
    ]
    async with in_process(*settings) as made:
        yield made


@pytest.fixture
def dumped(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, bool]]:
    """Each call of the encoder: elements, and True on the event loop's thread."""
    calls: list[tuple[int, bool]] = []
    dumps = encode.dumps

    def counted(value: Any) -> bytes:
        calls.append((np.size(value), threading.current_thread() is threading.main_thread()))
        return dumps(value)

    monkeypatch.setattr(encode, "dumps", counted)
    monkeypatch.setattr(predictions_encode, "dumps", counted)
    return calls


def message(rows: int, width: int) -> dict[str, Any]:
    data = [n % 7 for n in range(rows * width)]
    return {"inputs": [{"name": "x", "shape": [rows, width], "datatype": "FP32", "data": data}]}


@pytest.mark.parametrize(("rows", "width"), [(1, WIDTH), (3, WIDTH), (4, 100), (900, 100), (9, WIDTH)])
async def test_infer(running: InProcess, dumped: list[tuple[int, bool]], rows: int, width: int) -> None:
    answer = await running.http.post("/v2/models/negate/infer", json=message(rows, width))
    (output,) = answer.json()["outputs"]
    assert output["shape"] == [rows, width]
    assert output["data"] == [-(n % 7) for n in range(rows * width)]
    assert answer.headers["x-request-id"]
    check(dumped, long=rows * width > binary.LONG_ELEMENTS)


def check(dumped: list[tuple[int, bool]], *, long: bool) -> None:
    assert dumped
    assert max(elements for elements, _ in dumped) <= binary.LONG_ELEMENTS
    assert {on_loop for _, on_loop in dumped} == {not long}


@pytest.mark.parametrize("length", [0, 5])
async def test_strings(running: InProcess, length: int) -> None:
    """Many of them, with few or many characters in each piece."""
    data = [str(n % 7) + "é" * length for n in range(WIDTH)]
    tensor = {"name": "x", "shape": [1, WIDTH], "datatype": "BYTES", "data": data}
    answer = await running.http.post("/v2/models/text/infer", json={"inputs": [tensor]})
    assert answer.json()["outputs"][0]["data"] == data


@pytest.mark.parametrize(("rows", "width"), [(1, WIDTH), (3, WIDTH), (900, 100), (2, 3)])
async def test_predictions(running: InProcess, dumped: list[tuple[int, bool]], rows: int, width: int) -> None:
    x = [[(row + n) % 7 for n in range(width)] for row in range(rows)]
    answer = await running.http.post("/v1/models/negate/predictions", json={"inputs": {"x": x}})
    assert answer.json()["outputs"]["y"]["data"] == [[-value for value in row] for row in x]
    check(dumped, long=rows * width > binary.LONG_ELEMENTS)
    asked = {"inputs": {"x": x}, "top_k": width}
    answer = await running.http.post("/v1/models/negate/predictions", json=asked)
    for row, best in zip(x, answer.json()["outputs"]["y"]["top_k"], strict=True):
        assert [one["index"] for one in best] == sorted(range(width), key=lambda n: row[n])
    check(dumped, long=rows * width > binary.LONG_ELEMENTS)


async def test_batch(running: InProcess, dumped: list[tuple[int, bool]]) -> None:
    width = binary.LONG_ELEMENTS // 2
    item = {"method": "POST", "url": "/v2/models/negate/infer", "body": message(1, width)}
    call = {"requests": [{"id": str(n), **item} for n in range(5)]}
    answer = await running.http.post("/batch", json=call)
    for response in answer.json()["responses"]:
        assert response["body"]["outputs"][0]["data"] == [-(n % 7) for n in range(width)]
        assert response["headers"]["x-request-id"]
    assert max(elements for elements, _ in dumped) <= binary.LONG_ELEMENTS


async def test_answers_that_are_long_together(
    running: InProcess, dumped: list[tuple[int, bool]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each of them is short, but the answers of a batch are written one after another."""
    monkeypatch.setattr(encode, "BATCH_ELEMENTS", 3 * encode.LEAST_ELEMENTS)
    for count, long in ((4, True), (3, False)):
        dumped.clear()
        asked = message(1, encode.LEAST_ELEMENTS + long)
        item = {"method": "POST", "url": "/v2/models/negate/infer", "body": asked}
        answer = await running.http.post(
            "/batch", json={"requests": [{"id": str(n), **item} for n in range(count)]}
        )
        assert {one["status"] for one in answer.json()["responses"]} == {200}
        check(dumped, long=long)


texts = st.one_of(st.text(max_size=40), st.binary(max_size=40))


@given(rows=st.lists(st.lists(texts, min_size=2, max_size=2), min_size=1, max_size=5), flat=st.booleans())
def test_strings_in_pieces(rows: list[list[bytes | str]], flat: bool) -> None:
    values: Any = np.empty((len(rows), 2), object)
    values[:] = rows
    values = values.reshape(-1) if flat else values
    whole = msgspec.json.encode(encode._texts(values.tolist()))
    tensor = b"".join(binary.bytes_tensor(values))
    small: Any = {"TEXT_PIECE": 8, "LONG_TEXT": 8}
    with mock.patch.multiple(encode, **small), mock.patch.multiple(binary, **small):
        pieces = encode.json_pieces(values)
        assert b"".join(pieces) == whole
        with mock.patch.object(encode, "LONG_ELEMENTS", 3):
            assert b"".join(encode.json_pieces(values)) == whole
        # A character of JSON may take six bytes, a character of text four.
        assert max(map(len, pieces)) <= 8 * 6 + 3 * 8
        assert pieces[-1] == b"]" or len(pieces) == 1
        assert b"".join(binary.bytes_tensor(values)) == tensor


class Texts(GatedEngine):
    """Each row's answer is a long text."""

    def __init__(self) -> None:
        super().__init__()
        self.signature = Signature((TensorSpec("x", "INT64", (1,)),), (TensorSpec("y", "BYTES", (1,)),))

    def wait(self, slot: int) -> tuple[Array, ...]:
        (doubled,) = super().wait(slot)
        return (np.array([["y" * binary.LONG_TEXT + str(n)] for n in doubled[:, 0]], object),)


async def test_long_texts_of_a_batch() -> None:
    async with gated(engine=Texts()) as (running, _):
        items = [{"id": str(n), "method": "POST", "url": GATE, "body": rows_of(n)} for n in range(3)]
        answer = await running.http.post("/batch", json={"requests": items})
        for n, response in enumerate(answer.json()["responses"]):
            (text,) = response["body"]["outputs"][0]["data"]
            assert text == "y" * binary.LONG_TEXT + str(2 * n)


@pytest.mark.parametrize("lasting", [True, False])
@pytest.mark.parametrize(("rows", "whole"), [(4, True), (2, True), (1, False)])
def test_outputs_that_last_are_not_copied(rows: int, whole: bool, lasting: bool) -> None:
    """Unless a request would keep those of others for as long as its client takes its answer."""
    batch = Batch([], 4, (), "full")
    batch.outputs, batch.lasting = (np.zeros((4, 1 << 18), np.float32),), lasting
    request = Request(rows, (), ())
    request.batch, request.first_row = batch, 1 if rows == 1 else 0
    (own,) = encode._detached(request, [0]).batch.outputs  # type: ignore[union-attr]  # it has one
    assert own.shape == (rows, 1 << 18)
    assert np.shares_memory(own, batch.outputs[0]) == (lasting and whole)


@pytest.mark.parametrize("route", ["infer", "batch", "predictions"])
async def test_an_answer_that_cannot_be_copied(
    running: InProcess, route: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Its client hears of it."""

    def full(*_: Any) -> Any:
        raise MemoryError

    monkeypatch.setattr(encode, "_own", full)
    asked = message(1, WIDTH)
    if route == "batch":
        items = [{"method": "POST", "url": "/v2/models/negate/infer", "body": asked}]
        answer = await running.http.post("/batch", json={"requests": [{"id": "1", **one} for one in items]})
        (problem,) = [response["body"] for response in answer.json()["responses"]]
    else:
        version, body = ("v1", {"inputs": {"x": [[0] * WIDTH]}}) if route == "predictions" else ("v2", asked)
        problem = (await running.http.post(f"/{version}/models/negate/{route}", json=body)).json()
    assert problem["type"] == "/problems/internal"
    assert "copying a long answer failed" in caplog.text


@pytest.mark.parametrize("route", ["infer", "batch", "predictions"])
async def test_an_answer_too_long_for_json(
    running: InProcess, route: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is refused before its text is made; binary has no such limit."""
    monkeypatch.setattr(encode, "MOST_JSON_NUMBERS", WIDTH - 1)
    asked = message(1, WIDTH)
    if route == "batch":
        items = [{"method": "POST", "url": "/v2/models/negate/infer", "body": asked}]
        answer = await running.http.post("/batch", json={"requests": [{"id": "1", **one} for one in items]})
        (response,) = answer.json()["responses"]
        status, problem = response["status"], response["body"]
    else:
        version, body = ("v1", {"inputs": {"x": [[0] * WIDTH]}}) if route == "predictions" else ("v2", asked)
        answer = await running.http.post(f"/{version}/models/negate/{route}", json=body)
        status, problem = answer.status_code, answer.json()
    assert (status, problem["type"]) == (422, "/problems/answer-too-long")
    assert problem["limit"] == WIDTH - 1
    assert f"an output has {WIDTH} numbers" in problem["detail"]
    binary = asked | {"parameters": {"binary_data_output": True}}
    assert (await running.http.post("/v2/models/negate/infer", json=binary)).status_code == 200
    assert (await running.http.post("/v2/models/negate/infer", json=message(1, 2))).status_code == 200


async def test_strings_too_long_for_json(running: InProcess, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encode, "MOST_JSON_TEXT", 7)
    for text, status in (("1234567", 200), ("12345678", 422)):
        tensor = {"name": "x", "shape": [1, 1], "datatype": "BYTES", "data": [text]}
        answer = await running.http.post("/v2/models/text/infer", json={"inputs": [tensor]})
        assert answer.status_code == status


async def test_a_client_that_leaves_meanwhile(running: InProcess, monkeypatch: pytest.MonkeyPatch) -> None:
    began, go_on = asyncio.Event(), threading.Event()
    loop = asyncio.get_running_loop()
    json_pieces = encode.json_pieces

    def held(values: Any) -> list[bytes]:
        loop.call_soon_threadsafe(began.set)
        go_on.wait(60)
        return json_pieces(values)

    monkeypatch.setattr(encode, "json_pieces", held)
    text = json.dumps(message(1, WIDTH))
    asking = asyncio.create_task(running.http.post("/v2/models/negate/infer", content=text))
    await began.wait()
    asking.cancel()
    go_on.set()
    with pytest.raises(asyncio.CancelledError):
        await asking
    assert (await running.http.post("/v2/models/negate/infer", json=message(1, 2))).status_code == 200
