"""Differences of totals per second, bins, and the timeline of batches."""

from __future__ import annotations

import asyncio
from math import inf

import numpy as np
import pytest

from cobatch.batcher.batcher import Batcher
from cobatch.batcher.durations import EDGES_S
from cobatch.engines.errors import EngineError
from cobatch.server.dashboard.seconds import ModelSampler, Totals, size_bins, sparse, timeline
from cobatch.server.http.request_id import place_of
from cobatch.server.inference.model import Model
from cobatch.server.observability.history import History
from cobatch.server.settings.schema import ModelSettings
from tests.support.virtual.loop import Call, FakeEngine, FakeWorker, calls, make_batcher, run

RUN_S = 0.010


def model_of(batcher: Batcher | None) -> Model:
    """Return a model with this batcher."""
    model = Model(ModelSettings(path="fake", max_batch_size=8))
    model.batcher = batcher
    return model


async def run_requests(batcher: Batcher, *sizes: int) -> list[Call]:
    """Run requests with these numbers of rows one after another."""
    callers = [Call([[number, 0]] * rows) for number, rows in enumerate(sizes)]
    for caller in callers:
        batcher.submit(caller)
        await asyncio.sleep(1)
        caller.check()
    return callers


@pytest.mark.parametrize(
    ("largest", "bins"),
    [
        (1, [1]),
        (3, [1, 2, 3]),
        (16, [*range(1, 17)]),
        (17, [*range(1, 17), 17]),
        (64, [*range(1, 17), 24, 32, 48, 64]),
        (100, [*range(1, 17), 24, 32, 48, 64, 96, 100]),
    ],
)
def test_small_sizes_have_their_own_bins(largest: int, bins: list[int]) -> None:
    assert size_bins(largest) == bins


def test_the_largest_batch_size_has_few_bins() -> None:
    bins = size_bins(65536)
    assert bins[-1] == 65536
    assert len(bins) == 16 + 2 * 12
    assert bins == sorted(set(bins))


def test_sparse_counts_skip_zeros_at_both_ends() -> None:
    assert sparse(np.zeros(5, np.int64)) == []
    assert sparse(np.array([0, 0, 3, 0, 1, 0])) == [2, 3, 0, 1]
    assert sparse(np.array([7])) == [0, 7]


def test_a_difference_has_only_changed_entries() -> None:
    before = Totals(requests=2, compute=0.5, reasons={"idle": 2, "full": 1}, problems={"queue-full": 4})
    after = Totals(
        requests=5, compute=0.75, reasons={"idle": 3, "full": 1, "drain": 1}, problems={"queue-full": 4}
    )
    assert after.since(before) == Totals(requests=3, compute=0.25, reasons={"idle": 1, "drain": 1})


def test_each_second_has_its_own_totals() -> None:
    async def main() -> None:
        batcher = make_batcher(FakeWorker(FakeEngine()))
        sampler = ModelSampler(model_of(batcher))
        await run_requests(batcher, 1, 3)
        first = sampler.second()
        assert (first.delta.requests, first.delta.rows, first.delta.batches) == (2, 4, 2)
        assert first.delta.sizes == {1: 1, 3: 1}
        assert first.delta.reasons == {"idle": 2}
        assert first.delta.compute == pytest.approx(2 * RUN_S)
        assert (first.state, first.lanes, first.queued, first.running) == ("ready", 1, 0, 0)
        await run_requests(batcher, 3)
        second = sampler.second()
        assert (second.delta.requests, second.delta.sizes) == (1, {3: 1})
        assert sampler.second().delta == Totals()
        assert sampler.totals.rows == 7

    run(main())


def test_a_second_ends_with_queued_rows_and_running_batches() -> None:
    async def main() -> None:
        batcher = make_batcher(FakeWorker(FakeEngine(slots=1)))
        sampler = ModelSampler(model_of(batcher))
        callers = calls(3)
        batcher.submit(callers[0])
        await asyncio.sleep(RUN_S / 2)
        for caller in callers[1:]:
            batcher.submit(caller)
        second = sampler.second()
        assert (second.queued, second.running, second.delta.requests) == (2, 1, 0)
        await asyncio.sleep(1)
        delta = sampler.second().delta
        # Both waited for the other half of the run.
        assert delta.queue == pytest.approx(2 * RUN_S / 2)

    run(main())


def test_answers_of_both_edges_are_added() -> None:
    model = model_of(None)
    sampler = ModelSampler(model)

    async def main() -> None:
        model.batcher = make_batcher(FakeWorker(FakeEngine()))
        model.traffic.count(200, "", 1.5 * EDGES_S[0])
        model.infer_traffic.count(200, "", 1.5 * EDGES_S[0])
        model.infer_traffic.count(200, "", 2 * EDGES_S[-1])
        model.infer_traffic.count(429, "queue-full", 0.0)
        model.traffic.count(429, "queue-full", 0.0)
        model.traffic.count(503, "draining", 0.0)
        second = sampler.second()
        first_bucket, *counts = second.latency
        assert EDGES_S[first_bucket - 1] < 1.5 * EDGES_S[0] <= EDGES_S[first_bucket]
        assert counts[0] == 2
        assert counts[-1] == 1
        assert first_bucket + len(counts) == len(EDGES_S) + 1
        assert second.delta.problems == {"queue-full": 2, "draining": 1}
        assert sampler.second().latency == []

    run(main())


def test_a_model_without_an_engine_has_a_state_only() -> None:
    model = model_of(None)
    sampler = ModelSampler(model)
    assert sampler.second().state == "loading"
    model.load_error = EngineError("no such file")
    second = sampler.second()
    assert second.state == "failed"
    assert second.delta == Totals()


def test_timeline_has_times_and_queue_delay_of_each_batch() -> None:
    async def main() -> None:
        batcher = make_batcher(FakeWorker(FakeEngine(slots=1)))
        kept = History()
        batcher.watch_batches(lambda batch: kept.on_batch(batcher, batch))
        callers = calls(3)
        batcher.submit(callers[0])
        await asyncio.sleep(RUN_S / 2)
        for caller in callers[1:]:
            batcher.submit(caller)
        await asyncio.sleep(1)
        lone, both = timeline(kept.last("fake", 40))
        run_us, half_us = RUN_S * 1e6, RUN_S * 1e6 / 2
        # gathered, dispatched, started, finished, answering, answered
        assert lone[:6] == pytest.approx([0, 0, 0, run_us, run_us, run_us], abs=1)
        assert lone[6:9] == [1, 1, "idle"]
        assert both[:6] == pytest.approx([run_us, run_us, run_us, 2 * run_us, 2 * run_us, 2 * run_us], abs=1)
        assert both[6:8] == [2, 2]
        assert (lone[11], both[11]) == pytest.approx((0, half_us), abs=1)
        assert both[12] == lone[12] + 1
        assert [one[13] for one in (lone, both)] == [0, 0]
        assert place_of(both[14]) == (both[12], 0)

    run(main())


def test_a_failed_batch_is_marked() -> None:
    async def main() -> None:
        engine = FakeEngine()
        engine.fails = lambda rows: EngineError("no")
        batcher = make_batcher(FakeWorker(engine))
        kept = History()
        batcher.watch_batches(lambda batch: kept.on_batch(batcher, batch))
        (caller,) = calls(1)
        batcher.submit(caller)
        await asyncio.sleep(1)
        (row,) = timeline(kept.last("fake", 40))
        assert row[13] == 1
        assert max(row[:6]) < inf

    run(main())


def test_timeline_without_batches_is_empty() -> None:
    assert timeline([]) == []
