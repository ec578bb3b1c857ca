"""The batcher: admits requests, sends batches to the workers, hands the rows of each batch back.

One per model, living on one event loop; every method runs there. The decisions are the policy's
(`batcher.policy`), the order is the queue's (`batcher.queue`), the way to the engine and back is the
dispatcher's (`batcher.dispatcher`); this file lets requests in, and brings the three together.

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

from batcher.admission import Admission
from batcher.answers import Answers
from batcher.counters import Counters
from batcher.dispatcher import Dispatcher
from batcher.ending import Ending
from batcher.errors import BatcherError
from batcher.lane import BatchWorker, Lane
from batcher.latency import Arrivals, LatencyModel
from batcher.leaving import Leaving
from batcher.padding import Padder
from batcher.policy import DEADLINE, LEAD_S, Dispatch, Limits, Now, WaitUntil, decide
from batcher.queue import Group, RequestQueue
from batcher.request import Batch, Request, State
from batcher.returns import Returns
from batcher.shapes import ShapeTimes
from batcher.taking import Plan
from batcher.tenant import Tenant
from engines.errors import EngineError

# How many more iterations of the loop a batch may grow by while each brings someone new.
_SETTLE_ITERATIONS = 6
# After so many lone requests the next does not wait for that iteration either, where a run is so short that
# somebody right behind it loses next to nothing.
_ALONE = 16
_SHORT_RUN_S = 0.0002
# Only for a run of this length can it pay to wait for those who have just been answered: they take about a
# millisecond to come back.
_LONG_RUN_S = 0.001


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
        self._times = ShapeTimes(self.latency, vary=vary)
        self._latency_target_s = math.inf if latency_target_ms is None else latency_target_ms / 1000
        self._has_deadlines = deadline_ms is not None
        self.counters = Counters(padder)
        self._padder = padder
        self._loop = loop
        self._clock = clock
        self._queue = RequestQueue(
            1, self.latency.row_s, ages=max_delay_ms > 0, run_s=self.latency.expected_s
        )
        self._learn()
        self._admission = Admission(
            self._queue,
            self.latency,
            self._times,
            max_batch_size=engine.max_batch_size,
            max_queue_rows=max_queue_rows,
            deadline_ms=deadline_ms,
            now_s=clock(),
        )
        self._admission.lanes = len(workers)
        self._arrivals = Arrivals(clock())
        self._answers = Answers(name, self.counters, clock)
        self._ending = Ending(
            name,
            self._queue,
            self._admission,
            self._answers,
            self.counters,
            loop,
            decide=self._decide,
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
        self._dispatcher = Dispatcher(
            workers,
            self._answers,
            self.counters,
            loop,
            clock,
            times=self._times,
            decide=self._decide,
            on_dead=self._ending.on_dead,
            on_idle=self._on_idle,
            on_ran=self._on_ran,
            on_hung=self._ending.on_hung,
            on_late=self._leaving.fail_late,
            execution_timeout_s=None if execution_timeout_ms is None else execution_timeout_ms / 1000,
        )
        self._ending.dispatcher = self._dispatcher
        self._lost = 0  # requests for want of time, when a batch was last made up
        self._moment = Now(0.0, 0, 0, 0.0)
        self._returns = Returns()
        self._waits = False  # for those who have just been answered
        self._alone = 0  # so many batches in a row were of one request with none behind it
        self._decide_soon = False
        self._seen = 0
        self._timer: asyncio.TimerHandle | None = None

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
        return self._dispatcher.running

    def open_requests(self) -> tuple[dict[int, int], int]:
        """For who watches: queued rows by priority, and how many requests are not answered yet."""
        queued = self._queue.waiting()
        rows: dict[int, int] = {}
        for request in queued:
            rows[request.level] = rows.get(request.level, 0) + request.rows
        return rows, sum([request.callers for request in [*queued, *self._dispatcher.awaited()]])

    @property
    def all_lanes(self) -> list[Lane]:
        """Engines that can run something, each with what it has."""
        return self._dispatcher.lanes

    def watch_batches(self, on_batch: Callable[[Batch], None] | None) -> None:
        """Tell of each batch that is over; see `Dispatcher`. None: nobody any more."""
        self._dispatcher.on_batch = on_batch

    @property
    def lanes(self) -> int:
        """Engines that can run something: none while one that hung is being replaced."""
        return len(self._dispatcher.lanes)

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

    def submit(self, request: Request, *, counts: bool = True) -> None:
        """Queue a request. Raises what `refusal` says; then `request.done` is never called.

        `counts`: whether a refusal is what its callers are told, and counted; not where each of them will be
        tried by itself.

        The request's payloads must stay unchanged until it is done or cancelled.
        """
        request.enqueued_s = now_s = self._clock()
        admission, tenant = self._admission, request.tenant
        if self._padder is not None:
            self._refuse(request, self._padder.assign(request), counts)
        full = self._queue.rows >= admission.max_queue_rows or admission.closed is not None
        if full or tenant is not None or request.rows > 1:
            why = admission.refusal(request.rows, tenant, request.callers, now_s)
            self._refuse(request, why, counts)
        if request.timeout_s is not None or self._has_deadlines:
            why = admission.set_deadline(request, now_s, self._dispatcher.free_s, self._dispatcher.around_s)
            self._refuse(request, why, counts)
            if request.deadline_s < math.inf:
                self._leaving.watch(request, now_s)
        if tenant is not None:
            tenant.enter(request.callers, now_s)
        self.counters.accepted += request.callers
        if request.rows <= self.max_batch_size:
            group = self._queue.push(request)
            lane = self._dispatcher.next_lane()
            if lane is not None and (group.rows >= self._queue.full_rows or not lane.running):
                if self._waits and group.rows < self._moment.company_rows and request.timeout_s is None:
                    pass  # it is decided when they are all there, or when the time for that is over
                elif self._alone < _ALONE or lane.running or self._decide_soon or self._queue.deadlines:
                    self._decide_later()
                else:
                    self._decide()
            return
        request.parts = list(self._leaving.cut(request))
        request.state = State.QUEUED
        for part in request.parts:
            part.enqueued_s = request.enqueued_s
            self._queue.push(part)
        self._decide_later()

    def _refuse(self, request: Request, why: BatcherError | None, counts: bool) -> None:
        """Count and raise the reason for not accepting it, if there is one."""
        if why is None:
            return
        if counts:
            self.counters.refused += request.callers
            self.counters.refusals[why.reason] += request.callers
            if request.tenant is not None:
                request.tenant.figures.refused += request.callers
        raise why

    def run_again(self, requests: list[Request], enqueued_s: float) -> None:
        """Run rows that were accepted, in one request that failed, as requests of their own.

        They are alike in shape and fit one batch. What was accepted is not asked for room again.
        """
        for request in requests:
            request.state = State.RUNNING
            request.enqueued_s = enqueued_s
            if request.tenant is not None:
                request.tenant.open_requests += request.callers
        self._dispatcher.retries.append(requests)
        self._decide_later()

    def cancel(self, request: Request) -> None:
        """The caller does not want the answer any more. Harmless when it is already finished."""
        self._leaving.cancel(request)

    # Decision and dispatch

    def _decide_later(self) -> None:
        if not self._decide_soon:
            self._decide_soon = True
            self._seen = self.counters.accepted
            self._loop.call_soon(self._settle, _SETTLE_ITERATIONS)

    def _settle(self, iterations: int) -> None:
        """Decide once an iteration of the loop has brought nobody new.

        While sockets are being read one after another, the next request is microseconds away and the
        loop has nothing better to do than to read it; a batch that leaves in between costs a wake-up
        of the worker, two hand-overs of the interpreter lock and a callback, about as much as ten
        requests. Never waits for time to pass: a lone request leaves in the next iteration.
        """
        arriving = self.counters.accepted != self._seen
        if arriving and iterations and self._queue.rows < self._queue.full_rows:
            self._seen = self.counters.accepted
            self._loop.call_soon(self._settle, iterations - 1)
        else:
            self._decide()

    def _decide(self) -> None:
        self._decide_soon = self._waits = False
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        dispatcher = self._dispatcher
        while True:
            lane = dispatcher.next_lane()
            if lane is None:
                break
            if dispatcher.retries:
                dispatcher.send_retry(lane)
                continue
            if not self._queue.rows:
                break
            decision = decide(self._queue, self._now(lane), self.limits)
            if isinstance(decision, Dispatch):
                self._send(lane, decision.group, decision.reason)
                continue
            if isinstance(decision, WaitUntil):
                self._waits = self._moment.company_rows > 0
                delay_s = max(0.0, decision.time_s - self._clock())
                self._timer = self._loop.call_later(delay_s, self._decide)
            break
        if self._admission.closed is not None:
            self._ending.check_drained()

    def _now(self, lane: Lane) -> Now:
        # One object, filled anew each time: there is a decision for every batch, and often two.
        now = self._moment
        now.time_s = self._clock()
        now.in_slots = lane.in_slots
        now.running = len(lane.running)
        now.free_s = lane.free_s
        now.draining = self._admission.closed is not None
        if self.limits.max_delay_s > 0 or self._queue.deadlines:
            # Early enough for a timer that is late: when only the run is left, a request is taken out.
            times = self._times.of(self._queue.next_group.row_shapes)
            now.run_s = times.high_s(min(self._queue.rows, self._queue.full_rows)) + LEAD_S
        if self.limits.max_delay_s > 0:
            now.rows_per_s = self._arrivals.rate(now.time_s, self.counters.accepted)
        return now

    def _send(self, lane: Lane, group: Group, reason: str) -> None:
        """Take a batch of the group and send it, if anybody in it can still be in time."""
        queue = self._queue
        most, plan = queue.full_rows, None
        if queue.deadlines:
            counters = self.counters
            lost = counters.expired + counters.refusals["deadline"]
            times = self._times.of(group.row_shapes)
            plan = Plan(max(self._clock(), lane.free_s), times, lost != self._lost)
            self._lost = lost
            if plan.crowded and self._latency_target_s == math.inf:
                most = self.latency.crowded_rows
        taken = queue.take(group, most, plan)
        if taken.requests:
            alone = self._prompt and plan is None and len(taken.requests) == 1 and not queue.rows
            self._alone = self._alone + 1 if alone else 0
            if self._slow:
                self._returns.left(taken.requests)
                self._moment.company_rows = 0
                self._waits = False
            self._dispatcher.send(lane, taken.requests, DEADLINE if taken.capped else reason, taken.shares)
        for request in taken.late:
            self._leaving.fail_late(request)

    def _on_idle(self, lane: Lane, batch: Batch) -> bool:
        """A batch has ended. Whether others wait: then the engine has been given some of them."""
        if self._slow:
            self._expect_back(lane, batch)
        if not self._queue.rows and not self._dispatcher.retries:
            return False
        self._on_ran(batch)
        self._decide()
        return True

    def _expect_back(self, lane: Lane, batch: Batch) -> None:
        """Those whom it answers may soon be back, and then it may pay to wait for them. With several engines
        some are back while others run."""
        if len(self._dispatcher.lanes) > 1:
            return
        now_s = self._clock()
        self._returns.ended(now_s, len(batch.requests))
        if not lane.running and not self.limits.max_delay_s:
            company = self._returns.company(self._queue.rows, self._queue.full_rows, self.latency)
            if company is not None:
                self._moment.company_rows, wait_s = company
                self._moment.company_by_s = now_s + wait_s

    def _on_ran(self, batch: Batch) -> None:
        run_s = batch.finished_s - batch.started_s
        self._queue.settle(batch.shares, run_s, batch.rows)
        if self._times.observe(batch.row_shapes, batch.rows, run_s, batch.finished_s):
            self._learn()

    def _learn(self) -> None:
        """Let the queue know what the latency model has come to."""
        most = self.latency.full_rows
        if self._latency_target_s < math.inf:
            # While a batch runs the next one gathers: a request waits for one and rides in one.
            most = max(1, self.latency.most_rows(self._latency_target_s / 2, most))
        self._queue.full_rows = most
        self._queue.row_s = self.latency.row_s
        self._prompt = self.latency.expected_s(1) <= _SHORT_RUN_S
        self._slow = self.latency.expected_s(most) >= _LONG_RUN_S

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
