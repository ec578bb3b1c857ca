"""The batcher: admits requests, sends batches to the worker, hands the rows of each batch back.

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
import logging
import math
import time
from collections.abc import Callable

from batcher.admission import Admission
from batcher.answers import Answers
from batcher.counters import Counters
from batcher.dispatcher import BatchWorker, Dispatcher
from batcher.errors import (
    AbandonedError,
    BatcherError,
    DrainingError,
    EngineGoneError,
    ExecutionTimeoutError,
    ExpiredError,
)
from batcher.latency import Arrivals, LatencyModel
from batcher.padding import Padder
from batcher.policy import DEADLINE, LEAD_S, Dispatch, Limits, Now, WaitUntil, decide
from batcher.queue import Group, Plan, RequestQueue
from batcher.request import Batch, Request, State
from batcher.split import Part, cut, join, let_go
from batcher.tenant import Tenant
from engines.errors import EngineError

log = logging.getLogger("cobatch.batcher")

# How many more iterations of the loop a batch may grow by while each brings someone new.
_SETTLE_ITERATIONS = 6
# Sums of times are not exact.
_ROUNDING_S = 1e-6


class Batcher:
    """Gathers the requests for one model into batches for one opened worker.

    `max_queue_rows` bounds what is queued, in rows, not counting what already runs. `clock` gives
    seconds and must be monotonic. It is not `loop.time` because uvloop rounds that to milliseconds
    and stops it during an iteration; on asyncio's own loops the two are the same clock.
    """

    def __init__(
        self,
        name: str,
        worker: BatchWorker,
        *,
        max_queue_rows: int,
        max_delay_ms: float = 0.0,
        latency_target_ms: float | None = None,
        deadline_ms: float | None = None,
        execution_timeout_ms: float | None = None,
        on_hung: Callable[[], None] | None = None,
        on_died: Callable[[], None] | None = None,
        padder: Padder | None = None,
        loop: asyncio.AbstractEventLoop,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        engine = worker.engine
        self.name = name
        self.max_batch_size = engine.max_batch_size
        self.limits = Limits(max_delay_s=max_delay_ms / 1000, slots=engine.slots)
        self.latency = LatencyModel(engine.max_batch_size, worker.warmup_us)
        self._latency_target_s = math.inf if latency_target_ms is None else latency_target_ms / 1000
        self._has_deadlines = deadline_ms is not None
        self.counters = Counters(padder)
        self._padder = padder
        self._loop = loop
        self._clock = clock
        self._queue = RequestQueue(1, self.latency.row_s, ages=max_delay_ms > 0)
        self._learn()
        self._admission = Admission(
            self._queue,
            self.latency,
            max_batch_size=engine.max_batch_size,
            max_queue_rows=max_queue_rows,
            deadline_ms=deadline_ms,
        )
        self._arrivals = Arrivals(clock())
        self._answers = Answers(name, self.counters, clock)
        self._dispatcher = Dispatcher(
            worker,
            self._answers,
            self.counters,
            loop,
            clock,
            latency=self.latency,
            decide=self._decide,
            on_dead=self._on_engine_died,
            on_ran=self._on_ran,
            on_hung=self._on_engine_hung,
            execution_timeout_s=None if execution_timeout_ms is None else execution_timeout_ms / 1000,
        )
        self.hung = False
        self._lost = 0  # requests for want of time, when a batch was last made up
        self._reopen = on_hung
        self._on_died = on_died
        self._moment = Now(0.0, 0, 0, 0.0)
        self._decide_soon = False
        self._seen = 0
        self._timer: asyncio.TimerHandle | None = None
        self._drained: asyncio.Future[None] | None = None

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
        return len(self._dispatcher.running)

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
        if self.full or tenant is not None or request.rows > 1:
            self._refuse(request, admission.refusal(request.rows, tenant, request.callers, now_s))
        if request.timeout_s is not None or self._has_deadlines:
            self._refuse(request, admission.set_deadline(request, now_s, self._dispatcher.free_s))
            slack_s = self._slack_s(request, request.rows, now_s)
            request.expiry = self._loop.call_later(slack_s, self._expire, request)
        if tenant is not None:
            tenant.enter(request.callers, now_s)
        self.counters.accepted += request.callers
        if request.rows <= self.max_batch_size:
            group = self._queue.push(request)
            dispatcher = self._dispatcher
            if dispatcher.free_slots and (group.rows >= self._queue.full_rows or not dispatcher.running):
                self._decide_later()
            return
        request.parts = list(self._cut(request))
        request.state = State.QUEUED
        for part in request.parts:
            part.enqueued_s = request.enqueued_s
            self._queue.push(part)
        self._decide_later()

    def _refuse(self, request: Request, why: BatcherError | None) -> None:
        """Count and raise the reason for not accepting it, if there is one."""
        if why is not None:
            self.counters.refused += request.callers
            self.counters.refusals[why.reason] += request.callers
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
        if request.state not in (State.QUEUED, State.RUNNING):
            return
        self.counters.cancelled += request.callers
        if request.tenant is not None:
            request.tenant.open_requests -= request.callers
        if request.expiry is not None:
            request.expiry.cancel()
        self._withdraw(request)
        if request.parts is not None:
            let_go(request.parts)
        self._check_drained()

    def _slack_s(self, request: Request, rows: int, now_s: float) -> float:
        """How long so many rows of a request may still wait. Where some may be missing from its answer, it
        is worth it as long as one batch of them can be run."""
        if request.partial:
            rows = min(rows, self.max_batch_size)
        return request.deadline_s - self._admission.run_s(rows) - now_s

    def _expire(self, request: Request) -> None:
        """Its time is over: out of the queue. What already runs is answered, late or not."""
        parts = request.parts or [request]
        queued = [part for part in parts if part.state is State.QUEUED]
        if request.state is not State.QUEUED or not queued:
            return
        slack_s = self._slack_s(request, sum([part.rows for part in queued]), self._clock())
        if slack_s > _ROUNDING_S:
            # Parts have left the queue since this was planned, or runs have become faster.
            request.expiry = self._loop.call_later(slack_s, self._expire, request)
            return
        assert request.timeout_s is not None
        error = ExpiredError(request.timeout_s)
        if request.partial and len(queued) < len(parts):
            for part in queued:
                self._queue.cancel(part)
                self._answers.fail(part, error)
        else:
            self.counters.expired += request.callers
            self._withdraw(request)
            self._answers.fail(request, error)
        self._check_drained()

    def _withdraw(self, request: Request) -> None:
        if request.parts is not None:
            for part in request.parts:
                if part.state in (State.QUEUED, State.RUNNING):
                    self._withdraw(part)
        elif request.state is State.QUEUED:
            self._queue.cancel(request)
        # Running rows cannot be taken out of the batch; `_hand_out` passes over them.
        request.state = State.CANCELLED

    def _cut(self, request: Request) -> list[Part]:
        unanswered = math.ceil(request.rows / self.max_batch_size)
        expired = False

        def part_done(part: Part) -> None:
            nonlocal unanswered, expired
            unanswered -= 1
            if request.state in (State.DONE, State.CANCELLED):
                return
            if not expired and isinstance(part.error, ExpiredError):
                expired = True
                self.counters.expired += request.callers
            if part.error is not None and not request.partial:
                self._withdraw(request)
                self._answers.fail(request, part.error)
            elif unanswered == 0:
                self._join(request, parts)

        parts = cut(request, self.max_batch_size, part_done)
        return parts

    def _join(self, request: Request, parts: list[Part]) -> None:
        first_error = next((part.error for part in parts if part.error is not None), None)
        if first_error is not None and all(part.error is not None for part in parts):
            self._answers.fail(request, first_error)
            return
        try:
            join(request, parts)
        except Exception as error:  # noqa: BLE001 - whatever it is, the caller must hear of it
            self._answers.fail_run(request, f"its parts cannot be put together: {error!r}")
        else:
            self._answers.finish(request)

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
        self._decide_soon = False
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        dispatcher = self._dispatcher
        while dispatcher.free_slots:
            if dispatcher.retries:
                dispatcher.send_retry()
                continue
            if not self._queue.rows:
                break
            decision = decide(self._queue, self._now(), self.limits)
            if isinstance(decision, Dispatch):
                self._send(decision.group, decision.reason)
                continue
            if isinstance(decision, WaitUntil):
                delay_s = max(0.0, decision.time_s - self._clock())
                self._timer = self._loop.call_later(delay_s, self._decide)
            break
        self._check_drained()

    def _now(self) -> Now:
        dispatcher = self._dispatcher
        # One object, filled anew each time: there is a decision for every batch, and often two.
        now = self._moment
        now.time_s = self._clock()
        now.in_slots = dispatcher.in_slots
        now.running = len(dispatcher.running)
        now.free_s = dispatcher.free_s
        now.draining = self._admission.closed is not None
        if self.limits.max_delay_s > 0:
            # Early enough for a timer that is late: when only the run is left, a request is taken out.
            now.run_s = self.latency.high_s(min(self._queue.rows, self._queue.full_rows)) + LEAD_S
            now.rows_per_s = self._arrivals.rate(now.time_s, self.counters.accepted)
        return now

    def _send(self, group: Group, reason: str) -> None:
        """Take a batch of the group and send it, if anybody in it can still be in time."""
        queue = self._queue
        plan = None
        if queue.deadlines:
            counters = self.counters
            lost = counters.expired + counters.refusals["deadline"]
            plan = Plan(max(self._clock(), self._dispatcher.free_s), self.latency, lost != self._lost)
            self._lost = lost
        taken = queue.take(group, queue.full_rows, plan)
        if taken.requests:
            self._dispatcher.send(taken.requests, DEADLINE if taken.capped else reason, taken.shares)
        for request in taken.late:
            self._fail_late(request)

    def _fail_late(self, request: Request) -> None:
        """It is out of the queue, because it cannot be in time any more."""
        assert request.timeout_s is not None
        if not isinstance(request, Part):
            self.counters.expired += request.callers
        self._answers.fail(request, ExpiredError(request.timeout_s))

    def _on_ran(self, batch: Batch) -> None:
        run_s = batch.finished_s - batch.started_s
        self._queue.settle(batch.shares, run_s, batch.rows)
        if self.latency.observe(batch.rows, run_s, batch.finished_s):
            self._learn()

    def _learn(self) -> None:
        """Let the queue know what the latency model has come to."""
        most = self.latency.full_rows
        if self._latency_target_s < math.inf:
            # While a batch runs the next one gathers: a request waits for one and rides in one.
            most = max(1, self.latency.most_rows(self._latency_target_s / 2, most))
        self._queue.full_rows = most
        self._queue.row_s = self.latency.row_s

    # The end

    async def drain(self, timeout_s: float) -> bool:
        """Accept nothing more and answer what was accepted.

        False if that took longer than `timeout_s`: whatever was not answered by then was answered with
        `AbandonedError`, and what still runs is left to the engine.
        """
        if self.closed is None:
            self._admission.closed = DrainingError(f"model {self.name!r} is about to stop")
        self._drained = self._loop.create_future()
        self._decide()
        try:
            await asyncio.wait_for(self._drained, timeout_s)
        except TimeoutError:
            self._abandon(timeout_s)
            return False
        return True

    def _abandon(self, timeout_s: float) -> None:
        failed = self.counters.failed
        self._fail_all(AbandonedError(f"model {self.name!r} stopped before the request was done"))
        abandoned = self.counters.failed - failed
        log.error("model %s: %d requests were not done within %g s", self.name, abandoned, timeout_s)

    def _on_engine_died(self, error: EngineError) -> None:
        was_open = self.closed is None
        self._on_engine_dead(error)
        if was_open and self._on_died is not None:
            self._on_died()

    def _on_engine_dead(self, error: EngineError) -> None:
        self._admission.closed = gone = self._answers.engine_gone(str(error))
        # What still runs comes back with an error of its own, or with answers after all.
        waiting = [request for retry in self._dispatcher.retries for request in retry]
        self._dispatcher.retries.clear()
        self._answers.fail_all(waiting + self._queue.take_all(), gone)

    def _on_engine_hung(self, batch: Batch, limit_s: float) -> None:
        error = ExecutionTimeoutError(self.name, limit_s)
        log.critical("model %s: a batch of %d rows has not ended: %s", self.name, batch.rows, error)
        self.counters.hung += 1
        self.hung = True
        self._answers.fail_all(batch.requests, error)
        batch.requests = []
        if self._reopen is None or self.closed is not None:
            self._on_engine_dead(EngineError(str(error)))
        else:
            self._reopen()
        self._check_drained()

    def reopened(self, worker: BatchWorker) -> None:
        """Another engine takes the place of one that hung or died; what waited for it goes on."""
        self.hung = False
        if self._drained is None and isinstance(self.closed, EngineGoneError):
            self._admission.closed = None
        self._dispatcher.use(worker)
        self._decide()

    def gone(self, error: EngineError) -> None:
        """There is no engine any more, and there will be none."""
        self._on_engine_dead(error)
        self._check_drained()

    def _fail_all(self, error: Exception) -> None:
        waiting = self._dispatcher.awaited() + self._queue.take_all()
        self._dispatcher.retries.clear()
        self._answers.fail_all(waiting, error)

    def _check_drained(self) -> None:
        if self._drained is None or self._drained.done():
            return
        # A batch that runs for nobody is not waited for: its callers left or were answered already.
        if not self._queue.rows and not self._dispatcher.awaited():
            self._drained.set_result(None)
