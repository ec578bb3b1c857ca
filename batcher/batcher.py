"""The batcher: admits requests, sends batches to the worker, hands the rows of each batch back.

One per model, living on one event loop; every method runs there. The decisions are the policy's
(`batcher.policy`), the order is the queue's (`batcher.queue`); this file carries them out.

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
import secrets
import time
from collections import deque
from collections.abc import Callable
from typing import Protocol

from batcher.cost import efficient_rows
from batcher.counters import Counters
from batcher.errors import (
    AbandonedError,
    BatcherError,
    BatchFailedError,
    DrainingError,
    EngineGoneError,
    ExpiredError,
    QueueFullError,
    TooManyRowsError,
)
from batcher.packing import pack
from batcher.policy import RETRY, Dispatch, Limits, WaitUntil, decide
from batcher.queue import Group, RequestQueue
from batcher.request import Batch, Request, State
from batcher.split import Part, cut, join
from engines.base import Engine
from engines.errors import EngineDeadError, EngineError
from engines.worker import Deliver, Job, Outcome

log = logging.getLogger("cobatch.batcher")

# How many more iterations of the loop a batch may grow by while each brings someone new.
_SETTLE_ITERATIONS = 6
# How fast the estimate of the time per row follows the engine: weight of the newest batch.
_DRAIN_WEIGHT = 0.2


class BatchWorker(Protocol):
    """What the batcher needs of `engines.worker.Worker`."""

    deliver: Deliver | None
    warmup_us: dict[int, float]

    @property
    def engine(self) -> Engine: ...

    def submit(self, job: Job) -> None: ...


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
        loop: asyncio.AbstractEventLoop,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        engine = worker.engine
        self.name = name
        self.max_batch_size = engine.max_batch_size
        self.max_queue_rows = max_queue_rows
        self.limits = Limits(
            full_rows=efficient_rows(worker.warmup_us, engine.max_batch_size),
            max_delay_s=max_delay_ms / 1000,
            slots=engine.slots,
        )
        self.counters = Counters()
        self.closed: BatcherError | None = None
        self._engine = engine
        self._worker = worker
        self._loop = loop
        self._clock = clock
        self._queue = RequestQueue()
        self._retries: deque[list[Request]] = deque()
        self._free_slots = list(range(engine.slots))
        self._running: set[Batch] = set()
        self._decide_soon = False
        self._seen = 0
        self._timer: asyncio.TimerHandle | None = None
        rows, run_us = min(worker.warmup_us.items(), default=(1, 1000.0))
        self._row_s = run_us / rows / 1e6
        self._drained: asyncio.Future[None] | None = None
        worker.deliver = self._deliver

    # Admission

    @property
    def queued_rows(self) -> int:
        """Rows accepted and not yet sent to the engine."""
        return self._queue.rows

    @property
    def running_batches(self) -> int:
        """Batches that are with the engine."""
        return len(self._running)

    @property
    def full(self) -> bool:
        """Whether not even one row would be accepted now."""
        return self._queue.rows >= self.max_queue_rows or self.closed is not None

    def refusal(self, rows: int = 1) -> BatcherError | None:
        """Why a request of so many rows would not be accepted now, or None."""
        if self.closed is None and self._queue.rows + rows <= self.max_queue_rows:
            return None
        return self._why_not(rows)

    def _why_not(self, rows: int) -> BatcherError:
        if self.closed is not None:
            return self.closed
        if rows > self.max_queue_rows:
            return TooManyRowsError(rows, self.max_queue_rows)
        return QueueFullError(self._queue.rows, self.max_queue_rows, self.drain_s)

    @property
    def drain_s(self) -> float:
        """Estimated seconds until what is queued now will have left, at the current pace."""
        return self._queue.rows * self._row_s

    def submit(self, request: Request) -> None:
        """Queue a request. Raises what `refusal` says; then `request.done` is never called.

        The request's payloads must stay unchanged until it is done or cancelled.
        """
        if self.closed is not None or self._queue.rows + request.rows > self.max_queue_rows:
            self.counters.refused += 1
            raise self._why_not(request.rows)
        self.counters.accepted += 1
        request.enqueued_s = self._clock()
        if request.timeout_s is not None:
            request.expiry = self._loop.call_later(request.timeout_s, self._expire, request)
        if request.rows <= self.max_batch_size:
            group = self._queue.push(request)
            if self._free_slots and (group.rows >= self.limits.full_rows or not self._running):
                self._decide_later()
            return
        request.parts = list(self._cut(request))
        request.state = State.QUEUED
        for part in request.parts:
            part.enqueued_s = request.enqueued_s
            self._queue.push(part)
        self._decide_later()

    def cancel(self, request: Request) -> None:
        """The caller does not want the answer any more. Harmless when it is already finished."""
        if request.state not in (State.QUEUED, State.RUNNING):
            return
        self.counters.cancelled += 1
        if request.expiry is not None:
            request.expiry.cancel()
        self._withdraw(request)
        if request.parts is not None:
            self._let_go(request.parts)
        self._check_drained()

    def _expire(self, request: Request) -> None:
        """Its time is over: out of the queue. What already runs is answered, late or not."""
        parts = request.parts or [request]
        queued = [part for part in parts if part.state is State.QUEUED]
        if request.state is not State.QUEUED or not queued:
            return
        assert request.timeout_s is not None
        error = ExpiredError(request.timeout_s)
        self.counters.expired += 1
        if request.partial and len(queued) < len(parts):
            for part in queued:
                self._queue.cancel(part)
                self._fail(part, error)
        else:
            self._withdraw(request)
            self._fail(request, error)
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

        def part_done(part: Part) -> None:
            nonlocal unanswered
            unanswered -= 1
            if request.state in (State.DONE, State.CANCELLED):
                return
            if part.error is not None and not request.partial:
                self._withdraw(request)
                self._fail(request, part.error)
            elif unanswered == 0:
                self._join(request, parts)

        parts = cut(request, self.max_batch_size, part_done)
        return parts

    def _join(self, request: Request, parts: list[Part]) -> None:
        first_error = next((part.error for part in parts if part.error is not None), None)
        if first_error is not None and all(part.error is not None for part in parts):
            self._fail(request, first_error)
            return
        try:
            join(request, parts)
        except ValueError as error:
            self._fail_run(request, f"parts do not fit together: {error}")
        else:
            self._finish(request)

    def _let_go(self, parts: list[Request]) -> None:
        """Parts know their whole and it them: undo that, and do not keep their outputs."""
        for part in parts:
            assert isinstance(part, Part)
            part.on_done = _nobody
            part.outputs = ()

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
        if arriving and iterations and self._queue.rows < self.limits.full_rows:
            self._seen = self.counters.accepted
            self._loop.call_soon(self._settle, iterations - 1)
        else:
            self._decide()

    def _decide(self) -> None:
        self._decide_soon = False
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        while True:
            if self._retries and self._free_slots:
                self._retry(self._retries.popleft())
                continue
            decision = decide(
                self._queue.groups.values(),
                self._clock(),
                self.limits.slots - len(self._free_slots),
                len(self._running),
                self.closed is not None,
                self.limits,
            )
            if isinstance(decision, Dispatch):
                self._dispatch(decision)
                continue
            if isinstance(decision, WaitUntil):
                delay_s = max(0.0, decision.time_s - self._clock())
                self._timer = self._loop.call_later(delay_s, self._decide)
            return

    def _dispatch(self, decision: Dispatch[Group]) -> None:
        self._send(self._queue.take(decision.group, self.limits.full_rows), decision.reason)

    def _retry(self, requests: list[Request]) -> None:
        wanted = [request for request in requests if request.state is State.RUNNING]
        if wanted:
            self.counters.retries += 1
            self._send(wanted, RETRY)
        else:
            self._check_drained()

    def _send(self, requests: list[Request], reason: str) -> None:
        row_shapes = requests[0].row_shapes
        batch = Batch(requests, sum([request.rows for request in requests]), row_shapes, reason)
        slot = self._free_slots.pop()
        self._running.add(batch)
        batch.gathered_s = self._clock()
        try:
            pack(requests, self._engine.inputs(slot, batch.rows, row_shapes))
        except Exception as error:
            # Nothing was sent, so the batch fails here, like one that the engine refused.
            log.exception("model %s: packing a batch failed", self.name)
            job = Job(slot, batch.rows, row_shapes, batch)
            outcome = Outcome(None, EngineError(f"packing failed: {error!r}"), self._clock(), self._clock())
            self._loop.call_soon(self._on_outcome, job, outcome)
            return
        batch.dispatched_s = self._clock()
        self._worker.submit(Job(slot, batch.rows, row_shapes, batch))

    # Delivery

    def _deliver(self, job: Job, outcome: Outcome) -> None:
        """Called on the worker's thread: the one place where a thread calls into the loop."""
        try:
            self._loop.call_soon_threadsafe(self._on_outcome, job, outcome)
        except RuntimeError:
            log.warning("model %s: a batch came back after the event loop was closed", self.name)

    def _on_outcome(self, job: Job, outcome: Outcome) -> None:
        batch = job.context
        assert isinstance(batch, Batch)
        self._running.discard(batch)
        batch.started_s = outcome.started_s
        batch.finished_s = outcome.finished_s
        if outcome.error is not None:
            self._on_error(batch, outcome.error)
        else:
            assert outcome.outputs is not None
            batch.outputs = outcome.outputs
            self._row_s += _DRAIN_WEIGHT * ((batch.finished_s - batch.started_s) / batch.rows - self._row_s)
            # First the engine's next batch, then this one's answers: writing them takes time.
            self._decide()
            began_s = self._clock()
            self._hand_out(batch)
            self.counters.batch(batch, self._clock() - began_s)
            # Whoever keeps the batch must not keep the outputs, and batch and requests not each other.
            batch.outputs = ()
            batch.memo = {}
            batch.requests = []
        self._free_slots.append(job.slot)
        self._decide()
        self._check_drained()

    def _hand_out(self, batch: Batch) -> None:
        for request in batch.requests:
            if request.state is State.RUNNING:
                request.state = State.DONE
                request.batch = batch
                self._finish(request)

    def _finish(self, request: Request) -> None:
        if request.expiry is not None:
            request.expiry.cancel()
        try:
            request.done()
        except Exception:
            # One caller's trouble must not cost the others in its batch their answers.
            log.exception("model %s: handing an answer to its caller failed", self.name)
        if request.parts is not None:
            self._let_go(request.parts)

    def _fail(self, request: Request, error: Exception) -> None:
        request.state = State.DONE
        request.error = error
        if not isinstance(request, Part):
            self.counters.failed += 1
        self.counters.failed_s += self._clock() - request.enqueued_s
        self._finish(request)

    def _on_error(self, batch: Batch, error: EngineError) -> None:
        requests = [request for request in batch.requests if request.state is State.RUNNING]
        self.counters.failed_runs += 1
        if isinstance(error, EngineDeadError):
            self._on_engine_dead(requests, error)
        elif len(batch.requests) > 1:
            # Also with one left: what failed may have been the rows of somebody who is gone by now.
            half = len(requests) // 2
            self._retries.extendleft(part for part in (requests[half:], requests[:half]) if part)
        elif requests:
            self._fail_run(requests[0], str(error))

    def _fail_run(self, request: Request, why: str) -> None:
        """The caller gets a reference, the log gets it beside the engine's words."""
        reference = secrets.token_hex(8)
        log.error("model %s: a run failed (reference %s): %s", self.name, reference, why)
        self._fail(request, BatchFailedError(self.name, reference))

    def _on_engine_dead(self, requests: list[Request], error: EngineError) -> None:
        reference = secrets.token_hex(8)
        log.critical("model %s: the engine is dead (reference %s): %s", self.name, reference, error)
        self.closed = EngineGoneError(self.name, reference)
        self._fail_all(requests, self.closed)

    def _fail_all(self, requests: list[Request], error: Exception) -> None:
        waiting = [request for retry in self._retries for request in retry] + self._queue.take_all()
        self._retries.clear()
        for request in requests + waiting:
            if request.state is State.RUNNING:
                self._fail(request, error)

    # The end

    async def drain(self, timeout_s: float) -> bool:
        """Accept nothing more and answer what was accepted.

        False if that took longer than `timeout_s`: whatever was not answered by then was answered with
        `AbandonedError`, and what still runs is left to the engine.
        """
        if self.closed is None:
            self.closed = DrainingError(f"model {self.name!r} is about to stop")
        self._drained = self._loop.create_future()
        self._decide()
        self._check_drained()
        try:
            await asyncio.wait_for(self._drained, timeout_s)
        except TimeoutError:
            self._abandon(timeout_s)
            return False
        return True

    def _abandon(self, timeout_s: float) -> None:
        running = [request for batch in self._running for request in batch.requests]
        failed = self.counters.failed
        late = AbandonedError(f"model {self.name!r} stopped before the request was done")
        self._fail_all(running, late)
        abandoned = self.counters.failed - failed
        log.error("model %s: %d requests were not done within %g s", self.name, abandoned, timeout_s)

    def _check_drained(self) -> None:
        if self._drained is None or self._drained.done():
            return
        # A batch that runs for nobody is not waited for: its callers left or were answered already.
        sent = [*self._retries, *(batch.requests for batch in self._running)]
        if not self._queue.rows and not any(r.state is State.RUNNING for requests in sent for r in requests):
            self._drained.set_result(None)


def _nobody(part: Part) -> None:
    """Who hears of a part whose whole is answered already."""
