"""The order of tenants: start-time fair queueing (Goyal, Vin, Cheng, SIGCOMM 1996).

Each tenant has a virtual time at which its next row starts. The tenant with the earliest start is next; its
start then advances by the row's cost divided by the tenant's weight. Costs are seconds of the engine: the
expected ones when rows are taken, corrected when they have run. A tenant that returns from idleness starts
at the current virtual time or later, as it was given rows early, less a credit of a few full batches: so the
requests of a light tenant that come close together do not take turns with a flood. The order is
work-conserving.
"""

from __future__ import annotations

from collections.abc import Hashable
from heapq import heapify, heappop, heappush, heapreplace
from typing import Generic, Protocol, TypeVar

from cobatch.batcher.scheduling.priority import PriorityQueue
from cobatch.batcher.scheduling.tuning import IDLE_TENANTS_KEPT, TOMBSTONES_KEPT
from cobatch.batcher.tenant import Tenant
from cobatch.engines.base import RowShapes


class TenantShare:
    """The use that one tenant has made of one queue.

    `order` has its requests of all shapes. It is None while they have one shape only, whose flow has the
    order then.
    """

    def __init__(self, tenant: Tenant | None) -> None:
        self.tenant = tenant
        self.weight = 1.0 if tenant is None else tenant.weight
        self.rows = 0  # queued
        self.start_s = 0.0  # virtual
        self.cost_correction_s = 0.0  # cost of its rows beyond the expected
        self.order: PriorityQueue | None = None
        self.flows: dict[Flow, None] = {}
        self.in_turns = False

    @property
    def share(self) -> TenantShare:
        """Itself: it takes turns with the other shares."""
        return self

    def charge(self, cost_s: float) -> None:
        """Charge for rows that are taken. The start never goes back: a credit is kept for the next time."""
        cost_s += self.cost_correction_s
        if cost_s < 0:
            self.cost_correction_s = cost_s
        else:
            self.cost_correction_s = 0.0
            self.start_s += cost_s / self.weight


class Flow:
    """One tenant's requests of one shape."""

    __slots__ = ("group", "in_turns", "order", "rows", "share")

    def __init__(self, group: Group, share: TenantShare) -> None:
        self.group = group
        self.share = share
        self.order = PriorityQueue()
        self.rows = 0
        self.in_turns = False


class Turn(Protocol):
    """An object with rows that belongs to a tenant."""

    rows: int
    in_turns: bool

    @property
    def share(self) -> TenantShare: ...


T = TypeVar("T", bound=Turn)


class FairQueue(Generic[T]):
    """Objects that have rows, by the virtual start of their tenant. O(log n).

    A heap with the start that each had when it was put in. Starts only grow, so the first entry whose start
    is still current is the earliest. An object without rows stays as a tombstone until its turn comes, or
    until the heap has doubled.
    """

    __slots__ = ("_heap", "_most", "_number")

    def __init__(self) -> None:
        self._heap: list[tuple[float, int, T]] = []
        self._most = TOMBSTONES_KEPT
        self._number = 0

    def add(self, one: T) -> None:
        """Add an object that is about to have rows; harmless if it is here already."""
        if not one.in_turns:
            one.in_turns = True
            self._number += 1
            heappush(self._heap, (one.share.start_s, self._number, one))
            if len(self._heap) > self._most:
                self._drop_tombstones(one)

    def _drop_tombstones(self, new: T) -> None:
        for _, _, one in self._heap:
            one.in_turns = one.rows > 0 or one is new
        self._heap = [entry for entry in self._heap if entry[2].in_turns]
        heapify(self._heap)
        self._most = 2 * len(self._heap) + TOMBSTONES_KEPT

    def remove(self, one: T) -> None:
        """Take out an object that has rows. O(n)."""
        one.in_turns = False
        self._heap = [entry for entry in self._heap if entry[2] is not one]
        heapify(self._heap)

    def clear(self) -> None:
        """Forget all objects, which will have no rows again."""
        self._heap.clear()

    def set_aside(self) -> None:
        """Take the first object out, until it is added again."""
        heappop(self._heap)[2].in_turns = False

    def first(self) -> T:
        """Return the object whose turn it is; one must have rows."""
        heap = self._heap
        while True:
            start_s, number, one = heap[0]
            if not one.rows:
                one.in_turns = False
                heappop(heap)
            elif one.share.start_s != start_s:
                heapreplace(heap, (one.share.start_s, number, one))
            else:
                return one


class Group:
    """Requests of one shape that may share a batch, of at most `most_rows` rows; `key` is its queue's.

    `again`: they are a part of a batch that was sent before.
    """

    __slots__ = ("again", "flows", "key", "most_rows", "row_shapes", "rows", "turns")

    def __init__(self, key: Hashable, row_shapes: RowShapes, most_rows: int) -> None:
        self.key = key
        self.row_shapes = row_shapes
        self.most_rows = most_rows
        self.again = False
        self.rows = 0
        self.flows: dict[TenantShare, Flow] = {}
        self.turns: FairQueue[Flow] = FairQueue()


class TenantShares:
    """The shares of all tenants of a queue. `several`: more than one tenant is known; idle ones count for a
    while, since their next request may come any moment. `credit_s`: the engine time that idle ones save at
    most."""

    def __init__(self) -> None:
        self._of: dict[Tenant | None, TenantShare] = {}
        self._most = IDLE_TENANTS_KEPT
        self.several = False
        self.virtual_s = 0.0
        self.credit_s = 0.0
        self.active = 0  # tenants that have rows
        self.active_weight = 0.0

    def of(self, tenant: Tenant | None) -> TenantShare:
        """Return the tenant's share."""
        share = self._of.get(tenant)
        if share is None:
            if len(self._of) >= self._most:
                self._forget_idle()
            share = self._of[tenant] = TenantShare(tenant)
            self.several = len(self._of) > 1
        return share

    def activate(self, share: TenantShare) -> None:
        """Note that a tenant has rows again."""
        self.active += 1
        self.active_weight += share.weight
        share.start_s = max(share.start_s, self._earliest_s(share))

    def deactivate(self, share: TenantShare) -> None:
        """Note that a tenant has no rows any more."""
        self.active -= 1
        self.active_weight = self.active_weight - share.weight if self.active else 0.0

    def served(self, share: TenantShare, cost_s: float) -> None:
        """Charge a tenant for rows that were taken in its turn."""
        self.virtual_s = max(self.virtual_s, share.start_s)
        share.charge(cost_s)

    def settle(self, rows: dict[Tenant | None, int], beyond_s: float) -> None:
        """Correct the cost of a batch that ran: a row took `beyond_s` longer than its tenant was charged."""
        for tenant, its_rows in rows.items():
            self.of(tenant).cost_correction_s += its_rows * beyond_s

    def is_light(self, share: TenantShare, rows: int, part: float = 1.0) -> bool:
        """Return whether a tenant has less than `part` of its share of all `rows` that are queued."""
        return share.rows * self.active_weight < part * share.weight * rows - 1e-9

    def _earliest_s(self, share: TenantShare) -> float:
        """Return the virtual time at which a tenant starts that has been idle for long."""
        return self.virtual_s - self.credit_s / share.weight

    def _forget_idle(self) -> None:
        """Forget tenants that would start at the current time anyway. Amortised O(1) for each new tenant."""
        self._of = {
            tenant: share
            for tenant, share in self._of.items()
            if share.rows or share.flows or share.start_s > self._earliest_s(share)
        }
        self._most = 2 * len(self._of) + IDLE_TENANTS_KEPT
