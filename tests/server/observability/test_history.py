"""The kept batches and records of recent requests."""

from __future__ import annotations

import asyncio
from functools import partial

import pytest

from cobatch.server.observability import history
from cobatch.server.observability.record import RequestRecord
from tests.support.virtual.loop import Call, FakeEngine, FakeWorker, make_batcher, run


def test_each_model_has_its_share_of_the_kept_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(history, "_BATCHES", 6)

    async def main() -> None:
        kept = history.History(models=2)
        for name in ("busy", "idle"):
            batcher = make_batcher(FakeWorker(FakeEngine()))
            batcher.name = name
            batcher.watch_batches(partial(kept.on_batch, batcher))
            for call in [Call([[1]]) for _ in range(10 if name == "busy" else 2)]:
                batcher.submit(call)
                await asyncio.sleep(1)
        assert [len(kept.last(name, 40)) for name in ("busy", "idle", "none")] == [3, 2, 0]
        numbers = [record.batch.number for record in kept.last("busy", 2)]
        assert numbers == sorted(numbers)
        assert len(numbers) == 2

    run(main())


def test_a_long_tracestate_is_dropped_as_a_whole() -> None:
    record = RequestRecord("", "GET", "/", 0.0)
    record.mark(b"tracestate", b"a=1")
    record.mark(b"tracestate", b"b=" + b"2" * 9000)
    record.mark(b"tracestate", b"c=3")
    assert record.tracestate == "a=1,c=3"
