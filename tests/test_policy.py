"""When a batch leaves: each rule at its boundary, one step before it and on it."""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from batcher.policy import DELAY, DRAIN, FULL, IDLE, Dispatch, Limits, WaitUntil, decide

FULL_ROWS = 8
DELAY_S = 0.005
NOW_S = 100.0
EAGER = Limits(FULL_ROWS, max_delay_s=0.0, slots=2)
PATIENT = Limits(FULL_ROWS, max_delay_s=DELAY_S, slots=2)


@dataclass(frozen=True)
class Line:
    """A group as the policy sees it."""

    rows: int
    oldest_s: float = NOW_S


def before(time_s: float) -> float:
    """The last moment before."""
    return math.nextafter(time_s, -math.inf)


def idle(*groups: Line, now_s: float = NOW_S, limits: Limits = PATIENT) -> Dispatch[Line] | WaitUntil | None:
    """The decision while nothing runs."""
    return decide(groups, now_s, 0, 0, False, limits)


def test_nothing_is_done_about_nothing() -> None:
    for running in (0, 1):
        for draining in (False, True):
            assert decide([], NOW_S, running, running, draining, EAGER) is None


def test_an_idle_engine_gets_what_is_there() -> None:
    line = Line(1)
    assert idle(line, limits=EAGER) == Dispatch(line, IDLE)


@pytest.mark.parametrize(
    ("now_s", "leaves"), [(before(NOW_S + DELAY_S), False), (NOW_S + DELAY_S, True), (NOW_S + 9, True)]
)
def test_the_delay_is_over_at_the_deadline(now_s: float, leaves: bool) -> None:
    line = Line(1)
    expected = Dispatch(line, DELAY) if leaves else WaitUntil(NOW_S + DELAY_S)
    assert idle(line, now_s=now_s) == expected


@pytest.mark.parametrize(
    ("rows", "leaves"), [(FULL_ROWS - 1, False), (FULL_ROWS, True), (FULL_ROWS + 1, True)]
)
def test_a_full_batch_does_not_wait_for_the_delay(rows: int, leaves: bool) -> None:
    line = Line(rows)
    assert idle(line) == (Dispatch(line, FULL) if leaves else WaitUntil(NOW_S + DELAY_S))


@pytest.mark.parametrize(("rows", "leaves"), [(FULL_ROWS - 1, False), (FULL_ROWS, True)])
def test_beside_a_running_batch_only_a_full_one_leaves(rows: int, leaves: bool) -> None:
    line = Line(rows, oldest_s=NOW_S - 1000)
    for limits in (EAGER, PATIENT):
        for draining in (False, True):
            decision = decide([line], NOW_S, 1, 1, draining, limits)
            assert decision == (Dispatch(line, FULL) if leaves else None)


@pytest.mark.parametrize("slots", [1, 2, 3])
def test_nothing_leaves_without_a_free_slot(slots: int) -> None:
    limits = Limits(FULL_ROWS, 0.0, slots)
    line = Line(FULL_ROWS)
    assert decide([line], NOW_S, slots, slots, True, limits) is None
    assert decide([line], NOW_S, slots - 1, slots - 1, True, limits) is not None


def test_a_slot_whose_answers_are_handed_out_is_occupied_but_the_engine_is_idle() -> None:
    line = Line(1)
    assert decide([line], NOW_S, 1, 0, False, EAGER) == Dispatch(line, IDLE)
    assert decide([line], NOW_S, 1, 0, False, Limits(FULL_ROWS, 0.0, slots=1)) is None


def test_draining_does_not_wait_for_the_delay() -> None:
    line = Line(1)
    assert decide([line], NOW_S, 0, 0, True, PATIENT) == Dispatch(line, DRAIN)


@pytest.mark.parametrize("limits", [EAGER, PATIENT])
def test_the_oldest_group_goes_first(limits: Limits) -> None:
    older, newer = Line(1, NOW_S - 2), Line(1, NOW_S - 1)
    for groups in ((older, newer), (newer, older)):
        decision = idle(*groups, limits=limits)
        assert isinstance(decision, Dispatch)
        assert decision.group is older


def test_of_two_full_groups_the_older_goes_first() -> None:
    older, newer = Line(FULL_ROWS, NOW_S - 2), Line(FULL_ROWS + 5, NOW_S - 1)
    for groups in ((older, newer), (newer, older)):
        assert decide(groups, NOW_S, 1, 1, False, EAGER) == Dispatch(older, FULL)


@pytest.mark.parametrize(("now_s", "oldest"), [(before(NOW_S + DELAY_S), False), (NOW_S + DELAY_S, True)])
def test_a_group_whose_delay_is_over_goes_before_a_full_one_that_came_later(
    now_s: float, oldest: bool
) -> None:
    waiting, full = Line(1), Line(FULL_ROWS, NOW_S + DELAY_S / 2)
    expected = Dispatch(waiting, DELAY) if oldest else Dispatch(full, FULL)
    assert idle(waiting, full, now_s=now_s) == expected


def test_waiting_ends_with_the_oldest_groups_delay() -> None:
    assert idle(Line(1, NOW_S), Line(3, NOW_S - 0.001)) == WaitUntil(NOW_S - 0.001 + DELAY_S)


def test_a_full_group_whose_delay_is_over_is_counted_as_full() -> None:
    line = Line(FULL_ROWS, NOW_S - 1)
    assert idle(line, limits=PATIENT) == Dispatch(line, FULL)
    assert idle(line, limits=EAGER) == Dispatch(line, FULL)


LINES = st.lists(st.builds(Line, st.integers(1, 2 * FULL_ROWS), st.floats(NOW_S - 0.01, NOW_S)), max_size=5)


@given(
    groups=LINES,
    in_slots=st.integers(0, 3),
    handing_out=st.integers(0, 3),
    draining=st.booleans(),
    limits=st.builds(Limits, st.just(FULL_ROWS), st.sampled_from([0.0, DELAY_S]), st.integers(1, 3)),
)
def test_whatever_is_decided_can_be_done_and_keeps_nobody_for_ever(
    groups: list[Line], in_slots: int, handing_out: int, draining: bool, limits: Limits
) -> None:
    in_slots = min(in_slots, limits.slots)
    running = max(0, in_slots - handing_out)
    decision = decide(groups, NOW_S, in_slots, running, draining, limits)
    assert decision == decide(groups, NOW_S, in_slots, running, draining, limits)
    match decision:
        case Dispatch(group=group):
            assert any(group is one for one in groups)
            assert in_slots < limits.slots
        case WaitUntil(time_s=time_s):
            # Only an idle engine's batch waits, and never longer than its oldest request may.
            assert not running
            assert NOW_S < time_s <= min(group.oldest_s for group in groups) + limits.max_delay_s
        case None:
            # Something else will ask again: the end of a batch, or the next request.
            assert in_slots == limits.slots or running or not groups
