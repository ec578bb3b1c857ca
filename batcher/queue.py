"""The queue: requests in arrival order, grouped by the shape of their rows.

Rows of different shape cannot share a batch, so each shape has its own line and none waits behind
another's. Invariants, held by every method:

* `rows` of a group is the sum of `rows` of its requests in state QUEUED; the queue's `rows` is the
  sum over groups. Cancelled requests are in neither.
* A group that has no rows is not in `groups`, so what is idle costs nothing.
* Push, cancel and take are O(1) per request, amortised: a cancelled request stays in its line as a
  husk without payload until the head reaches it, or until husks outnumber the living.
"""

from __future__ import annotations

from collections import deque

from batcher.request import Request, State
from engines.base import RowShapes

_HUSKS_KEPT = 64


class Group:
    """The line of requests whose rows have one shape."""

    __slots__ = ("husks", "line", "row_shapes", "rows")

    def __init__(self, row_shapes: RowShapes) -> None:
        self.row_shapes = row_shapes
        self.line: deque[Request] = deque()
        self.rows = 0
        self.husks = 0

    @property
    def oldest_s(self) -> float:
        """When the request at the head was queued; the group must have rows."""
        line = self.line
        while line[0].state is not State.QUEUED:
            line.popleft()
            self.husks -= 1
        return line[0].enqueued_s


class RequestQueue:
    """All groups of one model."""

    __slots__ = ("groups", "rows")

    def __init__(self) -> None:
        self.groups: dict[RowShapes, Group] = {}
        self.rows = 0

    def push(self, request: Request) -> Group:
        """Put a new request at the end of its group's line."""
        group = self.groups.get(request.row_shapes)
        if group is None:
            group = self.groups[request.row_shapes] = Group(request.row_shapes)
        group.line.append(request)
        group.rows += request.rows
        self.rows += request.rows
        if request.tenant is not None:
            request.tenant.queued_rows += request.rows
        request.group = group
        request.state = State.QUEUED
        return group

    def cancel(self, request: Request) -> None:
        """Take a queued request out; its memory is given back at once."""
        group = request.group
        assert group is not None
        assert request.state is State.QUEUED
        request.state = State.CANCELLED
        request.payloads = ()
        if request.tenant is not None:
            request.tenant.queued_rows -= request.rows
        self._leave(group, request.rows)
        group.husks += 1
        if group.husks > _HUSKS_KEPT and group.husks * 2 > len(group.line):
            group.line = deque(r for r in group.line if r.state is State.QUEUED)
            group.husks = 0

    def take(self, group: Group, most_rows: int) -> list[Request]:
        """Remove requests from the head, whole ones, up to `most_rows` rows but at least one request."""
        taken: list[Request] = []
        rows = 0
        line = group.line
        while line:
            request = line[0]
            if request.state is not State.QUEUED:
                line.popleft()
                group.husks -= 1
                continue
            if taken and rows + request.rows > most_rows:
                break
            line.popleft()
            request.state = State.RUNNING
            rows += request.rows
            if request.tenant is not None:
                request.tenant.queued_rows -= request.rows
            taken.append(request)
            if rows >= most_rows:
                break
        self._leave(group, rows)
        return taken

    def take_all(self) -> list[Request]:
        """Empty the queue."""
        return [request for group in list(self.groups.values()) for request in self.take(group, group.rows)]

    def _leave(self, group: Group, rows: int) -> None:
        group.rows -= rows
        self.rows -= rows
        if group.rows == 0:
            # A request has at least one row, so no rows means nothing but husks.
            del self.groups[group.row_shapes]
