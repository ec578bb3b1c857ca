"""Engines with a process of their own that ends: its requests run alone in the next one. In virtual time."""

from __future__ import annotations

import asyncio

import pytest

from cobatch.batcher.batcher import Batcher
from cobatch.batcher.errors import BatcherError, BatchFailedError, EngineGoneError, EngineRestartingError
from cobatch.batcher.lane import BatchWorker
from cobatch.batcher.tenant import Tenant
from cobatch.engines.errors import EngineEndedError
from tests.batcher.test_bundle import BAD, bundle
from tests.support.virtual.loop import Array, FakeEngine, FakeWorker, calls, run

START_S = 1.0


class Process(FakeEngine):
    """Ends at a bad row; the batches after it have not begun."""

    def __init__(self) -> None:
        super().__init__(max_batch_size=4, slots=2)
        self.ended = False
        self.fails = self.run

    def run(self, rows: Array) -> EngineEndedError | None:
        if self.ended:
            return EngineEndedError("it has ended before", begun=False)
        self.ended = bool((rows == BAD).any())
        return EngineEndedError("it ended", begun=True) if self.ended else None


class Processes:
    """A batcher whose lost worker is replaced after START_S. `workers`: all that there were."""

    def __init__(self, count: int = 1) -> None:
        self.workers = [FakeWorker(Process()) for _ in range(count)]
        loop = asyncio.get_running_loop()
        self.batcher = Batcher(
            "fake", self.workers, max_queue_rows=100, on_lost=self._on_lost, loop=loop, clock=loop.time
        )

    def _on_lost(self, worker: BatchWorker, why: BatcherError) -> None:
        assert isinstance(why, EngineGoneError)
        asyncio.get_running_loop().call_later(START_S, self._start)

    def _start(self) -> None:
        self.workers.append(FakeWorker(Process()))
        self.batcher.use(self.workers[-1])


def test_each_request_of_the_batch_runs_alone() -> None:
    async def main() -> None:
        processes = Processes()
        batcher = processes.batcher
        good = calls(3, width=1)
        (bad,) = bundle(BAD).calls
        bad.tenant = Tenant("ann")
        for one in (*good[:1], bad, *good[1:]):
            batcher.submit(one)
        behind = calls(4, width=1)  # with the first process already when it ends
        await asyncio.sleep(0.001)
        for one in behind:
            batcher.submit(one)
        await asyncio.sleep(3 * START_S)
        for one in (*good, *behind):
            one.check()
        assert isinstance(bad.answer, BatchFailedError)
        assert len(processes.workers[0].ran) == 2
        assert len(processes.workers) == 3
        counters = batcher.counters
        assert (counters.ended, counters.failed_runs, counters.failed) == (2, 2, 1)
        assert batcher.suspects == 1
        assert batcher.admission.closed is None

    run(main())


def test_members_of_a_bundle_run_alone() -> None:
    async def main() -> None:
        processes = Processes()
        members = bundle(1, BAD, 3)
        members.enter(processes.batcher.submit)
        (other,) = calls(1, width=1)
        processes.batcher.submit(other)
        await asyncio.sleep(3 * START_S)
        for one in (other, members.calls[0], members.calls[2]):
            one.check()
        assert isinstance(members.calls[1].answer, BatchFailedError)
        assert processes.batcher.counters.ended == 2

    run(main())


def test_another_engine_goes_on() -> None:
    async def main() -> None:
        processes = Processes(2)
        (bad,) = bundle(BAD).calls
        processes.batcher.submit(bad)
        await asyncio.sleep(0.02)
        assert isinstance(bad.answer, BatchFailedError)
        good = calls(8, width=1)
        for one in good:
            processes.batcher.submit(one)
        await asyncio.sleep(START_S / 2)
        for one in good:
            one.check()

    run(main())


def test_an_idle_one_that_ends() -> None:
    async def main() -> None:
        processes = Processes()
        (worker,) = processes.workers
        batcher = processes.batcher
        (one,) = calls(1, width=1)
        batcher.submit(one)
        await asyncio.sleep(0.001)
        batcher.ended(worker, EngineEndedError("killed"))  # its batch will tell
        assert batcher.counters.ended == 0
        await asyncio.sleep(0.1)
        one.check()
        batcher.ended(worker, EngineEndedError("killed"))
        batcher.ended(worker, EngineEndedError("killed"))
        assert batcher.counters.ended == 1
        (two,) = calls(1, width=1)
        batcher.submit(two)
        await asyncio.sleep(2 * START_S)
        two.check()
        assert not processes.workers[0].ran[1:]

    run(main())


def test_requests_are_refused_while_it_waits_to_be_started() -> None:
    async def main() -> None:
        processes = Processes()
        batcher = processes.batcher
        batcher.restarting(4.0)  # an engine is there
        assert batcher.admission.closed is None
        batcher.ended(processes.workers[0], EngineEndedError("killed"))
        (waits,) = calls(1, width=1)
        batcher.submit(waits)
        batcher.restarting(4.0)
        assert isinstance(waits.answer, EngineRestartingError)
        with pytest.raises(EngineRestartingError, match="is being started again") as caught:
            batcher.submit(*calls(1, width=1))
        assert caught.value.retry_after_s == 4.0
        await asyncio.sleep(2 * START_S)
        (after,) = calls(1, width=1)
        batcher.submit(after)
        await asyncio.sleep(0.1)
        after.check()

    run(main())


def test_one_that_is_replaced_answers_its_batches() -> None:
    async def main() -> None:
        processes = Processes()
        batcher = processes.batcher
        old, new = processes.workers[0], FakeWorker(Process())
        before, after = calls(4, width=1), calls(4, width=1)
        for one in before:
            batcher.submit(one)
        await asyncio.sleep(0.001)
        batcher.use(new, instead_of=old)
        for one in after:
            batcher.submit(one)
        await asyncio.sleep(0.1)
        for one in (*before, *after):
            one.check()
        assert (sum(rows for _, rows in old.ran), sum(rows for _, rows in new.ran)) == (4, 4)
        assert [lane.worker for lane in batcher.lanes] == [new]
        assert batcher._lanes._all.keys() == set(batcher.lanes)

    run(main())


def test_none_is_started_for_a_batcher_that_drains() -> None:
    async def main() -> None:
        batcher = Processes().batcher
        (bad,) = bundle(BAD).calls
        batcher.submit(bad)
        assert await batcher.drain(10)
        assert isinstance(bad.answer, EngineGoneError)

    run(main())
