"""The oldest and the most urgent request of a queue: amortised O(1) and O(log n) for each request.

A request that leaves the queue stays as a tombstone until it is the first, or until tombstones outnumber live
entries.
"""

from collections import deque
from heapq import heapify, heappop, heappush
from math import inf

from cobatch.batcher.request import Request, State
from cobatch.batcher.scheduling.tuning import TOMBSTONES_KEPT


class Extremes:
    """Queued requests by age, if `ages`, and by deadline, those that have one. `used`: some were added."""

    __slots__ = ("_arrivals", "_most", "_number", "_urgent", "ages", "used")

    def __init__(self, *, ages: bool) -> None:
        self.ages = ages
        self.used = False
        self._arrivals: deque[Request] = deque()
        self._urgent: list[tuple[float, int, Request]] = []
        self._most = TOMBSTONES_KEPT  # entries of both before tombstones are dropped
        self._number = 0

    def __len__(self) -> int:
        return len(self._arrivals) + len(self._urgent)

    @property
    def oldest_s(self) -> float:
        """The time at which the oldest request was queued; there must be one, and `ages`."""
        arrivals = self._arrivals
        while arrivals[0].state is not State.QUEUED:
            arrivals.popleft()
        return arrivals[0].enqueued_s

    @property
    def urgent_s(self) -> float:
        """The earliest deadline, infinite if there is none."""
        urgent = self._urgent
        while urgent and urgent[0][2].state is not State.QUEUED:
            heappop(urgent)
        return urgent[0][0] if urgent else inf

    def add(self, request: Request) -> None:
        """Add a request that is queued now."""
        self.used = True
        if self.ages:
            self._arrivals.append(request)
        if request.deadline_s != inf:
            self._number += 1
            heappush(self._urgent, (request.deadline_s, self._number, request))
        if len(self) > self._most:
            self.drop_tombstones()

    def drop_tombstones(self) -> None:
        """Forget requests that left the queue; those that will be queued elsewhere would live again."""
        self._arrivals = deque([one for one in self._arrivals if one.state is State.QUEUED])
        self._urgent = [entry for entry in self._urgent if entry[2].state is State.QUEUED]
        heapify(self._urgent)
        self._most = 2 * len(self) + TOMBSTONES_KEPT

    def clear(self) -> None:
        """Forget all: none is queued."""
        self.used = False
        self._arrivals.clear()
        self._urgent.clear()
