"""Requests in order of priority and arrival: O(1) where all are of one priority, else O(log n).

One line for each priority level, first come first served. Between the levels whoever has waited longest
is next, where each level counts as `AGEING_S` of waiting: a request of the level below overtakes one that
came so much later, so nothing waits for ever, however much of higher priority keeps coming.

A request that left by another way (cancelled, expired, taken through another order) stays in its place as
a tombstone until the head reaches it, or until tombstones outnumber the live.
"""

from __future__ import annotations

from collections import deque
from heapq import heapify, heappop, heappush

from cobatch.batcher.request import Request, State

AGEING_S = 1.0
HIGHEST, DEFAULT, LOWEST = 1, 4, 8
_TOMBSTONES_KEPT = 64


def level_of(priority: int) -> int:
    """The level of a request's `priority` (V2: 1 is the highest, 0 stands for the default)."""
    return min(priority, LOWEST) if priority > 0 else DEFAULT


def _turn_s(request: Request) -> float:
    """The earlier, the sooner it is next."""
    return request.enqueued_s + request.level * AGEING_S


class PriorityQueue:
    """The lines of one order. `queued` counts the live; whoever takes one out says so to `leave`.

    Most of the time all requests are of one level: `_line` is that level's line. Those of other levels are
    in a heap, by when their turn is.
    """

    __slots__ = ("_level", "_line", "_number", "_others", "_waiting", "queued")

    def __init__(self) -> None:
        self._level = DEFAULT
        self._line: deque[Request] = deque()
        self._others: list[tuple[float, int, Request]] = []
        self._number = 0
        self._waiting = 0  # tombstones included
        self.queued = 0

    def copy(self) -> PriorityQueue:
        """The same requests in lines of their own."""
        twin = PriorityQueue()
        twin._level, twin._line = self._level, self._line.copy()
        twin._others, twin._number = self._others.copy(), self._number
        twin._waiting, twin.queued = self._waiting, self.queued
        return twin

    def live(self) -> list[Request]:
        """All of them, in no particular order."""
        queued = State.QUEUED
        both = [*self._line, *[request for _, _, request in self._others]]
        return [request for request in both if request.state is queued]

    def push(self, request: Request) -> None:
        """At the end of its level's line."""
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

    def leave(self, request: Request) -> None:
        """It is not queued any more."""
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
        elif self._waiting - self.queued > _TOMBSTONES_KEPT and self._waiting > 2 * self.queued:
            self._line = deque([one for one in self._line if one.state is State.QUEUED])
            self._others = [entry for entry in self._others if entry[2].state is State.QUEUED]
            heapify(self._others)
            self._waiting = self.queued

    def head(self) -> Request:
        """Who is next; there must be one that is queued."""
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
        """Whole requests from the head, of up to so many rows but at least one, and their rows; they are
        RUNNING then. None where several levels are queued: then it takes a `head` for each."""
        if self._others:
            return None
        taken: list[Request] = []
        rows = 0
        line = self._line
        while line:
            request = line[0]
            if request.state is State.QUEUED:
                if taken and rows + request.rows > most_rows:
                    break
                request.state = State.RUNNING
                request.entry = None
                taken.append(request)
                rows += request.rows
            line.popleft()
            self._waiting -= 1
            if rows >= most_rows:
                break
        self.queued -= len(taken)
        if not self.queued:
            line.clear()
            self._waiting = 0
        return taken, rows
