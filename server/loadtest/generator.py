"""The open loop sends by the clock; in the closed loop each connection asks again when it was answered."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from math import inf
from time import monotonic

from cobatch.server.loadtest.alarm import Alarm
from cobatch.server.loadtest.connection import Connection
from cobatch.server.loadtest.drivers import Driver, Tell
from cobatch.server.loadtest.messages import Plan, Prepared, Trial
from cobatch.server.loadtest.schedule import Due, choices, schedule

_AGAIN_S = 0.05  # from a connection that could not be opened to the next attempt
_MOST_AT_ONCE = 32  # sent before answers are read again
_FIRST_OPEN = 64


class ClosedLoop(Driver):
    """`connections` callers, each with one request under way."""

    def __init__(self, plan: Plan, trial: Trial, connections: int, tell: Tell, number: int) -> None:
        super().__init__(plan, trial, connections, tell)
        self._choices = choices(plan, trial, number)
        self._begun = False

    def _begin(self, at_s: float) -> None:
        self._loop.call_later(at_s - monotonic(), self._go)
        self._loop.call_later(self._end_s - monotonic(), self._end_if_over)

    def _go(self) -> None:
        self._begun = True
        for connection in list(self._connections):
            self._free(connection)
        while len(self._connections) + len(self._opening) < self._most:
            self._open()

    def _free(self, connection: Connection) -> None:
        request = next(self._choices)
        # Due when it is sent: what was done since the answer is none of the server's.
        now = monotonic()
        if now < self._end_s:
            connection.send(request, now, now, now)
        else:
            self._end_if_over()

    def _opened(self, connection: Connection) -> None:
        if self._begun:
            self._free(connection)

    def _not_opened(self, began_s: float, why: str) -> None:
        self._lost((began_s, began_s, began_s), next(self._choices), "cannot connect", why)
        self._loop.call_later(_AGAIN_S, self._open_again)

    def _open_again(self) -> None:
        if monotonic() < self._end_s:
            self._open()
        else:
            self._end_if_over()

    def gone(self, connection: Connection) -> None:
        """It is closed: another takes its place."""
        super().gone(connection)
        if self._begun:
            self._open_again()

    def _end_if_over(self) -> None:
        # A connection that is being opened has nothing under way, and what it brings is not sent any more.
        if monotonic() >= self._end_s and not self._open_requests():
            self.stop()


class OpenLoop(Driver):
    """Requests leave when they are due, over a free connection, up to `connections` of them.

    The connection that was used last is the next, so that a low rate keeps few of them busy.
    """

    def __init__(
        self, plan: Plan, trial: Trial, connections: int, tell: Tell, number: int, processes: int
    ) -> None:
        super().__init__(plan, trial, connections, tell)
        self._due: Iterator[Due] = schedule(plan, trial, number, processes)
        self._alarm = Alarm(self._loop, self._wake)
        self._usable: list[Connection] = []
        self._waiting: deque[tuple[float, float, Prepared]] = deque()  # due, taken up
        self._at_s = 0.0
        self._next_s = inf
        self._next: Prepared

    def _first(self) -> int:
        return min(self._most, _FIRST_OPEN)

    def _begin(self, at_s: float) -> None:
        self._at_s = at_s
        self._step()
        self._alarm.set(min(self._next_s, self._end_s))

    def _step(self) -> None:
        found = next(self._due, None)
        if found is None:
            self._next_s = inf
        else:
            self._next_s, self._next = self._at_s + found[0], found[1]

    def _wake(self) -> None:
        now = monotonic()
        for _ in range(_MOST_AT_ONCE):
            if self._next_s > now:
                break
            self._take(self._next_s, now, self._next)
            self._step()
            now = monotonic()
        if self._next_s < inf:
            self._alarm.set(self._next_s)
        elif now < self._end_s:
            self._alarm.set(self._end_s)
        else:
            self._end_if_over()

    def _take(self, due: float, now: float, request: Prepared) -> None:
        while self._usable:
            connection = self._usable.pop()
            if not connection.closing:
                connection.send(request, due, now, now)
                return
        self._waiting.append((due, now, request))
        self._open_more()

    def _open_more(self) -> None:
        opening = len(self._opening)
        if opening < len(self._waiting) and len(self._connections) + opening < self._most:
            self._open()

    def _free(self, connection: Connection) -> None:
        if self._waiting:
            due, taken, request = self._waiting.popleft()
            connection.send(request, due, taken, monotonic())
            return
        self._usable.append(connection)
        if self._next_s == inf:
            self._end_if_over()

    def _opened(self, connection: Connection) -> None:
        self._free(connection)

    def _not_opened(self, began_s: float, why: str) -> None:
        if self._waiting:
            self._give_up("cannot connect", why)
            self._loop.call_later(_AGAIN_S, self._open_more)
        self._end_if_over()

    def _give_up(self, kind: str, why: str = "") -> None:
        due, taken, request = self._waiting.popleft()
        self._lost((due, taken, monotonic()), request, kind, why)

    def gone(self, connection: Connection) -> None:
        """It is closed; others are opened as they are needed."""
        super().gone(connection)
        if connection in self._usable:
            self._usable.remove(connection)
        if self._waiting:
            self._open_more()
        self._end_if_over()

    def _leave(self, now: float) -> None:
        while self._waiting:
            self._give_up("stopped before it was sent")
        super()._leave(now)

    def _look(self, now: float) -> None:
        super()._look(now)
        while self._waiting and self._waiting[0][0] < now - self._plan.timeout_s:
            self._give_up("no connection was free in time")
        self._end_if_over()

    def _open_requests(self) -> int:
        return super()._open_requests() + len(self._waiting)

    def _end_if_over(self) -> None:
        over = self._next_s == inf and monotonic() >= self._end_s
        if over and not self._waiting and not super()._open_requests():
            self.stop()

    def stop(self) -> None:
        """Send nothing more."""
        self._alarm.close()
        super().stop()
