"""The connections, answers and samples of a trial in one process.

Nothing is computed here: a finished request becomes seven numbers in an array, which the main process reads.
"""

from __future__ import annotations

import asyncio
import sys
from abc import ABC, abstractmethod
from array import array
from collections.abc import Callable
from math import inf
from time import monotonic, process_time
from typing import cast

from cobatch.server.loadtest.answers import Answer, Malformed
from cobatch.server.loadtest.codec import Checker
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
from cobatch.server.loadtest.target import reason

_FLUSH_S = 0.1  # between two batches of samples
_HEARTBEAT_S = 1.0
_TIMEOUT_CHECK_S = 0.5

Report = Callable[[Ready | Samples | NewKind | Heartbeat | Done | Failed], None]


class Connection(asyncio.Protocol):
    """`request` is None while the connection is idle. `due`, `taken`, `sent`: as in `messages.COLUMNS`."""

    __slots__ = ("_driver", "answer", "due", "request", "sent", "taken", "transport")

    def __init__(self, driver: Driver) -> None:
        self._driver = driver
        self.transport: asyncio.Transport
        self.answer = Answer()
        self.request: PreparedRequest | None = None
        self.due = self.taken = self.sent = 0.0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast("asyncio.Transport", transport)  # uvloop's has another base class

    def send(self, request: PreparedRequest, due: float, taken: float, now: float) -> None:
        self.request = request
        self.due = due
        self.taken = taken
        self.sent = now
        self.transport.write(request.data)

    def data_received(self, data: bytes) -> None:
        now = monotonic()  # read before parsing, which takes a microsecond of the generator's time
        try:
            complete = self.answer.feed(data)
        except Malformed as error:
            self.give_up("malformed answer", str(error))
            return
        if not complete:
            return
        if self.request is None:  # a notice on an idle connection before the server closes it
            self.transport.close()
            return
        self._driver.on_answer(self, now)

    def connection_lost(self, error: Exception | None) -> None:
        if self.request is not None and self.answer.end():
            self._driver.on_answer(self, monotonic())
        if self.request is not None:
            kind = "connection closed within an answer" if self.answer.started else "connection closed"
            self.fail(kind, str(error or ""))
        self._driver.on_closed(self)

    def give_up(self, kind: str, message: str = "") -> None:
        """Fail the request and abort the connection."""
        self.fail(kind, message)
        self.transport.abort()

    def fail(self, kind: str, message: str) -> None:
        """Record the request, if there is one, as failed."""
        if self.request is not None:
            self._driver.record_failure((self.due, self.taken, self.sent), self.request, kind, message)
            self.request = None


class Driver(ABC):
    """Connections, answers and samples of a trial; the subclasses decide when a request is sent."""

    first_connections = sys.maxsize  # opened before the start

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
        self._heartbeat_from = (0.0, 0.0)  # CPU seconds, clock
        self._measured: list[tuple[float, float]] = []  # the same, from the start of measuring
        self._over = self._loop.create_future()

    async def prepare(self) -> None:
        """Open the first connections. Raises OSError."""
        count = min(self.first_connections, self._connection_limit)
        await asyncio.gather(*(self._connect() for _ in range(count)))

    async def run(self, at_s: float) -> None:
        """Run the trial from this time until its last request is over."""
        self._end_s = at_s + self._trial.lasts_s
        self._heartbeat_from = (process_time(), monotonic())
        for time_s in (at_s + self._trial.warmup_s, self._end_s):
            self._loop.call_later(time_s - monotonic(), self._read_clocks)
        self._repeat(_FLUSH_S, self._flush)
        self._repeat(_HEARTBEAT_S, self._beat)
        self._repeat(_TIMEOUT_CHECK_S, self._check_timeouts)
        self._begin(at_s)
        await self._over
        self._fail_unanswered(monotonic())
        self._flush()
        self._read_clocks()  # unless both are read, the trial was stopped
        (cpu_s, clock_s), (end_cpu_s, end_clock_s) = self._measured[0], self._measured[:2][-1]
        self._report(Done(end_cpu_s - cpu_s, end_clock_s - clock_s, self._most_open))
        for task in self._opening:
            task.cancel()
        for connection in list(self._connections):
            connection.transport.abort()

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
            connection.fail("stopped before its answer", message)

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

    def _on_opened(self, connection: Connection) -> None:
        self._on_free(connection)

    @abstractmethod
    def _on_not_opened(self, began_s: float, why: str) -> None:
        """Handle a connection that could not be opened."""

    @abstractmethod
    def _on_free(self, connection: Connection) -> None:
        """Use an idle connection."""

    def on_closed(self, connection: Connection) -> None:
        self._connections.discard(connection)

    # Answers.

    def on_answer(self, connection: Connection, now: float) -> None:
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
        if answer.keep_alive and not connection.transport.is_closing():
            self._on_free(connection)
        else:
            connection.transport.close()

    def record_failure(
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

    def _repeat(self, period_s: float, call: Callable[[], None]) -> None:
        """Call a function in this period until the trial is over."""

        def again() -> None:
            if not self._over.done():
                call()
                self._repeat(period_s, call)

        self._loop.call_later(period_s, again)

    def _flush(self) -> None:
        if self._samples:
            self._report(Samples(self._samples.tobytes()))
            del self._samples[:]

    def _beat(self) -> None:
        (cpu_s, at_s), self._heartbeat_from = self._heartbeat_from, (process_time(), monotonic())
        used_s, passed_s = self._heartbeat_from[0] - cpu_s, self._heartbeat_from[1] - at_s
        self._report(Heartbeat(self._open_requests(), used_s / passed_s))

    def _check_timeouts(self) -> None:
        oldest_s = monotonic() - self._plan.timeout_s
        for connection in list(self._connections):
            if connection.request is not None and connection.sent < oldest_s:
                connection.give_up("no answer in time")

    def _open_requests(self) -> int:
        return sum(one.request is not None for one in self._connections)

    def _read_clocks(self) -> None:
        self._measured.append((process_time(), monotonic()))
