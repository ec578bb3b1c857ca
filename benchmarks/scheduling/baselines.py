"""The batching policies of other servers, as nodes of the simulation.

Each is written after its original's documentation and code, with its settings, so that a comparison can tune
them. None considers tenants or priorities. A request's rows stay together; a request larger than a batch runs
alone, uncut.

They treat deadlines as follows:

* `FixedWindow`: not at all. The rows of a client that stopped waiting stay in the batch.
* `SizeOrTimeout`: not while requests wait; with `drops` it skips expired requests when it forms a batch,
  which is more than most servers do.
* `TritonLike`: skips expired requests when it forms a batch (queue policy REJECT, with the request's own
  timeout), but not those that will expire during the run. With `queue_timeout_ms` it also skips those that
  have waited that long, which can be set to the deadline less the run time.
* `Clipper`: the same, and takes requests in the order of their deadlines.
"""

from __future__ import annotations

from collections import Counter, deque
from heapq import heappop, heappush
from math import inf
from typing import Any

from cobatch.batcher.errors import ExpiredError
from cobatch.batcher.request import State
from cobatch.batcher.simulator.clock import Timer, VirtualLoop
from cobatch.batcher.simulator.engine import RunTimeSampler
from cobatch.batcher.simulator.nodes import SimulatedRequest


class Baseline:
    """A queue before one engine. A subclass decides in `_next` when a batch leaves."""

    def __init__(
        self,
        loop: VirtualLoop,
        sampler: RunTimeSampler,
        *,
        max_batch_size: int,
        max_queue_rows: float = inf,
        handover_s: float = 0.0,
    ) -> None:
        self.open_requests = 0
        self.batches: Counter[int] = Counter()
        self.reasons: Counter[str] = Counter()
        self._loop = loop
        self._sampler = sampler
        self._most = max_batch_size
        self._max_queue_rows = max_queue_rows
        self._handover_s = handover_s
        self._waits_s = inf
        self._queue: deque[SimulatedRequest] = deque()
        self._rows = 0
        self._busy = False
        self._timer: Timer | None = None

    def submit(self, request: SimulatedRequest) -> str | None:
        """Queue a request; or return the reason of a refusal."""
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
        """Return the reason to dispatch now, or the time to decide again; called while the engine is idle."""
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
        """Take whole requests from the head of the queue, at least one."""
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
        """Expire requests at the head whose deadline has passed, or that have waited too long."""
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
        run_s = self._sampler.run_s(rows, self._loop.now_s) + 2 * self._handover_s
        self._loop.call_later(run_s, self._ran, requests, rows, run_s)

    def _ran(self, requests: list[SimulatedRequest], rows: int, run_s: float) -> None:
        self._busy = False
        self._learn(rows, run_s)
        for request in requests:
            request.state = State.DONE
            request.done()
        self._consider()

    def _learn(self, rows: int, run_s: float) -> None:
        """Observe a finished run."""


class FixedWindow(Baseline):
    """The asyncio recipe: the first request opens a window, at whose end all queued requests are dispatched.

    They form as many batches as needed. The next request opens the next window. The queue is unbounded.
    """

    def __init__(
        self, loop: VirtualLoop, sampler: RunTimeSampler, *, window_ms: float, **shared: Any
    ) -> None:
        super().__init__(loop, sampler, **shared)
        self._window_s = window_ms / 1000
        self._due: deque[list[SimulatedRequest]] = deque()
        self._open = False

    def submit(self, request: SimulatedRequest) -> str | None:
        """Add a request to the window."""
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
    """TorchServe, Ray Serve, KServe, LitServe, mosec: dispatch full batches, and others after `timeout_ms`.

    The timeout counts from the arrival of the oldest request; batches leave when the engine is idle.
    """

    def __init__(
        self,
        loop: VirtualLoop,
        sampler: RunTimeSampler,
        *,
        timeout_ms: float,
        drops: bool = False,
        **shared: Any,
    ) -> None:
        super().__init__(loop, sampler, **shared)
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
    """Triton's dynamic batcher with one instance: dispatch the largest preferred size that is queued.

    Smaller batches leave when the oldest request has waited for `delay_ms`. Without preferred sizes the
    largest batch is the only one; without a delay an idle engine takes all that is queued.
    """

    def __init__(
        self,
        loop: VirtualLoop,
        sampler: RunTimeSampler,
        *,
        preferred: tuple[int, ...] = (),
        delay_ms: float = 0.0,
        queue_timeout_ms: float = inf,
        **shared: Any,
    ) -> None:
        super().__init__(loop, sampler, **shared)
        self._largest = self._most
        self._preferred = sorted(preferred, reverse=True) or [self._largest]
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
    """Clipper's adaptive batching (Crankshaw et al., NSDI 2017).

    The largest batch grows by `step` rows while its runs take at most `objective_ms` (None: no limit), and
    shrinks by a tenth when one takes longer.
    """

    def __init__(
        self,
        loop: VirtualLoop,
        sampler: RunTimeSampler,
        *,
        objective_ms: float | None,
        step: int = 1,
        **shared: Any,
    ) -> None:
        super().__init__(loop, sampler, **shared)
        self._largest, self._most = self._most, 1
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
