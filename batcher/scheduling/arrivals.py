"""Callers who wait for their answers come back together: how soon, and how many.

Clients that send their next request when they have the answer to the last fall into two groups whose
batches alternate, each of half the size it could have: one group is answered just after the other one's
batch has left. Where a run of both together takes hardly longer than one of half of them, it pays to wait
for those who have just been answered; and that is known after a few batches. So it does where an engine
stands idle between two runs, because the event loop has its hands full with other callers and does not notice
that one has ended: one run of all has that once. Whether waiting pays is the one question of batching that
Clipper (Crankshaw et al., NSDI 2017) leaves to a setting, its delayed batching.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from math import inf

from cobatch.batcher.request import Batch, Request
from cobatch.batcher.scheduling.run_times import LatencyModel

# The wait is no longer than this part of the run that it is for,
_PART_OF_RUN = 0.4
# and lets so many times as many rows through in a second.
_GAIN = 1.05
# Of so many batches all but one must have seen their callers back as soon.
_SEEN = 10
# Timers are late by so much, and so is whoever comes when one is due.
_TIMER_S = 0.0005
# Of those who come back, this part decides how long that takes; a wait is given so many times that.
_MOST = 0.9
_MARGIN = 2.0
# What part of a new measurement goes into what is known.
_NEW = 0.1


class ClosedLoopEstimator:
    """Of one model. Times are seconds of the batcher's clock."""

    def __init__(self) -> None:
        self._ends: deque[tuple[float, int]] = deque(maxlen=2)  # when a batch ended, with so many requests
        self._back_s: deque[float] = deque(maxlen=_SEEN)
        self._part = 0.0  # of those that a batch answers, so many rows for each
        # For so long the engine stands idle with each run: packing, starting, noticing its end.
        self._between_s = 0.0
        self._finished_s = 0.0

    def ended(self, now_s: float, batch: Batch) -> None:
        """This batch is about to be answered."""
        self._ends.append((now_s, len(batch.requests)))
        free_s = max(batch.gathered_s, self._finished_s)
        self._finished_s = batch.finished_s
        between_s = batch.started_s - free_s + now_s - batch.finished_s
        self._between_s += (between_s - self._between_s) * _NEW

    def left(self, requests: Sequence[Request]) -> None:
        """These leave as a batch, in the order in which they came: were they those of a batch that ended?"""
        first_s = requests[0].enqueued_s
        for end_s, answered in reversed(self._ends):
            if end_s <= first_s:
                back = requests[: min(answered, len(requests))]
                last = back[max(0, int(len(back) * _MOST) - 1)]
                # Where more come than were answered, they come of their own accord.
                self._back_s.append(last.enqueued_s - end_s if len(requests) <= answered else inf)
                self._part = sum([request.rows for request in back]) / answered
                return

    def expected_returns(
        self, queued: int, full_rows: int, latency: LatencyModel
    ) -> tuple[int, float] | None:
        """For how many rows, and how many seconds, it pays to wait when the engine has just become idle."""
        if len(self._back_s) < _SEEN or queued >= full_rows:
            return None
        back_s = sorted(self._back_s)
        wait_s = back_s[-2] + _TIMER_S  # one may have been held up
        rows = min(full_rows, queued + round(self._ends[-1][1] * self._part))
        run_s = latency.expected_s(rows)
        most_s = run_s * _PART_OF_RUN
        if wait_s > most_s:
            return None
        # All of them in one run, and a wait each time; or in two, where nobody has to be waited for. Where
        # nobody is there yet, whoever comes first would not leave alone but with some of the others.
        now_rows = queued or max(1, rows // 2)
        both_s = latency.expected_s(now_rows) + latency.expected_s(max(1, rows - now_rows)) + self._between_s
        gain = both_s / (run_s + back_s[_SEEN // 2])
        return (rows, min(wait_s * _MARGIN, most_s)) if gain > _GAIN else None
