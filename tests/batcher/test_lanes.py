"""Several engines for one model, fed from one queue: whichever is free first; a lost one stops no other."""

from __future__ import annotations

import asyncio
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cobatch.batcher.batcher import Batcher
from cobatch.batcher.errors import BatcherError, EngineGoneError, ExecutionTimeoutError
from cobatch.batcher.lane import BatchWorker
from cobatch.engines.errors import EngineDeadError, EngineRunError
from tests.support.examples import examples
from tests.support.virtual.loop import Call, FakeEngine, FakeWorker, calls, run

RUN_S = 0.010
EPSILON_S = 1e-6
LIMIT_S = 0.100


class House:
    """A batcher with several engines; those that are lost, and why."""

    def __init__(self, *workers: FakeWorker, **options: object) -> None:
        loop = asyncio.get_running_loop()
        self.lost: list[tuple[BatchWorker, BatcherError]] = []
        self.workers = list(workers)
        self.batcher = Batcher(
            "fake",
            self.workers,
            max_queue_rows=1000,
            on_lost=lambda worker, why: self.lost.append((worker, why)),
            loop=loop,
            clock=loop.time,
            **options,  # type: ignore[arg-type]
        )

    def submit(self, *callers: Call) -> None:
        for caller in callers:
            self.batcher.submit(caller)


def engines(count: int, slots: int = 2, run_s: float = RUN_S) -> list[FakeWorker]:
    return [FakeWorker(FakeEngine(slots=slots), lambda rows: run_s) for _ in range(count)]


@pytest.mark.parametrize("count", [1, 2, 3])
def test_as_many_batches_run_at_once_as_there_are_engines(count: int) -> None:
    async def main() -> None:
        house = House(*engines(count))
        callers = calls(8 * 12)
        house.submit(*callers)
        await asyncio.sleep(12 / count * RUN_S + EPSILON_S)
        for caller in callers:
            caller.check()
        assert [len(worker.ran) for worker in house.workers] == [12 // count] * count

    run(main())


def test_an_idle_engine_takes_queued_rows_while_another_runs() -> None:
    async def main() -> None:
        house = House(*engines(2))
        first, second, third = calls(3)
        for caller in (first, second, third):
            house.submit(caller)
            await asyncio.sleep(RUN_S / 4)
        await asyncio.sleep(1)
        assert first.at_s == pytest.approx(RUN_S)
        assert second.at_s == pytest.approx(1.25 * RUN_S)
        # Both were busy: it waits for the first that is free.
        assert third.at_s == pytest.approx(2 * RUN_S)

    run(main())


def test_the_engine_that_will_be_free_first_gets_the_next_full_batch() -> None:
    async def main() -> None:
        slow = FakeWorker(FakeEngine(), lambda rows: 5 * RUN_S)
        quick = FakeWorker(FakeEngine(), lambda rows: RUN_S)
        for worker in (slow, quick):
            worker.warmup_us = {8: RUN_S * 1e6}
        house = House(slow, quick)
        callers = calls(8 * 12)
        house.submit(*callers)
        await asyncio.sleep(1)
        for caller in callers:
            caller.check()
        assert len(quick.ran) > 2 * len(slow.ran)

    run(main())


def test_what_kills_one_engine_is_not_tried_on_another() -> None:
    """It may be the input. The others go on, with what waited behind it too."""

    async def main() -> None:
        house = House(*engines(2))
        dies, goes_on = house.workers
        dies.engine.fails = lambda rows: EngineDeadError("an illegal access")
        callers = calls(8 * 6)
        house.submit(*callers)
        await asyncio.sleep(1)
        answers = Counter(type(caller.answer) for caller in callers)
        assert answers[EngineGoneError] == 8 * len(dies.ran)
        assert len(dies.ran) <= 2  # the batches that it had when it died
        assert len(house.batcher.lanes) == 1
        assert house.batcher.admission.closed is None
        ((lost, why),) = house.lost
        assert lost is dies
        assert isinstance(why, EngineGoneError)
        after = calls(8)
        house.submit(*after)
        await asyncio.sleep(1)
        for caller in after:
            caller.check()
        assert sum(rows for _, rows in goes_on.ran) == 8 * 6 - 8 * len(dies.ran) + 8

    run(main())


def test_without_an_engine_requests_are_refused_until_there_is_one() -> None:
    async def main() -> None:
        house = House(*engines(2))
        for worker in house.workers:
            worker.engine.fails = lambda rows: EngineDeadError("an illegal access")
        callers = calls(8 * 6)
        house.submit(*callers)
        await asyncio.sleep(1)
        assert all(isinstance(caller.answer, EngineGoneError) for caller in callers)
        assert len(house.batcher.lanes) == 0
        with pytest.raises(EngineGoneError):
            house.submit(*calls(1))
        house.batcher.use(*engines(1))
        after = calls(20)
        house.submit(*after)
        await asyncio.sleep(1)
        for caller in after:
            caller.check()
        assert len(house.lost) == 2

    run(main())


def test_a_hung_engine_does_not_stop_the_others() -> None:
    """Its batch is given up; batches that it had not begun run elsewhere."""

    async def main() -> None:
        hangs, goes_on = FakeWorker(FakeEngine(), lambda rows: 1e6), engines(1)[0]
        house = House(hangs, goes_on, execution_timeout_ms=LIMIT_S * 1000)
        callers = calls(8 * 6)
        house.submit(*callers)
        await asyncio.sleep(1)
        gone = [caller for caller in callers if not caller.answers or isinstance(caller.answer, Exception)]
        assert len(gone) == 8
        assert all(isinstance(caller.answer, ExecutionTimeoutError) for caller in gone)
        assert len(house.batcher.lanes) == 1
        house.batcher.gone(EngineRunError("no other could be opened"))
        assert house.batcher.admission.closed is None, "there is another one"
        await house.batcher.drain(1)

    run(main())


@examples(60)
@given(
    counts=st.lists(st.integers(1, 20), min_size=1, max_size=20),
    waits=st.lists(st.sampled_from([0.0, RUN_S / 3, RUN_S, 5 * RUN_S]), min_size=1, max_size=20),
    lanes=st.integers(1, 4),
    slots=st.integers(1, 3),
    fails=st.sets(st.integers(0, 400), max_size=5),
)
def test_every_request_is_answered_once(
    counts: list[int], waits: list[float], lanes: int, slots: int, fails: set[int]
) -> None:
    """On any engine, whatever fails."""

    async def main() -> None:
        house = House(*engines(lanes, slots))
        for worker in house.workers:
            worker.engine.fails = lambda rows: (
                EngineRunError("bad rows") if fails & set((rows[:, 0] // 1000).tolist()) else None
            )
        callers = calls(sum(counts))
        left = list(callers)
        for number, count in enumerate(counts):
            house.submit(*(left.pop(0) for _ in range(count)))
            await asyncio.sleep(waits[number % len(waits)])
        await asyncio.sleep(100)
        for number, caller in enumerate(callers):
            if number in fails:
                assert isinstance(caller.answer, BatcherError)
            else:
                caller.check()
        assert house.batcher.queue.rows == house.batcher.running_batches == 0

    run(main())
