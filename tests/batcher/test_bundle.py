"""Bundles: one way through the queue for several callers, each with an answer of its own."""

from __future__ import annotations

import asyncio
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cobatch.batcher.batcher import Batcher
from cobatch.batcher.bundle import Bundle
from cobatch.batcher.errors import (
    DeadlineTooShortError,
    DeadlineUnreachableError,
    EngineGoneError,
    ExpiredError,
    InputRejectedError,
    QueueFullError,
    TooManyRowsError,
)
from cobatch.batcher.request import Request
from cobatch.batcher.scheduling.tuning import DOUBT_S
from cobatch.batcher.tenant import Tenant
from cobatch.engines.errors import EngineDeadError, EngineRunError
from tests.support.examples import examples
from tests.support.virtual.loop import Call, FakeEngine, FakeWorker, calls, make_batcher, run

BAD = -666
REFUSALS = (QueueFullError, TooManyRowsError, DeadlineTooShortError, DeadlineUnreachableError)


class Members(Bundle):
    """A bundle of calls."""

    __slots__ = ("calls", "separated")

    def __init__(self, *members: Call) -> None:
        super().__init__(members[0].row_shapes, [member.payloads for member in members])
        self.calls = members
        self.separated = False

    def separate(self) -> list[Request]:
        assert not self.separated
        self.separated = True
        return list(self.calls)

    def done(self) -> None:
        for n, member in enumerate(self.calls):
            member.batch, member.error, member.first_row = self.batch, self.error, self.first_row + n
            member.done()


def bundle(*values: int) -> Members:
    return Members(*[Call([[value]]) for value in values])


def poisoned() -> FakeWorker:
    """A worker that fails on a batch with a bad row."""
    engine = FakeEngine(max_batch_size=4, slots=1)
    engine.fails = lambda rows: EngineRunError("bad row") if (rows == BAD).any() else None
    return FakeWorker(engine)


def check_counts(batcher: Batcher, **expected: int) -> None:
    counters = batcher.counters
    assert {name: getattr(counters, name) for name in expected} == expected


def test_a_bundle_is_one_request_of_as_many_rows() -> None:
    async def main() -> None:
        worker = poisoned()
        batcher = make_batcher(worker)
        members = bundle(1, 2, 3)
        members.enter(batcher.submit)
        assert batcher.queue.rows == 3
        await asyncio.sleep(1)
        for member in members.calls:
            member.check()
        assert worker.ran == [(0.0, 3)]
        check_counts(batcher, accepted=3, refused=0, failed=0)

    run(main())


def test_where_there_is_no_room_for_all_each_is_tried_alone() -> None:
    async def main() -> None:
        batcher = make_batcher(poisoned(), max_queue_rows=2)
        members = bundle(1, 2, 3)
        members.enter(batcher.submit)
        refused = members.calls[2]
        assert isinstance(refused.answer, QueueFullError)  # told at once
        await asyncio.sleep(1)
        for member in members.calls[:2]:
            member.check()
        check_counts(batcher, accepted=2, refused=1, failed=0)

    run(main())


@pytest.mark.parametrize("bad", [(2,), (0, 3), (0, 1, 2, 3)])
def test_a_failed_run_costs_only_the_members_that_fail_alone(bad: tuple[int, ...]) -> None:
    async def main() -> None:
        batcher = make_batcher(poisoned(), max_queue_rows=4)
        members = bundle(*[BAD if n in bad else n for n in range(4)])
        members.tenant = tenant = Tenant("ann")
        members.enter(batcher.submit)
        (other,) = calls(1, width=1)
        await asyncio.sleep(0.001)
        batcher.submit(other)
        assert await batcher.drain(10)
        other.check()
        for n, member in enumerate(members.calls):
            if n in bad:
                assert isinstance(member.answer, InputRejectedError)
            else:
                member.check()
        check_counts(batcher, accepted=5, failed=len(bad), cancelled=0, refused=0)
        assert tenant.open_requests == 0
        assert (tenant.usage.answered, tenant.usage.failed) == (4 - len(bad), len(bad))

    run(main())


def test_members_that_run_again_need_no_room() -> None:
    async def main() -> None:
        batcher = make_batcher(poisoned(), max_queue_rows=4)
        members = bundle(1, 2, BAD, 4)
        members.enter(batcher.submit)
        await asyncio.sleep(0.001)
        queued = calls(4, width=1)
        for one in queued:
            batcher.submit(one)
        await asyncio.sleep(1)
        for one in (*queued, *[member for n, member in enumerate(members.calls) if n != 2]):
            one.check()

    run(main())


def test_a_bundle_beside_other_requests_in_a_batch_that_fails() -> None:
    async def main() -> None:
        worker = poisoned()
        batcher = make_batcher(worker)
        members = bundle(1, BAD)
        (other,) = calls(1, width=1)
        members.enter(batcher.submit)
        batcher.submit(other)
        await asyncio.sleep(1)
        other.check()
        members.calls[0].check()
        assert isinstance(members.calls[1].answer, InputRejectedError)
        # All, the bundle, then each of its members; the other request with none of them.
        assert [rows for _, rows in worker.ran] == [3, 2, 1, 1, 1]

    run(main())


def test_members_can_be_cancelled_while_they_run_again() -> None:
    async def main() -> None:
        batcher = make_batcher(poisoned())
        members = bundle(1, BAD)
        members.enter(batcher.submit)
        await asyncio.sleep(0.015)
        assert members.separated
        batcher.cancel(members)  # over already
        batcher.cancel(members.calls[0])
        await asyncio.sleep(1)
        assert members.calls[0].answers == []
        assert isinstance(members.calls[1].answer, InputRejectedError)
        check_counts(batcher, cancelled=1, failed=1)

    run(main())


def test_a_cancelled_bundle_leaves_the_queue_and_is_not_run_again() -> None:
    async def main() -> None:
        worker = poisoned()
        batcher = make_batcher(worker)
        first, second = bundle(BAD, 1, 2, 3), bundle(4, 5)
        first.enter(batcher.submit)
        await asyncio.sleep(0.001)
        second.enter(batcher.submit)
        batcher.cancel(first)
        batcher.cancel(second)
        await asyncio.sleep(1)
        assert [one.answers for one in (*first.calls, *second.calls)] == [[]] * 6
        assert worker.ran == [(0.0, 4)]
        check_counts(batcher, cancelled=6, failed=0)

    run(main())


def test_other_ends_are_told_to_every_member() -> None:
    async def main() -> None:
        engine = FakeEngine(max_batch_size=4, slots=1)
        batcher = make_batcher(FakeWorker(engine), deadline_ms=8.0)
        running, late = bundle(1, 2, 3, 4), bundle(5, 6)
        running.enter(batcher.submit)
        await asyncio.sleep(0.001)
        late.enter(batcher.submit)
        await asyncio.sleep(1)
        assert all(isinstance(one.answer, np.ndarray) for one in running.calls)
        assert [type(one.answer) for one in late.calls] == [ExpiredError] * 2
        check_counts(batcher, expired=2)
        engine.fails = lambda rows: EngineDeadError("gone")
        dead = bundle(7, 8)
        dead.enter(batcher.submit)
        await asyncio.sleep(1)
        assert [type(one.answer) for one in dead.calls] == [EngineGoneError] * 2

    run(main())


arrivals = st.lists(
    st.tuples(
        st.lists(st.sampled_from([1, 2, 3, BAD]), min_size=1, max_size=6),  # the members' values
        st.sampled_from([0.0, 0.001, 0.012, 0.03]),  # seconds since the previous one
        st.none() | st.sampled_from([0.0, 0.005, 0.015, 0.04]),  # seconds until it is cancelled
    ),
    max_size=8,
)


@examples(80)
@given(arrivals, st.integers(1, 12), st.none() | st.sampled_from([9.0, 25.0, 80.0]))
def test_every_member_is_answered_exactly_once(
    arrivals: list[tuple[list[int], float, float | None]], max_queue_rows: int, deadline_ms: float | None
) -> None:
    async def main() -> None:
        loop = asyncio.get_running_loop()
        batcher = make_batcher(poisoned(), max_queue_rows=max_queue_rows, deadline_ms=deadline_ms)
        bundles: list[tuple[Members, bool]] = []

        def cancel(members: Members) -> None:
            for request in (members, *members.calls):
                batcher.cancel(request)

        for values, after_s, cancel_s in arrivals:
            await asyncio.sleep(after_s)
            members = bundle(*values)
            members.enter(batcher.submit)
            bundles.append((members, cancel_s is not None))
            if cancel_s is not None:
                loop.call_later(cancel_s, cancel, members)
        assert await batcher.drain(100)
        outcomes: Counter[str] = Counter()
        for members, cancelled in bundles:
            for member in members.calls:
                assert len(member.answers) == 1 or (cancelled and not member.answers)
                outcomes["cancelled" if not member.answers else type(member.answer).__name__] += 1
                if member.answers and isinstance(member.answer, np.ndarray):
                    member.check()
                    assert member.values[0, 0] != BAD
        counters = batcher.counters
        refused = sum(outcomes[kind.__name__] for kind in REFUSALS)
        assert (counters.refused, counters.cancelled) == (refused, outcomes["cancelled"])
        assert counters.accepted == sum(outcomes.values()) - refused
        assert counters.failed == outcomes["InputRejectedError"] + outcomes["ExpiredError"]
        assert batcher.open_requests() == ({}, 0)

    run(main())


def test_members_of_a_bundle_on_trial_end_in_time_too() -> None:
    """Their bundle has no deadline, as run times are thought too long, but a timeout."""

    async def main() -> None:
        worker = poisoned()
        worker.run_s = lambda rows: 0.040
        worker.warmup_us = {1: 1e6, 4: 1e6}
        batcher = make_batcher(worker)
        await asyncio.sleep(DOUBT_S)
        members = bundle(1, BAD, 2, 3)
        members.timeout_s = 0.050
        members.enter(batcher.submit)
        await asyncio.sleep(1)
        for member in members.calls:
            assert isinstance(member.answer, ExpiredError)
            assert member.at_s == pytest.approx(DOUBT_S + 0.050)
        check_counts(batcher, accepted=4, expired=4, failed=4)

    run(main())
