"""Admission: room in the queue, the tenant's limits, and a deadline that can be met.

A request that cannot be answered in time is better refused than queued: its client can go elsewhere at once,
and no engine time is spent on an answer that comes too late (Clockwork, Gujarati et al., OSDI 2020). The
prediction is optimistic: median run times, and no request overtakes.

Run times are learned from runs, and a refused request does not run: after a few slow runs, all requests could
be refused for ever. So while the engine is idle and no recent run tells the time, one request is admitted on
trial.
"""

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
from cobatch.batcher.scheduling.run_times import RunTimeModel
from cobatch.batcher.scheduling.shape_times import ShapeRunTimes
from cobatch.batcher.scheduling.tuning import DOUBT_S, LEAST_RETRY_S, MOST_OVERHEAD, SHARE_OF_ROOM, TO_SPARE
from cobatch.batcher.tenant import Tenant
from cobatch.engines.base import RowShapes


class Admission:
    """Decides which requests of one model are accepted.

    `closed`: the reason why none is, if so. `open_rows`: the size at which the queue is full; 0 if closed.
    `engines`: the number of engines that share the work.
    `overhead_s`: the measured time beside queue and run, from the finished run to the written answer.
    """

    def __init__(
        self,
        queue: RequestQueue,
        model: RunTimeModel,
        run_times: ShapeRunTimes,
        *,
        max_batch_size: int,
        max_queue_rows: int,
        timeout_s: float | None,
        now_s: float,
    ) -> None:
        self.closed: BatcherError | None = None
        self.engines = 1
        self.overhead_s = 0.0
        self.max_queue_rows = self.open_rows = max_queue_rows
        self.timeout_s = timeout_s  # of requests that have none of their own
        self._queue = queue
        self._model = model
        self._run_times = run_times
        self._max_batch_size = max_batch_size
        self._tried_s = now_s  # when the last request was admitted on trial

    def close(self, why: BatcherError | None) -> None:
        """Refuse every request for this reason; None ends that."""
        self.closed = why
        self.open_rows = 0 if why is not None else self.max_queue_rows

    @property
    def drain_s(self) -> float:
        """The time until the queue is empty, which a refused client should wait."""
        return max(LEAST_RETRY_S, self._queue.rows * self._queue.row_s / self.engines)

    def refusal(self, rows: int, tenant: Tenant | None, callers: int, now_s: float) -> BatcherError | None:
        """Return why there is no room for `rows` rows for `callers` callers of a tenant, or None."""
        queue = self._queue
        if self.closed is not None:
            return self.closed
        if queue.rows + rows > self.max_queue_rows:
            if rows > self.max_queue_rows:
                return TooManyRowsError(rows, self.max_queue_rows)
            return QueueFullError(queue.rows, self.max_queue_rows, self.drain_s)
        if tenant is None:
            return None
        if queue.shares.of(tenant).rows > SHARE_OF_ROOM * (self.max_queue_rows - queue.rows):
            return QueueFullError(queue.rows, self.max_queue_rows, self.drain_s)
        return tenant.refusal(callers, rows, now_s, self.drain_s) if tenant.limited else None

    def set_deadline(
        self, request: Request, now_s: float, free_s: float, wait_s: float | None = None
    ) -> BatcherError | None:
        """Set a request's deadline, if it or its model has one; return why it cannot be met, or None.

        The deadline is when its run must have ended: earlier than the caller's by `overhead_s`, but at most
        by a part of the timeout. `free_s`: when the first engine is expected to be idle; `wait_s`: the
        predicted wait, if it is not that behind the whole queue. A request admitted on trial has no deadline:
        it is run, and fails at the end of its timeout if its run still goes on.
        """
        timeout_s = self.timeout_s if request.timeout_s is None else request.timeout_s
        if timeout_s is None:
            return None
        request.timeout_s = timeout_s
        left_s = timeout_s - min(self.overhead_s, timeout_s * MOST_OVERHEAD)
        run_s = self.run_s(request.rows, request.row_shapes)
        if run_s > left_s * (1 - TO_SPARE) and self._is_trial(request, now_s, free_s):
            self._tried_s = now_s
            return None
        request.deadline_s = now_s + left_s
        if run_s > left_s:
            return DeadlineTooShortError(timeout_s, run_s + timeout_s - left_s)
        if wait_s is None:
            wait_s, run_s = self._behind_queue(request, run_s)
            wait_s += max(0.0, free_s - now_s)
        needed_s = wait_s + run_s
        if needed_s > left_s:
            return DeadlineUnreachableError(timeout_s, needed_s + timeout_s - left_s, needed_s - left_s)
        return None

    def _behind_queue(self, request: Request, run_s: float) -> tuple[float, float]:
        """Return the time of the runs before a request's own, and of its own, at least `run_s`."""
        full_rows = self._queue.full_rows
        before, beside = divmod(math.ceil(self._queue.ahead_of(request.tenant)), full_rows)
        if beside and beside + request.rows > full_rows:
            before, beside = before + 1, 0
        beside_s = self._run_times.of(request.row_shapes).expected_s(min(full_rows, beside + request.rows))
        return before / self.engines * self._model.expected_s(full_rows), max(run_s, beside_s)

    def _is_trial(self, request: Request, now_s: float, free_s: float) -> bool:
        """Return whether to admit a request to measure how long it runs; no other has to wait for it."""
        if self._queue.rows or free_s > now_s or now_s - self._tried_s < DOUBT_S:
            return False
        rows = min(request.rows, self._max_batch_size)
        return now_s - self._run_times.of(request.row_shapes).ran_s(rows) >= DOUBT_S

    def run_s(self, rows: int, row_shapes: RowShapes) -> float:
        """Return the expected time of `rows` rows alone on the engine, in batches as large as it takes."""
        most, run_times = self._max_batch_size, self._run_times.of(row_shapes)
        if rows <= most:
            return run_times.expected_s(rows)
        full, rest = divmod(rows, most)
        return full * run_times.expected_s(most) + (run_times.expected_s(rest) if rest else 0.0)
