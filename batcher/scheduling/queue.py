"""The queue: what may ride together, and whose turn it is.

Rows of different shape cannot share a batch, so each shape is a group; within it each tenant has a flow,
and within that the order is `PriorityQueue`'. Across groups each tenant's requests stand in one order as
well, so that none of its shapes waits behind the others'. The turns are those of
`batcher.scheduling.fair_queueing`.

Invariants, held by every method:

* `rows` of a flow, a group, a share and the queue are each the sum over their requests in state QUEUED.
* A flow or group without rows is gone, so what is idle costs nothing.
* Push, cancel and take are O(log n) in tenants and O(1) in everything else, amortised.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from heapq import heapify, heappop, heappush
from math import inf

from cobatch.batcher.request import Request, State
from cobatch.batcher.scheduling.fair_queueing import FairQueue, TenantShare, TenantShares
from cobatch.batcher.scheduling.formation import BatchFormation, FormedBatch, StartPlan
from cobatch.batcher.scheduling.priority import DEFAULT, PriorityQueue, level_of
from cobatch.batcher.tenant import Tenant
from cobatch.engines.base import RowShapes

_TOMBSTONES_KEPT = 64


class Flow:
    """One tenant's requests of one shape."""

    __slots__ = ("group", "in_turns", "lines", "rows", "share")

    def __init__(self, group: Group, share: TenantShare) -> None:
        self.group = group
        self.share = share
        self.lines = PriorityQueue()
        self.rows = 0
        self.in_turns = False


class Group:
    """All requests whose rows have one shape."""

    __slots__ = ("flows", "row_shapes", "rows", "turns")

    def __init__(self, row_shapes: RowShapes) -> None:
        self.row_shapes = row_shapes
        self.rows = 0
        self.flows: dict[TenantShare, Flow] = {}
        self.turns: FairQueue[Flow] = FairQueue()


class RequestQueue:
    """Of one model. `full_rows`: what counts as a full batch. `row_s`: what a row is expected to cost,
    `run_s`: what a run of so many.

    `ages`: whether `oldest_s` will be asked for; it costs a little for each request.
    """

    def __init__(
        self, full_rows: int, row_s: float, *, ages: bool, run_s: Callable[[int], float] = lambda rows: 0.0
    ) -> None:
        self.groups: dict[RowShapes, Group] = {}
        self.rows = 0
        self.row_s = row_s
        self.deadlines = 0  # requests that have one
        self.run_s = run_s
        self.was_short = False  # the last batch, for the sake of a light tenant
        self._full_rows = full_rows
        self._full: dict[Group, None] = {}
        self.shares = TenantShares()
        self._turns: FairQueue[TenantShare] = FairQueue()
        self._ages = ages
        self._arrivals: deque[Request] = deque()
        self._urgent: list[tuple[float, int, Request]] = []
        self._most_ages = _TOMBSTONES_KEPT  # so many of both before those that left are dropped
        self._number = 0
        # Of the newest request: the next is often alike. When it was all there was, it is kept aside as it
        # is, and its tenant counts as active, since to make all that anew costs a lone request as much as to
        # queue it.
        self._last: Flow | None = None
        self._parked = False

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
        return self.shares.several

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
        flow = share.order.head().entry
        assert isinstance(flow, Flow)
        return flow.group

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
        """The earliest deadline, infinite without."""
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
            or not (flow.rows or self._parked)
        ):
            if self._parked:
                self._unpark()
            flow = self._last = self._flow_of(request)
        elif self._parked:
            self._parked = False
            self.groups[request.row_shapes] = flow.group
        rows = request.rows
        group, share = flow.group, flow.share
        request.entry = flow
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
        if self._ages or request.deadline_s != inf:
            self._note_age(request)
        return group

    def _unpark(self) -> None:
        """Forget the flow that was kept aside."""
        self._parked = False
        flow = self._last
        assert flow is not None
        del flow.share.flows[flow]
        del flow.group.flows[flow.share]
        flow.group.turns.clear()
        self.shares.sleeps(flow.share)

    def _flow_of(self, request: Request) -> Flow:
        """The flow that a request belongs to, ready for it."""
        group = self.groups.get(request.row_shapes)
        if group is None:
            group = self.groups[request.row_shapes] = Group(request.row_shapes)
        share = self.shares.of(request.tenant)
        if not share.rows:
            self.shares.wakes(share)
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
        if self._ages:
            self._arrivals.append(request)
        if request.deadline_s != inf:
            self._number += 1
            heappush(self._urgent, (request.deadline_s, self._number, request))
        if len(self._arrivals) + len(self._urgent) > self._most_ages:
            self._arrivals = deque([one for one in self._arrivals if one.state is State.QUEUED])
            self._urgent = [entry for entry in self._urgent if entry[2].state is State.QUEUED]
            heapify(self._urgent)
            self._most_ages = 2 * (len(self._arrivals) + len(self._urgent)) + _TOMBSTONES_KEPT

    # Out

    def cancel(self, request: Request) -> None:
        """Take a queued request out; its memory is given back at once."""
        self.remove(request, State.CANCELLED)
        request.payloads = ()

    def remove(self, request: Request, state: State) -> None:
        """Take a queued request out; `state` is what it has then."""
        assert request.state is State.QUEUED
        flow = request.entry
        assert isinstance(flow, Flow)
        request.state = state
        request.entry = None
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
            self._parked = True
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
                self.shares.sleeps(share)
        if group.rows < self._full_rows:
            self._full.pop(group, None)
        if not self.rows:
            self._arrivals.clear()
            self._urgent.clear()

    def take(self, group: Group, most_rows: int, plan: StartPlan | None = None) -> FormedBatch:
        """Remove the next batch: whole requests, up to `most_rows` rows but at least one request.

        Each row goes to the tenant whose turn it is; the rest of the rules is in
        `batcher.scheduling.formation`.
        """
        was_short, self.was_short = self.was_short, False
        if not self.deadlines and len(group.flows) == 1:
            taken = self._take_plain(group, most_rows)
            if taken is not None:
                return taken
        return BatchFormation(self, group, most_rows, plan, may_be_short=not was_short).batch()

    def _take_plain(self, group: Group, most_rows: int) -> FormedBatch | None:
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
        self.shares.served(share, rows * self.row_s)
        return FormedBatch(requests, [], False, {share.tenant: rows})

    def take_all(self) -> list[Request]:
        """Empty the queue."""
        return [
            request
            for group in list(self.groups.values())
            for request in self.take(group, group.rows).requests
        ]

    def settle(self, shares: dict[Tenant | None, int], run_s: float, rows: int) -> None:
        """A batch of so many rows ran: its tenants pay for what it took, and not for what was expected."""
        if not self.shares.several:
            return  # nobody else, nobody to be fair to
        beyond_s = run_s / rows - self.row_s
        for tenant, its_rows in shares.items():
            self.shares.of(tenant).cost_correction_s += its_rows * beyond_s

    def waiting(self) -> list[Request]:
        """All that are queued, in no particular order. Takes as long as there are many."""
        flows = [flow for group in self.groups.values() for flow in group.flows.values()]
        return [request for flow in flows for request in flow.lines.live()]

    def rows_of(self, tenant: Tenant) -> int:
        """Rows that a tenant has queued."""
        return self.shares.of(tenant).rows

    def ahead_of(self, tenant: Tenant | None) -> float:
        """Rows that will run before one that this tenant queues now, as far as shares foretell it."""
        share = self.shares.of(tenant)
        if self.shares.active < 1 or (self.shares.active == 1 and share.rows):
            return float(self.rows)
        weights = self.shares.active_weight + (0.0 if share.rows else share.weight)
        return min(float(self.rows), share.rows * weights / share.weight)
