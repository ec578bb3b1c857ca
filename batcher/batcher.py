"""The batcher: admits requests, sends batches to the workers, hands the rows of each batch back.

One per model, live on one event loop; every method runs there. What leaves when
is decided in `batcher.scheduling.scheduler`, the order is the queue's (`batcher.scheduling.queue`), the way
to the engine and back is the dispatcher's (`batcher.lanes`); this file lets requests in.

Guarantees:

* Every request that `submit` accepts is finished exactly once: `done` is called with its own rows or
  with an error, or the caller cancelled it. Nothing accepted is lost, whatever the engine, other
  callers or a raising `done` do.
* A cancelled request's rows are not packed, unless they already were.
* The loop is called once per finished batch, however many requests rode in it.
* When a batch comes back the next one is on its way to the engine before the answers of this one are
  written, so the engine does not wait for the encoding.
* A failing batch is run again in halves until the requests that fail on their own are found; only
  those get the error. With n requests that is at most 2*log2(n) extra runs for each bad one.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable, Sequence

from cobatch.batcher.bundle import Bundle
from cobatch.batcher.completion import Answers
from cobatch.batcher.ending import Ending
from cobatch.batcher.errors import BatcherError
from cobatch.batcher.lanes import BatchWorker, Lane, Lanes
from cobatch.batcher.leaving import Leaving
from cobatch.batcher.request import Batch, Request, State
from cobatch.batcher.rows.padding import Padder
from cobatch.batcher.scheduling.admission import Admission
from cobatch.batcher.scheduling.policy import Limits
from cobatch.batcher.scheduling.queue import RequestQueue
from cobatch.batcher.scheduling.run_times import LatencyModel, ShapeTimes
from cobatch.batcher.scheduling.scheduler import Scheduler
from cobatch.batcher.statistics import Counters
from cobatch.batcher.tenant import Tenant
from cobatch.engines.errors import EngineError


class Batcher:
    """Gathers the requests for one model into batches for its opened workers, one for each of its engines.

    `max_queue_rows` bounds what is queued, in rows, not counting what already runs. `clock` gives seconds
    and must be monotonic. It is not `loop.time` because uvloop rounds that to milliseconds and stops it
    during an iteration; on asyncio's own loops the two are the same clock. `on_lost` is told of each worker
    whose engine died or hung, and which; it opens another one and tells `use`, or else `gone`.
    """

    def __init__(
        self,
        name: str,
        workers: Sequence[BatchWorker],
        *,
        max_queue_rows: int,
        max_delay_ms: float = 0.0,
        latency_target_ms: float | None = None,
        deadline_ms: float | None = None,
        execution_timeout_ms: float | None = None,
        on_lost: Callable[[BatchWorker, BatcherError], None] | None = None,
        padder: Padder | None = None,
        loop: asyncio.AbstractEventLoop,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        engine = workers[0].engine
        self.name = name
        self.max_batch_size = engine.max_batch_size
        self.limits = Limits(max_delay_s=max_delay_ms / 1000, slots=engine.slots)
        self.latency = LatencyModel(engine.max_batch_size, workers[0].warmup_us)
        vary = any(spec.row_elements < 0 for spec in engine.signature.inputs)
        times = ShapeTimes(self.latency, vary=vary)
        self._has_deadlines = deadline_ms is not None
        self.counters = Counters(pads=padder is not None)
        self._padder = padder
        self._loop = loop
        self._clock = clock
        self._queue = RequestQueue(
            1, self.latency.row_s, ages=max_delay_ms > 0, run_s=self.latency.expected_s
        )
        self._admission = Admission(
            self._queue,
            self.latency,
            times,
            max_batch_size=engine.max_batch_size,
            max_queue_rows=max_queue_rows,
            deadline_ms=deadline_ms,
            now_s=clock(),
        )
        self._admission.lanes = len(workers)
        self._scheduler = scheduler = Scheduler(
            self._queue,
            self.latency,
            times,
            self._admission,
            self.counters,
            loop,
            clock,
            limits=self.limits,
            latency_target_s=math.inf if latency_target_ms is None else latency_target_ms / 1000,
        )
        self._answers = Answers(name, self.counters, clock)
        self._ending = Ending(
            name,
            self._queue,
            self._admission,
            self._answers,
            self.counters,
            loop,
            decide=scheduler.decide,
            on_lost=on_lost,
        )
        self._leaving = Leaving(
            self._queue,
            self._admission,
            self._answers,
            self.counters,
            loop,
            clock,
            max_batch_size=engine.max_batch_size,
            on_left=self._ending.check_drained,
        )
        self._lanes = Lanes(
            workers,
            self._answers,
            self.counters,
            loop,
            clock,
            times=times,
            padder=padder,
            decide=scheduler.decide,
            on_dead=self._ending.on_dead,
            on_idle=scheduler.on_idle,
            on_ran=scheduler.on_ran,
            on_hung=self._ending.on_hung,
            on_late=self._leaving.fail_late,
            execution_timeout_s=None if execution_timeout_ms is None else execution_timeout_ms / 1000,
        )
        self._ending.lanes = scheduler.lanes = self._lanes
        scheduler.on_late = self._leaving.fail_late
        scheduler.check_drained = self._ending.check_drained

    # Admission

    @property
    def queued_rows(self) -> int:
        """Rows accepted and not yet sent to the engine."""
        return self._queue.rows

    @property
    def full_rows(self) -> int:
        """Rows past which a batch gains nothing by growing, as far as is known now."""
        return self._queue.full_rows

    @property
    def running_batches(self) -> int:
        """Batches that are with the engine."""
        return self._lanes.running

    def open_requests(self) -> tuple[dict[int, int], int]:
        """For who watches: queued rows by priority, and how many requests are not answered yet."""
        queued = self._queue.waiting()
        rows: dict[int, int] = {}
        for request in queued:
            rows[request.level] = rows.get(request.level, 0) + request.rows
        return rows, sum([request.callers for request in [*queued, *self._lanes.awaited()]])

    @property
    def all_lanes(self) -> list[Lane]:
        """Engines that can run something, each with what it has."""
        return self._lanes.lanes

    def watch_batches(self, on_batch: Callable[[Batch], None] | None) -> None:
        """Tell of each batch that is over; see `Lanes`. None: nobody any more."""
        self._lanes.on_batch = on_batch

    @property
    def lanes(self) -> int:
        """Engines that can run something: none while one that hung is being replaced."""
        return len(self._lanes.lanes)

    @property
    def full(self) -> bool:
        """Whether not even one row would be accepted now."""
        admission = self._admission
        return self._queue.rows >= admission.max_queue_rows or admission.closed is not None

    @property
    def closed(self) -> BatcherError | None:
        """Why nothing is accepted any more, None as long as something is."""
        return self._admission.closed

    def refusal(self, rows: int = 1, tenant: Tenant | None = None, callers: int = 1) -> BatcherError | None:
        """Why a request of so many rows, for so many callers, would not be accepted now, or None."""
        return self._admission.refusal(rows, tenant, callers, self._clock())

    def submit(self, request: Request) -> None:
        """Queue a request. Raises what `refusal` says; then `request.done` is never called.

        The request's payloads must stay unchanged until it is done or cancelled.
        """
        request.enqueued_s = now_s = self._clock()
        admission, tenant = self._admission, request.tenant
        if self._padder is not None:
            self._refuse(request, self._padder.assign(request))
        full = self._queue.rows >= admission.max_queue_rows or admission.closed is not None
        if full or tenant is not None or request.rows > 1:
            why = admission.refusal(request.rows, tenant, request.callers, now_s)
            self._refuse(request, why)
        if request.timeout_s is not None or self._has_deadlines:
            why = admission.set_deadline(request, now_s, self._lanes.free_s, self._lanes.overhead_s)
            self._refuse(request, why)
            if request.deadline_s < math.inf:
                self._leaving.watch(request, now_s)
        if tenant is not None:
            tenant.enter(request.callers, now_s)
        self.counters.accepted += request.callers
        if request.rows <= self.max_batch_size:
            group = self._queue.push(request)
            lane = self._lanes.next_lane()
            if lane is not None and (group.rows >= self._queue.full_rows or not lane.running):
                self._scheduler.on_enqueued(group, request, lane)
            return
        request.parts = list(self._leaving.cut(request))
        request.state = State.QUEUED
        for part in request.parts:
            part.enqueued_s = request.enqueued_s
            self._queue.push(part)
        self._scheduler.decide_later()

    def _refuse(self, request: Request, why: BatcherError | None) -> None:
        """Count and raise the reason for not accepting it, if there is one."""
        if why is None:
            return
        # The members of a bundle are tried again, and counted, one by one.
        if not isinstance(request, Bundle):
            self.counters.refused += request.callers
            self.counters.refusals[why.reason] += request.callers
            if request.tenant is not None:
                request.tenant.usage.refused += request.callers
        raise why

    def cancel(self, request: Request) -> None:
        """The caller does not want the answer any more. Harmless when it is already finished."""
        self._leaving.cancel(request)

    # The end

    async def drain(self, timeout_s: float) -> bool:
        """Accept nothing more and answer what was accepted.

        False if that took longer than `timeout_s`: whatever was not answered by then was answered with
        `AbandonedError`, and what still runs is left to the engine.
        """
        return await self._ending.drain(timeout_s)

    def use(self, worker: BatchWorker) -> None:
        """Another engine, in place of one that hung or died; what waits goes on."""
        self._ending.use(worker)

    def gone(self, error: EngineError) -> None:
        """No other engine can be opened in place of one that hung or died."""
        self._ending.gone(error)
