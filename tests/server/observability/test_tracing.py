"""Traces: the spans that a real OTLP receiver gets, from both edges."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from cobatch.engines.errors import EngineRunError
from cobatch.server.settings.schema import ServerSettings
from tests.support.fronts.linked import WAYS, way
from tests.support.http.serving import GATE, Answer, GatedEngine, Served, gate, gated, get, post

pytest.importorskip("opentelemetry.exporter.otlp", reason="needs the extra otel: pip install 'cobatch[otel]'")

from opentelemetry.proto.trace.v1.trace_pb2 import Span, Status

from cobatch.server.observability import tracing
from cobatch.server.observability.record import RequestRecord
from cobatch.server.observability.tracing import Tracing
from tests.support.auth import protected as guarded
from tests.support.http.otlp import Receiver, attributes, receiver

BOTH = pytest.mark.parametrize("fast", [True, False], ids=["fast", "asgi"])
TRACE, CALLER = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
ROUTE = "POST /v2/models/{name}/infer"


@contextmanager
def traced(fast: bool, got: Receiver, **settings: Any) -> Iterator[tuple[Served, GatedEngine]]:
    """A server that sends traces to it; all spans have arrived at the end."""
    with gated(fast, **{"tracing": True, "trace_endpoint": got.endpoint, **settings}) as both:
        yield both


def parent(trace: str = TRACE, span: str = CALLER, flags: str = "01") -> dict[str, str]:
    return {"traceparent": f"00-{trace}-{span}-{flags}"}


def inside(got: Receiver, span: Span) -> dict[str, Span]:
    """A span's children by name."""
    found = [one for one in got.spans if one.parent_span_id == span.span_id]
    assert len({one.name for one in found}) == len(found)
    assert all(one.trace_id == span.trace_id for one in found)
    return {one.name: one for one in found}


@pytest.mark.parametrize("path", WAYS)
def test_a_request_with_its_stages_and_its_batch(path: str) -> None:
    with receiver() as got, traced(got=got, **way(path)) as (served, _):
        assert served.ask(gate(1, 2, headers=parent() | {"X-Request-Id": "mine"})).status == 200
    (span,) = got.named(ROUTE)
    assert span.trace_id.hex() == TRACE
    assert span.parent_span_id.hex() == CALLER
    assert span.kind == Span.SPAN_KIND_SERVER
    assert span.status.code == Status.STATUS_CODE_UNSET
    assert attributes(span) == {
        "http.request.method": "POST",
        "http.response.status_code": 200,
        "http.route": "/v2/models/{name}/infer",
        "url.path": GATE,
        "url.scheme": "http",
        "network.protocol.version": "1.1",
        "cobatch.request.id": "mine",
        "cobatch.model": "gate",
        "cobatch.rows": 2,
    }
    stages = inside(got, span)
    assert set(stages) == {"queue", "batch", "compute"}
    queue, batch, compute = stages["queue"], stages["batch"], stages["compute"]
    assert span.start_time_unix_nano <= queue.start_time_unix_nano
    assert queue.end_time_unix_nano == batch.start_time_unix_nano
    assert batch.end_time_unix_nano == compute.start_time_unix_nano
    assert compute.start_time_unix_nano < compute.end_time_unix_nano <= span.end_time_unix_nano
    (of_batch,) = got.named("batch gate")
    assert not queue.links
    assert not compute.links
    assert [(link.trace_id, link.span_id) for link in batch.links] == [(of_batch.trace_id, of_batch.span_id)]


@BOTH
def test_one_span_for_a_batch_linked_to_all_requests_in_it(fast: bool) -> None:
    with receiver() as got, traced(fast, got) as (served, engine):
        counters = served.batcher().counters
        engine.hold()
        clients = [served.connect() for _ in range(3)]
        for number, client in enumerate(clients):
            client.send(gate(number))
            served.until(lambda number=number: counters.accepted > number)  # type: ignore[misc]
            if number == 0:
                # Alone: the other two gather behind it.
                assert engine.began.get(timeout=60) == [0]
        engine.release()
        assert [client.answer().status for client in clients] == [200, 200, 200]
        for client in clients:
            client.close()
    batches = sorted(got.named("batch gate"), key=lambda one: one.start_time_unix_nano)
    assert [attributes(one)["cobatch.batch.rows"] for one in batches] == [1, 2]
    requests = {(one.trace_id, one.span_id) for one in got.named(ROUTE)}
    linked = [{(link.trace_id, link.span_id) for link in one.links} for one in batches]
    assert [len(links) for links in linked] == [1, 2]
    assert linked[0] | linked[1] == requests
    for batch in batches:
        assert batch.parent_span_id == b""
        assert batch.trace_id not in {trace for trace, _ in requests}
        assert attributes(batch)["cobatch.batch.reason"] in ("idle", "full")


@BOTH
def test_the_parts_of_a_split_request_ride_in_several_batches(fast: bool) -> None:
    with receiver() as got, traced(fast, got) as (served, _):
        assert served.ask(gate(*range(6))).status == 200
    (span,) = got.named(ROUTE)
    batches = {(one.trace_id, one.span_id) for one in got.named("batch gate")}
    assert len(batches) == 2
    links = inside(got, span)["batch"].links
    assert {(link.trace_id, link.span_id) for link in links} == batches


@BOTH
def test_only_server_errors_are_errors(fast: bool) -> None:
    with receiver() as got, traced(fast, got) as (served, engine):
        assert served.ask(post(GATE, b"{")).status == 400
        engine.fails = lambda x: EngineRunError("no")
        assert served.ask(gate(1)).status == 500
        assert served.ask(get("/none")).status == 404
    by_status = {
        attributes(one)["http.response.status_code"]: one
        for one in got.spans
        if one.kind == Span.SPAN_KIND_SERVER
    }
    assert {status: one.status.code for status, one in by_status.items()} == {
        400: Status.STATUS_CODE_UNSET,
        404: Status.STATUS_CODE_UNSET,
        500: Status.STATUS_CODE_ERROR,
    }
    assert attributes(by_status[400])["cobatch.problem"] == "not-json"
    assert "error.type" not in attributes(by_status[400])
    assert attributes(by_status[500])["error.type"] == "run-failed"
    (of_batch,) = got.named("batch gate")
    assert of_batch.status.code == Status.STATUS_CODE_ERROR
    assert set(inside(got, by_status[500])) == {"queue", "batch", "compute"}
    # An unknown path is no span name: clients could invent any number of them.
    assert by_status[404].name == "GET"
    assert "http.route" not in attributes(by_status[404])


@BOTH
def test_tenants_are_named_and_tokens_are_not(fast: bool, tmp_path: Path) -> None:
    token = guarded.token()
    with receiver() as got:
        settings = {"tracing": True, "trace_endpoint": got.endpoint}
        with guarded.protected(fast, tmp_path, server=settings) as p:
            assert p.infer(token, 815).status == 200
    (span,) = got.named(ROUTE)
    assert attributes(span)["cobatch.tenant"] == "alice"
    text = b"".join(one.SerializeToString() for one in got.spans)
    assert token.split(".")[2].encode() not in text
    assert b"815" not in text


def test_the_service_is_named() -> None:
    with receiver() as got, traced(True, got) as (served, _):
        served.ask(gate(1))
    assert got.resource["service.name"] == "cobatch"
    assert got.resource["service.version"]
    assert got.scope == "cobatch"
    assert set(got.paths) == {"/v1/traces"}


def test_opentelemetrys_own_variables_hold(monkeypatch: pytest.MonkeyPatch) -> None:
    with receiver() as got:
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", got.endpoint)
        monkeypatch.setenv("OTEL_SERVICE_NAME", "scores")
        with traced(True, got, trace_endpoint=None) as (served, _):
            served.ask(gate(1))
    assert got.resource["service.name"] == "scores"
    assert got.named(ROUTE)


# Sampling


def trace_of(answer: Answer) -> tuple[str, str] | None:
    """Return the trace and span in the response's header, None without one."""
    header = answer.headers.get("traceresponse")
    found = re.fullmatch(r"00-([0-9a-f]{32})-([0-9a-f]{16})-01", header) if header is not None else None
    assert (found is None) == (header is None)
    return None if found is None else (found[1], found[2])


@BOTH
def test_the_client_decides_or_else_the_sampling_ratio(fast: bool) -> None:
    with receiver() as got:
        with traced(fast, got, trace_sample=0.0) as (served, _):
            said = [
                trace_of(served.ask(gate(1, headers=headers)))
                for headers in (parent(), parent(flags="00"), {})
            ]
        assert [one and one[0] for one in said] == [TRACE, None, None]
        with traced(fast, got, trace_sample=1.0) as (served, _):
            said = [trace_of(served.ask(gate(1, headers=headers))) for headers in (parent(flags="00"), {})]
            assert served.ask(post(GATE, b"{", parent())).headers["traceresponse"].split("-")[1] == TRACE
        assert said[0] is None
        assert said[1] is not None
        assert said[1][0] != TRACE
    found = {(one.trace_id.hex(), one.span_id.hex()) for one in got.named(ROUTE)}
    assert len(found) == 3
    assert said[1] in found


@pytest.mark.parametrize(
    "header",
    ["", "x", f"00-{TRACE}-{CALLER}", f"00-{'0' * 32}-{CALLER}-01", f"00-{TRACE}-{'0' * 16}-01",
     f"ff-{TRACE}-{CALLER}-01", f"00-{TRACE.upper()}-{CALLER}-01", f"00-{TRACE}-{CALLER}-01\n",
     f"00-{TRACE}-{CALLER}-01-more"],
)  # fmt: skip
def test_an_invalid_header_is_ignored(header: str) -> None:
    traces = Tracing(0.5, "http://127.0.0.1:1", lot=lambda: 0.4)
    record = RequestRecord("", "GET", "/v2", 1.0)
    record.traceparent = header
    traces.begin(record, traces.draw())
    assert record.traceresponse
    assert TRACE not in record.traceresponse.decode()
    traces._provider.shutdown()


def test_a_later_version_with_more_in_it_is_taken() -> None:
    traces = Tracing(0.0, "http://127.0.0.1:1")
    record = RequestRecord("", "GET", "/v2", 1.0)
    record.traceparent = f"01-{TRACE}-{CALLER}-01-more"
    traces.begin(record, traces.draw())
    assert record.traceresponse.startswith(f"00-{TRACE}-".encode())
    traces._provider.shutdown()


@pytest.mark.parametrize(("drawn", "is_traced"), [(0.0999, True), (0.1, False)])
def test_the_sampling_ratio(drawn: float, is_traced: bool) -> None:
    traces = Tracing(0.1, "http://127.0.0.1:1", lot=lambda: drawn)
    record = RequestRecord("", "GET", "/v2", 1.0)
    traces.begin(record, traces.draw())
    assert (record.trace is not None) == is_traced
    traces._provider.shutdown()


# Off, and out of order


def test_off_loads_nothing_and_makes_no_records() -> None:
    with gated(True) as (served, _):
        assert not served.inference.observer.watched
        assert "traceresponse" not in served.ask(gate(1, headers=parent())).headers
    assert ServerSettings().tracing is False


def test_a_receiver_that_is_not_there_costs_no_request_its_answer(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tracing, "_STOP_S", 0.1)
    with receiver() as got:
        endpoint = got.endpoint
    with gated(True, tracing=True, trace_endpoint=endpoint) as (served, _):
        assert served.ask(gate(1)).status == 200
    assert any("opentelemetry" in record.name for record in caplog.records)


def test_without_the_libraries_the_setting_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from cobatch.server import app  # noqa: PLC0415 - only here
    from cobatch.server.settings.values import SettingsError  # noqa: PLC0415 - the same

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SettingsError, match=re.escape("pip install 'cobatch[otel]'")):
        app._tracer(ServerSettings(tracing=True))
