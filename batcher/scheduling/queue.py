"""The queue: requests that may share a batch, and the order of batches.

Rows of different shapes cannot share a batch, so each shape is a group; a part of a failed batch is a group
too, since it shares a batch with no other request. Within a group each tenant has a flow, ordered by
`PriorityQueue`. Across groups each tenant's requests stand in one order too, so that none of its shapes waits
behind the others. `batcher.scheduling.fair_queueing` orders the tenants.

Invariants, held by every method:

* `rows` of a flow, a group, a share and the queue are each the sum over their requests in state QUEUED.
* A flow or group without rows is gone, so idle ones cost nothing.
* Push, cancel and take are O(log n) in tenants and amortised O(1) in everything else.
"""

from collections.abc import Callable, Hashable, Sequence
from math import inf
from sys import maxsize

import msgspec

from cobatch.batcher.request import Request, State
from cobatch.batcher.scheduling.extremes import Extremes
from cobatch.batcher.scheduling.fair_queueing import FairQueue, Flow, Group, TenantShare, TenantShares
from cobatch.batcher.scheduling.priority import DEFAULT, level_of
from cobatch.batcher.tenant import Tenant

ANY_ROWS = maxsize


class FormedBatch(msgspec.Struct, eq=False):
    """A batch: its requests, requests found too late for any batch, and the rows of each tenant.

    `capped`: a deadline kept it from growing; `was_short`: a light tenant's rows did.
    """

    requests: list[Request]
    late: list[Request]
    shares: dict[Tenant | None, int]
    capped: bool = False
    was_short: bool = False


class RequestQueue:
    """The requests of one model.

    `full_rows`: the size of a full batch, changed by `set_full_rows`. `row_s`: the expected cost of a row,
    `run_s(rows)` of a run. `ages`: the age of the oldest will be asked for, which costs a little for each
    request. `deadlines` counts the requests that have one.
    """

    def __init__(
        self, full_rows: int, row_s: float, *, ages: bool, run_s: Callable[[int], float] = lambda rows: 0.0
    ) -> None:
        self.groups: dict[Hashable, Group] = {}  # a shape alone is the key of its ordinary group
        self.rows = 0
        self.row_s = row_s
        self.deadlines = 0
        self.run_s = run_s
        self.full_rows = full_rows
        self._full: dict[Group, None] = {}
        self.shares = TenantShares()
        self._turns: FairQueue[TenantShare] = FairQueue()
        self._overtaken: dict[TenantShare, None] = {}  # by a newer request of another shape
        self.extremes = Extremes(ages=ages)
        # The flow of the newest request; the next is often alike. If it was the only one, it is parked when
        # it is empty, and its tenant counts as active, because making all that anew would cost a lone
        # request as much as queueing it.
        self._last: Flow | None = None
        self._parked = False

    # For the policy

    def set_full_rows(self, rows: int) -> None:
        """Change the size of a full batch."""
        if rows != self.full_rows:
            self.full_rows = rows
            self._full = {group: None for group in self.groups.values() if group.rows >= rows}

    @property
    def contended(self) -> bool:
        """True if several tenants have rows, or had them recently."""
        return self.shares.several

    @property
    def next_group(self) -> Group:
        """The group of the request whose turn it is; there must be one."""
        if len(self.groups) == 1:
            return next(iter(self.groups.values()))
        share = self._turns.first()
        flow = next(iter(share.flows)) if share.order is None else share.order.head().entry
        assert isinstance(flow, Flow)
        return flow.group

    @property
    def full_group(self) -> Group | None:
        """The group that has been full for longest."""
        return next(iter(self._full), None)

    # In

    def push(self, request: Request) -> Group:
        """Queue a new request, whose `enqueued_s` is set; return its group."""
        flow = self._last
        if (
            flow is None
            or flow.group.row_shapes != request.row_shapes
            or flow.share.tenant is not request.tenant
            or not (flow.rows or self._parked)
        ):
            if self._parked:
                self._unpark()
            flow = self._last = self._flow_of(request, request.row_shapes, ANY_ROWS)
        elif self._parked:
            self._parked = False
            self.groups[flow.group.key] = flow.group
        rows = request.rows
        group, share = flow.group, flow.share
        request.entry = flow
        request.state = State.QUEUED
        request.level = level_of(request.priority) if request.priority else DEFAULT
        flow.rows += rows
        share.rows += rows
        group.rows += rows
        self.rows += rows
        flow.order.push(request)
        if share.order is not None:
            share.order.push(request)
        if share.tenant is not None:
            share.tenant.queued_rows += rows
        if group.rows >= self.full_rows:
            self._full[group] = None
        if request.deadline_s != inf:
            self.deadlines += 1
            self.extremes.add(request)
        elif self.extremes.ages:
            self.extremes.add(request)
        return group

    def push_apart(
        self, requests: Sequence[Request], key: Hashable, most_rows: int, *, again: bool = False
    ) -> None:
        """Queue requests of one shape in the group `key`, whose batches have at most `most_rows` rows.

        `again`: they were sent before, so they are next when it is their tenants' turn; their group is full.
        """
        for request in reversed(requests) if again else requests:
            if self._parked:
                self._unpark()
            flow = self._last = self._flow_of(request, key, most_rows)
            self._parked = True  # ready for this request
            group = self.push(request)
            if again:
                group.again = True
                self._full[group] = None
                for order in (flow.order, flow.share.order):
                    if order is not None:
                        order.advance(request)
        self._last = None

    def _unpark(self) -> None:
        self._parked = False
        flow = self._last
        assert flow is not None
        del flow.share.flows[flow]
        del flow.group.flows[flow.share]
        flow.group.turns.clear()
        self.shares.deactivate(flow.share)

    def _flow_of(self, request: Request, key: Hashable, most_rows: int) -> Flow:
        """Return the flow that a request belongs to in a group, ready for it."""
        group = self.groups.get(key)
        if group is None:
            group = self.groups[key] = Group(key, request.row_shapes, most_rows)
        share = self.shares.of(request.tenant)
        if not share.rows:
            self.shares.activate(share)
            self._turns.add(share)
        flow = group.flows.get(share)
        if flow is None:
            flow = group.flows[share] = Flow(group, share)
            if share.flows and share.order is None:
                # From here on it needs an order of its own, until it has nothing queued.
                (only,) = share.flows
                share.order = only.order.copy()
            share.flows[flow] = None
            group.turns.add(flow)
        return flow

    # Out

    def cancel(self, request: Request) -> None:
        """Remove a queued request and free its payloads at once."""
        self.remove(request, State.CANCELLED)
        request.payloads = ()

    def is_too_early(self, request: Request, share: TenantShare) -> bool:
        """Return whether a request would overtake an older one of its tenant, of another shape, once more.

        Riding in batches that others lead, the newer ones could use up all of the tenant's turns.
        """
        return share in self._overtaken and share.order is not None and share.order.head() is not request

    def take(self, request: Request, flow: Flow) -> None:
        """Remove a request that is sent, and charge its tenant."""
        share = flow.share
        if share.order is not None:
            if share.order.head() is request:
                self._overtaken.pop(share, None)
            else:
                self._overtaken[share] = None
        self.remove(request, State.RUNNING)
        self.shares.served(share, request.rows * self.row_s)

    def remove(self, request: Request, state: State) -> None:
        """Remove a queued request, which has `state` from then on."""
        flow = request.entry
        assert request.state is State.QUEUED
        assert isinstance(flow, Flow)
        request.state = state
        request.entry = None
        flow.order.leave(request)
        if flow.share.order is not None:
            flow.share.order.leave(request)
        if request.deadline_s != inf:
            self.deadlines -= 1
        self._subtract(flow, request.rows)

    def _subtract(self, flow: Flow, rows: int) -> None:
        """Note that `rows` rows of a flow are not queued any more."""
        group, share = flow.group, flow.share
        share.rows -= rows
        flow.rows -= rows
        group.rows -= rows
        self.rows -= rows
        if share.tenant is not None:
            share.tenant.queued_rows -= rows
        if not self.rows and flow is self._last and len(share.flows) == len(group.flows) == 1:
            self._parked = True
            del self.groups[group.key]
            if share.order is not None:
                share.order = None
                self._overtaken.clear()
        elif not flow.rows:
            del group.flows[share]
            del share.flows[flow]
            if not group.rows:
                del self.groups[group.key]
                group.turns.clear()  # breaks a reference cycle with its flows
            if not share.rows:
                share.order = None
                self._overtaken.pop(share, None)
                self.shares.deactivate(share)
        if group.rows < self.full_rows:
            self._full.pop(group, None)
        if not self.rows and self.extremes.used:
            self.extremes.clear()

    def take_plain(self, group: Group, most_rows: int) -> FormedBatch | None:
        """Remove whole requests, up to `most_rows` rows but at least one.

        None if that takes a closer look (`batcher.scheduling.formation`): several tenants, several shapes of
        one, several priorities, or deadlines.
        """
        if self.deadlines or len(group.flows) > 1:
            return None
        (flow,) = group.flows.values()
        share = flow.share
        if share.order is not None:
            return None
        taken = flow.order.take(most_rows)
        if taken is None:
            return None
        requests, rows = taken
        self._subtract(flow, rows)
        if self.shares.several:
            self.shares.served(share, rows * self.row_s)
        return FormedBatch(requests, [], {share.tenant: rows})

    def regroup(self, tenant: Tenant, most_rows: int) -> None:
        """Move a tenant's requests, but not those sent before, to groups of batches of `most_rows` rows.

        The key of such a group is (row shapes, most_rows). O(1) in the requests.
        """
        share = self.shares.of(tenant)
        for flow in share.flows:
            old = flow.group
            key = old.row_shapes, most_rows
            group = self.groups.get(key) or Group(key, old.row_shapes, most_rows)
            if old.again or share in group.flows:
                continue
            del old.flows[share]
            old.turns.remove(flow)
            old.rows -= flow.rows
            if not old.rows:
                del self.groups[old.key]
            if old.rows < self.full_rows:
                self._full.pop(old, None)
            self.groups[key] = flow.group = group
            group.flows[share] = flow
            group.turns.add(flow)
            group.rows += flow.rows
            if group.rows >= self.full_rows:
                self._full[group] = None

    def take_tenant(self, tenant: Tenant) -> list[Request]:
        """Remove the requests of a tenant, to be queued elsewhere, but not those sent before. O(n)."""
        share = self.shares.of(tenant)
        flows = [flow for flow in share.flows if not flow.group.again]
        requests = [request for flow in flows for request in flow.order.live()]
        for request in requests:
            self.remove(request, State.NEW)
        self.extremes.drop_tombstones()
        if share.order is not None:
            share.order.drop_tombstones()
        return requests

    def take_all(self) -> list[Request]:
        """Empty the queue."""
        requests = self.waiting()
        for request in requests:
            self.remove(request, State.RUNNING)
        return requests

    def waiting(self) -> list[Request]:
        """Return all queued requests, in no particular order. O(n)."""
        flows = [flow for group in self.groups.values() for flow in group.flows.values()]
        return [request for flow in flows for request in flow.order.live()]

    def ahead_of(self, tenant: Tenant | None) -> float:
        """Return the rows predicted to run before one that this tenant queues now."""
        shares, share = self.shares, self.shares.of(tenant)
        if shares.active < 1 or (shares.active == 1 and share.rows):
            return float(self.rows)
        weights = shares.active_weight + (0.0 if share.rows else share.weight)
        return min(float(self.rows), share.rows * weights / share.weight)
