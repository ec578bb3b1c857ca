"""Deadlines cover the queue and the run: at admission, in the queue, and when a batch is made up.

Pairs of a moment before and after each boundary. The engine takes as long as its warm-up said, unless a
test says otherwise.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import event, given
from hypothesis import strategies as st

from cobatch.batcher.batcher import Batcher
from cobatch.batcher.errors import (
    BatcherError,
    DeadlineTooShortError,
    DeadlineUnreachableError,
    ExpiredError,
    QueueFullError,
)
from cobatch.batcher.scheduling.tuning import LEAD_S
from cobatch.batcher.tenant import Tenant
from cobatch.engines.errors import EngineRunError
from tests.support.examples import examples
from tests.support.virtual.loop import Call, make_batcher, run
from tests.support.virtual.tenants import Metered, affine, flat, linear

EPSILON_S = 1e-5
BOUNDARY = [(-EPSILON_S, False), (EPSILON_S, True)]
pair = pytest.mark.parametrize(("more_s", "in_time"), BOUNDARY)


def call(timeout_s: float | None = None, rows: int = 1, tenant: Tenant | None = None) -> Call:
    one = Call([[7]] * rows)
    one.timeout_s = timeout_s
    one.tenant = tenant
    return one


def submit(batcher: Batcher, *callers: Call) -> None:
    for caller in callers:
        batcher.submit(caller)


def scripted(*runs_s: float, curve: Callable[[int], float] = affine) -> Metered:
    """The first runs take as long as is said, the others as the warm-up does."""
    worker = Metered(curve)
    script = list(runs_s)
    worker.run_s = lambda rows: script.pop(0) if script else curve(rows)
    return worker


def check(caller: Call, in_time: bool) -> None:
    """Answered before its deadline, or told that it could not be."""
    if in_time:
        caller.check()
        assert caller.at_s <= caller.deadline_s
    else:
        assert isinstance(caller.answer, ExpiredError), caller.answer
        assert caller.answer.timeout_s == caller.timeout_s


def learn(batcher: Batcher, run_s: float) -> None:
    """Let it learn that runs take `run_s` now."""
    for n in range(200):
        batcher._scheduler.run_times.observe(1 << n % 4, run_s, n * 0.050)
    batcher._scheduler.learn()


# At admission


@pair
def test_a_timeout_shorter_than_a_run_is_refused(more_s: float, in_time: bool) -> None:
    async def main() -> None:
        batcher = make_batcher(Metered(affine))
        caller = call(affine(1) + more_s)
        if in_time:
            batcher.submit(caller)
        else:
            with pytest.raises(DeadlineTooShortError) as refused:
                batcher.submit(caller)
            assert refused.value.needed_s == pytest.approx(affine(1))
            assert batcher.counters.refusals == {"deadline": 1}
            return
        await asyncio.sleep(1)
        check(caller, in_time=True)

    run(main())


@pytest.mark.parametrize(("rows", "run_s"), [(8, 0.020), (9, 0.026), (16, 0.040), (20, 0.052)])
@pair
def test_the_time_of_a_split_request_is_the_sum_of_its_runs(
    rows: int, run_s: float, more_s: float, in_time: bool
) -> None:
    """One that has the engine to itself is not given up while its parts run one after another."""

    async def main() -> None:
        batcher = make_batcher(Metered(affine))
        caller = call(run_s + more_s, rows)
        if not in_time:
            with pytest.raises(DeadlineTooShortError):
                batcher.submit(caller)
            return
        batcher.submit(caller)
        await asyncio.sleep(1)
        check(caller, in_time=True)
        assert caller.at_s == pytest.approx(run_s)

    run(main())


@pytest.mark.parametrize(
    ("queued", "needed_s"),
    [
        (0, 0.005 + 0.006),
        (4, 0.005 + 0.014),  # it rides with those
        (7, 0.005 + 0.020),
        (8, 0.005 + 0.020 + 0.006),  # those are a batch of their own
        (12, 0.005 + 0.020 + 0.014),
    ],
)
@pair
def test_what_waits_before_it_counts(queued: int, needed_s: float, more_s: float, in_time: bool) -> None:
    async def main() -> None:
        batcher = make_batcher(Metered(affine))
        submit(batcher, call())
        await asyncio.sleep(0.001)
        submit(batcher, *(call() for _ in range(queued)))
        caller = call(needed_s + more_s)
        if not in_time:
            with pytest.raises(DeadlineUnreachableError) as refused:
                batcher.submit(caller)
            assert refused.value.needed_s == pytest.approx(needed_s)
            assert refused.value.retry_after_s == pytest.approx(-more_s)
            assert batcher.counters.refusals == {"deadline": 1}
            assert batcher.queue.rows == queued
            return
        batcher.submit(caller)
        await asyncio.sleep(1)
        check(caller, in_time=True)
        assert caller.at_s - caller.enqueued_s == pytest.approx(needed_s)

    run(main())


def test_anothers_backlog_does_not_count_as_ahead() -> None:
    async def main() -> None:
        batcher = make_batcher(Metered(flat))
        flood, light = Tenant("flood"), Tenant("light")
        submit(batcher, call(tenant=light))
        await asyncio.sleep(0.001)
        submit(batcher, *(call(tenant=flood) for _ in range(100)))
        with pytest.raises(DeadlineUnreachableError):
            batcher.submit(call(0.030, tenant=flood))
        caller = call(0.030, tenant=light)
        batcher.submit(caller)
        await asyncio.sleep(1)
        check(caller, in_time=True)

    run(main())


def test_after_the_retry_hint_there_is_time() -> None:
    async def main() -> None:
        batcher = make_batcher(Metered(affine))
        submit(batcher, *(call() for _ in range(50)))
        await asyncio.sleep(0.001)
        for timeout_s in (0.100, 0.060, 0.040):
            with pytest.raises(DeadlineUnreachableError) as refused:
                batcher.submit(call(timeout_s))
            after_s = refused.value.retry_after_s
            await asyncio.sleep(after_s / 2)
            with pytest.raises(DeadlineUnreachableError):
                batcher.submit(call(timeout_s))
            await asyncio.sleep(after_s / 2 + EPSILON_S)
            caller = call(timeout_s)
            batcher.submit(caller)
            batcher.cancel(caller)

    run(main())


def test_after_the_retry_hint_there_is_room() -> None:
    async def main() -> None:
        batcher = make_batcher(Metered(affine), max_queue_rows=80)
        submit(batcher, call())
        await asyncio.sleep(0.006 - EPSILON_S)
        submit(batcher, *(call() for _ in range(80)))
        with pytest.raises(QueueFullError) as refused:
            batcher.submit(call(rows=80))
        # At the pace at which rows leave, 2.5 ms each.
        assert refused.value.retry_after_s == pytest.approx(80 * 0.0025)
        await asyncio.sleep(refused.value.retry_after_s)
        batcher.submit(call(rows=80))

    run(main())


@pair
def test_a_models_own_deadline_is_for_those_that_name_none(more_s: float, in_time: bool) -> None:
    async def main() -> None:
        batcher = make_batcher(Metered(affine), deadline_ms=11)
        submit(batcher, call())
        await asyncio.sleep(0.001 + more_s)
        unnamed, named = call(), call(0.5)
        if in_time:
            batcher.submit(unnamed)
        else:
            with pytest.raises(DeadlineUnreachableError):
                batcher.submit(unnamed)
        batcher.submit(named)
        assert named.deadline_s == pytest.approx(named.enqueued_s + 0.5)
        await asyncio.sleep(1)
        check(named, in_time=True)
        if in_time:
            assert unnamed.timeout_s == pytest.approx(0.011)
            check(unnamed, in_time=True)

    run(main())


# In the queue


@pair
def test_one_that_waits_is_taken_out_when_only_a_run_is_left(more_s: float, in_time: bool) -> None:
    """The run before it was to take 6 ms."""

    async def main() -> None:
        batcher = make_batcher(scripted(0.014 - more_s))
        submit(batcher, call())
        await asyncio.sleep(0)
        caller = call(0.020)
        batcher.submit(caller)
        await asyncio.sleep(1)
        check(caller, in_time)
        if not in_time:
            assert caller.at_s == pytest.approx(0.020 - affine(1))
            assert batcher.counters.expired == batcher.counters.failed == 1
        assert batcher.queue.rows == 0

    run(main())


@pair
def test_a_split_request_is_taken_out_when_only_its_runs_are_left(more_s: float, in_time: bool) -> None:
    async def main() -> None:
        worker = scripted(0.014 - more_s)
        batcher = make_batcher(worker)
        submit(batcher, call())
        await asyncio.sleep(0)
        caller = call(0.014 + 0.020 + 0.020, rows=16)
        batcher.submit(caller)
        # Its first part leaves at once: full.
        await asyncio.sleep(1)
        check(caller, in_time)
        assert batcher.counters.expired == (0 if in_time else 1)
        if not in_time:
            assert caller.at_s <= 0.034 + EPSILON_S

    run(main())


def test_one_that_waits_is_not_taken_out_where_runs_have_become_faster() -> None:
    async def main() -> None:
        worker = scripted(0.0145)
        batcher = make_batcher(worker)
        submit(batcher, call())
        await asyncio.sleep(0)
        caller = call(0.020)
        batcher.submit(caller)
        await asyncio.sleep(0.013)
        learn(batcher, 0.002)
        worker.run_s = lambda rows: 0.002
        await asyncio.sleep(1)
        check(caller, in_time=True)
        assert caller.at_s == pytest.approx(0.0165)

    run(main())


def test_a_request_that_runs_is_answered_late_or_not() -> None:
    async def main() -> None:
        batcher = make_batcher(scripted(0.5))
        caller = call(0.020)
        batcher.submit(caller)
        await asyncio.sleep(1)
        caller.check()
        assert caller.at_s == pytest.approx(0.5)
        assert batcher.counters.expired == 0

    run(main())


def test_parts_of_a_partial_request_are_run_until_its_deadline() -> None:
    async def main() -> None:
        batcher = make_batcher(scripted(0.030))
        submit(batcher, call())
        await asyncio.sleep(0)
        caller = call(0.006 + 0.060, rows=24)
        caller.partial = True
        batcher.submit(caller)
        await asyncio.sleep(1)
        # The run before it took 24 ms longer than it was to: time for one part, of which the second began.
        assert isinstance(caller.answer, np.ndarray)
        missing = sum(rows for _, rows, _ in caller.failures)
        assert missing == 16
        assert batcher.counters.expired == 1
        assert caller.at_s <= caller.deadline_s

    run(main())


def test_expired_are_counted_by_callers() -> None:
    async def main() -> None:
        batcher = make_batcher(scripted(1.0))
        submit(batcher, call())
        await asyncio.sleep(0)
        bulk = call(0.050, rows=5)
        bulk.callers = 5
        batcher.submit(bulk)
        await asyncio.sleep(2)
        check(bulk, in_time=False)
        assert batcher.counters.expired == batcher.counters.failed == 5

    run(main())


# When a batch is made up


@pair
def test_one_that_cannot_be_in_time_any_more_is_not_run(more_s: float, in_time: bool) -> None:
    """Run times were learned after its admission."""

    async def main() -> None:
        worker = scripted(0.010, 0.030, curve=flat)
        batcher = make_batcher(worker)
        submit(batcher, call())
        await asyncio.sleep(0.001)
        late, other = call(0.039 + more_s), call()
        submit(batcher, late, other)
        learn(batcher, 0.030)
        await asyncio.sleep(1)
        check(late, in_time)
        other.check()
        assert [rows for _, rows in worker.ran] == [1, 2 if in_time else 1]
        assert batcher.counters.expired == (not in_time)
        if not in_time:
            assert late.at_s == pytest.approx(0.010), "as soon as it was certain"

    run(main())


def test_a_late_part_fails_its_whole_which_is_counted_once() -> None:
    async def main() -> None:
        worker = scripted(0.010, 0.030, 0.030, curve=flat)
        batcher = make_batcher(worker)
        submit(batcher, *(call() for _ in range(8)))
        await asyncio.sleep(0.001)
        submit(batcher, *(call() for _ in range(8)))
        await asyncio.sleep(0.001)
        late = call(0.060, rows=24)
        batcher.submit(late)
        learn(batcher, 0.030)
        await asyncio.sleep(1)
        check(late, in_time=False)
        assert batcher.counters.expired == batcher.counters.failed == 1
        assert batcher.queue.rows == 0
        assert batcher.running_batches == 0

    run(main())


@pytest.mark.parametrize(("more_s", "rows"), [(-EPSILON_S, 4), (EPSILON_S, 5)])
def test_a_batch_is_not_grown_past_its_most_urgent_member(more_s: float, rows: int) -> None:
    """A batch of five takes 14 ms, and it begins at 6 ms."""

    async def main() -> None:
        worker = Metered(affine)
        batcher = make_batcher(worker)
        submit(batcher, call())
        await asyncio.sleep(0.001)
        urgent, others = call(0.005 + 0.014 + more_s), [call() for _ in range(7)]
        submit(batcher, urgent, *others)
        await asyncio.sleep(1)
        check(urgent, in_time=True)
        assert [rows for _, rows in worker.ran] == [1, rows, 8 - rows]
        assert batcher.counters.reasons["deadline"] == 1
        for other in others:
            other.check()

    run(main())


def test_the_most_urgent_member_need_not_be_the_first() -> None:
    async def main() -> None:
        worker = Metered(affine)
        batcher = make_batcher(worker)
        submit(batcher, call())
        await asyncio.sleep(0.001)
        callers = [call(1.0), call(0.005 + 0.012 + EPSILON_S), call(0.5), call(), call(), call()]
        submit(batcher, *callers)
        await asyncio.sleep(1)
        for caller in callers:
            caller.check()
            assert caller.at_s <= caller.deadline_s
        assert [rows for _, rows in worker.ran] == [1, 4, 2]

    run(main())


@pytest.mark.parametrize(("others", "dropped"), [(7, False), (8, True), (30, True)])
def test_a_request_that_would_keep_a_batch_small_is_dropped(others: int, dropped: bool) -> None:
    """Early drop (Nexus): with it a batch of four rows could run, without it one of eight."""

    async def main() -> None:
        worker = Metered(affine)
        batcher = make_batcher(worker)
        submit(batcher, call())
        await asyncio.sleep(0.001)
        urgent = call(0.005 + 0.012 + EPSILON_S)
        submit(batcher, urgent, *(call() for _ in range(others)))
        await asyncio.sleep(1)
        check(urgent, in_time=not dropped)
        assert worker.ran[1][1] == (8 if dropped else 4)

    run(main())


def test_others_many_rows_are_no_reason_to_drop_a_tenants_only_one() -> None:
    async def main() -> None:
        worker = Metered(affine)
        batcher = make_batcher(worker)
        light, flood = Tenant("light"), Tenant("flood")
        submit(batcher, call(tenant=light))
        await asyncio.sleep(0.001)
        urgent = call(0.005 + 0.012 + EPSILON_S, tenant=light)
        submit(batcher, urgent, *(call(tenant=flood) for _ in range(50)))
        await asyncio.sleep(1)
        check(urgent, in_time=True)

    run(main())


@pytest.mark.parametrize("timeout_s", [0.020, 0.030, 0.0545, 0.0555])
def test_waiting_for_company_ends_where_a_deadline_needs_it(timeout_s: float) -> None:
    async def main() -> None:
        batcher = make_batcher(Metered(flat), max_delay_ms=50)
        caller = call(timeout_s)
        batcher.submit(caller)
        await asyncio.sleep(1)
        check(caller, in_time=True)
        assert caller.at_s == pytest.approx(min(0.060, timeout_s - LEAD_S))
        assert batcher.counters.reasons == {"deadline": 1}

    run(main())


def test_a_batch_that_grows_for_others_drops_the_requests_that_it_outgrows() -> None:
    """The last row of a split request rides with five others, which one run more would make late."""

    async def main() -> None:
        batcher = make_batcher(Metered(affine))
        one, other = Tenant("a"), Tenant("b", weight=3)
        rows = [(1, one), (6, one), (7, None), (1, other), (5, None)]
        others = [call(rows=count, tenant=tenant) for count, tenant in rows]
        submit(batcher, *others)
        await asyncio.sleep(0.030)
        split = call(0.046875, 9, one)
        submit(batcher, split)
        await asyncio.sleep(1)
        for caller in others:
            caller.check()
        check(split, in_time=False)

    run(main())


# Whatever comes

ARRIVALS = st.lists(
    st.tuples(
        st.sampled_from([0.0, 0.0, 0.001, 0.003, 0.010, 0.030]),  # after the one before it
        st.one_of(st.none(), st.floats(0.001, 0.2)),  # its timeout
        st.integers(1, 12),  # rows
        st.integers(0, 2),  # tenant
        st.sampled_from([0, 0, 1, 8]),  # priority
    ),
    min_size=1,
    max_size=40,
)


@examples(100)
@given(
    arrivals=ARRIVALS,
    curve=st.sampled_from([flat, affine, linear]),
    slots=st.integers(1, 3),
    max_delay_ms=st.sampled_from([0.0, 0.0, 15.0]),
)
def test_no_late_answer_if_runs_take_the_predicted_time(
    arrivals: list[tuple[float, float | None, int, int, int]],
    curve: Callable[[int], float],
    slots: int,
    max_delay_ms: float,
) -> None:
    async def main() -> None:
        worker = Metered(curve)
        worker.engine.slots = slots
        batcher = make_batcher(worker, max_delay_ms=max_delay_ms)
        tenants = [Tenant("a"), Tenant("b", weight=3), None]
        callers, refusals = [], []
        for gap_s, timeout_s, rows, tenant, priority in arrivals:
            if gap_s:
                await asyncio.sleep(gap_s)
            caller = call(timeout_s, rows, tenants[tenant])
            caller.priority = priority
            try:
                batcher.submit(caller)
            except BatcherError as error:
                refusals.append(error)
                continue
            callers.append(caller)
        await asyncio.sleep(10)
        for refusal in refusals:
            assert isinstance(refusal, DeadlineTooShortError | DeadlineUnreachableError)
            event("refused")
        for caller in callers:
            if isinstance(caller.answer, ExpiredError):
                event("expired")
                assert caller.at_s <= caller.deadline_s
            else:
                caller.check()
                assert caller.at_s <= caller.deadline_s + 1e-9
                event("in time")
        assert batcher.counters.expired == sum(isinstance(c.answer, ExpiredError) for c in callers)

    run(main())


@pair
def test_a_retry_must_meet_the_deadline_too(more_s: float, in_time: bool) -> None:
    """A batch fails and is run again in halves; the second half would end at 30 ms."""

    async def main() -> None:
        worker = Metered(flat)
        worker.engine.fails = lambda rows: EngineRunError("no") if len(rows) > 1 else None
        batcher = make_batcher(worker)
        first, second = call(), call(0.030 + more_s)
        submit(batcher, first, second)
        await asyncio.sleep(0.010 + EPSILON_S)
        assert bool(second.answers) is not in_time  # told at once
        await asyncio.sleep(1)
        first.check()
        check(second, in_time)
        assert batcher.counters.expired == int(not in_time)

    run(main())
