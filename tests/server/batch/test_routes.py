"""POST /batch: each item has its own answer, and all are in the queue together."""

from __future__ import annotations

import asyncio
import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from cobatch.engines.base import Signature, TensorSpec
from cobatch.engines.errors import EngineDeadError, EngineRunError
from cobatch.server.settings.schema import ModelSettings
from tests.support.fronts.linked import WAYS, way
from tests.support.http import serving
from tests.support.http.batching import ask, data, get, infer, slug
from tests.support.http.in_process import gated, in_process
from tests.support.http.serving import GATE, GatedEngine, rows_of
from tests.support.models import models


async def test_each_item_has_its_own_answer_in_order() -> None:
    async with gated() as (running, _):
        answers = await ask(
            running,
            infer(1),
            infer(6, method="GET"),
            {**infer(2), "body": {"inputs": []}},
            infer(3, 30, 31),
            {**infer(4), "url": "/v2/models/none/infer"},
            infer(5),
        )
        assert data(answers[0]) == [2]
        assert answers[0]["headers"]["content-type"] == "application/json"
        assert answers[0]["headers"]["server-timing"].startswith("queue;dur=")
        assert slug(answers[1]) == "method-not-allowed"
        assert slug(answers[2]) == "missing-tensor"
        assert data(answers[3]) == [60, 62]
        assert slug(answers[4]) == "unknown-model"
        assert data(answers[5]) == [10]


async def test_an_items_answer_has_the_bytes_of_its_own_calls_answer() -> None:
    message = rows_of(7, id='"ü\\')
    async with gated() as (running, _):
        alone = await running.http.post(GATE, json=message)
        whole = await running.http.post("/batch", json={"requests": [{**infer(0), "body": message}]})
        assert b'"body":' + alone.content + b"}]}" in whole.content


X = {"name": "x", "datatype": "FP32", "shape": [1, 3], "data": [1, 2, 3]}
MESSAGES: list[Any] = [
    {"inputs": [X]},
    {"inputs": [X], "id": "é"},
    {"inputs": [X | {"data": [[1, 2, 3]]}]},
    {"inputs": [X | {"shape": [2, 3], "data": [1, 2, 3, 4, 5, 6]}]},
    {"inputs": [X], "outputs": [{"name": "y"}], "unknown": 1},
    {"inputs": [X], "parameters": {"priority": 1}},
    {"inputs": [X], "parameters": {"headers": 1}},
    {"inputs": [X | {"parameters": {"binary_data_size": 12}}]},
    {"inputs": [X | {"data": [1, 2]}]},
    {"inputs": [X | {"data": [1, 2, "3"]}]},
    {"inputs": [X | {"data": [1, 2, 1e39]}]},
    {"inputs": [X | {"data": None}]},
    {"inputs": [{name: value for name, value in X.items() if name != "data"}]},
    {"inputs": [X | {"shape": [1, 4]}]},
    {"inputs": [X | {"shape": []}]},
    {"inputs": [X | {"shape": [0, 3]}]},
    {"inputs": [X | {"datatype": "FP64"}]},
    {"inputs": [X | {"name": "z"}]},
    {"inputs": [X, X]},
    {"inputs": []},
    {"inputs": {}},
    None,
    {"inputs": [X | {"shape": [900, 3], "data": [0.25] * 2700}]},
]


@pytest.mark.parametrize("together", [True, False])
async def test_an_items_answer_is_that_of_its_own_call(together: bool, tmp_path: Path) -> None:
    """Infer messages are parsed together with the call, or, beside other bodies, after it."""
    path = models.write(tmp_path, models.negate(width=3), "negate.onnx")
    url = "/v2/models/negate/infer"
    async with in_process(ModelSettings(path=path, threads=1)) as running:
        alone = [await running.http.post(url, content=json.dumps(message)) for message in MESSAGES]
        items = [{"id": str(n), "url": url, "method": "POST", "body": m} for n, m in enumerate(MESSAGES)]
        if together:
            answers = await ask(running, *items)
        else:
            answers = [(await ask(running, item))[0] for item in items]
    for one, answer in zip(alone, answers, strict=True):
        assert (answer["status"], answer["body"]) == (one.status_code, one.json())
    assert {each["status"] for each in answers} == {200, 400, 422}


async def test_items_share_batches() -> None:
    async with gated() as (running, engine):
        answers = await ask(running, *map(infer, range(3)), get(GATE), *map(infer, range(3, 10)))
        assert engine.ran == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
        assert answers[0]["headers"]["server-timing"].endswith("batch;desc=4, reason;desc=full")


async def test_items_share_batches_with_other_callers() -> None:
    async with gated() as (running, engine):
        other = running.http.post(GATE, json=rows_of(9))
        await asyncio.gather(ask(running, infer(1), infer(2)), other)
        assert sorted(engine.ran[0]) == [1, 2, 9]


async def test_no_items() -> None:
    async with gated() as (running, _):
        assert await ask(running) == []


async def test_an_item_whose_run_fails_fails_alone(caplog: pytest.LogCaptureFixture) -> None:
    async with gated() as (running, engine):
        engine.fails = lambda rows: EngineRunError("no twos") if (rows == 2).any() else None
        answers = await ask(running, *map(infer, range(4)))
        assert [each["status"] for each in answers] == [200, 200, 422, 200]
        assert slug(answers[2]) == "input-rejected"
        assert answers[2]["body"]["reference"] in caplog.text


async def test_items_beyond_the_queue_are_refused_one_by_one() -> None:
    async with gated(max_queue_rows=3) as (running, _):
        answers = await ask(running, infer(0), infer(1, 1, 2, 3), infer(2), infer(3), infer(4))
        assert [each["status"] for each in answers] == [200, 429, 200, 200, 429]
        assert slug(answers[4]) == "queue-full"
        assert answers[4]["headers"]["retry-after"] == "1"
        assert answers[4]["body"]["queued_rows"] == 3


async def test_a_dead_engine(caplog: pytest.LogCaptureFixture) -> None:
    async with gated() as (running, engine):
        engine.fails = lambda rows: EngineDeadError("gone")
        answers = await ask(running, infer(0), get("/v2"))
        assert [slug(each) for each in answers] == ["engine-dead", "not-batchable"]


async def test_urls_may_be_quoted_and_versioned_and_have_a_query() -> None:
    async with gated() as (running, engine):
        urls = ["/v2/models/g%61te/infer", "/v2/models/gate/versions/1/infer", GATE + "?x=1"]
        answers = await ask(running, *[{**infer(n), "url": url} for n, url in enumerate(urls)])
        assert [data(each) for each in answers] == [[0], [2], [4]]
        assert [sorted(rows) for rows in engine.ran] == [[0, 1, 2]]


async def test_plain_headers_are_accepted() -> None:
    headers = {"Content-Type": "application/json; charset=utf-8", "ACCEPT": "*/*"}
    async with gated() as (running, _):
        (answer,) = await ask(running, infer(1, headers=headers))
        assert data(answer) == [2]


@pytest.mark.parametrize("path", WAYS)
def test_over_sockets(path: str) -> None:
    """Through uvicorn a connection goes on after a call."""
    items = [*map(infer, range(6)), get("/v2"), get("/batch")]
    with serving.gated(**way(path)) as (served, engine), served.connect() as client:
        engine.ran.clear()
        for _ in range(2):
            answers = client.ask(serving.post("/batch", {"requests": items})).json["responses"]
            assert [data(each) for each in answers[:6]] == [[2 * n] for n in range(6)]
            assert [each["status"] for each in answers[6:]] == [400, 400]
        assert engine.ran == [[0, 1, 2, 3], [4, 5]] * 2


@pytest.mark.parametrize("path", WAYS)
def test_a_lost_connection(path: str) -> None:
    with serving.gated(**way(path)) as (served, engine):
        engine.hold()
        with served.connect() as client:
            client.send(serving.post("/batch", {"requests": [*map(infer, range(12))]}))
            engine.began.get(timeout=serving.DEADLINE_S)
        served.until(lambda: served.batcher().counters.cancelled == 12)


async def test_compression_both_ways() -> None:
    async with gated(compress_min_bytes=1) as (running, _):
        packed = gzip.compress(json.dumps({"requests": [infer(1)]}).encode())
        headers = {"content-encoding": "gzip", "accept-encoding": "gzip"}
        response = await running.http.post("/batch", content=packed, headers=headers)
        assert response.headers["content-encoding"] == "gzip"
        assert data(response.json()["responses"][0]) == [2]


async def test_other_methods_of_the_route() -> None:
    async with gated() as (running, _):
        response = await running.http.get("/batch")
        assert slug(response) == "method-not-allowed"
        assert response.headers["allow"] == "POST"


async def test_while_draining() -> None:
    async with gated() as (running, _):
        running.inference.draining = True
        response = await running.http.post("/batch", json={"requests": [infer(1)]})
        assert slug(response) == "draining"
        assert response.headers["connection"] == "close"
        assert response.headers["retry-after"] == "1"


# Items that are one plain row each of a fixed shape go to the batcher together.


class FixedEngine(GatedEngine):
    """The same engine with rows of one number."""

    def __init__(self) -> None:
        super().__init__()
        self.signature = Signature((TensorSpec("x", "INT64", (1,)),), (TensorSpec("y", "INT64", (1,)),))


async def test_alike_items_have_answers_of_their_own() -> None:
    async with gated(engine=FixedEngine()) as (running, engine):
        answers = await ask(running, *map(infer, range(6)), infer(6, 60, 61), infer(7))
        assert [data(each) for each in answers] == [*([2 * n] for n in range(6)), [120, 122], [14]]
        assert sorted(row for rows in engine.ran for row in rows) == [0, 1, 2, 3, 4, 5, 7, 60, 61]
        assert running.batcher().counters.accepted == 8


async def test_an_alike_item_whose_run_fails_fails_alone() -> None:
    async with gated(engine=FixedEngine()) as (running, engine):
        engine.fails = lambda rows: EngineRunError("no twos") if (rows == 2).any() else None
        answers = await ask(running, *map(infer, range(4)))
        assert [each["status"] for each in answers] == [200, 200, 422, 200]
        assert slug(answers[2]) == "input-rejected"
        assert [data(answers[n]) for n in (0, 1, 3)] == [[0], [2], [6]]
        assert running.batcher().counters.failed == 1


async def test_alike_items_beyond_the_queue_are_refused_one_by_one() -> None:
    async with gated(engine=FixedEngine(), max_queue_rows=3) as (running, _):
        answers = await ask(running, *map(infer, range(4)))
        assert [each["status"] for each in answers] == [200, 200, 200, 429]
        assert slug(answers[3]) == "queue-full"
        counters = running.batcher().counters
        assert (counters.accepted, counters.refused) == (3, 1)


async def test_alike_items_with_an_unreachable_deadline_are_refused_one_by_one(tmp_path: Path) -> None:
    """The model's own deadline is shorter than its runs have become."""
    path = models.write(tmp_path, models.negate(width=3), "negate.onnx")
    async with in_process(ModelSettings(path=path, threads=1, deadline_ms=50.0)) as running:
        for n in range(400):
            running.batcher("negate")._scheduler.run_times.observe(1 << n % 7, 1.0, n * 0.05)
        url = "/v2/models/negate/infer"
        items = [{"id": str(n), "url": url, "method": "POST", "body": {"inputs": [X]}} for n in range(10)]
        answers = await ask(running, *items)
        assert [each["status"] for each in answers] == [504] * 10
