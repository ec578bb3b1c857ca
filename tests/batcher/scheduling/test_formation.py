"""The requests of a batch where deadlines differ: which are left out, and when a batch is cut short."""

from __future__ import annotations

import math

import pytest

from cobatch.batcher.scheduling.formation import StartPlan, form
from cobatch.batcher.scheduling.queue import FormedBatch, RequestQueue
from cobatch.batcher.scheduling.tuning import TIME_LEFT
from tests.support.virtual.loop import Call

FULL = 64
SURE = 3.0  # times the planned time
LONG_S = 10.0


class Affine:
    """Run times of 5 ms and 0.1 ms a row."""

    def expected_s(self, rows: int) -> float:
        return 0.005 + 0.0001 * rows

    mean_s = planned_s = expected_s

    def sure_s(self, rows: int) -> float:
        return SURE * self.planned_s(rows)

    def most_rows(self, budget_s: float, most: int) -> int:
        return max(0, min(most, int((budget_s - 0.005) / 0.0001)))

    def ran_s(self, rows: int) -> float:
        return -math.inf


TIMES = Affine()
FULL_S = TIMES.planned_s(FULL)


def formed(*left_s: float, timeout_s: float = LONG_S, overloaded: bool = False) -> FormedBatch:
    """Form a batch that starts at 0 s of one-row requests with so much time left, in the order of arrival."""
    queue = RequestQueue(FULL, 0.0001, ages=False, run_s=TIMES.expected_s)
    for one in left_s:
        call = Call([[1]])
        call.timeout_s, call.deadline_s = timeout_s, one
        queue.push(call)
    return form(queue, queue.next_group, FULL, StartPlan(0.0, TIMES, overloaded))


@pytest.mark.parametrize(
    ("left_s", "others", "overloaded", "dropped"),
    [
        (SURE * FULL_S - 1e-9, FULL, True, True),
        (SURE * FULL_S + 1e-9, FULL, True, False),
        (SURE * FULL_S - 1e-9, FULL, False, False),
        (SURE * FULL_S - 1e-9, FULL - 1, True, False),
        (FULL_S - 1e-9, FULL, False, True),
    ],
    ids=["in overload", "just enough time", "without overload", "too few others", "not even planned"],
)
def test_in_overload_a_request_leaves_its_place_to_one_that_is_surely_in_time(
    left_s: float, others: int, overloaded: bool, dropped: bool
) -> None:
    batch = formed(left_s, *[LONG_S] * others, overloaded=overloaded)
    assert len(batch.late) == dropped
    assert len(batch.requests) == FULL


@pytest.mark.parametrize(("above", "dropped"), [(-1e-9, True), (1e-9, False)])
def test_one_with_most_of_its_time_left_keeps_its_place(above: float, dropped: bool) -> None:
    timeout_s = 2 * FULL_S  # three quarters of that are half of the sure time
    batch = formed(TIME_LEFT * timeout_s + above, *[LONG_S] * FULL, timeout_s=timeout_s, overloaded=True)
    assert len(batch.late) == dropped


URGENT_S = TIMES.planned_s(30)


@pytest.mark.parametrize(
    ("others_s", "timeout_s", "rows"),
    [
        (URGENT_S + FULL_S + 1e-6, 2 * FULL_S + 1e-6, 30),
        (URGENT_S + FULL_S - 1e-6, 2 * FULL_S + 1e-6, FULL - 1),
        (URGENT_S + FULL_S - 1e-6, 2 * FULL_S - 1e-6, 30),
    ],
    ids=["others are in time", "others would be late, so it is dropped", "never time for a full batch"],
)
def test_a_batch_is_cut_for_an_urgent_request_unless_others_get_late(
    others_s: float, timeout_s: float, rows: int
) -> None:
    """Where all have time for two full batches, and some are urgent, small batches would keep it so."""
    batch = formed(URGENT_S + 1e-6, *[others_s] * (FULL - 1), timeout_s=timeout_s)
    assert (len(batch.requests), batch.capped, len(batch.late)) == (rows, rows == 30, rows != 30)
