"""When a batch leaves: each rule at its boundary, one step before it and on it."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cobatch.batcher.scheduling.policy import (
    DEADLINE,
    DELAY,
    DRAIN,
    FULL,
    IDLE,
    SHAPE,
    Now,
    Release,
    WaitUntil,
    decide,
)
from cobatch.batcher.scheduling.tuning import LEAD_S

FULL_ROWS = 8
DELAY_S = 0.005
NOW_S = 100.0


@dataclass(frozen=True)
class _Line:
    """A group as the policy sees it."""

    rows: int
    oldest_s: float = NOW_S


Line: Any = _Line  # stands for a group


@dataclass
class _Queue:
    """The queue as the policy sees it: `lines` in the order of their turns."""

    lines: tuple[_Line, ...]
    contended: bool = False
    urgent_s: float = math.inf
    full_rows: int = FULL_ROWS

    @property
    def rows(self) -> int:
        return sum(line.rows for line in self.lines)

    @property
    def groups(self) -> tuple[_Line, ...]:
        return self.lines

    @property
    def next_group(self) -> _Line:
        return self.lines[0]

    @property
    def full_group(self) -> _Line | None:
        return next((line for line in self.lines if line.rows >= self.full_rows), None)

    @property
    def oldest_s(self) -> float:
        return min(line.oldest_s for line in self.lines)

    @property
    def extremes(self) -> _Queue:
        return self


Queue: Any = _Queue  # stands for a RequestQueue
IDLE_NOW = Now(NOW_S, running=False, free_s=NOW_S)
BUSY = Now(NOW_S, running=True, free_s=NOW_S + 1)


def before(time_s: float) -> float:
    """The last moment before."""
    return math.nextafter(time_s, -math.inf)


def decided(
    *lines: Any, now: Now = IDLE_NOW, max_delay_s: float = 0.0, **more: object
) -> Release | WaitUntil | None:
    return decide(Queue(lines, **more), now, max_delay_s)


def test_an_empty_queue_needs_nothing() -> None:
    for now in (IDLE_NOW, BUSY, replace(IDLE_NOW, draining=True)):
        assert decided(now=now) is None


def test_an_idle_engine_gets_the_queued_rows_at_once() -> None:
    line = Line(1)
    assert decided(line) == Release(line, IDLE)


def test_other_shapes_in_the_queue_are_the_reason() -> None:
    line, other = Line(1), Line(2)
    assert decided(line, other) == Release(line, SHAPE)


def test_an_idle_engine_gets_the_group_whose_turn_it_is() -> None:
    line, full = Line(1, oldest_s=NOW_S), Line(FULL_ROWS, oldest_s=0.0)
    assert decided(line, full) == Release(line, SHAPE)
    assert decided(full, line) == Release(full, FULL)


@pytest.mark.parametrize(
    ("now_s", "leaves"), [(before(NOW_S + DELAY_S), False), (NOW_S + DELAY_S, True), (NOW_S + 9, True)]
)
def test_the_delay_is_over_at_the_deadline(now_s: float, leaves: bool) -> None:
    line = Line(1)
    expected = Release(line, DELAY) if leaves else WaitUntil(NOW_S + DELAY_S)
    assert decided(line, now=replace(IDLE_NOW, time_s=now_s), max_delay_s=DELAY_S) == expected


@pytest.mark.parametrize("rows", [FULL_ROWS, FULL_ROWS + 1])
def test_a_full_batch_does_not_wait(rows: int) -> None:
    full, line = Line(rows), Line(1)
    assert decided(full, max_delay_s=DELAY_S) == Release(full, FULL)
    assert decided(line, full, max_delay_s=DELAY_S) == Release(full, FULL)


@pytest.mark.parametrize(("rows", "leaves"), [(FULL_ROWS - 1, False), (FULL_ROWS, True)])
def test_only_a_full_batch_leaves_behind_a_running_one(rows: int, leaves: bool) -> None:
    line = Line(rows)
    assert decided(line, now=BUSY) == (Release(line, FULL) if leaves else None)


@pytest.mark.parametrize(("run_s", "leaves"), [(0.003, True), (0.0029, False)])
def test_a_delay_ends_at_a_deadline(run_s: float, leaves: bool) -> None:
    """The request must be answered in 3 ms; what its run hardly ever exceeds is taken off."""
    line = Line(1)
    urgent_s = NOW_S + 0.003
    came = decided(line, now=replace(IDLE_NOW, run_s=run_s), max_delay_s=DELAY_S, urgent_s=urgent_s)
    assert came == (Release(line, DEADLINE) if leaves else WaitUntil(urgent_s - run_s))


@pytest.mark.parametrize(("rows_per_s", "waits"), [(None, True), (99.0, False), (101.0, True)])
def test_no_delay_if_no_request_is_expected(rows_per_s: float | None, waits: bool) -> None:
    """In the 5 ms that are left half a row would come at 100 rows a second."""
    line = Line(1)
    came = decided(line, now=replace(IDLE_NOW, rows_per_s=rows_per_s), max_delay_s=DELAY_S)
    assert came == (WaitUntil(NOW_S + DELAY_S) if waits else Release(line, IDLE))


@pytest.mark.parametrize(("left_s", "leaves"), [(LEAD_S * 1.01, False), (LEAD_S * 0.99, True), (-1.0, True)])
def test_a_batch_is_formed_late_if_tenants_compete(left_s: float, leaves: bool) -> None:
    full = Line(FULL_ROWS)
    free_s = NOW_S + left_s
    came = decided(full, now=replace(BUSY, free_s=free_s), contended=True)
    assert came == (Release(full, FULL) if leaves else WaitUntil(free_s - LEAD_S))
    assert decided(full, now=replace(BUSY, free_s=free_s)) == Release(full, FULL)
    # The same if deadlines are missed, of any tenant.
    assert decided(full, now=replace(BUSY, free_s=free_s, overloaded=True)) == came


def test_in_overload_nothing_is_packed_ahead_of_a_run_of_uncertain_length() -> None:
    full = Line(FULL_ROWS)
    soon = replace(BUSY, free_s=NOW_S, overloaded=True)
    assert decided(full, now=soon) == Release(full, FULL)
    assert decided(full, now=replace(soon, uncertain=True)) is None
    assert decided(full, now=replace(soon, uncertain=True, overloaded=False)) == Release(full, FULL)
    assert decided(full, now=replace(soon, uncertain=True, running=False)) == Release(full, FULL)


COMPANY = Now(NOW_S, running=False, free_s=NOW_S, expected_rows=5, expected_by_s=NOW_S + 0.002)


@pytest.mark.parametrize(("rows", "leaves"), [(4, False), (5, True), (6, True)])
def test_closed_loop_clients_are_waited_for_until_they_are_back(rows: int, leaves: bool) -> None:
    decision = decide(Queue((Line(rows),)), COMPANY)
    assert decision == (Release(Line(rows), DELAY) if leaves else WaitUntil(COMPANY.expected_by_s, 5))


@pytest.mark.parametrize(("now_s", "leaves"), [(before(NOW_S + 0.002), False), (NOW_S + 0.002, True)])
def test_the_wait_for_clients_ends_in_time(now_s: float, leaves: bool) -> None:
    decision = decide(Queue((Line(4),)), replace(COMPANY, time_s=now_s))
    assert decision == (Release(Line(4), DELAY) if leaves else WaitUntil(NOW_S + 0.002, 5))


@pytest.mark.parametrize(("run_s", "leaves"), [(0.099, False), (0.1, True)])
def test_the_wait_for_clients_ends_at_a_deadline(run_s: float, leaves: bool) -> None:
    queue = Queue((Line(4),), urgent_s=NOW_S + 0.1)
    decision = decide(queue, replace(COMPANY, run_s=run_s))
    wait = WaitUntil(min(COMPANY.expected_by_s, queue.urgent_s - run_s), 5)
    assert decision == (Release(Line(4), DEADLINE) if leaves else wait)


def test_no_wait_for_clients_if_several_shapes_are_queued() -> None:
    assert decide(Queue((Line(4), Line(1))), COMPANY) == Release(Line(4), SHAPE)


def test_draining_does_not_wait() -> None:
    line = Line(1)
    assert decided(line, now=replace(IDLE_NOW, draining=True), max_delay_s=DELAY_S) == Release(line, DRAIN)


LINES = st.lists(st.builds(Line, st.integers(1, 20), st.floats(0, NOW_S)), max_size=4).map(tuple)
NOWS = st.builds(
    Now,
    st.floats(NOW_S, NOW_S + 1),
    st.booleans(),
    st.floats(NOW_S - 1, NOW_S + 1),
    run_s=st.floats(0, 0.1),
    rows_per_s=st.none() | st.floats(0, 1000),
    draining=st.booleans(),
    overloaded=st.booleans(),
)


@given(lines=LINES, now=NOWS, max_delay_s=st.sampled_from([0.0, DELAY_S]), contended=st.booleans())
def test_invariants_for_any_queue(
    lines: tuple[Any, ...], now: Now, max_delay_s: float, contended: bool
) -> None:
    """An idle engine waits only for the delay; a wait is for the future."""
    came = decided(*lines, now=now, max_delay_s=max_delay_s, contended=contended)
    if not lines:
        assert came is None
    elif not now.running and not max_delay_s:
        assert isinstance(came, Release)
    if isinstance(came, Release):
        assert came.group in lines
        assert (came.reason == FULL) <= (came.group.rows >= FULL_ROWS)
    if isinstance(came, WaitUntil):
        assert came.time_s > now.time_s
