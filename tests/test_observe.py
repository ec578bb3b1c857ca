"""Who is told of requests and batches, and what happens to what those raise."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from batcher.batcher import Batcher
from batcher.request import Batch
from server.record import Record
from tests.serving import Served, gate, gated


@pytest.fixture(params=[True, False], ids=["fast path", "ASGI"])
def served(request: pytest.FixtureRequest) -> Iterator[Served]:
    with gated(request.param) as (server, _):
        yield server


class Sink:
    """Keeps what it is told, and what it saw of it."""

    def __init__(self) -> None:
        self.begun: list[Record] = []
        self.done: list[Record] = []
        self.batches: list[tuple[str, int, int]] = []

    def begin(self, record: Record) -> None:
        assert record.status == 0
        self.begun.append(record)

    def batch(self, batcher: Batcher, batch: Batch) -> None:
        self.batches.append((batcher.name, batch.rows, len(batch.requests)))


def test_a_request_is_told_of_twice_and_its_batch_once(served: Served) -> None:
    sink = Sink()
    observer = served.core.observer
    served.call(lambda: observer.add(begin=sink.begin, requests=sink.done.append, batches=sink.batch))
    assert served.ask(gate(1, 2)).status == 200
    (record,) = served.call(sink.done.copy)
    assert sink.begun == [record]
    assert (record.status, record.slug, record.model, record.rows) == (200, "", "gate", 2)
    assert record.route == "/v2/models/{name}/infer"
    batch = record.batch
    assert batch is not None
    times = [
        record.received_s, record.enqueued_s, batch.gathered_s, batch.dispatched_s, batch.started_s,
        batch.finished_s, batch.answering_s, record.answered_s,
    ]  # fmt: skip
    assert times == sorted(times)
    assert times[0] > 0
    assert sink.batches == [("gate", 2, 1)]


def test_who_is_removed_hears_no_more(served: Served) -> None:
    sink = Sink()
    observer = served.core.observer
    kept = served.call(lambda: observer.watched)
    served.call(lambda: observer.add(begin=sink.begin, requests=sink.done.append, batches=sink.batch))
    assert served.call(lambda: observer.watched)
    # Bound methods are equal, not the same: `remove` is asked for the equal one.
    served.call(lambda: observer.remove(begin=sink.begin, requests=sink.done.append, batches=sink.batch))
    assert served.call(lambda: observer.watched) is kept
    assert served.ask(gate(1)).status == 200
    assert not sink.begun
    assert not sink.done
    assert not sink.batches


def test_what_a_watcher_raises_reaches_no_request(served: Served, caplog: pytest.LogCaptureFixture) -> None:
    sink = Sink()

    def angry(*_: object) -> None:
        raise RuntimeError("not with me")

    observer = served.core.observer
    served.call(lambda: observer.add(begin=angry, requests=angry, batches=angry))
    served.call(lambda: observer.add(begin=sink.begin, requests=sink.done.append, batches=sink.batch))
    with served.connect() as client:
        for _ in range(3):
            assert client.ask(gate(1)).status == 200
    # On the loop: an answer is written before anybody is told of it.
    assert served.call(lambda: (len(sink.begun), len(sink.done), len(sink.batches))) == (3, 3, 3)
    assert served.call(lambda: served.batcher().running_batches) == 0
    assert caplog.text.count("RuntimeError: not with me") == 9


def test_refusals_have_records_with_their_kind(served: Served) -> None:
    sink = Sink()
    served.call(lambda: served.core.observer.add(requests=sink.done.append))
    assert served.ask(gate(1).replace(b'"x"', b'"z"')).slug == "unknown-tensor"
    (record,) = served.call(sink.done.copy)
    assert (record.status, record.slug, record.batch) == (400, "unknown-tensor", None)
