"""The batcher: admits requests, sends batches to the workers, hands the rows of each batch back.

One per model, on one event loop, where every method runs. The scheduler (`batcher.scheduling`) decides at
once, given the time; the batcher owns the timers and acts: `batcher.lanes` takes a batch to an engine and
back, `batcher.completion` ends each request.

Guarantees:

* Every request that `submit` accepts ends exactly once: `done` is called with its own rows or with an error,
  or the caller cancelled it. Nothing accepted is lost, whatever the engine, other callers or a raising
  `done` do.
* A cancelled request's rows are not packed, unless they already were.
* A worker calls into the loop once per batch, however many requests it has.
* When a batch comes back and others wait, the engine gets its next one before the answers of this one are
  written, so it does not wait for the encoding.
* A failed batch is run again in halves until the requests that fail alone are found; only those get the
  error. With n requests that is at most 2*log2(n) extra runs for each of them. Their sources ride apart from
  others then (`batcher.scheduling.suspects`). The requests of a batch that ended the engine's process run
  alone, since each run that fails costs a start of the process.
"""

import asyncio
import logging
import math
import time
from collections.abc import Callable, Sequence

from cobatch.batcher.bundle import Bundle
from cobatch.batcher.completion import Completion
from cobatch.batcher.errors import AbandonedError, BatcherError, DrainingError
from cobatch.batcher.lane import BatchWorker, Lane
from cobatch.batcher.lanes import Lanes
from cobatch.batcher.request import Batch, Request
from cobatch.batcher.rows.padding import Padder
from cobatch.batcher.rows.splitting import Part
from cobatch.batcher.scheduling.policy import WaitUntil
from cobatch.batcher.scheduling.scheduler import Dispatch, Scheduler
from cobatch.batcher.scheduling.tuning import SETTLE_ITERATIONS
from cobatch.batcher.statistics import Counters
from cobatch.batcher.tenant import Tenant
from cobatch.engines.errors import EngineEndedError, EngineError

log = logging.getLogger("cobatch.batcher")


class Batcher:
    """Batches the requests of one model for its opened workers, one for each engine.

    `queue` and `admission` are the scheduler's: there is room for a row while `queue.rows` is below
    `admission.open_rows`.
    `max_queue_rows` bounds the queued rows, without those that run. `clock` gives seconds and must be
    monotonic. It is not `loop.time` because uvloop rounds that to milliseconds and stops it during an
    iteration; on asyncio's own loops both are the same clock. `on_lost` is told of each worker whose engine
    died or hung, and why; it opens another one and calls `use`, or else `gone`. If they are not `opened` yet,
    `use` is called for each later.
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
        opened: bool = True,
        loop: asyncio.AbstractEventLoop,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        engine = workers[0].engine
        self.name = name
        self.max_batch_size = engine.max_batch_size
        self.counters = Counters(pads=padder is not None)
        self._padder = padder
        self._loop = loop
        self._clock = clock
        self._scheduler = Scheduler(
            self.counters,
            workers[0].warmup_us,
            max_batch_size=engine.max_batch_size,
            vary=any(spec.row_elements < 0 for spec in engine.signature.inputs),
            max_queue_rows=max_queue_rows,
            max_delay_s=max_delay_ms / 1000,
            latency_target_s=None if latency_target_ms is None else latency_target_ms / 1000,
            deadline_s=None if deadline_ms is None else deadline_ms / 1000,
            now_s=clock(),
        )
        self.queue = self._scheduler.queue
        self.admission = self._scheduler.admission
        self._suspects = self._scheduler.suspects
        self._apart = self._suspects.queue
        self._completion = Completion(name, self._scheduler, clock, loop, self.decide)
        self._lanes = Lanes(
            name,
            workers if opened else (),
            self._scheduler,
            self._completion,
            loop,
            clock,
            decide=self.decide,
            recheck=self._recheck,
            on_lost=on_lost,
            padder=padder,
            execution_timeout_s=None if execution_timeout_ms is None else execution_timeout_ms / 1000,
        )
        self._soon = False  # a decision is due in one of the next iterations
        self._seen = 0  # requests accepted when that was last looked at
        self._timer: asyncio.TimerHandle | None = None
        self._wait_rows = 0  # the rows that the engine waits for
        self._drained: asyncio.Future[None] | None = None

    # State

    @property
    def expected_run_s(self) -> float:
        """The predicted run time of a full batch."""
        return self._scheduler.run_times.expected_s(self.queue.full_rows)

    @property
    def suspects(self) -> int:
        """The number of sources that ride apart from others, because rows of theirs have failed."""
        return len(self._suspects.marks)

    @property
    def running_batches(self) -> int:
        """Batches that are with an engine."""
        return self._lanes.running

    @property
    def lanes(self) -> list[Lane]:
        """The engines that can run a batch: none while a single one is being replaced."""
        return self._lanes.lanes

    def open_requests(self) -> tuple[dict[int, int], int]:
        """Return the queued rows by priority, and the number of requests that are not answered yet."""
        queued = self._scheduler.waiting()
        rows: dict[int, int] = {}
        for request in queued:
            rows[request.level] = rows.get(request.level, 0) + request.rows
        return rows, sum([request.callers for request in [*queued, *self._lanes.awaited()]])

    def watch_batches(self, on_batch: Callable[[Batch], None] | None) -> None:
        """Call `on_batch` with each batch that ends (see `Lanes`); None stops that."""
        self._lanes.on_batch = on_batch

    # Requests

    def refusal(self, rows: int = 1, tenant: Tenant | None = None, callers: int = 1) -> BatcherError | None:
        """Return why a request of `rows` rows for `callers` callers would be refused now, or None."""
        return self.admission.refusal(rows, tenant, callers, self._clock())

    def submit(self, request: Request) -> None:
        """Queue a request, or raise why it is refused; then `request.done` is never called.

        The request's payloads must stay unchanged until it is done or cancelled.
        """
        request.enqueued_s = now_s = self._clock()
        lanes = self._lanes
        error = None if self._padder is None else self._padder.assign(request)
        if error is None:
            error = self._scheduler.admit(request, now_s, lanes.free_s)
        if error is not None:
            if not isinstance(request, Bundle):  # its members are tried, and counted, one by one
                self.counters.count_refusal(request, error)
            try:
                raise error
            finally:
                del error  # it refers to this frame
        if request.timeout_s is not None:
            self._set_expiry(request)
        suspects = self._suspects
        if request.rows > self.max_batch_size or (suspects.marks and suspects.holds(request)):
            parts = self._completion.cut(request) if request.rows > self.max_batch_size else [request]
            for part in parts:
                part.enqueued_s = now_s
                suspects.push(part)
            self._decide_soon()
            return
        group = self.queue.push(request)
        if self._soon:
            return
        lane = lanes.next
        if lane is not None and (not lane.running or group.rows >= self.queue.full_rows):
            waits = group.rows < self._wait_rows and request.timeout_s is None
            if waits and len(self.queue.groups) == 1:
                return  # decided when the expected rows are there, or at the end of the wait
            if lane.running or self.queue.deadlines or not self._scheduler.lone:
                self._decide_soon()
            else:
                self.decide()

    def cancel(self, request: Request) -> None:
        """Drop a request whose caller left. Harmless if it is already done."""
        if self._completion.cancel(request):
            self._check_drained()

    def _set_expiry(self, request: Request) -> None:
        if request.deadline_s < math.inf:
            self._expire_later(request, self._completion.slack_s(request, request.rows))
        else:  # admitted on trial
            left_s = request.enqueued_s + (request.timeout_s or 0.0) - self._clock()
            request.expiry = self._loop.call_later(left_s, self.end_late, request)

    def end_late(self, request: Request) -> None:
        """Fail a request at the end of its timeout, also if it runs. Harmless if it is already done."""
        self._completion.end_late(request)
        self._check_drained()

    def _expire_later(self, request: Request, slack_s: float) -> None:
        """Remove it from the queue as soon as it cannot meet its deadline any more."""
        request.expiry = self._loop.call_later(slack_s, self._expire, request)

    def _expire(self, request: Request) -> None:
        slack_s = self._completion.expire(request)
        if slack_s is not None:
            self._expire_later(request, slack_s)
        else:
            self._check_drained()

    def _recheck(self, request: Request) -> None:
        """Look again at the deadline of a request that waits once more."""
        whole = request.whole if isinstance(request, Part) and request.whole is not None else request
        if whole.deadline_s < math.inf:
            if whole.expiry is not None:
                whole.expiry.cancel()
            self._expire(whole)
        elif whole.timeout_s is not None and whole.expiry is None:  # of a bundle
            self._set_expiry(whole)

    # Decisions

    def hold(self) -> bool:
        """Decide about the next requests when `decide` is called, which must follow, or when a batch ends.

        Return False, and decide as always, if the next one has probably no other right behind it.
        """
        self._soon |= not self._scheduler.lone
        return self._soon

    def _decide_soon(self) -> None:
        """Decide once the requests that are about to come are there; see `_settle`."""
        if not self._soon:
            self._soon = True
            self._seen = self.counters.accepted
            self._loop.call_soon(self._settle, SETTLE_ITERATIONS)

    def _settle(self, iterations: int) -> None:
        """Decide once an iteration of the loop has brought no new request.

        While sockets are read one after another, the next request is microseconds away. A batch that leaves
        in between costs a wake-up of the worker, two hand-overs of the interpreter lock and a callback, about
        as much as ten requests. Never waits for time to pass: a lone request leaves in the next iteration.
        """
        arriving = self.counters.accepted != self._seen
        if arriving and iterations and self.queue.rows < self.queue.full_rows:
            self._seen = self.counters.accepted
            self._loop.call_soon(self._settle, iterations - 1)
        else:
            self.decide()

    def decide(self) -> None:
        """Ask the scheduler, and act, until no engine has anything to do now."""
        self._soon = False
        self._wait_rows = 0
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        lanes, queue, scheduler = self._lanes, self.queue, self._scheduler
        while (lane := lanes.next) is not None and (queue.rows or self._apart.rows):
            try:
                answer = scheduler.next(self._clock(), running=bool(lane.running), free_s=lane.free_s)
            except Exception as error:
                # Its queue cannot be trusted any more, and requests would wait for ever.
                log.exception("model %s: the scheduler failed", self.name)
                lanes.close(f"its scheduler failed: {error!r}")
                break
            if isinstance(answer, Dispatch):
                if answer.requests:
                    lanes.send(lane, answer.requests, answer.reason, answer.shares)
                for request in answer.late:
                    self._completion.fail_late(request)
                continue
            if isinstance(answer, WaitUntil):
                self._wait_rows = answer.rows
                delay_s = max(0.0, answer.time_s - self._clock())
                self._timer = self._loop.call_later(delay_s, self.decide)
            break
        if scheduler.admission.closed is not None:
            self._check_drained()

    # The end

    async def drain(self, timeout_s: float, waited_s: float = 0.0) -> bool:
        """Accept nothing more and answer all accepted requests.

        Return False if that took longer than `timeout_s`: the remaining requests got `AbandonedError`, and
        batches that still run are left to the engine. `waited_s`: spent on this already, for the log.
        """
        admission = self.admission
        if admission.closed is None:
            admission.close(DrainingError(f"model {self.name!r} is about to stop"))
        self._scheduler.draining = True
        self._drained = self._loop.create_future()
        self.decide()
        try:
            await asyncio.wait_for(self._drained, timeout_s)
        except TimeoutError:
            self._abandon(waited_s + timeout_s)
            return False
        return True

    def _abandon(self, timeout_s: float) -> None:
        failed = self.counters.failed
        waiting = self._lanes.awaited() + self._scheduler.take_all()
        error = AbandonedError(f"model {self.name!r} stopped before the request was done")
        self._completion.fail_all(waiting, error)
        abandoned = self.counters.failed - failed
        log.error("model %s: %d requests were not done within %g s", self.name, abandoned, timeout_s)

    def _check_drained(self) -> None:
        """End `drain` if nothing accepted is left. A batch without live requests is not waited for."""
        drained = self._drained
        if drained is None or drained.done() or self.queue.rows or self._apart.rows or self._lanes.awaited():
            return
        drained.set_result(None)

    def use(self, worker: BatchWorker, *, instead_of: BatchWorker | None = None) -> None:
        """Use another worker in place of one that hung or died, or that gets no more batches from now on."""
        if instead_of is not None:
            self._lanes.retire(instead_of)
        self._lanes.use(worker)

    def retire(self, worker: BatchWorker) -> None:
        """Give a worker no more batches."""
        self._lanes.retire(worker)

    def ended(self, worker: BatchWorker, error: EngineEndedError) -> None:
        """Note that the process of a worker's engine has ended; harmless if its batch has told that."""
        self._lanes.ended(worker, error)

    def restarting(self, retry_after_s: float) -> None:
        """Refuse requests for a while if no engine is left."""
        self._lanes.restarting(retry_after_s)

    def gone(self, error: EngineError) -> None:
        """Close if no engine is left: no other can be opened in place of one that hung or died."""
        self._lanes.gone(error)
