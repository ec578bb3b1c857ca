"""Making up a batch where tenants, deadlines or priorities differ.

Each row goes to the tenant whose turn it is, but

* a batch does not grow past what lets each of its requests finish in time, unless enough others wait to fill
  it without the one that cannot; that one is late then (early drop: Nexus, Shen et al., SOSP 2019);
* the rows of a light tenant, which has much less queued than its part, do not ride with so many of others
  that the run would take them much longer, and do not take turns with them either but leave together; in
  every other batch at most, so that this costs others little.
"""

from __future__ import annotations

from collections.abc import Callable
from math import inf
from typing import TYPE_CHECKING, NamedTuple

from cobatch.batcher.request import Request, State
from cobatch.batcher.scheduling.run_times import RunTimes
from cobatch.batcher.tenant import Tenant

if TYPE_CHECKING:
    from cobatch.batcher.scheduling.queue import Flow, Group, RequestQueue

# A request that still has this part of its timeout is never left out for the sake of larger batches; nor one
# that makes a row no more than so many times as dear.
_ENOUGH = 0.75
_DEARER = 1.0
# A tenant is light with less than this part of its part of the queue, and its rows are not made to wait for
# others' where that takes a run more than so many times as long.
_MUCH_LESS = 0.25
_HELD_UP = 1.2


class FormedBatch(NamedTuple):
    """A batch: its requests, those that were found to be too late for it and for any other, whether a
    deadline kept it from growing, and the rows of each tenant."""

    requests: list[Request]
    late: list[Request]
    capped: bool
    shares: dict[Tenant | None, int]


class StartPlan(NamedTuple):
    """When a batch would start, and how long runs take: for requests that have a deadline."""

    start_s: float
    latency: RunTimes
    overloaded: bool = False  # requests are lost for want of the engine's time


class BatchFormation:
    """One batch of a group, of `most_rows` rows at most. `may_be_short`: for the sake of a light tenant."""

    def __init__(
        self, queue: RequestQueue, group: Group, most_rows: int, plan: StartPlan | None, *, may_be_short: bool
    ) -> None:
        self._queue = queue
        self._group = group
        self._most_rows = most_rows
        self._plan = plan if queue.deadlines else None
        self._queued = queue.rows
        self._rows = self._light_rows = 0
        self._light: dict[Flow, None] = {}  # of tenants that are, with rows in the batch
        self._considerate = may_be_short and queue.shares.active > 1
        self._tightest_s = inf
        # Whose deadline is after this does not keep the batch from growing.
        self._limit_s = -inf
        if self._plan is not None:
            self._limit_s = self._plan.start_s + self._plan.latency.high_s(min(most_rows, group.rows))

    def batch(self) -> FormedBatch:
        """Take it out of the queue."""
        queue, group, most_rows = self._queue, self._group, self._most_rows
        taken = FormedBatch([], [], False, {})
        requests, shares = taken.requests, taken.shares
        next_flow: Callable[[], Flow | None] = group.turns.first
        while group.rows and self._rows < most_rows:
            flow = next_flow()
            if flow is None:
                break
            request = flow.lines.head()
            rows = self._rows + request.rows
            if requests and rows > most_rows:
                break
            if self._plan is not None:
                if self._is_late(request, flow, self._plan):
                    queue.remove(request, State.RUNNING)
                    taken.late.append(request)
                    continue
                if requests and self._would_make_late(rows, self._plan):
                    return taken._replace(capped=True)
            if self._considerate and self._would_hold_up(request, flow, rows):
                queue.was_short, self._considerate = True, False
                next_flow = self._next_light
                continue
            queue.remove(request, State.RUNNING)
            queue.shares.served(flow.share, request.rows * queue.row_s)
            tenant = flow.share.tenant
            shares[tenant] = shares.get(tenant, 0) + request.rows
            self._rows = rows
            requests.append(request)
        return taken

    def _next_light(self) -> Flow | None:
        """Where only light tenants' rows may still ride: one that has some."""
        return next((flow for flow in self._light if flow.rows), None)

    def _would_hold_up(self, request: Request, flow: Flow, rows: int) -> bool:
        """Whether a batch of so many rows would make those of light tenants in it wait for the others'."""
        queue = self._queue
        if queue.shares.is_light(flow.share, self._queued, _MUCH_LESS):
            self._light_rows += request.rows
            self._light[flow] = None
            return False
        return self._light_rows > 0 and queue.run_s(rows) > _HELD_UP * queue.run_s(self._light_rows)

    def _would_make_late(self, rows: int, plan: StartPlan) -> bool:
        """Whether a batch of so many rows would be too late for one that is in it."""
        tightest_s = self._tightest_s
        return tightest_s < self._limit_s and tightest_s < plan.start_s + plan.latency.high_s(rows)

    def _is_late(self, request: Request, flow: Flow, plan: StartPlan) -> bool:
        """Whether it cannot be in time; if it can, the batch may not grow past its deadline."""
        if request.deadline_s >= self._limit_s and request.rows <= self._most_rows:
            return False
        if self._is_too_late(request, flow, plan):
            return True
        self._tightest_s = min(self._tightest_s, request.deadline_s)
        return False

    def _is_too_late(self, request: Request, flow: Flow, plan: StartPlan) -> bool:
        """Whether it cannot be in time even alone; or would keep the batch small, where that costs others
        their answers.

        That is so where others of its tenant fill the batch without it, and where requests are lost for want
        of engine time. Requests with little time left would make batches small there, those behind them would
        have less left, and so on: goodput would collapse. Nobody loses that way a turn, while its tenant has
        less than its part of the queue; nor a batch that takes no more than `_ENOUGH` of its timeout, so that
        whoever never has time for a large one is served.
        """
        latency, left_s = plan.latency, request.deadline_s - plan.start_s
        if latency.expected_s(request.rows) > left_s:
            return True
        queue, most_rows, rows = self._queue, self._most_rows, self._rows
        full = min(most_rows, queue.full_rows)
        if rows + flow.rows - request.rows >= full and left_s < latency.high_s(full):
            return True
        if not plan.overloaded or request.timeout_s is None or queue.shares.is_light(flow.share, queue.rows):
            return False
        target = min(most_rows, rows + flow.group.rows)
        fair_s = min(latency.high_s(target), request.timeout_s * _ENOUGH)
        if left_s >= fair_s:
            return False
        small, fair = latency.most_rows(left_s, target), latency.most_rows(fair_s, target)
        if not small or not fair:
            return not small
        return latency.expected_s(small) / small > _DEARER * latency.expected_s(fair) / fair
