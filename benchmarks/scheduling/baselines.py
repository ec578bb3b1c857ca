"""How others batch, as nodes of the same simulation.

Each is written after its original's documents and code, and each with settings, so that a comparison can
give it its best ones. None looks at tenants or priorities. Rows of several requests ride together whole;
a request larger than a batch is cut by none of them, and rides alone.

What each does about deadlines:

* `FixedWindow`: nothing. A caller that stops waiting leaves its rows in the batch.
* `SizeOrTimeout`: nothing while they wait; with `drops` it leaves out what is past its deadline when a batch
  is made up, which is kinder than most.
* `TritonLike`: leaves out what is past its deadline when a batch is made up (queue policy REJECT, with the
  request's own timeout), not what will be by the end of its run. With `queue_timeout_ms` also what has
  waited for so long: somebody who knows the deadline and a run's time can set that to the difference.
* `Clipper`: the same, and takes requests earliest deadline first.
"""

from __future__ import annotations

from collections import Counter, deque
from heapq import heappop, heappush
from math import inf

from cobatch.batcher.errors import ExpiredError
from cobatch.batcher.request import State
from cobatch.batcher.simulator.clock import Timer, VirtualLoop
from cobatch.batcher.simulator.engine import Clockwork
from cobatch.batcher.simulator.traffic import SimulatedRequest


class Baseline:
    """A queue before one engine. A subclass says in `_next` when what leaves."""

    def __init__(
        self,
        loop: VirtualLoop,
        clockwork: Clockwork,
        *,
        max_batch_size: int,
        max_queue_rows: float = inf,
        handover_s: float = 0.0,
    ) -> None:
        self.open_requests = 0
        self.batches: Counter[int] = Counter()
        self.reasons: Counter[str] = Counter()
        self._loop = loop
        self._clockwork = clockwork
        self._most = max_batch_size
        self._max_queue_rows = max_queue_rows
        self._handover_s = handover_s
        self._waits_s = inf
        self._queue: deque[SimulatedRequest] = deque()
        self._rows = 0
        self._busy = False
        self._timer: Timer | None = None

    def submit(self, request: SimulatedRequest) -> str | None:
        """Queue it, or say that the queue is full."""
        if self._rows + request.rows > self._max_queue_rows:
            return "queue"
        request.enqueued_s = now_s = self._loop.now_s
        request.state = State.QUEUED
        if request.timeout_s is not None:
            request.deadline_s = now_s + request.timeout_s
        self.open_requests += 1
        self._push(request)
        self._rows += request.rows
        if not self._busy:
            self._consider()
        return None

    def _push(self, request: SimulatedRequest) -> None:
        self._queue.append(request)

    def _next(self) -> str | float:
        """Why a batch leaves now, or when to ask again; only while the engine is idle."""
        raise NotImplementedError

    def _consider(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._busy or not self._rows:
            return
        answer = self._next()
        if isinstance(answer, str):
            self._run(self._take(self._most), answer)
        elif self._rows and answer < inf:
            self._timer = self._loop.call_later(max(0.0, answer - self._loop.now_s), self._consider)

    def _take(self, most_rows: int) -> list[SimulatedRequest]:
        """Whole requests from the head of the queue, at least one."""
        taken: list[SimulatedRequest] = []
        rows = 0
        queue = self._queue
        while queue and (not taken or rows + queue[0].rows <= most_rows):
            request = queue.popleft()
            rows += request.rows
            taken.append(request)
        self._rows -= rows
        return taken

    def _drop_late(self) -> None:
        """Answer those at the head whose deadline is over, or that have waited for too long."""
        queue, now_s = self._queue, self._loop.now_s
        while queue and (queue[0].deadline_s <= now_s or queue[0].enqueued_s + self._waits_s <= now_s):
            self._drop(queue.popleft())

    def _drop(self, request: SimulatedRequest) -> None:
        self._rows -= request.rows
        request.state = State.DONE
        request.error = ExpiredError(self._waits_s if request.timeout_s is None else request.timeout_s)
        request.done()

    def _run(self, requests: list[SimulatedRequest], reason: str) -> None:
        self._busy = True
        rows = sum([request.rows for request in requests])
        self.batches[rows] += 1
        self.reasons[reason] += 1
        run_s = self._clockwork.run_s(rows, self._loop.now_s) + 2 * self._handover_s
        self._loop.call_later(run_s, self._ran, requests, rows, run_s)

    def _ran(self, requests: list[SimulatedRequest], rows: int, run_s: float) -> None:
        self._busy = False
        self._learn(rows, run_s)
        for request in requests:
            request.state = State.DONE
            request.done()
        self._consider()

    def _learn(self, rows: int, run_s: float) -> None:
        """A run is over."""


class FixedWindow(Baseline):
    """The asyncio recipe: the first request opens a window, and when it closes all that is there goes to
    the engine, in as many batches as it takes. The next window opens with the next request."""

    def __init__(
        self,
        loop: VirtualLoop,
        clockwork: Clockwork,
        *,
        max_batch_size: int,
        window_ms: float,
        handover_s: float = 0.0,
    ) -> None:
        super().__init__(loop, clockwork, max_batch_size=max_batch_size, handover_s=handover_s)
        self._window_s = window_ms / 1000
        self._due: deque[list[SimulatedRequest]] = deque()
        self._open = False

    def submit(self, request: SimulatedRequest) -> str | None:
        """Join the window; there is no bound."""
        request.enqueued_s = self._loop.now_s
        self.open_requests += 1
        self._queue.append(request)
        self._rows += request.rows
        if not self._open:
            self._open = True
            self._loop.call_later(self._window_s, self._close)
        return None

    def _close(self) -> None:
        self._open = False
        while self._queue:
            self._due.append(self._take(self._most))
        self._consider()

    def _consider(self) -> None:
        if not self._busy and self._due:
            self._run(self._due.popleft(), "delay")


class SizeOrTimeout(Baseline):
    """As in TorchServe, Ray Serve, KServe, LitServe or mosec: an idle engine is given a batch when it is
    full, or when its oldest request has waited for `timeout_ms`."""

    def __init__(
        self,
        loop: VirtualLoop,
        clockwork: Clockwork,
        *,
        max_batch_size: int,
        max_queue_rows: float,
        timeout_ms: float,
        drops: bool = False,
        handover_s: float = 0.0,
    ) -> None:
        super().__init__(
            loop,
            clockwork,
            max_batch_size=max_batch_size,
            max_queue_rows=max_queue_rows,
            handover_s=handover_s,
        )
        self._timeout_s = timeout_ms / 1000
        self._drops = drops

    def _next(self) -> str | float:
        if self._drops:
            self._drop_late()
        if self._rows >= self._most:
            return "full"
        if not self._rows:
            return inf
        due_s = self._queue[0].enqueued_s + self._timeout_s
        return "delay" if self._loop.now_s >= due_s else due_s


class TritonLike(Baseline):
    """Triton's dynamic batcher with one instance: the largest preferred size that is there leaves at once;
    less leaves when the oldest has waited for `delay_ms`. Without preferred sizes the largest batch is the
    only one, and with no delay whatever is there leaves."""

    def __init__(
        self,
        loop: VirtualLoop,
        clockwork: Clockwork,
        *,
        max_batch_size: int,
        max_queue_rows: float,
        preferred: tuple[int, ...] = (),
        delay_ms: float = 0.0,
        queue_timeout_ms: float = inf,
        handover_s: float = 0.0,
    ) -> None:
        super().__init__(
            loop,
            clockwork,
            max_batch_size=max_batch_size,
            max_queue_rows=max_queue_rows,
            handover_s=handover_s,
        )
        self._preferred = sorted(preferred, reverse=True) or [max_batch_size]
        self._largest = max_batch_size
        self._delay_s = delay_ms / 1000
        self._waits_s = queue_timeout_ms / 1000

    def _next(self) -> str | float:
        self._drop_late()
        if not self._rows:
            return inf
        for size in self._preferred:
            if self._rows >= size:
                self._most = size
                return "full"
        self._most = self._largest
        due_s = self._queue[0].enqueued_s + self._delay_s
        return ("delay" if self._delay_s else "idle") if self._loop.now_s >= due_s else due_s


class Clipper(Baseline):
    """Clipper's adaptive batching (Crankshaw et al., NSDI 2017): the largest batch grows by
    `step` rows as long as runs of it stay within the objective, and shrinks by a tenth when one does not.

    `objective_ms` is what a run may take; None: no limit but the engine's.
    """

    def __init__(
        self,
        loop: VirtualLoop,
        clockwork: Clockwork,
        *,
        max_batch_size: int,
        max_queue_rows: float,
        objective_ms: float | None,
        step: int = 1,
        handover_s: float = 0.0,
    ) -> None:
        super().__init__(
            loop, clockwork, max_batch_size=1, max_queue_rows=max_queue_rows, handover_s=handover_s
        )
        self._largest = max_batch_size
        self._objective_s = inf if objective_ms is None else objective_ms / 1000
        self._step = step
        self._heap: list[tuple[float, int, SimulatedRequest]] = []
        self._number = 0

    def _push(self, request: SimulatedRequest) -> None:
        self._number += 1
        heappush(self._heap, (request.deadline_s, self._number, request))

    def _next(self) -> str | float:
        heap, now_s = self._heap, self._loop.now_s
        while heap and heap[0][0] <= now_s:
            self._drop(heappop(heap)[2])
        return "idle" if heap else inf

    def _take(self, most_rows: int) -> list[SimulatedRequest]:
        taken: list[SimulatedRequest] = []
        rows = 0
        while self._heap and (not taken or rows + self._heap[0][2].rows <= most_rows):
            request = heappop(self._heap)[2]
            rows += request.rows
            taken.append(request)
        self._rows -= rows
        return taken

    def _learn(self, rows: int, run_s: float) -> None:
        if run_s > self._objective_s:
            self._most = max(1, min(self._most, rows) * 9 // 10)
        elif rows >= self._most:
            self._most = min(self._largest, self._most + self._step)
