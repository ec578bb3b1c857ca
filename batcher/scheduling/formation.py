"""Forming a batch where tenants, deadlines or priorities differ.

Each row goes to the tenant whose turn it is, except that

* a batch does not grow beyond the size at which each of its requests still meets its deadline, unless that
  would make others late; and if enough others wait to fill it without a request that cannot, that one is
  dropped (early drop: Nexus, Shen et al., SOSP 2019);
* rows of a light tenant, which has much less queued than its share, do not ride with rows of others that
  make the run much longer, but leave together without taking turns; in every other batch at most, which
  keeps the cost to others small.
"""

from collections.abc import Callable
from math import inf
from typing import NamedTuple

from cobatch.batcher.request import Request, State
from cobatch.batcher.scheduling.fair_queueing import Flow, Group
from cobatch.batcher.scheduling.queue import FormedBatch, RequestQueue
from cobatch.batcher.scheduling.run_times import RunTimes
from cobatch.batcher.scheduling.tuning import HELD_UP, LIGHT, ROW_COST, TIME_LEFT
from cobatch.batcher.tenant import Tenant


class StartPlan(NamedTuple):
    """The start of a batch and the run times, for requests with deadlines.

    `overloaded`: requests miss deadlines for want of engine time.
    """

    start_s: float
    run_times: RunTimes
    overloaded: bool = False


def form(
    queue: RequestQueue,
    group: Group,
    most_rows: int,
    plan: StartPlan | None = None,
    *,
    was_short: bool = False,
) -> FormedBatch:
    """Take the next batch out of the queue: whole requests, up to `most_rows` rows but at least one request.

    `was_short`: the batch before was, so this one may not be.
    """
    if not queue.deadlines:
        plan = None
    return BatchFormation(queue, group, most_rows, plan, may_be_short=not was_short).form()


class BatchFormation:
    """The forming of one batch of a group, of `most_rows` rows at most.

    `plan` is None if no queued request has a deadline. `may_be_short`: for the sake of a light tenant.
    """

    def __init__(
        self, queue: RequestQueue, group: Group, most_rows: int, plan: StartPlan | None, *, may_be_short: bool
    ) -> None:
        self._queue = queue
        self._group = group
        self._most_rows = most_rows
        self._plan = plan
        self._queued = queue.rows
        self._rows = self._light_rows = 0
        self._light: dict[Flow, None] = {}  # flows of light tenants with rows in the batch
        self._spares_light = may_be_short and queue.shares.active > 1
        self._tightest_s = self._tightest_timeout_s = inf
        # A deadline after this does not keep the batch from growing.
        self._limit_s = -inf
        if plan is not None:
            run_s = plan.run_times.sure_s if plan.overloaded else plan.run_times.planned_s
            self._limit_s = plan.start_s + run_s(min(most_rows, group.rows))

    def form(self) -> FormedBatch:
        """Take the batch out of the queue."""
        queue, group, plan, most_rows = self._queue, self._group, self._plan, self._most_rows
        requests: list[Request] = []
        late: list[Request] = []
        shares: dict[Tenant | None, int] = {}
        capped = was_short = False
        aside: list[Flow] = []
        aside_rows = 0
        next_flow: Callable[[], Flow | None] = group.turns.first
        while group.rows > aside_rows and self._rows < most_rows and (flow := next_flow()) is not None:
            request = flow.order.head()
            others = group.rows > aside_rows + flow.rows
            if others and not was_short and queue.is_too_early(request, flow.share):
                group.turns.set_aside()
                aside.append(flow)
                aside_rows += flow.rows
                continue
            rows = self._rows + request.rows
            if requests and rows > most_rows:
                break
            if plan is not None:
                if self._is_late(request, flow, plan):
                    queue.remove(request, State.RUNNING)
                    late.append(request)
                    continue
                if requests and self._is_cut_before(request, plan):
                    capped = True
                    break
            if self._spares_light and self._would_hold_up(request, flow, rows):
                was_short, self._spares_light = True, False
                next_flow = self._next_light
                continue
            queue.take(request, flow)
            shares[request.tenant] = shares.get(request.tenant, 0) + request.rows
            self._rows = rows
            requests.append(request)
            if plan is not None and self._tightest_s < self._limit_s:
                self._drop_outgrown(requests, late, shares, plan)
        for flow in aside:
            group.turns.add(flow)
        return FormedBatch(requests, late, shares, capped, was_short)

    def _drop_outgrown(
        self,
        requests: list[Request],
        late: list[Request],
        shares: dict[Tenant | None, int],
        plan: StartPlan,
    ) -> None:
        """Drop the requests that a batch has grown too long for (`_is_cut_before`), the most urgent first."""
        while self._rows and plan.run_times.expected_s(self._rows) > self._tightest_s - plan.start_s:
            request = min(requests, key=lambda request: request.deadline_s)
            requests.remove(request)
            late.append(request)
            self._rows -= request.rows
            shares[request.tenant] -= request.rows
            if not shares[request.tenant]:
                del shares[request.tenant]
            self._tightest_s = min((request.deadline_s for request in requests), default=inf)

    def _next_light(self) -> Flow | None:
        return next((flow for flow in self._light if flow.rows), None)

    def _would_hold_up(self, request: Request, flow: Flow, rows: int) -> bool:
        """Return whether a batch of `rows` rows would hold up the rows of light tenants in it."""
        queue = self._queue
        if queue.shares.is_light(flow.share, self._queued, LIGHT):
            self._light_rows += request.rows
            self._light[flow] = None
            return False
        return self._light_rows > 0 and queue.run_s(rows) > HELD_UP * queue.run_s(self._light_rows)

    def _is_cut_before(self, request: Request, plan: StartPlan) -> bool:
        """Return whether the batch ends before a request, for the sake of the most urgent one in it.

        Not if that one's timeout is long enough for two batches of the size that this one could have, a row
        of a smaller one costs more, and `request` may be late in the next: something held the engine up,
        and small batches would keep the others urgent.
        """
        tightest_s, run_times, now = self._tightest_s, plan.run_times, self._rows
        if tightest_s >= self._limit_s:
            return False
        if tightest_s >= plan.start_s + run_times.planned_s(now + request.rows):
            return False
        target = min(self._most_rows, now + self._group.rows)
        target_s = run_times.planned_s(target)
        if request.deadline_s >= plan.start_s + run_times.planned_s(now) + target_s:
            return True
        if self._tightest_timeout_s < 2 * target_s:
            return True
        return run_times.expected_s(now) / now <= ROW_COST * run_times.expected_s(target) / target

    def _is_late(self, request: Request, flow: Flow, plan: StartPlan) -> bool:
        """Return whether a request is dropped; if not, the batch may not grow past its deadline."""
        if request.deadline_s >= self._limit_s and request.rows <= self._most_rows:
            return False
        if self._is_too_late(request, flow, plan):
            return True
        if request.deadline_s < self._tightest_s:
            self._tightest_s, self._tightest_timeout_s = request.deadline_s, request.timeout_s or 0.0
        return False

    def _is_too_late(self, request: Request, flow: Flow, plan: StartPlan) -> bool:
        """Return whether a request misses its deadline even alone, or would keep the batch too small.

        The second is so if other requests of its tenant fill the batch without it, and in overload: requests
        with little time left would make batches small, those behind them would have less left, and goodput
        would collapse. A tenant never loses a turn that way while it has less than its share of the queue,
        nor a batch that takes no more than `TIME_LEFT` of the request's timeout, so that a client that never
        has time for a large batch is served.
        """
        run_times, left_s = plan.run_times, request.deadline_s - plan.start_s
        if run_times.expected_s(request.rows) > left_s:
            return True
        queue, most_rows, rows = self._queue, self._most_rows, self._rows
        full = min(most_rows, queue.full_rows)
        needed_s = run_times.planned_s(full)
        if plan.overloaded and request.timeout_s is not None:
            needed_s = max(needed_s, min(run_times.sure_s(full), request.timeout_s * TIME_LEFT))
        if rows + flow.rows - request.rows >= full and left_s < needed_s:
            return True
        if not plan.overloaded or request.timeout_s is None or queue.shares.is_light(flow.share, queue.rows):
            return False
        target = min(most_rows, rows + flow.group.rows)
        fair_s = min(run_times.planned_s(target), request.timeout_s * TIME_LEFT)
        if left_s >= fair_s:
            return False
        small, fair = run_times.most_rows(left_s, target), run_times.most_rows(fair_s, target)
        if not small or not fair:
            return not small
        return run_times.expected_s(small) / small > ROW_COST * run_times.expected_s(fair) / fair
