"""Items of POST /batch that are refused, each by itself, and calls that are refused as a whole."""

from __future__ import annotations

import gzip
import json

import pytest

from tests.support.http.batching import ask, data, get, infer, slug
from tests.support.http.in_process import gated
from tests.support.http.serving import GATE, rows_of


@pytest.mark.parametrize(
    "url",
    ["/batch", "/problems", "http://test" + GATE, "//test" + GATE, "v2", "", "/v2/../batch", "/openapi.json",
     "/v2/health", GATE + "/", "/v2/models/a/b/infer", "/v2/models/stats/x", GATE + "#x", GATE + "\n", "/v2",
     "/v2/models/gate", "/v2/health/ready", "/v1/models/gate/predictions", "/v1/predictions/x", "\ud7ff"],
)  # fmt: skip
@pytest.mark.parametrize("method", ["GET", "POST"])
async def test_other_urls_are_refused(url: str, method: str) -> None:
    async with gated() as (running, _):
        answers = await ask(running, {"id": "x", "url": url, "method": method, "body": {}}, infer(1))
        assert slug(answers[0]) == "not-batchable"
        assert answers[0]["body"]["field"] == "url"
        assert data(answers[1]) == [2]


@pytest.mark.parametrize("method", ["GET", "DELETE", "post", ""])
async def test_other_methods_are_refused(method: str) -> None:
    async with gated() as (running, _):
        (answer,) = await ask(running, infer(0, method=method))
        assert slug(answer) == "method-not-allowed"
        assert answer["headers"]["allow"] == "POST"


async def test_unknown_models_and_versions_are_refused() -> None:
    async with gated() as (running, _):
        urls = ["/v2/models/none/infer", "/v2/models/gate/versions/2/infer"]
        answers = await ask(running, *[{**infer(n), "url": url} for n, url in enumerate(urls)])
        alone = [(await running.http.post(url, json=rows_of(1))).json() for url in urls]
    assert [each["body"] for each in answers] == alone
    assert [slug(each) for each in answers] == ["unknown-model", "unknown-version"]


@pytest.mark.parametrize(
    "headers",
    [{"Authorization": "x"}, {"Content-Encoding": "gzip"}, {"Inference-Header-Content-Length": "1"},
     {"content-type": "application/octet-stream"}, {"Prefer": "respond-async"}, {"Idempotency-Key": "k"}],
)  # fmt: skip
async def test_other_headers_are_refused(headers: dict[str, str]) -> None:
    async with gated() as (running, _):
        answers = await ask(running, infer(0, headers=headers), get("/v2", headers=headers))
        assert [slug(each) for each in answers] == ["not-batchable"] * 2
        assert answers[0]["body"]["field"] == "headers"


async def test_no_binary_tensors() -> None:
    async with gated() as (running, engine):
        x = {"name": "x", "shape": [1, 1], "datatype": "INT64", "parameters": {"binary_data_size": 8}}
        answers = await ask(
            running,
            {**infer(0), "body": rows_of(1, parameters={"binary_data_output": True})},
            {**infer(1), "body": {"inputs": [x]}},
            infer(2),
        )
        assert [slug(each) for each in answers[:2]] == ["not-batchable", "bad-binary"]
        assert engine.ran == [[2]]


async def test_an_item_without_body_or_with_another_kind_of_json() -> None:
    bare = infer(0)
    del bare["body"]
    async with gated() as (running, _):
        answers = await ask(running, bare, {**infer(1), "body": None}, {**infer(2), "body": [1]})
        assert [slug(each) for each in answers] == ["not-json", "bad-request", "bad-request"]


# The call as a whole


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        (b"", "not-json"),
        (b"{", "not-json"),
        (b'{"requests":[{"id":"a","url":"/v2","method":"GET","body":{]}}]}', "not-json"),
        (b'{"requests":[{"id":"\xff","url":"/v2","method":"GET"}]}', "not-json"),
        (b'{"requests":[{"id":"1","url":"/v2","method":"GET","body":' + b"[" * 20_000, "not-json"),
        (b"[]", "bad-request"),
        (b"{}", "bad-request"),
        (b'{"requests":{}}', "bad-request"),
        (b'{"requests":[],"atomic":true}', "bad-request"),
        (b'{"requests":[{"url":"/v2","method":"GET"}]}', "bad-request"),
        (b'{"requests":[{"id":1,"url":"/v2","method":"GET"}]}', "bad-request"),
        (b'{"requests":[{"id":"","url":"/v2","method":"GET"}]}', "bad-request"),
        (b'{"requests":[{"id":"a","method":"GET"}]}', "bad-request"),
        (b'{"requests":[{"id":"a","url":"/v2"}]}', "bad-request"),
        (b'{"requests":[{"id":"a","url":"/v2","method":"GET","headers":{"accept":1}}]}', "bad-request"),
        (b'{"requests":[{"id":"a","url":"/v2","method":"GET","dependsOn":["b"]}]}', "bad-request"),
    ],
)
async def test_a_malformed_call(body: bytes, expected: str) -> None:
    async with gated() as (running, _):
        assert slug(await running.http.post("/batch", content=body)) == expected


async def test_ids_must_differ() -> None:
    async with gated() as (running, engine):
        response = await running.http.post("/batch", json={"requests": [infer(1), infer(2), infer(1)]})
        assert slug(response) == "duplicate-id"
        assert response.json()["id"] == "i1"
        assert engine.ran == []


async def test_as_many_items_as_allowed() -> None:
    async with gated(max_batch_items=3) as (running, _):
        assert len(await ask(running, *map(infer, range(3)))) == 3
        response = await running.http.post("/batch", json={"requests": [*map(infer, range(4))]})
        assert slug(response) == "too-many-items"
        assert response.json()["limit"] == 3
        # The rest of a body with too many items is not parsed.
        many = b'{"requests":[' + b'{"id":"a","url":"","method":""},' * 4
        assert slug(await running.http.post("/batch", content=many)) == "too-many-items"


async def test_the_body_limit() -> None:
    async with gated(max_body_bytes=300) as (running, _):
        assert len(await ask(running, infer(1))) == 1
        packed = gzip.compress(json.dumps({"requests": [infer(1)]}).encode() + b" " * 1000)
        response = await running.http.post("/batch", content=packed, headers={"content-encoding": "gzip"})
        assert slug(response) == "body-too-large"
        assert slug(await running.http.post("/batch", content=b" " * 301)) == "body-too-large"
