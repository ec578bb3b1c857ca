"""Observing the items of POST /batch: ids, `cobatch explain`, spans, counts."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cobatch.engines.errors import EngineRunError
from cobatch.server.api.requests import Explainer
from cobatch.server.http.problem import Problem
from cobatch.server.observability import history
from cobatch.server.observability.history import History
from cobatch.server.observability.record import RequestRecord
from cobatch.server.settings.schema import ModelSettings
from tests.support.http.batching import get, infer
from tests.support.http.scraping import scrape
from tests.support.http.serving import DEADLINE_S, Answer, Served, gated, post, serve
from tests.support.http.serving import get as get_request
from tests.support.models import models

BOTH = pytest.mark.parametrize("fast", [True, False], ids=["fast", "asgi"])


def ask(served: Served, *items: dict[str, Any], **headers: str) -> tuple[str, list[Any]]:
    """The call's id, and its items' answers, each with the id that follows from it."""
    answer = served.ask(post("/batch", {"requests": items}, headers))
    assert answer.status == 200, answer
    call = answer.headers["x-request-id"]
    answers = answer.json["responses"]
    assert [one["headers"]["x-request-id"] for one in answers] == [f"{call}.{n}" for n in range(len(items))]
    return call, answers


def told(served: Served, request_id: str) -> Answer:
    return served.ask(get_request(f"/v1/requests/{request_id}"))


def explained(served: Served, request_id: str) -> Any:
    answer = told(served, request_id)
    assert answer.status == 200, answer
    assert answer.json["id"] == request_id
    return answer.json


@BOTH
def test_items_are_explained_by_their_batches(fast: bool) -> None:
    with gated(fast) as (served, _):
        call, answers = ask(served, *map(infer, range(6)))
        found = [explained(served, f"{call}.{n}") for n in range(6)]
        whole = explained(served, call)
        none = told(served, f"{call}.6")
    assert [answer["status"] for answer in answers] == [200] * 6
    assert [(one["status"], one["rows"], one["model"]) for one in found] == [(200, 1, "gate")] * 6
    assert [one["batches"][0]["rows"] for one in found] == [4, 4, 4, 4, 2, 2]
    assert whole["items"] == 6
    assert f"for 6 items: ask for {call}.0 and so on" in whole["in_words"][0]
    assert none.slug == "unknown-request"


@contextlib.contextmanager
def negating(fast: bool, folder: Path, **settings: Any) -> Iterator[Served]:
    """A model whose items are bundled, four at a time."""
    path = models.write(folder, models.negate(width=3), "negate.onnx")
    with serve(fast, (ModelSettings(path=path, threads=1),), **settings) as served:
        queue = served.batcher("negate").queue
        served.call(lambda: setattr(queue, "full_rows", 4))
        yield served


def negated(number: int) -> dict[str, Any]:
    tensor = {"name": "x", "datatype": "FP32", "shape": [1, 3], "data": [number, 2, 3]}
    url = "/v2/models/negate/infer"
    return {"id": str(number), "url": url, "method": "POST", "body": {"inputs": [tensor]}}


@BOTH
def test_bundled_items_are_explained_by_their_batches(fast: bool, tmp_path: Path) -> None:
    with negating(fast, tmp_path) as served:
        call, answers = ask(served, *map(negated, range(4)))
        found = [explained(served, f"{call}.{n}") for n in range(4)]
    assert [answer["body"]["outputs"][0]["data"][0] for answer in answers] == [0, -1, -2, -3]
    assert [(one["status"], one["rows"]) for one in found] == [(200, 1)] * 4
    assert [(one["batches"][0]["rows"], one["batches"][0]["requests"]) for one in found] == [(4, 4)] * 4


def test_a_larger_item_beside_a_bundle(tmp_path: Path) -> None:
    two = negated(7)
    two["body"]["inputs"][0] |= {"shape": [2, 3], "data": [7, 2, 3, 8, 2, 3]}
    with negating(True, tmp_path) as served:
        call, answers = ask(served, negated(0), two, negated(1))
        found = [explained(served, f"{call}.{n}") for n in range(3)]
    assert [answer["body"]["outputs"][0]["data"][0] for answer in answers] == [0, -7, -1]
    assert [one["rows"] for one in found] == [1, 2, 1]
    assert [(one["batches"][0]["rows"], one["batches"][0]["requests"]) for one in found] == [(4, 3)] * 3


@BOTH
def test_other_items_have_records(fast: bool) -> None:
    with gated(fast) as (served, _):
        split = infer(0, *range(6))
        bad = {**infer(1), "body": {"inputs": []}}
        strange = {**get("/nothing/" + "x" * 5000), "id": "s"}
        items = (infer(9), split, bad, strange, infer(4, url="/v2/models/none/infer"))
        call, _ = ask(served, *items, **{"X-Request-Id": "mine"})
        assert call == "mine"
        found = [explained(served, f"mine.{n}") for n in range(5)]
    assert [one["status"] for one in found] == [200, 200, 400, 400, 404]
    problems = [one.get("problem", "") for one in found]
    assert problems == ["", "", "missing-tensor", "not-batchable", "unknown-model"]
    assert [len(one.get("batches", ())) for one in found] == [1, 2, 0, 0, 0]
    assert [one.get("rows") for one in found] == [1, 6, None, None, None]
    assert [one.get("model") for one in found] == ["gate", "gate", "gate", None, None]
    assert len(found[3]["path"]) == 500


@BOTH
def test_an_item_that_fails_among_others(fast: bool) -> None:
    with gated(fast) as (served, engine):
        engine.fails = lambda x: EngineRunError("no") if 2 in x[:, 0] else None
        call, answers = ask(served, *map(infer, range(4)))
        found = [explained(served, f"{call}.{n}") for n in range(4)]
    assert [answer["status"] for answer in answers] == [200, 200, 422, 200]
    assert [one["status"] for one in found] == [200, 200, 422, 200]
    assert found[2]["problem"] == "input-rejected"
    # Each was run again, the failing one alone in the end.
    assert [one["batches"][0]["reason"] for one in found] == ["retry"] * 4
    assert [one["batches"][0].get("failed", False) for one in found] == [False, False, True, False]
    assert found[2]["batches"][0]["rows"] == 1
    assert "That batch failed, or did not end in time." in found[2]["in_words"]


def test_the_limit_of_kept_items(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(history, "_ITEMS", 4)
    recent = History()
    explain = Explainer(recent).explain

    def record(status: int) -> RequestRecord:
        made = RequestRecord("", "GET", "/v2", 1.0)
        made.status = status
        return made

    recent.on_items("a", [record(400), record(401)])
    recent.on_items("b", [record(402), record(403)])
    recent.on_items("a", [record(404)])  # the newest of that name, with one item less
    recent.on_items("c", [record(405)])
    assert [explain(one)["status"] for one in ("b.1", "a.0", "c.0")] == [403, 404, 405]
    recent.on_items("d", [record(406)])
    with pytest.raises(Problem):
        explain("b.1")
    recent.on_items("e", [record(407)] * 9)
    assert explain("e.8")["status"] == 407
    for gone in ("a.0", "d.0", "e.9", "e.x", "e.", ".1", "e.-1", "e.99999", "e.\u0661"):
        with pytest.raises(Problem):
            explain(gone)


def test_items_of_a_disconnected_client_are_counted() -> None:
    with gated(True) as (served, engine):
        engine.hold()
        with served.connect() as client:
            client.send(post("/batch", {"requests": [*map(infer, range(6)), get("/v2")]}))
            engine.began.get(timeout=DEADLINE_S)
        served.until(lambda: served.batcher().counters.cancelled == 6)
        now = scrape(served)
        engine.release()
    assert now.value("requests_total", model="gate", code="499", reason="client-left") == 6


# Spans


def test_a_span_for_each_item_inside_the_calls() -> None:
    pytest.importorskip("opentelemetry.exporter.otlp", reason="needs the extra otel")
    from tests.support.http.otlp import attributes, receiver  # noqa: PLC0415 - needs the extra too

    with receiver() as got, gated(True, tracing=True, trace_endpoint=got.endpoint) as (served, _):
        call, _ = ask(served, *map(infer, range(5)), {**infer(7), "body": {"inputs": []}})
        mixed, _ = ask(served, infer(0, *range(6)), infer(1, 1, 2), get("/v2/models/gate"))
    (first, second) = sorted(got.named("POST /batch"), key=lambda one: one.start_time_unix_nano)
    by_id = {
        attributes(one)["cobatch.request.id"]: one for one in got.spans if attributes(one).get("url.path")
    }
    assert set(by_id) == {
        call,
        mixed,
        *(f"{call}.{n}" for n in range(6)),
        *(f"{mixed}.{n}" for n in range(3)),
    }
    names = {f"{call}.{n}": "POST /v2/models/{name}/infer" for n in range(6)} | {
        f"{mixed}.0": "POST /v2/models/{name}/infer",
        f"{mixed}.1": "POST /v2/models/{name}/infer",
        f"{mixed}.2": "GET",
    }
    links = []
    for one, name in names.items():
        span = by_id[one]
        parent = first if one.startswith(f"{call}.") else second
        assert (span.name, span.trace_id, span.parent_span_id) == (name, parent.trace_id, parent.span_id)
        assert parent.start_time_unix_nano <= span.start_time_unix_nano
        assert span.start_time_unix_nano <= span.end_time_unix_nano <= parent.end_time_unix_nano
        inside = {child.name: child for child in got.spans if child.parent_span_id == span.span_id}
        links.append(len(inside["batch"].links) if inside else 0)
        assert set(inside) in ({"queue", "batch", "compute"}, set())
    # The items without tensors ran in no batch, the split one in two.
    assert links == [1, 1, 1, 1, 1, 0, 2, 1, 0]
    rows = [attributes(by_id[one]).get("cobatch.rows") for one in names]
    assert rows == [1, 1, 1, 1, 1, None, 6, 2, None]
    batches = {one.span_id: one for one in got.named("batch gate")}
    assert sum(len(one.links) for one in batches.values()) == sum(links)


def test_spans_of_bundled_items(tmp_path: Path) -> None:
    pytest.importorskip("opentelemetry.exporter.otlp", reason="needs the extra otel")
    from tests.support.http.otlp import attributes, receiver  # noqa: PLC0415 - needs the extra too

    with (
        receiver() as got,
        negating(True, tmp_path, tracing=True, trace_endpoint=got.endpoint) as served,
    ):
        call, _ = ask(served, *map(negated, range(4)))
    of_items = [
        one for one in got.spans if attributes(one).get("cobatch.request.id", "").startswith(f"{call}.")
    ]
    assert [attributes(one)["cobatch.rows"] for one in of_items] == [1] * 4
    (of_batch,) = got.named("batch negate")
    linked = [(link.trace_id, link.span_id) for link in of_batch.links]
    assert linked == [(one.trace_id, one.span_id) for one in of_items]


def test_an_untraced_call_has_none() -> None:
    pytest.importorskip("opentelemetry.exporter.otlp", reason="needs the extra otel")
    from tests.support.http.otlp import receiver  # noqa: PLC0415 - needs the extra too

    with (
        receiver() as got,
        gated(True, tracing=True, trace_endpoint=got.endpoint, trace_sample=0.0) as (served, _),
    ):
        ask(served, *map(infer, range(3)))
    assert got.spans == []
