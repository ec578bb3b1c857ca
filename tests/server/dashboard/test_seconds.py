"""What the live page is told of each second: differences of counters, bins, and single batches."""

from __future__ import annotations

import asyncio
from math import inf

import numpy as np
import pytest

from cobatch.batcher.batcher import Batcher
from cobatch.batcher.durations import EDGES_S
from cobatch.engines.errors import EngineError
from cobatch.server.dashboard.seconds import Figures, ModelRecent, size_bins, sparse, timeline
from cobatch.server.http.request_id import place_of
from cobatch.server.inference.model import Model
from cobatch.server.observability.history import History
from cobatch.server.settings.schema import ModelSettings
from tests.support.virtual.loop import Call, FakeEngine, FakeWorker, calls, make_batcher, run

RUN_S = 0.010


def model_of(batcher: Batcher | None) -> Model:
    """A model of which only the batcher matters."""
    model = Model(ModelSettings(path="fake", max_batch_size=8))
    model.batcher = batcher
    return model


async def ride(batcher: Batcher, *sizes: int) -> list[Call]:
    """Requests of so many rows, one after another."""
    callers = [Call([[number, 0]] * rows) for number, rows in enumerate(sizes)]
    for caller in callers:
        batcher.submit(caller)
        await asyncio.sleep(1)
        caller.check()
    return callers


@pytest.mark.parametrize(
    ("most", "bins"),
    [
        (1, [1]),
        (3, [1, 2, 3]),
        (16, [*range(1, 17)]),
        (17, [*range(1, 17), 17]),
        (64, [*range(1, 17), 24, 32, 48, 64]),
        (100, [*range(1, 17), 24, 32, 48, 64, 96, 100]),
    ],
)
def test_sizes_have_bins_of_their_own_while_they_are_small(most: int, bins: list[int]) -> None:
    assert size_bins(most) == bins


def test_the_largest_batches_that_may_be_set_have_few_bins() -> None:
    bins = size_bins(65536)
    assert bins[-1] == 65536
    assert len(bins) == 16 + 2 * 12
    assert bins == sorted(set(bins))


def test_counts_are_sent_from_the_first_to_the_last_that_is_not_zero() -> None:
    assert sparse(np.zeros(5, np.int64)) == []
    assert sparse(np.array([0, 0, 3, 0, 1, 0])) == [2, 3, 0, 1]
    assert sparse(np.array([7])) == [0, 7]


def test_a_difference_names_only_what_has_changed() -> None:
    before = Figures(requests=2, compute=0.5, reasons={"idle": 2, "full": 1}, problems={"queue-full": 4})
    after = Figures(
        requests=5, compute=0.75, reasons={"idle": 3, "full": 1, "drain": 1}, problems={"queue-full": 4}
    )
    assert after.since(before) == Figures(requests=3, compute=0.25, reasons={"idle": 1, "drain": 1})


def test_each_second_has_what_happened_in_it() -> None:
    async def main() -> None:
        batcher = make_batcher(FakeWorker(FakeEngine()))
        recent = ModelRecent(model_of(batcher))
        await ride(batcher, 1, 3)
        first = recent.second()
        assert (first.did.requests, first.did.rows, first.did.batches) == (2, 4, 2)
        assert first.did.sizes == {1: 1, 3: 1}
        assert first.did.reasons == {"idle": 2}
        assert first.did.compute == pytest.approx(2 * RUN_S)
        assert (first.state, first.lanes, first.queued, first.running) == ("ready", 1, 0, 0)
        await ride(batcher, 3)
        second = recent.second()
        assert (second.did.requests, second.did.sizes) == (1, {3: 1})
        assert recent.second().did == Figures()
        assert recent.total.rows == 7

    run(main())


def test_what_waits_and_what_runs_is_told_as_it_is() -> None:
    async def main() -> None:
        batcher = make_batcher(FakeWorker(FakeEngine(slots=1)))
        recent = ModelRecent(model_of(batcher))
        callers = calls(3)
        batcher.submit(callers[0])
        await asyncio.sleep(RUN_S / 2)
        for caller in callers[1:]:
            batcher.submit(caller)
        second = recent.second()
        assert (second.queued, second.running, second.did.requests) == (2, 1, 0)
        await asyncio.sleep(1)
        did = recent.second().did
        # The two waited for the other half of the run: on average 0.01 of them in this second.
        assert did.queue == pytest.approx(2 * RUN_S / 2)

    run(main())


def test_answers_of_both_edges_are_taken_together() -> None:
    model = model_of(None)
    recent = ModelRecent(model)

    async def main() -> None:
        model.batcher = make_batcher(FakeWorker(FakeEngine()))
        model.traffic.count(200, "", 1.5 * EDGES_S[0])
        model.infer_traffic.count(200, "", 1.5 * EDGES_S[0])
        model.infer_traffic.count(200, "", 2 * EDGES_S[-1])
        model.infer_traffic.count(429, "queue-full", 0.0)
        model.traffic.count(429, "queue-full", 0.0)
        model.traffic.count(503, "draining", 0.0)
        second = recent.second()
        first_bucket, *counts = second.latency
        assert EDGES_S[first_bucket - 1] < 1.5 * EDGES_S[0] <= EDGES_S[first_bucket]
        assert counts[0] == 2
        assert counts[-1] == 1
        assert first_bucket + len(counts) == len(EDGES_S) + 1
        assert second.did.problems == {"queue-full": 2, "draining": 1}
        assert recent.second().latency == []

    run(main())


def test_a_model_without_an_engine_says_so() -> None:
    model = model_of(None)
    recent = ModelRecent(model)
    assert recent.second().state == "loading"
    model.load_error = EngineError("no such file")
    second = recent.second()
    assert second.state == "failed"
    assert second.did == Figures()


def test_batches_are_told_one_by_one_with_what_they_waited_for() -> None:
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


def test_a_batch_that_failed_is_marked() -> None:
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


def test_without_batches_there_is_nothing_to_tell() -> None:
    assert timeline([]) == []
