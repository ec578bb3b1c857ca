"""Subscribers to requests and batches, and exceptions in them."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import pytest

from cobatch.batcher.batcher import Batcher
from cobatch.batcher.durations import PENDING_LIMIT
from cobatch.batcher.request import Batch
from cobatch.engines.errors import EngineError
from cobatch.server.observability.observer import Observer
from cobatch.server.observability.record import RequestRecord
from tests.support.fronts.linked import WAYS, way
from tests.support.http.serving import GatedEngine, Served, gate, gated


@pytest.fixture(params=WAYS)
def both(request: pytest.FixtureRequest) -> Iterator[tuple[Served, GatedEngine]]:
    with gated(**way(request.param)) as (server, engine):
        yield server, engine


@pytest.fixture
def served(both: tuple[Served, GatedEngine]) -> Served:
    return both[0]


def of_requests(served: Served) -> list[Observer]:
    """Return the observers of all processes that answer infer requests."""
    return [one.observer for one in served.server.inferences()]


def subscribe(served: Served, sink: Sink, *, each: bool = False) -> None:
    """Subscribe to the requests of all processes, and to the batches."""

    def on_loop() -> None:
        for observer in of_requests(served):
            observer.on_request(sink.request_done, each=each)
        served.inference.observer.on_batch(sink.batch)

    served.call(on_loop)


class Sink:
    """Collects requests and batches. Also a tracer that draws every request."""

    def __init__(self) -> None:
        self.begun: list[RequestRecord] = []
        self.done: list[RequestRecord] = []
        self.batches: list[tuple[str, int, int]] = []

    def draw(self) -> bool:
        return True

    def begin(self, record: RequestRecord, drawn: bool) -> None:
        assert record.status == 0
        assert drawn
        self.begun.append(record)

    def request_done(self, record: RequestRecord) -> None:
        self.done.append(record)

    def batch(self, batcher: Batcher, batch: Batch) -> None:
        self.batches.append((batcher.name, batch.rows, len(batch.requests)))

    def start(self, *_: object) -> None:
        raise NotImplementedError

    def item_done(self, *_: object) -> None:
        raise NotImplementedError

    def stop(self) -> None:
        raise NotImplementedError


def test_a_request_is_reported_twice_and_its_batch_once(served: Served) -> None:
    sink = Sink()
    trace(served, sink)
    assert served.ask(gate(1, 2)).status == 200
    (record,) = served.call(sink.done.copy)
    assert sink.begun == [record]
    assert (record.status, record.slug, record.model, record.rows) == (200, "", "gate", 2)
    assert record.route == "/v2/models/{name}/infer"
    batch = record.batch
    assert batch is not None
    times = [
        record.received_s, record.enqueued_s, batch.gathered_s, batch.dispatched_s, batch.started_s,
        batch.finished_s, record.answered_s,
    ]  # fmt: skip
    if of_requests(served) == [served.inference.observer]:  # only where the batch ran
        times.insert(-1, batch.answering_s)
    assert times == sorted(times)
    assert times[0] > 0
    assert sink.batches == [("gate", 2, 1)]


def test_a_removed_subscriber_is_not_called(served: Served) -> None:
    sink = Sink()
    (observer, *_) = of_requests(served)
    batches = served.inference.observer
    kept = served.call(lambda: observer.watched)
    subscribe(served, sink, each=True)
    assert served.call(lambda: observer.watched)
    # Bound methods are equal, not the same: `remove` gets the equal one.
    for each in of_requests(served):
        served.call(partial(each.remove, sink.request_done))
    served.call(lambda: batches.remove(sink.batch))
    assert served.call(lambda: observer.watched) is kept
    assert served.ask(gate(1)).status == 200
    assert not sink.done
    assert not sink.batches


def trace(served: Served, sink: Sink) -> None:
    """Trace the requests of all processes, and subscribe to the batches."""

    def on_loop() -> None:
        for observer in of_requests(served):
            observer.trace(sink)
        served.inference.observer.on_batch(sink.batch)

    served.call(on_loop)


class Failing(Sink):
    """Raises an exception whenever it is called."""

    def begin(self, record: RequestRecord, drawn: bool) -> None:
        raise RuntimeError("not with me")

    def request_done(self, record: RequestRecord) -> None:
        raise RuntimeError("not with me")

    def batch(self, batcher: Batcher, batch: Batch) -> None:
        raise RuntimeError("not with me")


def test_an_exception_in_a_subscriber_reaches_no_request(
    served: Served, caplog: pytest.LogCaptureFixture
) -> None:
    failing, sink = Failing(), Sink()
    trace(served, failing)
    subscribe(served, sink, each=True)
    with served.connect() as client:
        for _ in range(3):
            assert client.ask(gate(1)).status == 200
    # On the loop: a response is written before subscribers are called.
    assert served.call(lambda: (len(sink.done), len(sink.batches))) == (3, 3)
    assert served.call(lambda: served.batcher().running_batches) == 0
    assert caplog.text.count("RuntimeError: not with me") == 9
    caplog.clear()  # its tracebacks refer to the connection


def test_refusals_have_records_with_their_kind(served: Served) -> None:
    sink = Sink()
    subscribe(served, sink, each=True)
    assert served.ask(gate(1).replace(b'"x"', b'"z"')).slug == "unknown-tensor"
    (record,) = served.call(sink.done.copy)
    assert (record.status, record.slug, record.batch) == (400, "unknown-tensor", None)


def test_a_response_whose_id_names_its_batch_has_no_record(both: tuple[Served, GatedEngine]) -> None:
    served, engine = both
    sink = Sink()
    subscribe(served, sink)
    assert served.ask(gate(1)).status == 200
    assert not served.call(sink.done.copy)
    assert served.ask(gate(1, headers={"X-Request-Id": "mine"})).headers["x-request-id"] == "mine"
    engine.fails = lambda _: EngineError("it cannot")
    failed = served.ask(gate(1, 2))
    assert failed.status == 500
    first, second = served.call(sink.done.copy)
    assert (first.request_id, first.status, first.rows) == ("mine", 200, 1)
    assert (second.request_id, second.status) == (failed.headers["x-request-id"], 500)
    assert (second.slug, second.rows) == ("run-failed", 2)


def test_durations_are_counted_in_once_there_are_many(served: Served) -> None:
    durations = served.server.inferences()[0].served["gate"].infer_traffic.durations
    served.call(lambda: durations.values.extend([0.001] * PENDING_LIMIT))
    assert served.ask(gate(1)).status == 200
    # Through ASGI an answer is counted behind its batch.
    assert len(served.call(durations.values.copy)) == (0 if served.fast else 1)
    assert served.call(lambda: durations.count) == PENDING_LIMIT + 1
