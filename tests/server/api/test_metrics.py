"""GET /metrics: counts of requests, batches and engines, and both formats."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import pytest
from prometheus_client.openmetrics.parser import text_string_to_metric_families as open_metrics

from cobatch.engines.errors import EngineRunError
from cobatch.server.observability import metric_families as metric_names
from cobatch.server.observability.metric_families import FAMILIES
from cobatch.server.settings.schema import ModelSettings
from tests.support.fronts.linked import WAYS, way
from tests.support.http.scraping import Scrape, scrape
from tests.support.http.serving import GATE, GatedEngine, Served, gate, gated, get, post, rows_of, serve

ALL = pytest.mark.parametrize("path", WAYS)
Gated = tuple[Served, GatedEngine]
REQUESTS = "requests_total"


@pytest.fixture(params=WAYS)
def gates(request: pytest.FixtureRequest) -> Iterator[Gated]:
    with gated(**way(request.param)) as both:
        yield both


# Requests


def test_answers_are_counted_with_their_durations(gates: Gated) -> None:
    served, _ = gates
    with served.connect() as client:
        for _ in range(5):
            assert client.ask(gate(1)).status == 200
    now = scrape(served)
    assert now.value(REQUESTS, model="gate", code="200", reason="") == 5
    assert now.value("request_duration_seconds_count", model="gate") == 5
    total = now.value("request_duration_seconds_sum", model="gate")
    waited = now.value("queue_delay_seconds_sum", model="gate")
    assert total is not None
    assert waited is not None
    assert total > waited > 0
    of_route = {"route": "/v2/models/{name}/infer", "method": "POST", "code": "200", "reason": ""}
    assert now.value("http_requests_total", **of_route) == 5


def test_refusals_are_counted_by_status_and_kind(gates: Gated) -> None:
    served, _ = gates
    assert served.ask(post(GATE, b"{")).slug == "not-json"
    assert served.ask(post(GATE, {"inputs": []})).slug == "missing-tensor"
    assert served.ask(post(GATE, {"inputs": []})).slug == "missing-tensor"
    now = scrape(served)
    assert now.value(REQUESTS, model="gate", code="400", reason="not-json") == 1
    assert now.value(REQUESTS, model="gate", code="400", reason="missing-tensor") == 2
    assert now.value(REQUESTS, model="gate", code="200", reason="") == 0
    assert now.value("request_duration_seconds_count", model="gate") == 0


@ALL
def test_refusals_of_a_full_queue_are_counted(path: str) -> None:
    with gated(**way(path), max_queue_rows=4) as (served, engine), contextlib.ExitStack() as stack:
        occupy_slots(served, engine, stack)
        queued = stack.enter_context(served.connect())
        queued.send(gate(6, 7, 8, 9))
        served.until(lambda: served.batcher().queue.rows == 4)
        assert served.ask(gate(10)).slug == "queue-full"
        now = scrape(served)
        assert now.value(REQUESTS, model="gate", code="429", reason="queue-full") == 1
        assert now.value("queue_rows", model="gate", priority="4") == 4
        assert now.value("queue_limit_rows", model="gate") == 4
        assert now.value("requests_in_flight", model="gate") == 3
        assert now.value("engine_slots_in_use", model="gate", engine="0") == 2
        engine.release()


def occupy_slots(served: Served, engine: GatedEngine, stack: contextlib.ExitStack) -> None:
    """Occupy both slots, each with a request of four rows."""
    engine.hold()
    batcher = served.batcher()
    for n in range(1, 3):
        client = stack.enter_context(served.connect())
        client.send(gate(1, 2, 3, 4))
        while served.call(lambda: batcher.running_batches) < n:
            pass


def test_a_disconnected_client_is_counted_once(gates: Gated) -> None:
    served, engine = gates
    with contextlib.ExitStack() as stack:
        occupy_slots(served, engine, stack)
        client = served.connect()
        client.send(gate(9))
        served.until(lambda: served.batcher().queue.rows == 1)
        client.close()
        served.until(lambda: served.batcher().counters.cancelled == 1)
        now = scrape(served)
        engine.release()
    assert now.value("requests_cancelled_total", model="gate") == 1
    assert now.value(REQUESTS, model="gate", code="499", reason="client-left") == 1


@ALL
def test_queued_rows_are_counted_by_priority(path: str) -> None:
    with gated(**way(path)) as (served, engine), contextlib.ExitStack() as stack:
        occupy_slots(served, engine, stack)
        for priority, rows in ((1, (5,)), (1, (6,)), (0, (7, 8, 9))):
            client = stack.enter_context(served.connect())
            client.send(gate(*rows, parameters={"priority": priority}))
        served.until(lambda: served.batcher().queue.rows == 5)
        now = scrape(served)
        engine.release()
    assert now.value("queue_rows", model="gate", priority="1") == 2
    assert now.value("queue_rows", model="gate", priority="4") == 3


def test_each_item_of_a_batch_is_a_request(gates: Gated) -> None:
    served, _ = gates
    urls = (GATE, GATE, GATE.replace("gate", "g%61te"))
    good = [{"id": str(n), "method": "POST", "url": url, "body": rows_of(1)} for n, url in enumerate(urls)]
    bad = {"id": "bad", "method": "POST", "url": GATE, "body": {"inputs": []}}
    other = {"id": "health", "method": "GET", "url": "/v2/health/live"}
    assert served.ask(post("/batch", {"requests": [*good, bad, other]})).status == 200
    alike = [{**good[0], "id": str(n)} for n in range(7)]
    assert served.ask(post("/batch", {"requests": alike})).status == 200
    now = scrape(served)
    assert now.value(REQUESTS, model="gate", code="200", reason="") == 10
    assert now.value(REQUESTS, model="gate", code="400", reason="missing-tensor") == 1
    assert now.value("queue_delay_seconds_count", model="gate") == 10
    assert now.value("http_requests_total", route="/batch", method="POST", code="200", reason="") == 2


def test_predictions_are_requests(gates: Gated) -> None:
    served, _ = gates
    target = "/v1/models/gate/predictions"
    json = {"Content-Type": "application/json"}
    assert served.ask(post(target, {"inputs": {"x": [[1]]}}, json)).status == 200
    assert served.ask(post(target, b"{", json)).status == 400
    now = scrape(served)
    assert now.value(REQUESTS, model="gate", code="200", reason="") == 1
    assert now.value(REQUESTS, model="gate", code="400", reason="not-json") == 1
    route = "/v1/models/{name}/predictions"
    assert now.value("http_requests_total", route=route, method="POST", code="200", reason="") == 1


def test_unknown_paths_and_methods_share_a_series(gates: Gated) -> None:
    served, _ = gates
    for path in ("/a", "/b", "/v2/models/none/infer", "/v2/models/nada"):
        assert served.ask(get(path)).status in (404, 405)
    assert served.ask(get("/a", "PROPFIND")).status == 404
    series = [dict(labels) for labels in scrape(served).of("http_requests_total")]
    assert {one["route"] for one in series} <= {"", *routes()}
    assert {one["method"] for one in series} <= {"GET", "POST", "other"}


def routes() -> set[str]:
    return {"/v2/models/{name}", "/v2/models/{name}/infer", "/metrics"}


# Batches and engines


@ALL
def test_batches_are_counted_by_size_and_reason(path: str) -> None:
    with gated(**way(path)) as (served, engine):
        with contextlib.ExitStack() as stack:
            occupy_slots(served, engine, stack)
            for row in range(3):
                client = stack.enter_context(served.connect())
                client.send(gate(row))
            served.until(lambda: served.batcher().queue.rows == 3)
            engine.release()
            assert client.answer().status == 200
        now = scrape(served)
    assert now.buckets("batch_rows", model="gate") == {"1.0": 0, "2.0": 0, "4.0": 3, "+Inf": 3}
    assert now.value("batch_rows_sum", model="gate") == 11
    assert sum(now.of("batches_total").values()) == 3
    assert now.value("batch_compute_seconds_count", model="gate") == 3
    assert now.value("engine_runs_total", model="gate", engine="0") == 3
    busy = now.value("engine_busy_seconds_total", model="gate", engine="0")
    compute = now.value("batch_compute_seconds_sum", model="gate")
    assert busy is not None
    assert busy == pytest.approx(compute)
    assert busy > 0


def test_before_the_first_run_the_expected_run_time_is_the_warm_ups(gates: Gated) -> None:
    served, _ = gates
    warmup_us = served.server.inference.models["gate"].engine_worker.warmup_us.values()
    expected_s = scrape(served).value("expected_run_seconds", model="gate")
    assert expected_s is not None
    assert min(warmup_us) * 0.999 <= expected_s * 1e6 <= max(warmup_us) * 1.001


@ALL
def test_failed_runs_are_counted_as_busy_time(path: str) -> None:
    with gated(**way(path)) as (served, engine):
        engine.fails = lambda x: EngineRunError("no")
        assert served.ask(gate(13)).slug == "run-failed"
        now = scrape(served)
    assert now.value(REQUESTS, model="gate", code="500", reason="run-failed") == 1
    assert now.value("failed_runs_total", model="gate") == 1
    assert now.value("engine_runs_total", model="gate", engine="0") == 1
    assert now.value("batch_compute_seconds_count", model="gate") == 0
    assert now.value("engine_busy_seconds_total", model="gate", engine="0") is not None


def test_a_model_has_exactly_one_state() -> None:
    engine = GatedEngine()
    engine.may_open.clear()
    with serve(True, (ModelSettings(path="gate"),), engines={"gate": engine}, ready=False) as served:
        assert states(scrape(served)) == ["loading"]
        assert scrape(served).value("ready") == 0
        engine.may_open.set()
        assert served.server.ready.wait(20)
        assert states(scrape(served)) == ["ready"]
        assert scrape(served).value("ready") == 1
        assert scrape(served).value("engines", model="gate") == 1


def states(now: Scrape) -> list[str]:
    return [dict(labels)["state"] for labels, value in now.of("model_state").items() if value]


# The format


def test_open_metrics_on_request(gates: Gated) -> None:
    served, _ = gates
    assert served.ask(gate(1)).status == 200
    request = get("/metrics").replace(
        b"\r\n\r\n", b"\r\nAccept: application/openmetrics-text; version=1.0.0\r\n\r\n"
    )
    answer = served.ask(request)
    assert answer.headers["content-type"].startswith("application/openmetrics-text")
    text = answer.body.decode()
    assert text.endswith("# EOF\n")
    assert text.count("# EOF") == 1
    # The strict parser accepts it.
    kinds = {family.name: family.type for family in open_metrics(text)}  # type: ignore[no-untyped-call]
    assert kinds["cobatch_requests"] == "counter"
    assert kinds["cobatch_request_duration_seconds"] == "histogram"
    assert kinds["cobatch_build"] == "info"
    plain = served.ask(get("/metrics"))
    assert plain.headers["content-type"].startswith("text/plain")


def processes(served: Served) -> int:
    return len({served.inference, *served.server.inferences()})


def test_scraped_families_match_the_table(gates: Gated) -> None:
    served, _ = gates
    served.ask(gate(1))
    scraped = {
        name: family for name, family in scrape(served).families.items() if name.startswith("cobatch_")
    }
    table = {family.name: family for family in FAMILIES}
    for name, family in scraped.items():
        if family.type != "gauge" or not name.endswith("_info"):
            assert table[name].kind == family.type
            assert table[name].help == family.documentation
            for sample in family.samples:
                assert set(sample.labels) - {"le"} == set(table[name].labels)
    others = ["gpu", "tenant", "auth", "batch_padding", *([] if processes(served) > 1 else ["front"])]
    optional = {
        family.name
        for family in FAMILIES
        if family.name.startswith(tuple(f"cobatch_{start}" for start in others))
    } | {metric_names.ELEMENTS.name}
    infos = {family.name for family in FAMILIES if family.kind == "info"}
    assert set(table) - set(scraped) - infos == optional - infos
