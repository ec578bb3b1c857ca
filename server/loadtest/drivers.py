"""What the open loop and the closed loop share: connections, answers, and telling of them.

Nothing here computes: a request that is over becomes seven numbers in an array, which another process reads.
"""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from array import array
from collections.abc import Callable
from math import inf
from time import monotonic, process_time

from cobatch.server.loadtest.answers import Answer, Checker
from cobatch.server.loadtest.connection import Connection
from cobatch.server.loadtest.messages import (
    Done,
    Failed,
    NewKind,
    Plan,
    Prepared,
    Pulse,
    Ready,
    Samples,
    Trial,
)
from cobatch.server.loadtest.target import reason

_FLUSH_S = 0.1
_LOOK_S = 0.5  # how often it is looked for requests that wait too long
_STOPPED = "stopped before its answer"

Tell = Callable[[Ready | Samples | NewKind | Pulse | Done | Failed], None]


class Driver(ABC):
    """Runs one trial in one process."""

    def __init__(self, plan: Plan, trial: Trial, connections: int, tell: Tell) -> None:
        self._loop = asyncio.get_running_loop()
        self._plan = plan
        self._trial = trial
        self._most = connections
        self._tell = tell
        self._checker = None if plan.expected is None else Checker(plan.expected)
        self._context = plan.address.context()
        self._connections: set[Connection] = set()
        self._opening: set[asyncio.Task[None]] = set()
        self._samples = array("d")
        self._kinds: dict[str, int] = {}
        self._end_s = inf
        self._look_s = 0.0
        self._cpu_s = self._cpu_at_s = 0.0
        self._from: tuple[float, float] | None = None  # CPU and clock when measuring began
        self._until: tuple[float, float] | None = None
        self._most_open = 0
        self._over = self._loop.create_future()

    async def prepare(self) -> None:
        """Open the first connections. Raises OSError."""
        await asyncio.gather(*(self._connect() for _ in range(min(self._most, self._first()))))

    def _first(self) -> int:
        return self._most

    async def run(self, at_s: float) -> None:
        """Run from this moment until the last request is over."""
        self._end_s = at_s + self._trial.lasts_s
        self._cpu_at_s, self._cpu_s = monotonic(), process_time()
        self._loop.call_later(at_s + self._trial.warmup_s - monotonic(), self._measure)
        flushing = self._loop.call_later(_FLUSH_S, self._flush)
        self._begin(at_s)
        await self._over
        flushing.cancel()
        self._leave(monotonic())
        self._flush(again=False)
        self._tell(self._done())
        for task in self._opening:
            task.cancel()
        for connection in list(self._connections):
            connection.drop()

    @abstractmethod
    def _begin(self, at_s: float) -> None:
        """Send what is due from then on."""

    def stop(self) -> None:
        """Send nothing more and wait for nobody."""
        self._end_s = min(self._end_s, monotonic())
        if not self._over.done():
            self._over.set_result(None)

    def _leave(self, now: float) -> None:
        """Note what has no answer yet, which there is only where the trial was stopped."""
        open_ = [one for one in self._connections if one.request is not None]
        said = f"the first had waited for {now - min(one.due for one in open_):.3f} s" if open_ else ""
        for connection in open_:
            self.failed(connection, _STOPPED, said)

    # Connections.

    async def _connect(self) -> None:
        address = self._plan.address
        name = address.host if self._context is not None else None
        _, connection = await self._loop.create_connection(
            lambda: Connection(self), address.host, address.port, ssl=self._context, server_hostname=name
        )
        self._connections.add(connection)
        self._most_open = max(self._most_open, len(self._connections))
        self._opened(connection)

    def _open(self) -> None:
        task = self._loop.create_task(self._try())
        self._opening.add(task)
        task.add_done_callback(self._opening.discard)

    async def _try(self) -> None:
        began = monotonic()
        try:
            async with asyncio.timeout(self._plan.timeout_s):
                await self._connect()
        except (OSError, TimeoutError) as error:
            self._not_opened(began, reason(error))

    @abstractmethod
    def _opened(self, connection: Connection) -> None:
        """There is one more."""

    @abstractmethod
    def _not_opened(self, began_s: float, why: str) -> None:
        """There is not."""

    def gone(self, connection: Connection) -> None:
        """It is closed."""
        self._connections.discard(connection)

    # Answers.

    def answered(self, connection: Connection, now: float) -> None:
        """Note it, and use the connection again."""
        request, answer = connection.request, connection.answer
        assert request is not None
        kind = 0
        if answer.status != 200:
            kind = self._kind(answer.kind(), answer.said)
        elif self._checker is not None:
            kind = self._check(request, answer)
        times = (connection.due, connection.taken, connection.sent, now)
        self._samples.extend((*times, kind, request.caller, answer.batch))
        connection.request = None
        if answer.keeps and not connection.closing:
            self._free(connection)
        else:
            connection.close()

    def _check(self, request: Prepared, answer: Answer) -> int:
        assert self._checker is not None
        why = self._checker.wrong(request.example, answer)
        return 0 if why is None else self._kind("wrong answer", why.__str__)

    def failed(self, connection: Connection, kind: str, said: str) -> None:
        """Note that there will be no answer."""
        assert connection.request is not None
        times = (connection.due, connection.taken, connection.sent)
        self._lost(times, connection.request, kind, said)

    def _lost(self, times: tuple[float, float, float], request: Prepared, kind: str, said: str) -> None:
        """Note a request without an answer: due, taken up, sent."""
        number = self._kind(kind, lambda: said)
        self._samples.extend((*times, monotonic(), number, request.caller, 0))

    @abstractmethod
    def _free(self, connection: Connection) -> None:
        """It can be used again."""

    def _kind(self, name: str, said: Callable[[], str]) -> int:
        number = self._kinds.get(name)
        if number is None:
            number = self._kinds[name] = len(self._kinds) + 1
            self._tell(NewKind(number, name, said()))
        return number

    # What is told meanwhile.

    def _flush(self, again: bool = True) -> None:
        now = monotonic()
        if self._samples:
            self._tell(Samples(self._samples.tobytes()))
            del self._samples[:]
        cpu_s, took_s = process_time() - self._cpu_s, now - self._cpu_at_s
        if took_s >= 1:
            self._tell(Pulse(self._open_requests(), cpu_s / took_s))
            self._cpu_s, self._cpu_at_s = process_time(), now
        if now >= self._look_s:
            self._look_s = now + _LOOK_S
            self._look(now)
        if again and not self._over.done():
            self._loop.call_later(_FLUSH_S, self._flush)

    def _look(self, now: float) -> None:
        """Give up on what waits too long."""
        too_old = now - self._plan.timeout_s
        for connection in list(self._connections):
            if connection.request is not None and connection.sent < too_old:
                connection.give_up("no answer in time")

    def _open_requests(self) -> int:
        return sum(one.request is not None for one in self._connections)

    def _measure(self) -> None:
        self._from = (process_time(), monotonic())
        self._loop.call_later(self._end_s - monotonic(), self._measured)

    def _measured(self) -> None:
        if self._until is None:
            self._until = (process_time(), monotonic())

    def _done(self) -> Done:
        self._measured()
        assert self._until is not None
        began = self._from or self._until
        return Done(self._until[0] - began[0], self._until[1] - began[1], self._most_open)
