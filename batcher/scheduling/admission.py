"""Who gets in: room in the queue, the tenant's limits, and a deadline that can be kept.

A request that cannot be answered in time is better refused than queued: its caller can go elsewhere at
once, and no engine time goes into an answer that nobody takes (Clockwork, Gujarati et al., OSDI 2020).
What is foretold is hopeful: medians, and nobody else coming first.

It is foretold from runs, and what is refused does not run: where runs were slow once, all would be refused
for ever. So while the engine is idle and no run says how long they take now, one request is let in all the
same.
"""

from __future__ import annotations

import math

from cobatch.batcher.errors import (
    BatcherError,
    DeadlineTooShortError,
    DeadlineUnreachableError,
    QueueFullError,
    TooManyRowsError,
)
from cobatch.batcher.request import Request
from cobatch.batcher.scheduling.queue import RequestQueue
from cobatch.batcher.scheduling.run_times import LatencyModel, ShapeTimes
from cobatch.batcher.tenant import Tenant
from cobatch.engines.base import RowShapes

# A tenant may have so many times as much queued as there is room left (dynamic thresholds: Choudhury and
# Hahne, IEEE/ACM Transactions on Networking, 1998). One alone fills 8/9 of the queue, and two 8/17 each;
# what is left is for those that come, so that whoever floods the queue shuts nobody out.
_SHARE_OF_ROOM = 8
# Nobody is told to come back at once.
_LEAST_S = 0.001
_MOST_OVERHEAD = 0.25  # of a timeout
# After so long without a run it is doubted how long one takes,
_DOUBT_S = 1.0
# by those that would have less than this part of their timeout to spare. (With next to nothing to spare a
# request is let in, and too late when its batch is made up.)
_TO_SPARE = 0.1


class Admission:
    """Of one model. `closed` is set once nothing more is accepted, to why. `lanes`: how many engines share
    the work."""

    def __init__(
        self,
        queue: RequestQueue,
        latency: LatencyModel,
        times: ShapeTimes,
        *,
        max_batch_size: int,
        max_queue_rows: int,
        deadline_ms: float | None,
        now_s: float,
    ) -> None:
        self.closed: BatcherError | None = None
        self.lanes = 1
        self.max_queue_rows = max_queue_rows
        self._queue = queue
        self._latency = latency
        self._times = times
        self._max_batch_size = max_batch_size
        self._default_timeout_s = None if deadline_ms is None else deadline_ms / 1000
        self._tried_s = now_s  # when the last request was let in to find out

    @property
    def drain_s(self) -> float:
        """Estimated seconds until what is queued now will have left, at the current pace; never none."""
        return max(_LEAST_S, self._queue.rows * self._queue.row_s / self.lanes)

    def refusal(self, rows: int, tenant: Tenant | None, callers: int, now_s: float) -> BatcherError | None:
        """Why there is no room for so many rows, for so many callers of a tenant, or None."""
        queue = self._queue
        if self.closed is not None:
            return self.closed
        if queue.rows + rows > self.max_queue_rows:
            if rows > self.max_queue_rows:
                return TooManyRowsError(rows, self.max_queue_rows)
            return QueueFullError(queue.rows, self.max_queue_rows, self.drain_s)
        if tenant is None:
            return None
        if queue.rows_of(tenant) > _SHARE_OF_ROOM * (self.max_queue_rows - queue.rows):
            return QueueFullError(queue.rows, self.max_queue_rows, self.drain_s)
        return tenant.refusal(callers, rows, now_s, self.drain_s) if tenant.limited else None

    def set_deadline(
        self, request: Request, now_s: float, free_s: float, overhead_s: float
    ) -> BatcherError | None:
        """Give the request its deadline, if it or its model has one; why it cannot be kept, or None.

        The deadline is when its run must have ended: earlier than the caller's by `overhead_s`, what passes
        before and after, but by no more than a part of the timeout: that is not foretold as well as runs are.
        `free_s`: when the first engine is expected to have run what it has. One that is let in to find out
        how long a run takes has no deadline from here on: it is run and answered, late or not.
        """
        timeout_s = self._default_timeout_s if request.timeout_s is None else request.timeout_s
        if timeout_s is None:
            return None
        request.timeout_s = timeout_s
        left_s = timeout_s - min(overhead_s, timeout_s * _MOST_OVERHEAD)
        run_s = self.run_s(request.rows, request.row_shapes)
        if run_s > left_s * (1 - _TO_SPARE) and self._is_trial(request, now_s, free_s):
            self._tried_s = now_s
            return None
        request.deadline_s = now_s + left_s
        if run_s > left_s:
            return DeadlineTooShortError(timeout_s, run_s + timeout_s - left_s)
        full_rows = self._queue.full_rows
        before, beside = divmod(math.ceil(self._queue.ahead_of(request.tenant)), full_rows)
        if beside and beside + request.rows > full_rows:
            before, beside = before + 1, 0
        beside_s = self._times.of(request.row_shapes).expected_s(min(full_rows, beside + request.rows))
        batch_s = max(run_s, beside_s)
        wait_s = before / self.lanes * self._latency.expected_s(full_rows)
        needed_s = max(0.0, free_s - now_s) + wait_s + batch_s
        if needed_s > left_s:
            return DeadlineUnreachableError(timeout_s, needed_s + timeout_s - left_s, needed_s - left_s)
        return None

    def _is_trial(self, request: Request, now_s: float, free_s: float) -> bool:
        """Whether to let it in to find out how long it takes; nobody has to wait for it."""
        if self._queue.rows or free_s > now_s or now_s - self._tried_s < _DOUBT_S:
            return False
        rows = min(request.rows, self._max_batch_size)
        return now_s - self._times.of(request.row_shapes).ran_s(rows) >= _DOUBT_S

    def run_s(self, rows: int, row_shapes: RowShapes) -> float:
        """What so many rows take with the engine to themselves, in batches as large as it takes."""
        most, times = self._max_batch_size, self._times.of(row_shapes)
        if rows <= most:
            return times.expected_s(rows)
        full, rest = divmod(rows, most)
        return full * times.expected_s(most) + (times.expected_s(rest) if rest else 0.0)
