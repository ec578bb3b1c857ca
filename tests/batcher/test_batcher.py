"""The batcher in virtual time: when batches leave, each caller's rows, the cost of a failure."""

from __future__ import annotations

import asyncio
import logging
import math
from functools import partial

import numpy as np
import pytest

from cobatch.batcher.errors import (
    AbandonedError,
    BatchFailedError,
    DrainingError,
    EngineGoneError,
    ExpiredError,
    InputRejectedError,
    QueueFullError,
    TooManyRowsError,
)
from cobatch.batcher.request import State
from cobatch.engines.errors import EngineDeadError, EngineRunError
from cobatch.engines.worker import Outcome
from tests.support.virtual.loop import Call, FakeEngine, FakeWorker, calls, make_batcher, run

RUN_S = 0.010
EPSILON_S = 1e-6


def test_requests_of_one_iteration_ride_together() -> None:
    async def main() -> None:
        worker = FakeWorker(FakeEngine())
        batcher = make_batcher(worker)
        callers = calls(5)
        for caller in callers:
            batcher.submit(caller)
        await asyncio.sleep(1)
        assert worker.ran == [(0.0, 5)]
        for caller in callers:
            caller.check()
            assert caller.at_s == pytest.approx(RUN_S)

    run(main())


def test_nothing_waits_while_the_engine_is_idle() -> None:
    async def main() -> None:
        worker = FakeWorker(FakeEngine())
        batcher = make_batcher(worker)
        (caller,) = calls(1)
        batcher.submit(caller)
        await asyncio.sleep(1)
        assert caller.at_s == pytest.approx(RUN_S)
        assert batcher.counters.reasons == {"idle": 1}

    run(main())


def test_the_next_batch_grows_while_the_engine_is_busy() -> None:
    async def main() -> None:
        worker = FakeWorker(FakeEngine())
        batcher = make_batcher(worker)
        callers = calls(5)
        for caller in callers:
            batcher.submit(caller)
            await asyncio.sleep(0.001)
        await asyncio.sleep(1)
        assert [rows for _, rows in worker.ran] == [1, 4]
        assert worker.ran[1][0] == pytest.approx(RUN_S)

    run(main())


def test_a_full_batch_lies_ready_when_the_engine_finishes() -> None:
    async def main() -> None:
        worker = FakeWorker(FakeEngine(max_batch_size=4))
        batcher = make_batcher(worker)
        first, *others = calls(5)
        batcher.submit(first)
        await asyncio.sleep(0.001)
        for caller in others:
            batcher.submit(caller)
        await asyncio.sleep(0.001)
        assert batcher.running_batches == 2, "the full batch left although the engine is busy"
        assert batcher.queue.rows == 0
        await asyncio.sleep(1)
        assert batcher.counters.reasons == {"idle": 1, "full": 1}

    run(main())


@pytest.mark.parametrize(("second_at_s", "together"), [(0.005 - EPSILON_S, True), (0.005 + EPSILON_S, False)])
def test_the_delay_runs_from_the_oldest_request(second_at_s: float, together: bool) -> None:
    async def main() -> None:
        worker = FakeWorker(FakeEngine())
        batcher = make_batcher(worker, max_delay_ms=5)
        first, second = calls(2)
        batcher.submit(first)
        await asyncio.sleep(second_at_s)
        batcher.submit(second)
        await asyncio.sleep(1)
        assert worker.ran[0][0] == pytest.approx(0.005)
        assert worker.ran[0][1] == (2 if together else 1)
        first.check()
        second.check()

    run(main())


def test_a_full_batch_does_not_wait_for_the_delay() -> None:
    async def main() -> None:
        worker = FakeWorker(FakeEngine(max_batch_size=3))
        batcher = make_batcher(worker, max_delay_ms=50)
        for caller in calls(3):
            batcher.submit(caller)
        await asyncio.sleep(1)
        assert worker.ran == [(0.0, 3)]

    run(main())


def test_limits_are_in_rows() -> None:
    async def main() -> None:
        worker = FakeWorker(FakeEngine(max_batch_size=4))
        batcher = make_batcher(worker)
        three, two, one = Call([[1], [2], [3]]), Call([[4], [5]]), Call([[6]])
        for caller in (three, two, one):
            batcher.submit(caller)
        await asyncio.sleep(1)
        assert [rows for _, rows in worker.ran] == [3, 3], "requests stay whole and in order"
        for caller in (three, two, one):
            caller.check()

    run(main())


def test_a_request_larger_than_a_batch_is_split_and_joined() -> None:
    async def main() -> None:
        worker = FakeWorker(FakeEngine(max_batch_size=4))
        batcher = make_batcher(worker)
        large, small = Call([[n, n + 1] for n in range(10)]), Call([[77, 78]])
        batcher.submit(large)
        batcher.submit(small)
        await asyncio.sleep(1)
        large.check()
        small.check()
        assert [rows for _, rows in worker.ran] == [4, 4, 3], "the small one rides with the last part"
        assert sum(figures.requests for figures in batcher.counters.by_rows.values()) == 2

    run(main())


def test_a_part_that_fails_fails_the_whole_once_and_frees_the_queue() -> None:
    async def main() -> None:
        engine = FakeEngine(max_batch_size=2, slots=1)
        engine.fails = lambda rows: EngineRunError("bad row") if 3 in rows else None
        batcher = make_batcher(FakeWorker(engine))
        large = Call([[n] for n in range(1, 12)])
        batcher.submit(large)
        await asyncio.sleep(1)
        assert isinstance(large.answer, InputRejectedError)
        assert batcher.queue.rows == 0
        assert batcher.running_batches == 0

    run(main())


def test_different_shapes_are_not_mixed_and_do_not_hold_each_other_up() -> None:
    async def main() -> None:
        worker = FakeWorker(FakeEngine(max_batch_size=4))
        batcher = make_batcher(worker)
        narrow, wide = calls(6, width=2), calls(2, width=3)
        batcher.submit(narrow[0])
        await asyncio.sleep(0.001)
        for caller in (*wide, *narrow[1:4]):
            batcher.submit(caller)
        await asyncio.sleep(0.001)
        for caller in narrow[4:]:
            batcher.submit(caller)
        await asyncio.sleep(1)
        for caller in narrow + wide:
            caller.check()
        assert sorted(rows for _, rows in worker.ran) == [1, 1, 2, 4]
        assert max(caller.at_s for caller in wide) <= 3 * RUN_S + EPSILON_S

    run(main())


def test_a_full_queue_refuses_and_says_when_to_come_back() -> None:
    async def main() -> None:
        worker = FakeWorker(FakeEngine(max_batch_size=2, slots=1))
        batcher = make_batcher(worker, max_queue_rows=3)
        accepted = calls(5)
        for caller in accepted[:2]:
            batcher.submit(caller)
        await asyncio.sleep(0.001)
        for caller in accepted[2:]:
            batcher.submit(caller)
        assert isinstance(batcher.refusal(), QueueFullError)
        with pytest.raises(QueueFullError) as refused:
            batcher.submit(Call([[9, 9]]))
        assert refused.value.queued_rows == 3
        assert refused.value.retry_after_s > 0
        assert isinstance(batcher.refusal(rows=4), TooManyRowsError)
        await asyncio.sleep(1)
        for caller in accepted:
            caller.check()
        assert batcher.refusal(rows=3) is None
        assert batcher.counters.refused == 1

    run(main())


def test_a_caller_that_left_is_dropped_before_packing_and_counted() -> None:
    async def main() -> None:
        worker = FakeWorker(FakeEngine())
        batcher = make_batcher(worker)
        first, leaving, staying = calls(3)
        batcher.submit(first)
        await asyncio.sleep(0.001)
        batcher.submit(leaving)
        batcher.submit(staying)
        batcher.cancel(leaving)
        batcher.cancel(leaving)
        assert batcher.queue.rows == 1
        await asyncio.sleep(1)
        assert [rows for _, rows in worker.ran] == [1, 1]
        assert leaving.answers == []
        assert batcher.counters.cancelled == 1
        staying.check()

    run(main())


def test_cancelling_the_only_queued_request_leaves_nothing_to_run() -> None:
    async def main() -> None:
        worker = FakeWorker(FakeEngine())
        batcher = make_batcher(worker)
        (caller,) = calls(1)
        batcher.submit(caller)
        batcher.cancel(caller)
        await asyncio.sleep(1)
        assert worker.ran == []
        (again,) = calls(1)
        batcher.submit(again)
        await asyncio.sleep(1)
        again.check()

    run(main())


def test_a_caller_that_leaves_while_its_batch_runs_hears_nothing() -> None:
    async def main() -> None:
        batcher = make_batcher(FakeWorker(FakeEngine()))
        leaving, staying = calls(2)
        batcher.submit(leaving)
        batcher.submit(staying)
        await asyncio.sleep(RUN_S / 2)
        batcher.cancel(leaving)
        await asyncio.sleep(1)
        assert leaving.answers == []
        assert leaving.state is State.CANCELLED
        staying.check()

    run(main())


def test_cancelling_a_split_request_takes_all_its_parts_out() -> None:
    async def main() -> None:
        worker = FakeWorker(FakeEngine(max_batch_size=2, slots=1))
        batcher = make_batcher(worker)
        large = Call([[n] for n in range(9)])
        batcher.submit(large)
        await asyncio.sleep(RUN_S / 2)
        batcher.cancel(large)
        assert batcher.queue.rows == 0
        await asyncio.sleep(1)
        assert large.answers == []
        assert len(worker.ran) == 1
        assert batcher.counters.cancelled == 1

    run(main())


@pytest.mark.parametrize("bad", [[0], [5], [0, 7], [3, 4], list(range(8))])
def test_only_the_requests_that_fail_by_themselves_fail(
    bad: list[int], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.CRITICAL)

    async def main() -> None:
        engine = FakeEngine(max_batch_size=8)
        engine.fails = lambda rows: EngineRunError("poisoned") if (rows == -666).any() else None
        worker = FakeWorker(engine)
        batcher = make_batcher(worker)
        callers = [Call([[-666 if n in bad else n]]) for n in range(8)]
        for caller in callers:
            batcher.submit(caller)
        await asyncio.sleep(1)
        for n, caller in enumerate(callers):
            if n in bad:
                assert isinstance(caller.answer, InputRejectedError)
            else:
                caller.check()
        extra_runs = len(worker.ran) - 1
        assert extra_runs <= 2 * math.log2(8) * len(bad)
        (after,) = calls(1)
        batcher.submit(after)
        await asyncio.sleep(1)
        after.check()

    run(main())


def test_the_callers_reference_is_in_the_log(caplog: pytest.LogCaptureFixture) -> None:
    async def main() -> None:
        engine = FakeEngine()
        engine.fails = lambda rows: EngineRunError("the engine's own words")
        batcher = make_batcher(FakeWorker(engine))
        (caller,) = calls(1)
        batcher.submit(caller)
        await asyncio.sleep(1)
        assert isinstance(caller.answer, BatchFailedError)
        assert caller.answer.reference in caplog.text
        assert "the engine's own words" in caplog.text
        assert "own words" not in str(caller.answer), "internals stay in the log"

    run(main())


def test_a_dead_engine_fails_everyone_at_once_and_refuses_from_then_on() -> None:
    async def main() -> None:
        engine = FakeEngine(max_batch_size=2, slots=1)
        engine.fails = lambda rows: EngineDeadError("gone")
        worker = FakeWorker(engine)
        batcher = make_batcher(worker)
        callers = calls(6)
        for caller in callers:
            batcher.submit(caller)
        await asyncio.sleep(1)
        for caller in callers:
            assert isinstance(caller.answer, EngineGoneError)
        assert len(worker.ran) == 1, "a dead engine is not asked again"
        with pytest.raises(EngineGoneError):
            batcher.submit(Call([[1, 1]]))

    run(main())


def test_a_callback_that_raises_costs_no_other_request_its_answer(caplog: pytest.LogCaptureFixture) -> None:
    class Broken(Call):
        def done(self) -> None:
            raise ValueError("broken caller")

    async def main() -> None:
        batcher = make_batcher(FakeWorker(FakeEngine()))
        before, after = calls(2)
        for caller in (before, Broken([[1, 2]]), after):
            batcher.submit(caller)
        await asyncio.sleep(1)
        before.check()
        after.check()
        assert "broken caller" in caplog.text

    run(main())


def test_drain_answers_what_was_accepted_and_refuses_the_rest() -> None:
    async def main() -> None:
        batcher = make_batcher(FakeWorker(FakeEngine(max_batch_size=2)), max_delay_ms=60_000)
        callers = calls(5)
        for caller in callers:
            batcher.submit(caller)
        drained = asyncio.ensure_future(batcher.drain(10))
        await asyncio.sleep(0)
        with pytest.raises(DrainingError):
            batcher.submit(Call([[1, 1]]))
        assert await drained
        for caller in callers:
            caller.check()
            assert caller.at_s < 1, "draining does not wait for the delay"

    run(main())


def test_drain_that_takes_too_long_answers_all_the_same() -> None:
    async def main() -> None:
        worker = FakeWorker(FakeEngine(max_batch_size=1, slots=1), run_s=lambda rows: 4.0)
        batcher = make_batcher(worker)
        callers = calls(5)
        for caller in callers:
            batcher.submit(caller)
        assert not await batcher.drain(10)
        await asyncio.sleep(100)
        for caller in callers[:2]:
            caller.check()
        for caller in callers[2:]:
            assert isinstance(caller.answer, AbandonedError)
            assert caller.at_s == pytest.approx(10)

    run(main())


def test_batches_grow_only_to_where_rows_get_cheaper() -> None:
    async def main() -> None:
        worker = FakeWorker(FakeEngine(max_batch_size=8), run_s=lambda rows: 0.010 * rows)
        worker.warmup_us = {1: 10_000, 2: 20_500, 4: 41_000, 8: 84_000}
        batcher = make_batcher(worker)
        callers = calls(8)
        for caller in callers:
            batcher.submit(caller)
        await asyncio.sleep(1)
        assert [rows for _, rows in worker.ran] == [1] * 8
        assert callers[0].at_s == pytest.approx(0.010)

    run(main())


def test_rows_are_the_callers_own_whatever_the_buffers_held() -> None:
    async def main() -> None:
        batcher = make_batcher(FakeWorker(FakeEngine(max_batch_size=3)))
        for _ in range(20):
            callers = calls(7)
            for caller in callers:
                batcher.submit(caller)
            await asyncio.sleep(0.1)
            for caller in callers:
                caller.check()

    run(main())


def test_a_thousand_cancelled_requests_leave_no_tombstones() -> None:
    async def main() -> None:
        worker = FakeWorker(FakeEngine(max_batch_size=1, slots=1), run_s=lambda rows: 1e9)
        batcher = make_batcher(worker, max_queue_rows=10)
        (running,) = calls(1)
        batcher.submit(running)
        await asyncio.sleep(0)
        (staying,) = calls(1)
        batcher.submit(staying)
        for _ in range(1000):
            (leaving,) = calls(1)
            batcher.submit(leaving)
            batcher.cancel(leaving)
        (group,) = batcher.queue.groups.values()
        (flow,) = group.flows.values()
        assert flow.order._waiting < 200
        assert batcher.queue.rows == 1
        assert flow.order.head() is staying

    run(main())


@pytest.mark.parametrize(
    ("timeout_s", "in_time"), [(RUN_S - EPSILON_S, False), (2 * RUN_S + EPSILON_S, True)]
)
def test_a_request_still_queued_after_its_timeout_is_taken_out(timeout_s: float, in_time: bool) -> None:
    async def main() -> None:
        worker = FakeWorker(FakeEngine())
        batcher = make_batcher(worker)
        (running,) = calls(1)
        batcher.submit(running)
        await asyncio.sleep(0)
        (caller,) = calls(1)
        caller.timeout_s = timeout_s
        batcher.submit(caller)
        await asyncio.sleep(1)
        if in_time:
            caller.check()
        else:
            assert isinstance(caller.answer, ExpiredError)
            assert caller.at_s == pytest.approx(timeout_s)
            assert batcher.counters.expired == 1
        assert [rows for _, rows in worker.ran] == ([1, 1] if in_time else [1])
        assert batcher.queue.rows == 0

    run(main())


def test_a_split_request_expires_whole() -> None:
    async def main() -> None:
        worker = FakeWorker(FakeEngine(max_batch_size=2, slots=1))
        batcher = make_batcher(worker)
        large = Call([[n] for n in range(9)])
        large.timeout_s = 1.5 * RUN_S
        batcher.submit(large)
        await asyncio.sleep(1)
        assert isinstance(large.answer, ExpiredError)
        assert len(worker.ran) == 2
        assert batcher.running_batches == 0

    run(main())


def test_a_partial_request_keeps_the_rows_that_could_be_done() -> None:
    async def main() -> None:
        engine = FakeEngine(max_batch_size=2, slots=1)
        engine.fails = lambda rows: EngineRunError("bad row") if 3 in rows else None
        batcher = make_batcher(FakeWorker(engine))
        large = Call([[n] for n in range(1, 8)])
        large.partial = True
        batcher.submit(large)
        await asyncio.sleep(1)
        assert isinstance(large.answer, np.ndarray)
        assert large.answer.ravel().tolist() == [2, 4, 0, 0, 10, 12, 14]
        ((first, rows, error),) = large.failures
        assert (first, rows) == (2, 2)
        assert isinstance(error, InputRejectedError)

    run(main())


def test_a_partial_request_that_expires_keeps_what_had_left_the_queue() -> None:
    async def main() -> None:
        worker = FakeWorker(FakeEngine(max_batch_size=2, slots=1))
        worker.warmup_us = {2: 0.6 * RUN_S * 1e6}  # faster than it will be
        batcher = make_batcher(worker)
        large = Call([[n] for n in range(1, 8)])
        large.partial = True
        large.timeout_s = 2.5 * RUN_S
        batcher.submit(large)
        await asyncio.sleep(1)
        assert isinstance(large.answer, np.ndarray)
        assert large.answer.ravel().tolist() == [2, 4, 6, 8, 0, 0, 0]
        assert [(first, rows) for first, rows, _ in large.failures] == [(4, 2), (6, 1)]
        assert all(isinstance(error, ExpiredError) for _, _, error in large.failures)

    run(main())


def test_a_partial_request_of_which_nothing_could_be_done_fails() -> None:
    async def main() -> None:
        engine = FakeEngine(max_batch_size=2, slots=1)
        engine.fails = lambda rows: EngineRunError("no row is good")
        batcher = make_batcher(FakeWorker(engine))
        large = Call([[n] for n in range(1, 8)])
        large.partial = True
        batcher.submit(large)
        await asyncio.sleep(1)
        assert isinstance(large.answer, BatchFailedError)

    run(main())


def test_a_part_whose_rows_cannot_be_copied_fails_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    class NoMemory(np.ndarray):
        def tobytes(self, order: object = "C") -> bytes:
            raise MemoryError

    async def main() -> None:
        engine = FakeEngine(max_batch_size=2, slots=1)
        worker = FakeWorker(engine)
        monkeypatch.setattr(
            "tests.support.virtual.loop.Outcome",
            lambda outputs, *rest: Outcome(tuple(o.view(NoMemory) for o in outputs), *rest),
        )
        batcher = make_batcher(worker)
        large = Call([[n] for n in range(5)])
        batcher.submit(large)
        await asyncio.sleep(1)
        assert isinstance(large.answer, MemoryError)
        assert batcher.queue.rows == 0

    run(main())


def constant(run_s: float, rows: int) -> float:
    return run_s


def test_after_many_lone_requests_the_next_leaves_in_the_same_iteration() -> None:
    """If runs are so short that a request right behind it loses little."""

    async def main() -> None:
        for run_s, at_once in ((0.0001, True), (0.010, False)):
            worker = FakeWorker(FakeEngine(), partial(constant, run_s))
            worker.warmup_us = {8: run_s * 1e6}
            batcher = make_batcher(worker)
            for number in range(20):
                caller = Call([[number]])
                batcher.submit(caller)
                assert batcher.running_batches == int(at_once and number >= 16)
                await asyncio.sleep(1)
                caller.check()
            # Many at once are noticed, and the lone one that left before them is not worth mentioning.
            crowd = calls(8)
            for caller in crowd:
                batcher.submit(caller)
            await asyncio.sleep(1)
            for caller in crowd:
                caller.check()
            batcher.submit(Call([[1]]))
            assert not batcher.running_batches
            await asyncio.sleep(1)

    run(main())


def test_a_wait_for_more_rows_ends_when_another_shape_comes() -> None:
    """No wait pays then, by the policy, and none may go on until its timer."""

    async def main() -> None:
        batcher = make_batcher(FakeWorker(FakeEngine()))
        first, second, third = Call([[1]]), Call([[2]]), Call([[3, 3]])
        batcher.submit(first)
        await asyncio.sleep(0.005)
        run_times = batcher._scheduler.run_times
        run_times.observe = lambda *run: False  # type: ignore[method-assign]  # so that the spacing stays
        run_times.spacing_s, batcher._scheduler._peak_rows = 1.0, 9.0
        await asyncio.sleep(0.1)
        batcher.submit(second)
        await asyncio.sleep(0.1)
        assert not second.answers, "it waits"
        batcher.submit(third)
        await asyncio.sleep(0.015)
        second.check()

    run(main())
