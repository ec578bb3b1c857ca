"""Requests in order of priority and arrival, with O(1) push and cancel.

One line for each priority level, first come first served. Between the levels whoever has waited longest
is next, where each level counts as `AGEING_S` of waiting: a request of the level below overtakes one that
came so much later, so nothing waits for ever, however much of higher priority keeps coming.

A request that left by another way (cancelled, expired, taken through another order) stays in its line as
a husk until the head reaches it, or until husks outnumber the living.
"""

from __future__ import annotations

from collections import deque

from batcher.request import Request, State

AGEING_S = 1.0
HIGHEST, DEFAULT, LOWEST = 1, 4, 8
_HUSKS_KEPT = 64


def level_of(priority: int) -> int:
    """The level of a request's `priority` (V2: 1 is the highest, 0 stands for the default)."""
    return min(priority, LOWEST) if priority > 0 else DEFAULT


class Lines:
    """The lines of one order. `queued` counts the living; whoever takes one out says so to `leave`.

    Most of the time all requests are of one level: `_line` is that level's line, and the others are
    looked at only where there are any.
    """

    __slots__ = ("_level", "_line", "_others", "_waiting", "queued")

    def __init__(self) -> None:
        self._level = DEFAULT
        self._line: deque[Request] = deque()
        self._others: dict[int, deque[Request]] = {}
        self._waiting = 0  # husks included
        self.queued = 0

    def copy(self) -> Lines:
        """The same requests in lines of their own."""
        twin = Lines()
        twin._level, twin._line = self._level, self._line.copy()
        twin._others = {level: line.copy() for level, line in self._others.items()}
        twin._waiting, twin.queued = self._waiting, self.queued
        return twin

    def push(self, request: Request) -> None:
        """At the end of its level's line."""
        if request.level == self._level:
            self._line.append(request)
        else:
            self._push_other(request)
        self._waiting += 1
        self.queued += 1

    def _push_other(self, request: Request) -> None:
        if not self._waiting:
            self._level = request.level
            self._line.append(request)
            return
        line = self._others.get(request.level)
        if line is None:
            line = self._others[request.level] = deque()
        line.append(request)

    def leave(self) -> None:
        """One of the requests is not queued any more."""
        self.queued -= 1
        if not self.queued:
            self._line.clear()
            self._others.clear()
            self._waiting = 0
        elif self._waiting - self.queued > _HUSKS_KEPT and self._waiting > 2 * self.queued:
            self._drop_husks()

    def _drop_husks(self) -> None:
        self._line = deque([one for one in self._line if one.state is State.QUEUED])
        living = {
            level: [one for one in line if one.state is State.QUEUED] for level, line in self._others.items()
        }
        self._others = {level: deque(line) for level, line in living.items() if line}
        self._waiting = self.queued

    def head(self) -> Request:
        """Who is next; there must be one that is queued."""
        line = self._line
        while line and line[0].state is not State.QUEUED:
            line.popleft()
            self._waiting -= 1
        if not self._others:
            return line[0]
        best: Request | None = None
        best_s = 0.0
        if line:
            best = line[0]
            best_s = best.enqueued_s + self._level * AGEING_S
        for level, other in list(self._others.items()):
            while other and other[0].state is not State.QUEUED:
                other.popleft()
                self._waiting -= 1
            if not other:
                del self._others[level]
                continue
            at_s = other[0].enqueued_s + level * AGEING_S
            if best is None or at_s < best_s:
                best, best_s = other[0], at_s
        assert best is not None
        return best

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
                request.flow = None
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
