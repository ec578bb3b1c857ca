"""The queue: what may ride together, and whose turn it is.

Rows of different shape cannot share a batch, so each shape is a group; within it each tenant has a flow,
and within that the order is `Lines`'. Across groups each tenant's requests stand in one order as well,
so that none of its shapes waits behind the others'. Whose turn it is says `batcher.fair`.

Invariants, held by every method:

* `rows` of a flow, a group, a share and the queue are each the sum over their requests in state QUEUED.
* A flow or group without rows is gone, so what is idle costs nothing.
* Push, cancel and take are O(log n) in tenants and O(1) in everything else, amortised.
"""

from __future__ import annotations

from collections import deque
from heapq import heapify, heappop, heappush
from math import inf
from typing import NamedTuple

from batcher.fair import Share, Shares, Turns
from batcher.latency import LatencyModel
from batcher.lines import DEFAULT, Lines, level_of
from batcher.request import Request, State
from batcher.tenant import Tenant
from engines.base import RowShapes

_HUSKS_KEPT = 64


# A request that still has this part of its timeout is never left out for the sake of larger batches; nor one
# that makes a row no more than so many times as dear.
_ENOUGH = 0.75
_DEARER = 1.0


class Flow:
    """One tenant's requests of one shape."""

    __slots__ = ("group", "in_turns", "lines", "rows", "share")

    def __init__(self, group: Group, share: Share) -> None:
        self.group = group
        self.share = share
        self.lines = Lines()
        self.rows = 0
        self.in_turns = False


class Group:
    """All requests whose rows have one shape."""

    __slots__ = ("flows", "row_shapes", "rows", "turns")

    def __init__(self, row_shapes: RowShapes) -> None:
        self.row_shapes = row_shapes
        self.rows = 0
        self.flows: dict[Share, Flow] = {}
        self.turns: Turns[Flow] = Turns()


class Taken(NamedTuple):
    """A batch: its requests, those that were found to be too late for it and for any other, whether a
    deadline kept it from growing, and the rows of each tenant."""

    requests: list[Request]
    late: list[Request]
    capped: bool
    shares: dict[Share, int]


class Plan(NamedTuple):
    """When a batch would start, and how long runs take: for requests that have a deadline."""

    start_s: float
    latency: LatencyModel
    crowded: bool = False  # requests are lost for want of the engine's time


class RequestQueue:
    """Of one model. `full_rows`: what counts as a full batch. `row_s`: what a row is expected to cost.

    `ages`: whether `oldest_s` and `urgent_s` will be asked for; they cost a little for each request.
    """

    def __init__(self, full_rows: int, row_s: float, *, ages: bool) -> None:
        self.groups: dict[RowShapes, Group] = {}
        self.rows = 0
        self.row_s = row_s
        self.deadlines = 0  # requests that have one
        self._full_rows = full_rows
        self._full: dict[Group, None] = {}
        self._shares = Shares()
        self._turns: Turns[Share] = Turns()
        self._ages = ages
        self._arrivals: deque[Request] = deque()
        self._urgent: list[tuple[float, int, Request]] = []
        self._most_ages = _HUSKS_KEPT  # so many of both before those that left are dropped
        self._number = 0
        # Of the newest request: the next is often alike. When it was all there was, it is kept aside as it is,
        # and its tenant counts as active, since to make all that anew costs a lone request as much as to queue it.
        self._last: Flow | None = None
        self._aside = False

    # What the policy sees

    @property
    def full_rows(self) -> int:
        """How many rows make a full batch."""
        return self._full_rows

    @full_rows.setter
    def full_rows(self, rows: int) -> None:
        if rows != self._full_rows:
            self._full_rows = rows
            self._full = {group: None for group in self.groups.values() if group.rows >= rows}

    @property
    def contended(self) -> bool:
        """Whether several tenants have rows, or had lately: the next of them may come any moment."""
        return self._shares.several

    @property
    def shapes(self) -> int:
        """How many groups there are."""
        return len(self.groups)

    @property
    def next_group(self) -> Group:
        """The group of the request whose turn it is; there must be one."""
        if len(self.groups) == 1:
            return next(iter(self.groups.values()))
        share = self._turns.first()
        if share.order is None:
            return next(iter(share.flows)).group
        request = share.order.head()
        assert request.flow is not None
        return request.flow.group

    @property
    def full_group(self) -> Group | None:
        """The group that has been full for longest."""
        return next(iter(self._full), None)

    @property
    def oldest_s(self) -> float:
        """When the oldest request was queued; there must be one, and `ages`."""
        arrivals = self._arrivals
        while arrivals[0].state is not State.QUEUED:
            arrivals.popleft()
        return arrivals[0].enqueued_s

    @property
    def urgent_s(self) -> float:
        """The earliest deadline, infinite without; needs `ages`."""
        urgent = self._urgent
        while urgent and urgent[0][2].state is not State.QUEUED:
            heappop(urgent)
        return urgent[0][0] if urgent else inf

    # In

    def push(self, request: Request) -> Group:
        """Put a new request in; it says when it was queued."""
        flow = self._last
        if (
            flow is None
            or flow.group.row_shapes != request.row_shapes
            or flow.share.tenant is not request.tenant
            or not (flow.rows or self._aside)
        ):
            if self._aside:
                self._let_go()
            flow = self._last = self._flow_of(request)
        elif self._aside:
            self._aside = False
            self.groups[request.row_shapes] = flow.group
        rows = request.rows
        group, share = flow.group, flow.share
        request.flow = flow
        request.state = State.QUEUED
        request.level = level_of(request.priority) if request.priority else DEFAULT
        flow.rows += rows
        share.rows += rows
        group.rows += rows
        self.rows += rows
        flow.lines.push(request)
        if share.order is not None:
            share.order.push(request)
        if share.tenant is not None:
            share.tenant.queued_rows += rows
        if request.deadline_s != inf:
            self.deadlines += 1
        if group.rows >= self._full_rows:
            self._full[group] = None
        if self._ages:
            self._note_age(request)
        return group

    def _let_go(self) -> None:
        """Forget the flow that was kept aside."""
        self._aside = False
        flow = self._last
        assert flow is not None
        del flow.share.flows[flow]
        del flow.group.flows[flow.share]
        flow.group.turns.clear()
        self._shares.sleeps(flow.share)

    def _flow_of(self, request: Request) -> Flow:
        """The flow that a request belongs to, ready for it."""
        group = self.groups.get(request.row_shapes)
        if group is None:
            group = self.groups[request.row_shapes] = Group(request.row_shapes)
        share = self._shares.of(request.tenant)
        if not share.rows:
            self._shares.wakes(share)
            self._turns.add(share)
        flow = group.flows.get(share)
        if flow is None:
            flow = group.flows[share] = Flow(group, share)
            if share.flows and share.order is None:
                # From here on it needs an order of its own, until it has nothing queued.
                (only,) = share.flows
                share.order = only.lines.copy()
            share.flows[flow] = None
            group.turns.add(flow)
        return flow

    def _note_age(self, request: Request) -> None:
        self._arrivals.append(request)
        if request.deadline_s != inf:
            self._number += 1
            heappush(self._urgent, (request.deadline_s, self._number, request))
        if len(self._arrivals) + len(self._urgent) > self._most_ages:
            self._arrivals = deque([one for one in self._arrivals if one.state is State.QUEUED])
            self._urgent = [entry for entry in self._urgent if entry[2].state is State.QUEUED]
            heapify(self._urgent)
            self._most_ages = 2 * (len(self._arrivals) + len(self._urgent)) + _HUSKS_KEPT

    # Out

    def cancel(self, request: Request) -> None:
        """Take a queued request out; its memory is given back at once."""
        self._remove(request, State.CANCELLED)
        request.payloads = ()

    def _remove(self, request: Request, state: State) -> None:
        assert request.state is State.QUEUED
        flow = request.flow
        assert flow is not None
        request.state = state
        request.flow = None
        flow.lines.leave(request)
        if flow.share.order is not None:
            flow.share.order.leave(request)
        if request.deadline_s != inf:
            self.deadlines -= 1
        self._forget(flow, request.rows)

    def _forget(self, flow: Flow, rows: int) -> None:
        """So many rows of a flow are not queued any more."""
        group, share = flow.group, flow.share
        share.rows -= rows
        flow.rows -= rows
        group.rows -= rows
        self.rows -= rows
        if share.tenant is not None:
            share.tenant.queued_rows -= rows
        if not self.rows and flow is self._last and len(share.flows) == len(group.flows) == 1:
            self._aside = True
            del self.groups[group.row_shapes]
            share.order = None
        elif not flow.rows:
            del group.flows[share]
            del share.flows[flow]
            if not group.rows:
                del self.groups[group.row_shapes]
                group.turns.clear()  # its flows know it, and it would know them: nothing for the collector
            if not share.rows:
                share.order = None
                self._shares.sleeps(share)
        if group.rows < self._full_rows:
            self._full.pop(group, None)
        if not self.rows:
            self._arrivals.clear()
            self._urgent.clear()

    def take(self, group: Group, most_rows: int, plan: Plan | None = None) -> Taken:
        """Remove the next batch: whole requests, up to `most_rows` rows but at least one request.

        Each row goes to the tenant whose turn it is. With a plan, a batch does not grow past what lets each
        of its requests finish in time, unless enough others wait to fill it without the one that
        cannot; that one is late then (early drop: Nexus, Shen et al., SOSP 2019).
        """
        if not self.deadlines and len(group.flows) == 1:
            taken = self._take_plain(group, most_rows)
            if taken is not None:
                return taken
        requests: list[Request] = []
        late: list[Request] = []
        shares: dict[Share, int] = {}
        rows = 0
        tightest_s = inf
        careful = plan is not None and self.deadlines > 0
        # Whose deadline is after this does not keep the batch from growing.
        limit_s = -inf
        if careful:
            assert plan is not None
            limit_s = plan.start_s + plan.latency.high_s(min(most_rows, group.rows))
        while group.rows and rows < most_rows:
            flow = group.turns.first()
            request = flow.lines.head()
            if requests and rows + request.rows > most_rows:
                break
            if careful and (request.deadline_s < limit_s or request.rows > most_rows):
                assert plan is not None
                if self._is_late(request, rows, flow, most_rows, plan):
                    self._remove(request, State.RUNNING)
                    late.append(request)
                    continue
                tightest_s = min(tightest_s, request.deadline_s)
            if tightest_s < limit_s and requests:
                assert plan is not None
                if tightest_s < plan.start_s + plan.latency.high_s(rows + request.rows):
                    return Taken(requests, late, True, shares)
            self._remove(request, State.RUNNING)
            self._shares.served(flow.share, request.rows * self.row_s)
            shares[flow.share] = shares.get(flow.share, 0) + request.rows
            rows += request.rows
            requests.append(request)
        return Taken(requests, late, False, shares)

    def _take_plain(self, group: Group, most_rows: int) -> Taken | None:
        """The same for one tenant without deadlines, all at once; None where it takes a closer look."""
        (flow,) = group.flows.values()
        share = flow.share
        if share.order is not None:
            return None
        found = flow.lines.take(most_rows)
        if found is None:
            return None
        requests, rows = found
        self._forget(flow, rows)
        self._shares.served(share, rows * self.row_s)
        return Taken(requests, [], False, {share: rows})

    def _is_late(self, request: Request, rows: int, flow: Flow, most_rows: int, plan: Plan) -> bool:
        """Whether it cannot be in time even alone; or would keep the batch small, where that costs others
        their answers. `rows` are in the batch already.

        That is so where others of its tenant fill the batch without it, and where requests are lost for want
        of engine time. Requests with little time left would make batches small there, those behind them would
        have less left, and so on: goodput would collapse. Nobody loses that way a turn, while its tenant has
        less than its part of the queue; nor a batch that takes no more than `_ENOUGH` of its timeout, so that
        whoever never has time for a large one is served.
        """
        latency, left_s = plan.latency, request.deadline_s - plan.start_s
        if latency.expected_s(request.rows) > left_s:
            return True
        full = min(most_rows, self._full_rows)
        if rows + flow.rows - request.rows >= full and left_s < latency.high_s(full):
            return True
        if not plan.crowded or request.timeout_s is None or self._shares.is_light(flow.share, self.rows):
            return False
        target = min(most_rows, rows + flow.group.rows)
        fair_s = min(latency.high_s(target), request.timeout_s * _ENOUGH)
        if left_s >= fair_s:
            return False
        small, fair = latency.most_rows(left_s, target), latency.most_rows(fair_s, target)
        if not small or not fair:
            return not small
        return latency.expected_s(small) / small > _DEARER * latency.expected_s(fair) / fair

    def take_all(self) -> list[Request]:
        """Empty the queue."""
        return [
            request
            for group in list(self.groups.values())
            for request in self.take(group, group.rows).requests
        ]

    def settle(self, shares: dict[Share, int], run_s: float, rows: int) -> None:
        """A batch of so many rows ran: its tenants pay for what it took, and not for what was expected."""
        if not self._shares.several:
            return  # nobody else, nobody to be fair to
        beyond_s = run_s / rows - self.row_s
        for share, its_rows in shares.items():
            share.owed_s += its_rows * beyond_s

    def rows_of(self, tenant: Tenant) -> int:
        """Rows that a tenant has queued."""
        return self._shares.of(tenant).rows

    def ahead_of(self, tenant: Tenant | None) -> float:
        """Rows that will run before one that this tenant queues now, as far as shares foretell it."""
        share = self._shares.of(tenant)
        if self._shares.active < 1 or (self._shares.active == 1 and share.rows):
            return float(self.rows)
        weights = self._shares.active_weight + (0.0 if share.rows else share.weight)
        return min(float(self.rows), share.rows * weights / share.weight)
