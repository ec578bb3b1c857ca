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
    """The lines of one order. `queued` counts the living; whoever takes one out says so to `leave`."""

    __slots__ = ("_lines", "_waiting", "queued")

    def __init__(self) -> None:
        self._lines: dict[int, deque[Request]] = {}
        self._waiting = 0  # husks included
        self.queued = 0

    def push(self, request: Request) -> None:
        """At the end of its level's line."""
        line = self._lines.get(request.level)
        if line is None:
            line = self._lines[request.level] = deque()
        line.append(request)
        self._waiting += 1
        self.queued += 1

    def leave(self) -> None:
        """One of the requests is not queued any more."""
        self.queued -= 1
        if not self.queued:
            self._lines.clear()
            self._waiting = 0
        elif self._waiting - self.queued > _HUSKS_KEPT and self._waiting > 2 * self.queued:
            for level, line in list(self._lines.items()):
                self._lines[level] = deque([one for one in line if one.state is State.QUEUED])
                if not self._lines[level]:
                    del self._lines[level]
            self._waiting = self.queued

    def head(self) -> Request:
        """Who is next; there must be one that is queued."""
        lines = self._lines
        if len(lines) == 1:
            for line in lines.values():
                while line[0].state is not State.QUEUED:
                    line.popleft()
                    self._waiting -= 1
                return line[0]
        best: Request | None = None
        best_s = 0.0
        for level, line in list(lines.items()):
            while line and line[0].state is not State.QUEUED:
                line.popleft()
                self._waiting -= 1
            if not line:
                del lines[level]
                continue
            at_s = line[0].enqueued_s + level * AGEING_S
            if best is None or at_s < best_s:
                best, best_s = line[0], at_s
        assert best is not None
        return best
