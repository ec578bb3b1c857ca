"""The closed loop, which sends after each answer, and the open loop, which sends by schedule and timer."""

import asyncio
import ctypes
import os
import sys
from collections import deque
from collections.abc import Callable, Iterator
from itertools import cycle, islice, takewhile
from math import inf
from time import monotonic

import numpy as np

from cobatch.batcher.simulator.traffic import Trace
from cobatch.server.loadtest.driver import Connection, Driver, Report
from cobatch.server.loadtest.messages import Plan, PreparedRequest, Trial

_CHUNK = 4096  # random numbers drawn at once
_RECONNECT_S = 0.05  # after a connection could not be opened
_SEND_LIMIT = 32  # requests sent before answers are read again
_CLOCK_MONOTONIC = 1  # the clock of time.monotonic
_ABSOLUTE_TIME = 1
_TIMER_FLAGS = os.O_NONBLOCK | getattr(os, "O_CLOEXEC", 0)

Due = tuple[float, PreparedRequest]


def schedule(plan: Plan, trial: Trial, number: int, processes: int) -> Iterator[Due]:
    """Yield (seconds from the start, request) for generator process `number` of `processes`.

    Requests are dealt to the processes in rotation, so that together they send the same load as one would.
    """
    arrivals = trial.arrivals
    assert arrivals is not None
    times = arrivals.times(np.random.default_rng([plan.seed, trial.seed, 0]))
    load = zip(times, choices(plan, trial), strict=False)
    return takewhile(lambda due: due[0] < trial.lasts_s, islice(load, number, None, processes))


def choices(plan: Plan, trial: Trial, number: int = 0) -> Iterator[PreparedRequest]:
    """Yield requests: callers in proportion to their shares, each caller's examples in rotation."""
    # Each process starts with another example.
    starts = {key: number % len(requests) for key, requests in plan.requests.items()}
    rotations = {
        key: cycle([*plan.requests[key][at:], *plan.requests[key][:at]]) for key, at in starts.items()
    }
    if isinstance(trial.arrivals, Trace):
        callers = {one.name: number for number, one in enumerate(plan.callers)}
        for recorded in trial.arrivals.requests:
            yield next(rotations[callers[recorded.tenant] if recorded.tenant else 0, recorded.rows])
        return
    by_caller = [rotations[number, one.rows] for number, one in enumerate(plan.callers)]
    if len(by_caller) == 1:
        yield from by_caller[0]
    shares = np.cumsum([one.share for one in plan.callers])
    rng = np.random.default_rng([plan.seed, trial.seed, 1, number])
    while True:
        drawn = np.searchsorted(shares, rng.random(_CHUNK) * shares[-1], side="right")
        for caller in drawn.tolist():
            yield next(by_caller[caller])


class Timer:
    """Calls `callback` once for each `set`, at its time or right after.

    uvloop rounds its timers to milliseconds, too coarse for answers within 0.1 ms. Linux has timers that are
    file descriptors (timerfd); elsewhere the loop's timers are used, and the report shows the send delay.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, callback: Callable[[], None]) -> None:
        self._loop = loop
        self._callback = callback
        self._handle: asyncio.TimerHandle | None = None
        self._file = -1
        if sys.platform == "linux":
            self._libc = ctypes.CDLL(None, use_errno=True)
            self._file = self._libc.timerfd_create(_CLOCK_MONOTONIC, _TIMER_FLAGS)
        if self._file >= 0:
            # struct itimerspec: seconds and nanoseconds of the interval, then of the time.
            self._time = (ctypes.c_long * 4)()
            self._pointer = ctypes.byref(self._time)
            loop.add_reader(self._file, self._on_expired)

    def set(self, at_s: float) -> None:
        """Replace the time to call back: a time of `time.monotonic`; at once if it has passed."""
        if self._file < 0:
            if self._handle is not None:
                self._handle.cancel()
            self._handle = self._loop.call_at(at_s, self._callback)
            return
        self._time[2] = seconds = int(at_s)
        self._time[3] = int((at_s - seconds) * 1e9)
        self._libc.timerfd_settime(self._file, _ABSOLUTE_TIME, self._pointer, None)

    def _on_expired(self) -> None:
        try:
            os.read(self._file, 8)
        except BlockingIOError:  # set again after the loop saw it expire
            return
        self._callback()

    def close(self) -> None:
        if self._handle is not None:
            self._handle.cancel()
        if self._file >= 0:
            self._loop.remove_reader(self._file)
            os.close(self._file)
            self._file = -1


class ClosedLoop(Driver):
    """`connections` clients with one request in flight each."""

    def __init__(self, plan: Plan, trial: Trial, connections: int, report: Report, number: int) -> None:
        super().__init__(plan, trial, connections, report)
        self._choices = choices(plan, trial, number)
        self._begun = False

    def _begin(self, at_s: float) -> None:
        self._loop.call_later(at_s - monotonic(), self._send_first)
        self._loop.call_later(self._end_s - monotonic(), self._stop_if_over)

    def _send_first(self) -> None:
        self._begun = True
        for connection in list(self._connections):
            self._on_free(connection)
        while len(self._connections) + len(self._opening) < self._connection_limit:
            self._open()

    def _on_free(self, connection: Connection) -> None:
        request = next(self._choices)
        # Due when it is sent: the generator's own work since the last answer is not the server's latency.
        now = monotonic()
        if now < self._end_s:
            connection.send(request, now, now, now)
        else:
            self._stop_if_over()

    def _on_opened(self, connection: Connection) -> None:
        if self._begun:
            self._on_free(connection)

    def _on_not_opened(self, began_s: float, why: str) -> None:
        self.record_failure((began_s, began_s, began_s), next(self._choices), "cannot connect", why)
        self._loop.call_later(_RECONNECT_S, self._open_again)

    def _open_again(self) -> None:
        if monotonic() < self._end_s:
            self._open()
        else:
            self._stop_if_over()

    def on_closed(self, connection: Connection) -> None:
        super().on_closed(connection)
        if self._begun:
            self._open_again()

    def _stop_if_over(self) -> None:
        # Connections that are still being opened have no request, and would send none.
        if monotonic() >= self._end_s and not self._open_requests():
            self.stop()


class OpenLoop(Driver):
    """Sends each request when it is due, over an idle connection, up to `connections` of them.

    The connection used last is used next, so that a low rate keeps few connections busy.
    """

    first_connections = 64

    def __init__(
        self, plan: Plan, trial: Trial, connections: int, report: Report, number: int, processes: int
    ) -> None:
        super().__init__(plan, trial, connections, report)
        self._schedule = schedule(plan, trial, number, processes)
        self._timer = Timer(self._loop, self._send_due)
        self._idle: list[Connection] = []
        self._waiting: deque[tuple[float, float, PreparedRequest]] = deque()  # due, taken up
        self._at_s = 0.0
        self._next_s = inf
        self._next: PreparedRequest

    def _begin(self, at_s: float) -> None:
        self._at_s = at_s
        self._advance()
        self._timer.set(min(self._next_s, self._end_s))

    def _advance(self) -> None:
        due = next(self._schedule, None)
        if due is None:
            self._next_s = inf
        else:
            self._next_s, self._next = self._at_s + due[0], due[1]

    def _send_due(self) -> None:
        now = monotonic()
        for _ in range(_SEND_LIMIT):
            if self._next_s > now:
                break
            self._send(self._next_s, now, self._next)
            self._advance()
            now = monotonic()
        if self._next_s < inf:
            self._timer.set(self._next_s)
        elif now < self._end_s:
            self._timer.set(self._end_s)
        else:
            self._stop_if_over()

    def _send(self, due: float, now: float, request: PreparedRequest) -> None:
        while self._idle:
            connection = self._idle.pop()
            if not connection.transport.is_closing():
                connection.send(request, due, now, now)
                return
        self._waiting.append((due, now, request))
        self._open_more()

    def _open_more(self) -> None:
        opening = len(self._opening)
        if opening < len(self._waiting) and len(self._connections) + opening < self._connection_limit:
            self._open()

    def _on_free(self, connection: Connection) -> None:
        if self._waiting:
            due, taken, request = self._waiting.popleft()
            connection.send(request, due, taken, monotonic())
            return
        self._idle.append(connection)
        if self._next_s == inf:
            self._stop_if_over()

    def _on_not_opened(self, began_s: float, why: str) -> None:
        if self._waiting:
            self._fail_waiting("cannot connect", why)
            self._loop.call_later(_RECONNECT_S, self._open_more)
        self._stop_if_over()

    def _fail_waiting(self, kind: str, message: str = "") -> None:
        due, taken, request = self._waiting.popleft()
        self.record_failure((due, taken, monotonic()), request, kind, message)

    def on_closed(self, connection: Connection) -> None:
        """Open another connection if requests wait for one."""
        super().on_closed(connection)
        if connection in self._idle:
            self._idle.remove(connection)
        if self._waiting:
            self._open_more()
        self._stop_if_over()

    def _fail_unanswered(self, now: float) -> None:
        while self._waiting:
            self._fail_waiting("stopped before it was sent")
        super()._fail_unanswered(now)

    def _check_timeouts(self) -> None:
        super()._check_timeouts()
        while self._waiting and self._waiting[0][0] < monotonic() - self._plan.timeout_s:
            self._fail_waiting("no connection was free in time")
        self._stop_if_over()

    def _open_requests(self) -> int:
        return super()._open_requests() + len(self._waiting)

    def _stop_if_over(self) -> None:
        if self._next_s == inf and monotonic() >= self._end_s and not self._open_requests():
            self.stop()

    def stop(self) -> None:
        self._timer.close()
        super().stop()
