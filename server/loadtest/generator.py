"""Run one trial in one process. The closed loop sends after each answer, the open loop by the clock.

Nothing is computed here: a finished request becomes seven numbers in an array, which the main process reads.
"""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from array import array
from collections import deque
from collections.abc import Callable
from math import inf
from time import monotonic, process_time

from cobatch.server.loadtest.codec import Checker
from cobatch.server.loadtest.connection import Connection
from cobatch.server.loadtest.messages import (
    Done,
    Failed,
    Heartbeat,
    NewKind,
    Plan,
    PreparedRequest,
    Ready,
    Samples,
    Trial,
)
from cobatch.server.loadtest.schedule import Timer, choices, schedule
from cobatch.server.loadtest.target import reason

_FLUSH_S = 0.1  # between two batches of samples
_HEARTBEAT_S = 1.0
_TIMEOUT_CHECK_S = 0.5
_RECONNECT_S = 0.05  # after a connection could not be opened
_SEND_LIMIT = 32  # requests sent before answers are read again
_OPEN_AT_START = 64

Report = Callable[[Ready | Samples | NewKind | Heartbeat | Done | Failed], None]


class Driver(ABC):
    """Connections, answers and samples of a trial; the subclasses decide when a request is sent."""

    def __init__(self, plan: Plan, trial: Trial, connections: int, report: Report) -> None:
        self._loop = asyncio.get_running_loop()
        self._plan = plan
        self._trial = trial
        self._connection_limit = connections
        self._report = report
        self._checker = None if plan.expected is None else Checker(plan.expected)
        self._context = plan.address.context()
        self._connections: set[Connection] = set()
        self._opening: set[asyncio.Task[None]] = set()
        self._most_open = 0
        self._samples = array("d")
        self._kinds: dict[str, int] = {}
        self._end_s = inf
        self._next_check_s = 0.0
        self._heartbeat_from = (0.0, 0.0)  # CPU seconds, clock
        self._measured_from: tuple[float, float] | None = None
        self._measured_until: tuple[float, float] | None = None
        self._over = self._loop.create_future()

    async def prepare(self) -> None:
        """Open the first connections. Raises OSError."""
        await asyncio.gather(*(self._connect() for _ in range(self._first_connections())))

    def _first_connections(self) -> int:
        return self._connection_limit

    async def run(self, at_s: float) -> None:
        """Run the trial from this time until its last request is over."""
        self._end_s = at_s + self._trial.lasts_s
        self._heartbeat_from = (process_time(), monotonic())
        self._loop.call_later(at_s + self._trial.warmup_s - monotonic(), self._start_measuring)
        flushing = self._loop.call_later(_FLUSH_S, self._flush)
        self._begin(at_s)
        await self._over
        flushing.cancel()
        self._fail_unanswered(monotonic())
        self._flush(again=False)
        self._report(self._summary())
        for task in self._opening:
            task.cancel()
        for connection in list(self._connections):
            connection.drop()

    @abstractmethod
    def _begin(self, at_s: float) -> None:
        """Send requests from this time on."""

    def stop(self) -> None:
        """Send no more requests and wait for no answers."""
        self._end_s = min(self._end_s, monotonic())
        if not self._over.done():
            self._over.set_result(None)

    def _fail_unanswered(self, now: float) -> None:
        """Record the requests in flight as failures; there are some only if the trial was stopped."""
        unanswered = [one for one in self._connections if one.request is not None]
        oldest_s = min((one.due for one in unanswered), default=now)
        for connection in unanswered:
            message = f"the first had waited for {now - oldest_s:.3f} s"
            self.on_failure(connection, "stopped before its answer", message)

    # Connections.

    async def _connect(self) -> None:
        address = self._plan.address
        name = address.host if self._context is not None else None
        _, connection = await self._loop.create_connection(
            lambda: Connection(self), address.host, address.port, ssl=self._context, server_hostname=name
        )
        self._connections.add(connection)
        self._most_open = max(self._most_open, len(self._connections))
        self._on_opened(connection)

    def _open(self) -> None:
        task = self._loop.create_task(self._try_to_connect())
        self._opening.add(task)
        task.add_done_callback(self._opening.discard)

    async def _try_to_connect(self) -> None:
        began = monotonic()
        try:
            async with asyncio.timeout(self._plan.timeout_s):
                await self._connect()
        except (OSError, TimeoutError) as error:
            self._on_not_opened(began, reason(error))

    @abstractmethod
    def _on_opened(self, connection: Connection) -> None:
        """Use a new connection."""

    @abstractmethod
    def _on_not_opened(self, began_s: float, why: str) -> None:
        """Handle a connection that could not be opened."""

    @abstractmethod
    def _on_free(self, connection: Connection) -> None:
        """Use a connection whose request is over."""

    def on_closed(self, connection: Connection) -> None:
        """Forget a closed connection."""
        self._connections.discard(connection)

    # Answers.

    def on_answer(self, connection: Connection, now: float) -> None:
        """Record the answer, and use the connection again."""
        request, answer = connection.request, connection.answer
        assert request is not None
        kind = 0
        if answer.status != 200:
            kind = self._kind(answer.error_kind(), answer.error_message)
        elif self._checker is not None:
            why = self._checker.check(request.example, answer.head, answer.body)
            kind = 0 if why is None else self._kind("wrong answer", why.__str__)
        times = (connection.due, connection.taken, connection.sent, now)
        self._samples.extend((*times, kind, request.caller, answer.batch))
        connection.request = None
        if answer.keep_alive and not connection.closing:
            self._on_free(connection)
        else:
            connection.close()

    def on_failure(self, connection: Connection, kind: str, message: str) -> None:
        """Record a request without an answer."""
        assert connection.request is not None
        times = (connection.due, connection.taken, connection.sent)
        self._record_failure(times, connection.request, kind, message)

    def _record_failure(
        self, times: tuple[float, float, float], request: PreparedRequest, kind: str, message: str
    ) -> None:
        number = self._kind(kind, lambda: message)
        self._samples.extend((*times, monotonic(), number, request.caller, 0))

    def _kind(self, name: str, message: Callable[[], str]) -> int:
        number = self._kinds.get(name)
        if number is None:
            number = self._kinds[name] = len(self._kinds) + 1
            self._report(NewKind(number, name, message()))
        return number

    # Reports during the trial.

    def _flush(self, again: bool = True) -> None:
        now = monotonic()
        if self._samples:
            self._report(Samples(self._samples.tobytes()))
            del self._samples[:]
        cpu_s, at_s = self._heartbeat_from
        if now - at_s >= _HEARTBEAT_S:
            used_s = process_time()
            self._report(Heartbeat(self._open_requests(), (used_s - cpu_s) / (now - at_s)))
            self._heartbeat_from = (used_s, now)
        if now >= self._next_check_s:
            self._next_check_s = now + _TIMEOUT_CHECK_S
            self._check_timeouts(now)
        if again and not self._over.done():
            self._loop.call_later(_FLUSH_S, self._flush)

    def _check_timeouts(self, now: float) -> None:
        oldest_s = now - self._plan.timeout_s
        for connection in list(self._connections):
            if connection.request is not None and connection.sent < oldest_s:
                connection.give_up("no answer in time")

    def _open_requests(self) -> int:
        return sum(one.request is not None for one in self._connections)

    def _start_measuring(self) -> None:
        self._measured_from = (process_time(), monotonic())
        self._loop.call_later(self._end_s - monotonic(), self._stop_measuring)

    def _stop_measuring(self) -> None:
        if self._measured_until is None:
            self._measured_until = (process_time(), monotonic())

    def _summary(self) -> Done:
        self._stop_measuring()
        assert self._measured_until is not None
        cpu_s, at_s = self._measured_from or self._measured_until
        return Done(self._measured_until[0] - cpu_s, self._measured_until[1] - at_s, self._most_open)


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
        self._record_failure((began_s, began_s, began_s), next(self._choices), "cannot connect", why)
        self._loop.call_later(_RECONNECT_S, self._open_again)

    def _open_again(self) -> None:
        if monotonic() < self._end_s:
            self._open()
        else:
            self._stop_if_over()

    def on_closed(self, connection: Connection) -> None:
        """Open another connection in its place."""
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

    def _first_connections(self) -> int:
        return min(self._connection_limit, _OPEN_AT_START)

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
            if not connection.closing:
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

    def _on_opened(self, connection: Connection) -> None:
        self._on_free(connection)

    def _on_not_opened(self, began_s: float, why: str) -> None:
        if self._waiting:
            self._fail_waiting("cannot connect", why)
            self._loop.call_later(_RECONNECT_S, self._open_more)
        self._stop_if_over()

    def _fail_waiting(self, kind: str, message: str = "") -> None:
        due, taken, request = self._waiting.popleft()
        self._record_failure((due, taken, monotonic()), request, kind, message)

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

    def _check_timeouts(self, now: float) -> None:
        super()._check_timeouts(now)
        while self._waiting and self._waiting[0][0] < now - self._plan.timeout_s:
            self._fail_waiting("no connection was free in time")
        self._stop_if_over()

    def _open_requests(self) -> int:
        return super()._open_requests() + len(self._waiting)

    def _stop_if_over(self) -> None:
        if self._next_s == inf and monotonic() >= self._end_s and not self._open_requests():
            self.stop()

    def stop(self) -> None:
        """Send no more requests and wait for no answers."""
        self._timer.close()
        super().stop()
