"""Requests in order of priority and arrival: O(1) if all have one priority, else O(log n).

Within a priority level requests are first come, first served. Between levels, the request that has waited
longest is next, where each level counts as `AGEING_S` of waiting. So a request of the level below overtakes
one that came that much later, and nothing waits for ever behind higher priorities.

A request that leaves in another way (cancelled, expired, taken through another order) stays as a tombstone
until it reaches the head, or until tombstones outnumber live requests.
"""

from __future__ import annotations

from collections import deque
from heapq import heapify, heappop, heappush

from cobatch.batcher.request import Request, State
from cobatch.batcher.scheduling.tuning import AGEING_S, TOMBSTONES_KEPT

HIGHEST, DEFAULT, LOWEST = 1, 4, 8


def level_of(priority: int) -> int:
    """Return the level of a request's `priority` (V2: 1 is the highest, 0 stands for the default)."""
    return min(priority, LOWEST) if priority > 0 else DEFAULT


def _turn_s(request: Request) -> float:
    return request.enqueued_s + request.level * AGEING_S


class PriorityQueue:
    """One order of requests. `queued` counts the live ones; `leave` must be told of each that goes.

    Most of the time all requests are of one level and stand in `_line`. Those of other levels are in a heap,
    by their turn.
    """

    __slots__ = ("_level", "_line", "_number", "_others", "_waiting", "queued")

    def __init__(self) -> None:
        self._level = DEFAULT
        self._line: deque[Request] = deque()
        self._others: list[tuple[float, int, Request]] = []
        self._number = 0
        self._waiting = 0  # with tombstones
        self.queued = 0

    def copy(self) -> PriorityQueue:
        """Return a queue of its own with the same requests."""
        twin = PriorityQueue()
        twin._level, twin._line = self._level, self._line.copy()
        twin._others, twin._number = self._others.copy(), self._number
        twin._waiting, twin.queued = self._waiting, self.queued
        return twin

    def live(self) -> list[Request]:
        """Return all requests without tombstones, in no particular order."""
        queued = State.QUEUED
        both = [*self._line, *[request for _, _, request in self._others]]
        return [request for request in both if request.state is queued]

    def push(self, request: Request) -> None:
        """Append a request to its level."""
        if request.level == self._level:
            self._line.append(request)
        elif not self._waiting:
            self._level = request.level
            self._line.append(request)
        else:
            self._number += 1
            heappush(self._others, (_turn_s(request), self._number, request))
        self._waiting += 1
        self.queued += 1

    def advance(self, request: Request) -> None:
        """Move a request, which was pushed last, before all others of its level: it has been here before."""
        if self._line and self._line[-1] is request:
            self._line.rotate(1)

    def leave(self, request: Request) -> None:
        """Note that a request is no longer queued."""
        self.queued -= 1
        if not self.queued:
            self._line.clear()
            self._others.clear()
            self._waiting = 0
        elif self._line and self._line[0] is request:
            self._line.popleft()
            self._waiting -= 1
        elif self._others and self._others[0][2] is request:
            heappop(self._others)
            self._waiting -= 1
        elif self._waiting - self.queued > TOMBSTONES_KEPT and self._waiting > 2 * self.queued:
            self.drop_tombstones()

    def drop_tombstones(self) -> None:
        """Forget requests that are no longer queued; those that will be queued elsewhere would live again."""
        # A request that was sent and came back is here twice.
        self._line = deque(dict.fromkeys([one for one in self._line if one.state is State.QUEUED]))
        self._others = [entry for entry in self._others if entry[2].state is State.QUEUED]
        heapify(self._others)
        self._waiting = self.queued

    def head(self) -> Request:
        """Return the next request; there must be one."""
        line, others, queued = self._line, self._others, State.QUEUED
        while line and line[0].state is not queued:
            line.popleft()
            self._waiting -= 1
        while others and others[0][2].state is not queued:
            heappop(others)
            self._waiting -= 1
        if not others:
            return line[0]
        turn_s, _, other = others[0]
        return line[0] if line and _turn_s(line[0]) <= turn_s else other

    def take(self, most_rows: int) -> tuple[list[Request], int] | None:
        """Take whole requests of up to `most_rows` rows, at least one; return them, RUNNING, and their rows.

        None if several levels are queued: then `head` must be asked for each request.
        """
        if self._others:
            return None
        taken: list[Request] = []
        rows = 0
        line, queued, running = self._line, State.QUEUED, State.RUNNING
        passed = 0
        for request in line:
            if request.state is queued:
                if rows + request.rows > most_rows and taken:
                    break
                request.state = running
                request.entry = None
                taken.append(request)
                rows += request.rows
            passed += 1
            if rows >= most_rows:
                break
        self.queued -= len(taken)
        if not self.queued:
            line.clear()
            self._waiting = 0
        else:
            self._waiting -= passed
            for _ in range(passed):
                line.popleft()
        return taken, rows
