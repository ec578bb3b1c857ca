"""Steps of a pipeline in Server-Timing, in an explanation and in a trace."""

from __future__ import annotations

import time

import pytest

from cobatch.server.api.requests import Explainer
from cobatch.server.observability.history import History
from cobatch.server.observability.record import RequestRecord, StepTimes, server_timing

STEPS = (
    StepTimes("detect", 1, 100.001, 100.002, 100.003, 100.013),
    StepTimes("read.it", 3, 100.020, 100.021, 100.021, 100.022),
    StepTimes("read.it", 2, 100.020, 100.024, 100.024, 100.026),
    StepTimes("detect", 1, 100.030, 100.031, 100.031, 100.031, "expired"),
)


def record() -> RequestRecord:
    return RequestRecord(
        "mine", "POST", "/v1/models/ocr/infer", 100.0,
        route="/v1/models/{name}/infer", model="ocr", status=200, answered_s=100.04, steps=STEPS,
    )  # fmt: skip


def test_server_timing_has_the_sums_of_each_model() -> None:
    assert server_timing(()) == b""
    assert server_timing(STEPS) == (
        b"detect-queue;dur=2.000, detect-run;dur=10.000, read.it-queue;dur=5.000, read.it-run;dur=3.000"
    )


def test_an_explanation_has_each_step() -> None:
    history = History()
    history.on_request(record())
    explained = Explainer(history, lambda: 101.0).explain("mine")
    assert explained["steps"][0] == {
        "model": "detect", "rows": 1, "after_us": 1000, "queue_us": 1000, "compute_us": 10_000,
    }  # fmt: skip
    assert explained["steps"][3] == {
        "model": "detect", "rows": 1, "after_us": 30_000, "problem": "expired", "total_us": 1000,
    }  # fmt: skip
    assert explained["in_words"][-4:] == [
        "After 1.00 ms its step detect with 1 row queued for 1.00 ms and ran for 10.00.",
        "After 20.00 ms its step read.it with 3 rows queued for 1.00 ms and ran for 1.00.",
        "After 20.00 ms its step read.it with 2 rows queued for 4.00 ms and ran for 2.00.",
        "After 30.00 ms its step detect with 1 row failed (expired), 1.00 ms later.",
    ]


def test_a_trace_has_a_span_for_each_step() -> None:
    pytest.importorskip("opentelemetry.exporter.otlp", reason="needs the extra otel")
    from cobatch.server.observability.tracing import Tracing  # noqa: PLC0415 - an extra
    from tests.support.http.otlp import attributes, receiver  # noqa: PLC0415

    with receiver() as got:
        tracing = Tracing(1.0, got.endpoint, clock=lambda: 100.0, wall_clock=time.time)
        request = record()
        tracing.begin(request, drawn=True)
        tracing.request_done(request)
        tracing.stop()
    (call,) = got.named("POST /v1/models/{name}/infer")
    first, last = got.named("step detect")
    assert first.parent_span_id == last.parent_span_id == call.span_id
    assert attributes(first) == {"cobatch.model": "detect", "cobatch.rows": 1}
    assert attributes(last)["cobatch.problem"] == "expired"
    assert last.status.code == last.status.STATUS_CODE_ERROR
    stages = {span.name: span for span in got.spans if span.parent_span_id == first.span_id}
    assert set(stages) == {"queue", "compute"}
    compute = stages["compute"]
    assert round((compute.end_time_unix_nano - compute.start_time_unix_nano) / 1e6) == 10
    assert len(got.named("step read.it")) == 2
