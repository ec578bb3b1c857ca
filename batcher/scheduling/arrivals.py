"""Arrivals: their rate, and closed-loop clients that are worth waiting for.

Closed-loop clients send their next request when they have the answer to the last. They fall into two groups
whose batches alternate, each of half the possible size: one group is answered just after the other's batch
has left. If a run of both together takes hardly longer than one of half of them, it pays to wait for the
clients that were just answered; a few batches tell. The same holds where the engine is idle between two runs
because the event loop notices late that one has ended: one run of all pays that once. Clipper (Crankshaw et
al., NSDI 2017) leaves this question to a setting, delayed batching.
"""

from collections import deque
from collections.abc import Sequence
from math import inf

from cobatch.batcher.request import Batch, Request
from cobatch.batcher.scheduling import tuning
from cobatch.batcher.scheduling.run_times import RunTimes


class ArrivalRate:
    """The number of requests that arrive per second."""

    def __init__(self, now_s: float) -> None:
        self._at_s = now_s
        self._count = 0
        self._rate: float | None = None

    def per_s(self, now_s: float, count: int) -> float | None:
        """Return the rate, given the count of all requests so far; None until enough have come."""
        passed_s = now_s - self._at_s
        if passed_s >= tuning.RATE_WINDOW_S:
            new = (count - self._count) / passed_s
            known = self._rate is not None or count >= tuning.RATE_LEAST_REQUESTS
            self._rate = new if known else None
            self._at_s, self._count = now_s, count
        return self._rate


class ClosedLoopEstimator:
    """Estimates how soon, and how many of, a batch's clients come back. Times are of the batcher's clock."""

    def __init__(self) -> None:
        self._ends: deque[tuple[float, int]] = deque(maxlen=2)  # when a batch ended, its callers
        self._returns_s: deque[float] = deque(maxlen=tuning.RETURNS_SEEN)
        self._rows_per_answer = 0.0
        # The engine is idle this long for each run: packing, starting, noticing the end.
        self._idle_s = 0.0
        self._finished_s = 0.0

    def on_ended(self, now_s: float, batch: Batch) -> None:
        """Note that a batch is about to be answered."""
        self._ends.append((now_s, sum([one.callers or 1 for one in batch.requests])))
        free_s = max(batch.gathered_s, self._finished_s)
        self._finished_s = batch.finished_s
        idle_s = batch.started_s - free_s + now_s - batch.finished_s
        self._idle_s += (idle_s - self._idle_s) * tuning.IDLE_GAIN

    def on_formed(self, requests: Sequence[Request]) -> None:
        """Note that these requests, in the order in which they came, leave as a batch."""
        first_s = requests[0].enqueued_s
        for end_s, answered in reversed(self._ends):
            if end_s <= first_s:
                # A bundle's callers come with it; of a cut request each part is counted as one.
                callers = [one for one in requests for _ in range(one.callers or 1)]
                back = callers[:answered]
                last = back[max(0, int(len(back) * tuning.RETURNED) - 1)]
                # More callers than were answered are not those clients.
                self._returns_s.append(last.enqueued_s - end_s if len(callers) <= answered else inf)
                self._rows_per_answer = sum([one.rows / (one.callers or 1) for one in back]) / answered
                return

    def expected_returns(self, queued: int, full_rows: int, run_times: RunTimes) -> tuple[int, float] | None:
        """Return the rows, and the seconds, that an engine that has just become idle should wait for.

        None if waiting does not pay.
        """
        if len(self._returns_s) < tuning.RETURNS_SEEN or queued >= full_rows:
            return None
        returns_s = sorted(self._returns_s)
        wait_s = returns_s[-2] + tuning.TIMER_S  # one may have been held up
        rows = min(full_rows, queued + round(self._ends[-1][1] * self._rows_per_answer))
        run_s = run_times.mean_s(rows)
        most_s = run_s * tuning.MOST_WAIT
        if wait_s > most_s:
            return None
        # One run of all rows after a wait, or two runs without one. If nothing is queued yet, the first
        # request to come would leave with some of the others.
        now_rows = queued or max(1, rows // 2)
        two_s = run_times.mean_s(now_rows) + run_times.mean_s(max(1, rows - now_rows)) + self._idle_s
        gain = two_s / (run_s + returns_s[tuning.RETURNS_SEEN // 2])
        return (rows, min(wait_s * tuning.RETURN_MARGIN, most_s)) if gain > tuning.WAIT_GAIN else None
