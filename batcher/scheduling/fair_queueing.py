"""Whose turn it is: start-time fair queueing (Goyal, Vin, Cheng, SIGCOMM 1996).

Each tenant has a virtual time at which its next row starts. Whoever's is earliest is next, and then moves
on by what the row costs, divided by the tenant's weight. Costs are seconds of the engine: what they are
expected to be when rows are taken, put right when they have run. A tenant that comes back from idleness
starts where the others are: it has saved up nothing, and owes nothing beyond what it was given early.
Work-conserving: as long as anybody has rows, somebody's turn it is.
"""

from __future__ import annotations

from heapq import heapify, heappop, heappush, heapreplace
from typing import TYPE_CHECKING, Generic, Protocol, TypeVar

from cobatch.batcher.scheduling.priority import PriorityQueue

if TYPE_CHECKING:
    from cobatch.batcher.scheduling.queue import Flow
    from cobatch.batcher.tenant import Tenant

# Tenants that are idle are forgotten once there are so many more than others.
_IDLE_KEPT = 64
_TOMBSTONES_KEPT = 64


class TenantShare:
    """What one tenant has had of one queue.

    `order`: its requests, whatever their shape; None as long as they have one shape only, whose flow's
    order it is then.
    """

    __slots__ = ("cost_correction_s", "flows", "in_turns", "order", "rows", "start_s", "tenant", "weight")

    def __init__(self, tenant: Tenant | None, weight: float) -> None:
        self.tenant = tenant
        self.weight = weight
        self.rows = 0  # queued
        self.start_s = 0.0  # virtual
        self.cost_correction_s = 0.0  # what its rows took beyond what they were expected to
        self.order: PriorityQueue | None = None
        self.flows: dict[Flow, None] = {}
        self.in_turns = False

    @property
    def share(self) -> TenantShare:
        """Itself: it takes turns with the others."""
        return self

    def charge(self, cost_s: float) -> None:
        """Its rows are taken. The start never goes back: what was too much is kept for the next time."""
        cost_s += self.cost_correction_s
        if cost_s < 0:
            self.cost_correction_s = cost_s
        else:
            self.cost_correction_s = 0.0
            self.start_s += cost_s / self.weight


class Turn(Protocol):
    """Something with rows that belongs to a tenant."""

    rows: int
    in_turns: bool

    @property
    def share(self) -> TenantShare: ...


T = TypeVar("T", bound=Turn)


class FairQueue(Generic[T]):
    """Those that have rows, by whose turn it is. O(log n) each.

    A heap with the start that each had when it was put in. Starts only grow, so the first one whose start
    is still what it was is the earliest. One that has no rows any more stays until its turn comes, or until
    the heap has doubled.
    """

    __slots__ = ("_heap", "_most", "_number")

    def __init__(self) -> None:
        self._heap: list[tuple[float, int, T]] = []
        self._most = _TOMBSTONES_KEPT
        self._number = 0

    def add(self, one: T) -> None:
        """It has rows now; harmless if it had before."""
        if not one.in_turns:
            one.in_turns = True
            self._number += 1
            heappush(self._heap, (one.share.start_s, self._number, one))
            if len(self._heap) > self._most:
                self._drop_tombstones(one)

    def _drop_tombstones(self, new: T) -> None:
        """`new` is about to have rows."""
        for _, _, one in self._heap:
            one.in_turns = one.rows > 0 or one is new
        self._heap = [entry for entry in self._heap if entry[2].in_turns]
        heapify(self._heap)
        self._most = 2 * len(self._heap) + _TOMBSTONES_KEPT

    def clear(self) -> None:
        """Nobody has rows any more, nor will have."""
        self._heap.clear()

    def first(self) -> T:
        """Whose turn it is; there must be one that has rows."""
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


class TenantShares:
    """All tenants of a queue."""

    def __init__(self) -> None:
        self._of: dict[Tenant | None, TenantShare] = {}
        self._most = _IDLE_KEPT
        self.virtual_s = 0.0
        self.active = 0  # tenants that have rows
        self.active_weight = 0.0

    @property
    def several(self) -> bool:
        """Whether several tenants are known; those that are idle are, for a while."""
        return len(self._of) > 1

    def of(self, tenant: Tenant | None) -> TenantShare:
        """The tenant's share."""
        share = self._of.get(tenant)
        if share is None:
            if len(self._of) >= self._most:
                self._forget_idle()
            share = self._of[tenant] = TenantShare(tenant, 1.0 if tenant is None else tenant.weight)
        return share

    def wakes(self, share: TenantShare) -> None:
        """It has rows again."""
        self.active += 1
        self.active_weight += share.weight
        share.start_s = max(share.start_s, self.virtual_s)

    def sleeps(self, share: TenantShare) -> None:
        """It has no rows any more."""
        self.active -= 1
        self.active_weight = self.active_weight - share.weight if self.active else 0.0

    def served(self, share: TenantShare, cost_s: float) -> None:
        """Rows of it were taken in its turn."""
        self.virtual_s = max(self.virtual_s, share.start_s)
        share.charge(cost_s)

    def is_light(self, share: TenantShare, rows: int, part: float = 1.0) -> bool:
        """Whether it has less than its part, or that part of it, of so many rows, all that are queued."""
        return share.rows * self.active_weight < part * share.weight * rows - 1e-9

    def _forget_idle(self) -> None:
        """Those that would start where the others are anyway. O(n), but each time for as many new ones."""
        self._of = {
            tenant: share
            for tenant, share in self._of.items()
            if share.rows or share.flows or share.start_s > self.virtual_s
        }
        self._most = 2 * len(self._of) + _IDLE_KEPT
