"""Priority and ageing: within a tenant, the longest wait is next, and a level is worth a second."""

from __future__ import annotations

import asyncio

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cobatch.batcher.request import Request, State
from cobatch.batcher.scheduling.priority import DEFAULT, HIGHEST, LOWEST, PriorityQueue, level_of
from cobatch.batcher.scheduling.tuning import AGEING_S
from cobatch.batcher.tenant import Tenant
from tests.support.virtual.loop import Call, make_batcher, run
from tests.support.virtual.tenants import Metered

EPSILON_S = 1e-6


def request(level: int, at_s: float = 0.0, rows: int = 1) -> Request:
    one = Request(rows, ((),), [b""])
    one.level = level
    one.enqueued_s = at_s
    one.state = State.QUEUED
    return one


def call(priority: int = 0, rows: int = 1) -> Call:
    one = Call([[priority]] * rows)
    one.priority = priority
    return one


def served(lines: PriorityQueue) -> list[Request]:
    """All of them, in the order in which they are next."""
    order = []
    while lines.queued:
        one = lines.head()
        assert one.state is State.QUEUED
        one.state = State.RUNNING
        lines.leave(one)
        order.append(one)
    return order


@pytest.mark.parametrize(("priority", "level"), [(0, DEFAULT), (1, 1), (4, 4), (8, 8), (9, 8), (10**9, 8)])
def test_the_level_of_a_priority(priority: int, level: int) -> None:
    assert level_of(priority) == level
    assert HIGHEST <= level_of(priority) <= LOWEST


def test_within_a_level_first_come_first_served() -> None:
    lines = PriorityQueue()
    line = [request(3) for _ in range(5)]
    for one in line:
        lines.push(one)
    assert served(lines) == line


@pytest.mark.parametrize(
    ("later_s", "overtakes"), [(AGEING_S - EPSILON_S, True), (AGEING_S + EPSILON_S, False)]
)
@pytest.mark.parametrize("high", [1, 4, 7])
def test_a_higher_level_overtakes_requests_up_to_a_second_older(
    later_s: float, overtakes: bool, high: int
) -> None:
    for swapped in (False, True):
        lines = PriorityQueue()
        low, late = request(high + 1, 10.0), request(high, 10.0 + later_s)
        for one in (late, low) if swapped else (low, late):
            lines.push(one)
        assert lines.head() is (late if overtakes else low)


@pytest.mark.parametrize("low", range(2, LOWEST + 1))
def test_nothing_waits_for_ever(low: int) -> None:
    """However much of the highest priority keeps coming: a level counts as a second, no more."""
    lines = PriorityQueue()
    waiting = request(low, 0.0)
    lines.push(waiting)
    now_s = 0.0
    while True:
        lines.push(request(HIGHEST, now_s))
        lines.push(request(HIGHEST, now_s))
        one = lines.head()
        one.state = State.RUNNING
        lines.leave(one)
        if one is waiting:
            break
        now_s += 0.010
    # It is served before later ones with a higher priority; half of all requests are never served here.
    assert now_s == pytest.approx(2 * (low - HIGHEST) * AGEING_S, abs=0.05)


STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("push"), st.integers(1, 8), st.integers(1, 4)),
        st.tuples(st.just("leave"), st.integers(0, 50), st.just(0)),
        st.tuples(st.just("next"), st.just(0), st.just(0)),
        st.tuples(st.just("take"), st.integers(1, 9), st.just(0)),
        st.tuples(st.just("pass"), st.sampled_from([1, 500, 1500]), st.just(0)),
        st.tuples(st.just("copy"), st.just(0), st.just(0)),
    ),
    max_size=60,
)


@given(STEPS)
def test_against_a_sorted_list(steps: list[tuple[str, int, int]]) -> None:
    lines = PriorityQueue()
    model: list[Request] = []
    now_s = 0.0
    for step, number, rows in steps:
        model.sort(key=lambda one: one.enqueued_s + one.level * AGEING_S)
        now_s += 0.0001  # no two came at once
        match step:
            case "push":
                model.append(request(number, now_s, rows))
                lines.push(model[-1])
            case "leave" if model:
                gone = model.pop(number % len(model))
                gone.state = State.CANCELLED
                lines.leave(gone)
            case "next" if model:
                first = model.pop(0)
                assert lines.head() is first
                first.state = State.RUNNING
                lines.leave(first)
            case "take" if model:
                found = lines.take(number)
                if found is None:
                    # More than one level may be queued.
                    continue
                taken, their_rows = found
                assert taken == model[: len(taken)]
                assert {one.state for one in taken} == {State.RUNNING}
                assert their_rows == sum(one.rows for one in taken)
                del model[: len(taken)]
                assert len(taken) == 1 or their_rows <= number
                assert not model or their_rows >= number or their_rows + model[0].rows > number
            case "pass":
                now_s += number / 1000
            case "copy":
                lines = lines.copy()
        assert lines.queued == len(model)
    model.sort(key=lambda one: one.enqueued_s + one.level * AGEING_S)
    assert served(lines) == model


def test_those_that_left_are_dropped() -> None:
    lines = PriorityQueue()
    lines.push(request(8))
    for n in range(10_000):
        one = request(1 + n % 7, 1.0)
        lines.push(one)
        one.state = State.CANCELLED
        lines.leave(one)
        assert len(lines._line) + len(lines._others) <= 66
    assert len(served(lines)) == 1


# In the batcher


def test_the_high_go_before_the_low_and_the_low_fill_what_is_left() -> None:
    async def main() -> None:
        worker = Metered()
        batcher = make_batcher(worker)
        running = call()
        batcher.submit(running)
        await asyncio.sleep(0.001)
        low = [call(8) for _ in range(10)]
        middle = [call() for _ in range(3)]
        high = [call(1) for _ in range(4)]
        for one in (*low, *middle, *high):
            batcher.submit(one)
        await asyncio.sleep(1)
        # Its last place is for one of those that can wait, and they are served first come first served.
        assert [rows for _, rows in worker.ran] == [1, 8, 8, 1]
        first = [one for one in (*low, *middle, *high) if one.at_s == pytest.approx(0.020)]
        assert first == [low[0], *middle, *high]

    run(main())


def test_low_priority_keeps_no_batch_from_filling() -> None:
    async def main() -> None:
        worker = Metered()
        batcher = make_batcher(worker)

        class Again(Call):
            def done(self) -> None:
                super().done()
                if asyncio.get_running_loop().time() < 2:
                    again(self.priority)

        def again(priority: int) -> None:
            one = Again([[1]])
            one.priority = priority
            batcher.submit(one)

        for _ in range(6):
            again(1)
        for _ in range(30):
            again(8)
        await asyncio.sleep(3)
        full = [rows for start_s, rows in worker.ran if 0.05 < start_s < 1.9]
        assert set(full) == {8}

    run(main())


def test_a_priority_counts_only_within_a_tenant() -> None:
    """It goes before other requests of the same tenant, not before other tenants'."""

    async def main() -> None:
        worker = Metered(max_batch_size=1)
        batcher = make_batcher(worker)
        one, other = Tenant("one"), Tenant("other")
        order: list[str] = []

        class Noted(Call):
            def done(self) -> None:
                super().done()
                assert self.tenant is not None
                order.append(f"{self.tenant.name} {self.priority}")

        for n in range(4):
            for tenant, priority in ((one, 8), (other, 1 if n else 4)):
                asked = Noted([[1]])
                asked.tenant, asked.priority = tenant, priority
                batcher.submit(asked)
        await asyncio.sleep(1)
        names = [entry.split()[0] for entry in order]
        assert abs(names[:4].count("one") - 2) <= 1
        assert names.count("one") == names.count("other") == 4

    run(main())
