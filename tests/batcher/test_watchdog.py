"""A run that does not end: its callers are told, what waited is run on another engine, nothing is lost.

In virtual time, but for the last part, which is the model's: how an engine is opened again.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterator
from unittest import mock

import pytest

import cobatch.server.inference.model
from cobatch.batcher.batcher import Batcher
from cobatch.batcher.errors import (
    AbandonedError,
    BatcherError,
    BatchFailedError,
    DrainingError,
    EngineGoneError,
    ExecutionTimeoutError,
    ExpiredError,
    InputRejectedError,
)
from cobatch.batcher.lane import BatchWorker
from cobatch.batcher.request import Batch, Request, State
from cobatch.engines.errors import EngineError, EngineRunError
from cobatch.engines.worker import Job
from cobatch.server.inference.model import Model
from cobatch.server.settings.schema import ModelSettings
from tests.support.http.serving import DEADLINE_S, GatedEngine
from tests.support.virtual.loop import Call, FakeEngine, FakeWorker, calls, make_batcher, run
from tests.support.virtual.tenants import CallWithCallback, Metered

RUN_S = 0.010
LIMIT_S = 0.100
REOPEN_S = 0.200
COMES_BACK_S = 5.0
EPSILON_S = 1e-6


class Hanging(Metered):
    """The runs with these numbers take five seconds, against a limit of a tenth."""

    def __init__(self, *hang: int, slots: int = 2) -> None:
        super().__init__()
        self.engine.slots = slots
        self.hang = hang

    def time_s(self, job: Job) -> float:
        run_s = super().time_s(job)
        return COMES_BACK_S if self.batches - 1 in self.hang else run_s


class House:
    """A batcher whose engine can be opened again, and how often it was."""

    def __init__(self, worker: FakeWorker, *others: FakeWorker, slots: int = 2) -> None:
        self.workers = [worker, *(others or (FakeWorker(FakeEngine(slots=slots)),))]
        self.reopened_s: list[float] = []
        self.batcher: Batcher = make_batcher(
            worker, execution_timeout_ms=LIMIT_S * 1000, on_lost=self._on_lost
        )

    def _on_lost(self, worker: BatchWorker, why: BatcherError) -> None:
        loop = asyncio.get_running_loop()
        self.reopened_s.append(loop.time() + REOPEN_S)
        loop.call_later(REOPEN_S, self._open, self.workers[len(self.reopened_s)])

    def _open(self, worker: FakeWorker) -> None:
        self.batcher.use(worker)

    def submit(self, *callers: Call) -> None:
        for caller in callers:
            self.batcher.submit(caller)


def check_hung(*callers: Call) -> None:
    for caller in callers:
        assert isinstance(caller.answer, ExecutionTimeoutError)
        assert caller.answer.limit_s == LIMIT_S


def check_at_rest(batcher: Batcher, slots: int = 2) -> None:
    """As it was before the first request."""
    assert len(batcher.lanes) == 1
    assert batcher.queue.rows == 0
    assert batcher.running_batches == 0
    assert sorted(batcher._lanes.lanes[0].free_slots) == list(range(slots))


# The limit


@pytest.mark.parametrize(("more_s", "hangs"), [(-EPSILON_S, False), (EPSILON_S, True)])
def test_the_limit(more_s: float, hangs: bool) -> None:
    async def main() -> None:
        house = House(FakeWorker(FakeEngine(), lambda rows: LIMIT_S + more_s))
        callers = calls(3)
        house.submit(*callers)
        await asyncio.sleep(1)
        if hangs:
            check_hung(*callers)
            assert [caller.at_s for caller in callers] == pytest.approx([LIMIT_S] * 3)
        else:
            for caller in callers:
                caller.check()
        assert house.batcher.counters.hung == hangs
        assert len(house.reopened_s) == hangs

    run(main())


@pytest.mark.parametrize("slots", [1, 2, 3])
def test_the_limit_does_not_include_the_wait_for_the_engine(slots: int) -> None:
    """Each run takes most of the limit, and those behind it wait for more than it."""

    async def main() -> None:
        house = House(FakeWorker(FakeEngine(slots=slots), lambda rows: 0.9 * LIMIT_S))
        callers = calls(64)
        house.submit(*callers)
        await asyncio.sleep(3)
        for caller in callers:
            caller.check()
        assert house.batcher.counters.hung == 0
        assert house.batcher._lanes.lanes[0].watch is None, "nothing runs, and nothing is watched"

    run(main())


@pytest.mark.parametrize(("more_s", "hangs"), [(-EPSILON_S, False), (EPSILON_S, True)])
def test_zeros_that_tell_whose_fault_it_is_have_the_limit_for_themselves(more_s: float, hangs: bool) -> None:
    """A run of 0.9 of the limit that fails, and then zeros in its place: the engine works well."""

    async def main() -> None:
        house = House(worker := FakeWorker(FakeEngine(), lambda rows: 0.9 * LIMIT_S))
        house.workers[0].engine.fails = lambda rows: EngineRunError("bad row") if rows.any() else None
        worker.zeros_s = LIMIT_S + more_s
        first, behind = Call([[1, 1]]), Call([[0, 0]])
        house.submit(first)
        await asyncio.sleep(0.5 * LIMIT_S)
        house.submit(behind)
        await asyncio.sleep(1)
        if hangs:
            check_hung(first)
            assert first.at_s == pytest.approx(1.9 * LIMIT_S)
        else:
            assert isinstance(first.answer, InputRejectedError)
        behind.check()
        assert house.batcher.counters.hung == hangs

    run(main())


def test_without_a_limit_there_is_no_watchdog() -> None:
    async def main() -> None:
        batcher = make_batcher(FakeWorker(FakeEngine(), lambda rows: 1e6))
        (caller,) = calls(1)
        batcher.submit(caller)
        await asyncio.sleep(2e6)
        caller.check()

    run(main())


# The fate of all requests


def test_batches_that_had_not_begun_run_first_on_the_next_engine() -> None:
    async def main() -> None:
        house = House(Hanging(0))
        batcher, (_, second) = house.batcher, house.workers
        callers = calls(20)
        house.submit(*callers)
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        assert batcher.running_batches == 2
        assert batcher.queue.rows == 4
        await asyncio.sleep(LIMIT_S + EPSILON_S)
        check_hung(*callers[:8])
        assert len(batcher.lanes) == 0
        assert batcher.running_batches == 0
        assert batcher.queue.rows == 12, "accepted, and it may yet be answered"
        late = Call([[9, 9]])
        house.submit(late)
        await asyncio.sleep(1)
        for caller in (*callers[8:], late):
            caller.check()
        assert callers[8].at_s == pytest.approx(LIMIT_S + REOPEN_S + RUN_S)
        assert [start_s for start_s, _ in second.ran] == pytest.approx([0.300, 0.310])
        assert [rows for _, rows in second.ran] == [8, 5]
        assert batcher.counters.hung == 1
        assert batcher.counters.failed == 8
        assert batcher.counters.reasons["retry"] == 1
        check_at_rest(batcher)

    run(main())


def test_a_hung_batch_is_reported_once() -> None:
    """With its requests, which know it; also that which was sent behind it, when it has run elsewhere."""

    async def main() -> None:
        house = House(Hanging(0))
        told: list[tuple[Batch, list[Request]]] = []
        house.batcher.watch_batches(lambda batch: told.append((batch, list(batch.requests))))
        callers = calls(16)
        house.submit(*callers)
        await asyncio.sleep(COMES_BACK_S + 1)
        check_hung(*callers[:8])
        assert [requests for _, requests in told] == [callers[:8], callers[8:]]
        (hung, _), (good, _) = told
        assert [caller.batch for caller in callers] == [hung] * 8 + [good] * 8
        assert (hung.failed, good.failed) == (True, False)
        times = [hung.gathered_s, hung.dispatched_s, hung.started_s, hung.finished_s, hung.answered_s]
        assert times == pytest.approx([0, 0, 0, LIMIT_S, LIMIT_S])
        assert not hung.requests

    run(main())


def test_a_run_behind_another_began_when_that_ended() -> None:
    async def main() -> None:
        house = House(Hanging(1))
        told: list[Batch] = []
        house.batcher.watch_batches(told.append)
        callers = calls(16)
        house.submit(*callers)
        await asyncio.sleep(1)
        check_hung(*callers[8:])
        hung = told[1]
        assert (hung.dispatched_s, hung.started_s) == pytest.approx((0, RUN_S))
        assert hung.finished_s == pytest.approx(RUN_S + LIMIT_S)

    run(main())


def test_a_late_outcome_of_a_hung_engine_is_ignored() -> None:
    """The batch that hung, and the one that was given to it beside: both come back after five seconds."""

    async def main() -> None:
        first = Hanging(0)
        house = House(first)
        batcher = house.batcher
        callers = calls(16)
        house.submit(*callers)
        await asyncio.sleep(1)
        finished_s, rows, batches = (
            batcher.counters.last_finished_s,
            batcher.counters.rows,
            batcher.counters.batches,
        )
        await asyncio.sleep(COMES_BACK_S)
        assert len(first.ran) == 2, "it ran the other one, too"
        assert (batcher.counters.last_finished_s, batcher.counters.rows) == (finished_s, rows)
        assert batcher.counters.batches == batches == 1
        check_hung(*callers[:8])
        for caller in callers[8:]:
            caller.check()
        check_at_rest(batcher)
        # And it has not become a third slot, or a free one that is taken.
        more = calls(40)
        house.submit(*more)
        await asyncio.sleep(1)
        for caller in more:
            caller.check()
        check_at_rest(batcher)

    run(main())


def test_what_hung_teaches_nothing_about_latency() -> None:
    async def main() -> None:
        house = House(Hanging(0))
        before_s = house.batcher._scheduler.run_times.expected_s(8)
        house.submit(*calls(8))
        await asyncio.sleep(1)
        assert house.batcher._scheduler.run_times.expected_s(8) == before_s

    run(main())


@pytest.mark.parametrize("times", [2, 5])
def test_the_next_engine_may_hang_as_well(times: int) -> None:
    async def main() -> None:
        house = House(*(Hanging(0) for _ in range(times)), Hanging())
        callers = calls(8 * (times + 1))
        house.submit(*callers)
        await asyncio.sleep(60)
        check_hung(*callers[: 8 * times])
        for caller in callers[8 * times :]:
            caller.check()
        assert house.batcher.counters.hung == times
        check_at_rest(house.batcher)

    run(main())


def test_the_next_engine_may_have_fewer_slots() -> None:
    async def main() -> None:
        house = House(Hanging(0, slots=3), Hanging(slots=1))
        callers = calls(40)
        house.submit(*callers)
        await asyncio.sleep(10)
        check_hung(*callers[:8])
        for caller in callers[8:]:
            caller.check()
        check_at_rest(house.batcher, slots=1)

    run(main())


def test_a_batch_that_cannot_be_packed_is_not_what_hangs() -> None:
    """It fails by itself; the limit runs for the one behind it."""

    async def main() -> None:
        house = House(Hanging(0))
        (bad,) = calls(1)
        bad.payloads = [b"short"]
        good = calls(8)
        house.submit(bad)
        await asyncio.sleep(0)
        house.submit(*good)
        await asyncio.sleep(1)
        assert isinstance(bad.answer, BatchFailedError)
        check_hung(*good)
        check_at_rest(house.batcher)

    run(main())


def test_a_split_request_fails_with_the_part_that_hung() -> None:
    async def main() -> None:
        house = House(Hanging(1))
        large = Call([[n] for n in range(40)])
        house.submit(large)
        await asyncio.sleep(1)
        check_hung(large)
        assert house.batcher.counters.failed == 1
        check_at_rest(house.batcher)

    run(main())


def test_a_partial_request_keeps_the_parts_that_did_not_hang() -> None:
    async def main() -> None:
        house = House(Hanging(1))
        large = Call([[n] for n in range(40)])
        large.partial = True
        house.submit(large)
        await asyncio.sleep(1)
        assert not isinstance(large.answer, Exception)
        assert large.answer.ravel().tolist() == [0 if 8 <= n < 16 else 2 * n for n in range(40)]
        ((first, rows, error),) = large.failures
        assert (first, rows) == (8, 8)
        assert isinstance(error, ExecutionTimeoutError)
        check_at_rest(house.batcher)

    run(main())


def test_halves_of_a_failed_batch_survive_a_hang() -> None:
    async def main() -> None:
        first, second = Hanging(1), Hanging()
        for worker in (first, second):
            worker.engine.fails = lambda rows: EngineRunError("bad") if -666 in rows else None
        house = House(first, second)
        callers = [Call([[-666 if n == 6 else n]]) for n in range(8)]
        house.submit(*callers)
        await asyncio.sleep(1)
        check_hung(*callers[:4])
        for n, caller in enumerate(callers[4:], 4):
            if n == 6:
                assert isinstance(caller.answer, InputRejectedError)
            else:
                caller.check()
        check_at_rest(house.batcher)

    run(main())


# Who leaves meanwhile


@pytest.mark.parametrize(
    "at_s",
    [
        0.0,
        LIMIT_S / 2,
        LIMIT_S - EPSILON_S,
        LIMIT_S + EPSILON_S,
        LIMIT_S + REOPEN_S / 2,
        0.300 + EPSILON_S,
        0.5,
    ],
)
@pytest.mark.parametrize("who", ["hung", "beside", "queued", "split", "all"])
def test_a_caller_may_leave_at_any_moment(at_s: float, who: str) -> None:
    async def main() -> None:
        house = House(Hanging(0))
        batcher = house.batcher
        hung, beside, queued = calls(8), calls(8), calls(3)
        split = Call([[n, n] for n in range(20)])
        house.submit(*hung, *beside, *queued, split)
        every_call = [*hung, *beside, *queued, split]
        leaving = {
            "hung": hung[:2], "beside": beside[:2], "queued": queued[:2], "split": [split], "all": every_call
        }[who]  # fmt: skip
        await asyncio.sleep(at_s)
        gone = [caller for caller in leaving if not caller.answers]
        for caller in leaving:
            batcher.cancel(caller)
            batcher.cancel(caller)
        assert all(caller.state is State.CANCELLED for caller in gone)
        await asyncio.sleep(COMES_BACK_S + 1)
        for caller in every_call:
            if caller in gone:
                assert caller.answers == []
            elif caller in hung:
                check_hung(caller)
            else:
                caller.check()
        assert batcher.counters.cancelled == len(gone)
        check_at_rest(batcher)
        (after,) = calls(1)
        house.submit(after)
        await asyncio.sleep(1)
        after.check()

    run(main())


def test_a_deadline_is_kept_while_no_engine_is_there() -> None:
    async def main() -> None:
        house = House(Hanging(0))
        house.submit(*calls(1))
        await asyncio.sleep(LIMIT_S + EPSILON_S)
        short, long = calls(2)
        short.timeout_s, long.timeout_s = 0.150, 0.250
        house.submit(short, long)
        await asyncio.sleep(1)
        assert isinstance(short.answer, ExpiredError)
        long.check()

    run(main())


def test_a_callback_may_submit_again_at_once() -> None:
    """A client that tries again when it is told 504."""

    async def main() -> None:
        house = House(Hanging(0))
        again: list[Call] = []

        def submit(_: Call) -> None:
            again.append(Call([[5, 5]]))
            house.submit(again[-1])

        house.submit(*(CallWithCallback(1, 2, submit) for _ in range(8)))
        await asyncio.sleep(1)
        assert len(again) == 8
        for caller in again:
            caller.check()
        check_at_rest(house.batcher)

    run(main())


# There is no other engine


def test_one_that_cannot_be_opened_again_is_gone() -> None:
    async def main() -> None:
        batcher = make_batcher(Hanging(0), execution_timeout_ms=LIMIT_S * 1000)
        callers = calls(20)
        for caller in callers:
            batcher.submit(caller)
        await asyncio.sleep(1)
        check_hung(*callers[:8])
        for caller in callers[8:]:
            assert isinstance(caller.answer, EngineGoneError)
            assert caller.at_s == pytest.approx(LIMIT_S)
        with pytest.raises(EngineGoneError):
            batcher.submit(Call([[1, 1]]))
        await asyncio.sleep(COMES_BACK_S)

    run(main())


def test_if_no_engine_can_be_opened_every_request_fails() -> None:
    async def main() -> None:
        house = House(Hanging(0))
        house._open = lambda worker: house.batcher.gone(EngineError("no memory"))  # type: ignore[method-assign]
        callers = calls(20)
        house.submit(*callers)
        await asyncio.sleep(1)
        check_hung(*callers[:8])
        for caller in callers[8:]:
            assert isinstance(caller.answer, EngineGoneError)
            assert caller.at_s == pytest.approx(LIMIT_S + REOPEN_S)
        assert isinstance(house.batcher.admission.closed, EngineGoneError)

    run(main())


# Draining


def test_draining_waits_for_the_next_engine() -> None:
    async def main() -> None:
        house = House(Hanging(0))
        callers = calls(20)
        house.submit(*callers)
        await asyncio.sleep(LIMIT_S + EPSILON_S)
        assert await house.batcher.drain(10)
        for caller in callers[8:]:
            caller.check()
        assert asyncio.get_running_loop().time() < 1

    run(main())


def test_draining_ends_where_opening_again_fails() -> None:
    async def main() -> None:
        house = House(Hanging(0))
        house._open = lambda worker: house.batcher.gone(EngineError("no memory"))  # type: ignore[method-assign]
        callers = calls(20)
        house.submit(*callers)
        await asyncio.sleep(LIMIT_S + EPSILON_S)
        assert await house.batcher.drain(100)
        assert asyncio.get_running_loop().time() == pytest.approx(LIMIT_S + REOPEN_S)

    run(main())


def test_a_server_that_stops_opens_no_engine_again() -> None:
    async def main() -> None:
        house = House(Hanging(0))
        callers = calls(20)
        house.submit(*callers)
        await asyncio.sleep(LIMIT_S / 2)
        assert await house.batcher.drain(100)
        assert asyncio.get_running_loop().time() == pytest.approx(LIMIT_S)
        check_hung(*callers[:8])
        assert all(isinstance(caller.answer, EngineGoneError) for caller in callers[8:])
        assert house.reopened_s == []

    run(main())


def test_requests_left_after_the_time_to_drain_are_abandoned() -> None:
    async def main() -> None:
        house = House(Hanging(0))
        callers = calls(20)
        house.submit(*callers)
        await asyncio.sleep(LIMIT_S + EPSILON_S)
        assert not await house.batcher.drain(REOPEN_S / 2)
        assert all(isinstance(caller.answer, AbandonedError) for caller in callers[8:])
        with pytest.raises(DrainingError):
            house.submit(*calls(1))
        await asyncio.sleep(COMES_BACK_S)

    run(main())


# The model


@contextlib.contextmanager
def opening(*engines: FakeEngine | EngineError) -> Iterator[None]:
    """The results of opening a model, one after another."""
    left = list(engines)

    def load(*_: object, **__: object) -> FakeEngine:
        engine = left.pop(0)
        if isinstance(engine, EngineError):
            raise engine
        return engine

    with mock.patch.object(cobatch.server.inference.model, "load_engine", load):
        yield


async def loaded() -> Model:
    model = Model(ModelSettings(path="gate", max_batch_size=4, execution_timeout_ms=LIMIT_S * 1000))
    await model.load()
    return model


class Waited(Call):
    """A caller in real time."""

    __slots__ = ("told",)

    def __init__(self, values: list[list[int]]) -> None:
        super().__init__(values)
        self.told = asyncio.Event()

    def done(self) -> None:
        super().done()
        self.told.set()


async def answered(*callers: Waited) -> None:
    async with asyncio.timeout(DEADLINE_S):
        for caller in callers:
            await caller.told.wait()


async def test_a_model_whose_engine_hangs_opens_another_one() -> None:
    hangs, works = GatedEngine(), GatedEngine()
    with opening(hangs, works):
        model = await loaded()
        try:
            batcher = model.loaded_batcher
            works.may_open.clear()
            hangs.hold()
            callers = [Waited([[n]]) for n in range(10)]
            for caller in callers:
                batcher.submit(caller)
            await answered(*callers[:4])
            check_hung(*callers[:4])
            assert not model.ready
            assert not model.dead
            works.may_open.set()
            await answered(*callers[4:])
            for caller in callers[4:]:
                caller.check()
            assert model.ready
            assert works.ran[-2:] == [[4, 5, 6, 7], [8, 9]]
        finally:
            hangs.release()
            await model.stop(1)
        assert await asyncio.to_thread(_joined, model)


def _joined(model: Model) -> bool:
    return all(worker.join(DEADLINE_S) for worker in model._hung)


async def test_a_model_that_cannot_be_opened_again_is_dead() -> None:
    hangs = GatedEngine()
    with opening(hangs, EngineError("no such device")):
        model = await loaded()
        try:
            hangs.hold()
            callers = [Waited([[n]]) for n in range(10)]
            for caller in callers:
                model.loaded_batcher.submit(caller)
            await answered(*callers)
            check_hung(*callers[:4])
            assert all(isinstance(caller.answer, EngineGoneError) for caller in callers[4:])
            assert model.dead
            assert not model.ready
            assert isinstance(model.loaded_batcher.refusal(), EngineGoneError)
        finally:
            hangs.release()
            await model.stop(1)
        assert await asyncio.to_thread(_joined, model)
