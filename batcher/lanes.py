"""Lanes: each open engine with its worker, its slots and its batches; a model has one or several.

A slot belongs to a batch from `send` until its rows are handed out, because callers read the slot's output
buffers until then. When a batch comes back and others wait, the engine gets its next one before the answers
of this one are written; otherwise everything that can wait is done after them.

A failed batch is queued again in halves. A batch that does not end within the limit is given up, and so is
its engine; the model opens another one, which inherits the lane's number.
"""

import asyncio
import logging
import math
from collections.abc import Callable, Sequence
from functools import partial
from itertools import count
from typing import Protocol

from cobatch.batcher.bundle import Bundle
from cobatch.batcher.completion import Completion
from cobatch.batcher.errors import BatcherError, EngineGoneError, ExecutionTimeoutError
from cobatch.batcher.request import Batch, Request, State, Timer
from cobatch.batcher.rows.packing import pack
from cobatch.batcher.rows.padding import Padder
from cobatch.batcher.scheduling.policy import SUSPECT
from cobatch.batcher.scheduling.scheduler import Scheduler
from cobatch.batcher.scheduling.tuning import HEALTHY_S
from cobatch.batcher.statistics import EngineTotals
from cobatch.batcher.tenant import Tenant
from cobatch.engines.base import Engine
from cobatch.engines.errors import EngineDeadError, EngineError
from cobatch.engines.worker import Deliver, Job, Outcome

log = logging.getLogger("cobatch.batcher")

_NUMBERS = count(1)


class BatchWorker(Protocol):
    """The part of `engines.worker.Worker` that the batcher uses."""

    deliver: Deliver | None
    warmup_us: dict[int, float]

    @property
    def engine(self) -> Engine: ...

    def submit(self, job: Job) -> None: ...


class Lane:
    """One worker and its batches.

    `number`: its place among the model's lanes. `free_s`: when its engine is expected to be idle. `ran_s`:
    when a batch last ran well. `gone`: the error for its callers, once the engine has died.
    """

    def __init__(self, worker: BatchWorker, number: int, totals: EngineTotals) -> None:
        self.worker = worker
        self.number = number
        self.totals = totals
        self.engine = worker.engine
        self.free_slots = list(range(worker.engine.slots))
        self.running: dict[Batch, None] = {}  # in the order in which they run
        self.free_s = 0.0
        self.ran_s = -math.inf
        self.watch: Timer | None = None
        self.gone: EngineGoneError | None = None

    @property
    def in_slots(self) -> int:
        """Batches that hold a slot: with the engine, or being handed out."""
        return self.engine.slots - len(self.free_slots)


class Lanes:
    """The lanes of one model whose engines can run a batch.

    `next`: the lane with a free slot where a batch would run first, None if there is none. `free_s`: when
    the first engine is expected to be idle. `decide` is called when a slot may be filled. `on_lost` is told
    of each worker whose engine died or hung; it opens another one and calls `use`, or else `gone`.
    `on_batch` may be set to be told of each batch that ended, once its answers are written, while it still
    has its requests; it must not raise, nor keep the requests.
    """

    def __init__(
        self,
        model: str,
        workers: Sequence[BatchWorker],
        scheduler: Scheduler,
        completion: Completion,
        loop: asyncio.AbstractEventLoop,
        clock: Callable[[], float],
        *,
        decide: Callable[[], None],
        recheck: Callable[[Request], None],
        on_lost: Callable[[BatchWorker, BatcherError], None] | None,
        padder: Padder | None,
        execution_timeout_s: float | None,
    ) -> None:
        self.on_batch: Callable[[Batch], None] | None = None
        self.next: Lane | None = None
        self.free_s = 0.0
        self.lanes: list[Lane] = []
        self._all: dict[Lane, None] = {}  # with dead ones that still have batches
        self._model = model
        self._scheduler = scheduler
        self._queue = scheduler.queue
        self._completion = completion
        self._counters = scheduler.counters
        self._loop = loop
        self._clock = clock
        self._decide = decide
        self._recheck = recheck
        self._on_lost = on_lost
        self._padder = padder
        self._execution_timeout_s = execution_timeout_s
        for worker in workers:
            self._add(worker)

    # Which lane

    def _add(self, worker: BatchWorker) -> None:
        engines = self._counters.engines
        taken = {lane.number for lane in self.lanes}
        number = min(set(range(len(taken) + 1)) - taken)
        if number == len(engines):
            engines.append(EngineTotals())
        lane = Lane(worker, number, engines[number])
        self.lanes.append(lane)
        self._all[lane] = None
        worker.deliver = partial(self._deliver, lane)
        self._changed()

    def _remove(self, lane: Lane) -> None:
        if lane in self.lanes:
            self.lanes.remove(lane)
            self._changed()

    def _changed(self) -> None:
        self._scheduler.admission.engines = max(1, len(self.lanes))
        self._choose()

    def _choose(self) -> None:
        """Keep `next` and `free_s`."""
        lanes = self.lanes
        if len(lanes) == 1:
            (lane,) = lanes
            self.free_s = lane.free_s
            self.next = lane if lane.free_slots else None
            return
        self.free_s = min([lane.free_s for lane in lanes], default=0.0)
        free = [lane for lane in lanes if lane.free_slots]
        idle = next((lane for lane in free if not lane.running), None)
        self.next = idle or min(free, key=lambda lane: lane.free_s, default=None)

    @property
    def running(self) -> int:
        """Batches that are with an engine."""
        return sum([len(lane.running) for lane in self._all])

    def awaited(self) -> list[Request]:
        """Return the requests that were sent and are not answered or cancelled."""
        return [request for lane in self._all for batch in lane.running for request in _unanswered(batch)]

    # To the engine

    def send(
        self, lane: Lane, requests: list[Request], reason: str, shares: dict[Tenant | None, int]
    ) -> None:
        """Pack a batch into a free slot, which there must be, and give it to the worker."""
        row_shapes = requests[0].row_shapes
        alone = len(requests) == 1
        rows = requests[0].rows if alone else sum([request.rows for request in requests])
        slot = lane.free_slots.pop()
        batch = Batch(requests, rows, row_shapes, reason, lane.number, next(_NUMBERS), slot, shares)
        lane.running[batch] = None
        batch.gathered_s = self._clock()
        explain = alone and (reason != SUSPECT or not self._ran_recently(lane))
        job = Job(slot, rows, row_shapes, batch, explain)
        try:
            pack(requests, lane.engine.inputs(slot, rows, row_shapes))
        except Exception as error:
            # The batch fails like one that the engine refused.
            log.exception("packing a batch failed")
            now_s = self._clock()
            outcome = Outcome(None, EngineError(f"packing failed: {error!r}"), now_s, now_s, zeros_run=False)
            self._loop.call_soon(self._on_outcome, lane, job, outcome)
            self._choose()
            return
        batch.dispatched_s = now_s = self._clock()
        run_s = self._scheduler.shape_times.of(row_shapes).expected_s(rows)
        lane.free_s = max(lane.free_s, now_s) + run_s
        lane.worker.submit(job)
        self._choose()
        if self._execution_timeout_s is not None and lane.watch is None:
            self._watch_next(lane)

    # Back from the engine

    def _deliver(self, lane: Lane, job: Job, outcome: Outcome) -> None:
        """Hand an outcome over to the loop, from the worker's thread."""
        try:
            self._loop.call_soon_threadsafe(self._on_outcome, lane, job, outcome)
        except RuntimeError:
            log.warning("a batch came back after the event loop was closed")

    def _on_outcome(self, lane: Lane, job: Job, outcome: Outcome) -> None:
        batch = job.context
        assert isinstance(batch, Batch)
        running = lane.running
        if batch not in running:
            return  # it was given up, and its slot with it
        del running[batch]
        if lane.watch is not None:
            self._watch_next(lane)
        lane.free_s = now_s = self._clock()
        for one in running:  # they begin now
            lane.free_s += self._scheduler.shape_times.of(one.row_shapes).expected_s(one.rows)
        self._choose()
        batch.started_s = outcome.started_s
        batch.finished_s = outcome.finished_s
        totals = lane.totals
        totals.runs += 1
        totals.busy_s += outcome.finished_s - outcome.started_s
        if outcome.error is None:
            assert outcome.outputs is not None
            batch.outputs = outcome.outputs
            lane.ran_s = now_s
            self._answer(batch, now_s, idle=not running)
        else:
            batch.answering_s = self._clock()
            self._on_error(lane, batch, outcome.error, outcome.zeros_run)
            self._end_failed(batch)
        lane.free_slots.append(job.slot)
        if len(self._all) > len(self.lanes) and lane not in self.lanes and not running:
            self._all.pop(lane, None)  # it was dead, and this was its last batch
        self._choose()
        self._decide()

    def _answer(self, batch: Batch, now_s: float, *, idle: bool) -> None:
        """Give the engine its next batch if others wait, then answer this one."""
        scheduler = self._scheduler
        others_wait = self._queue.rows > 0
        if others_wait:
            scheduler.on_ended(batch, now_s, idle=idle)
            self._decide()
        batch.answering_s = self._clock()
        self._completion.answer(batch)
        batch.answered_s = self._clock()
        scheduler.on_answered(batch, now_s)
        if not others_wait:
            scheduler.on_ended(batch, now_s, idle=idle)
        self._counters.count(batch, None if self._padder is None else self._padder.padded(batch))
        if self.on_batch is not None:
            self.on_batch(batch)
        batch.requests = []

    # Failures

    def _on_error(self, lane: Lane, batch: Batch, error: EngineError, zeros_run: bool | None) -> None:
        requests = _unanswered(batch)
        self._counters.failed_runs += 1
        _note_failed(batch, requests)
        if isinstance(error, EngineDeadError):
            self._on_dead(lane, requests, error)
        elif len(batch.requests) > 1:
            # Also with one left: the rows that failed may be of a request that was cancelled since.
            self._retry_halves(batch, requests)
        elif requests and isinstance(requests[0], Bundle):
            self._retry_halves(batch, requests[0].split())
        elif requests:
            self._fail_alone(lane, requests[0], error, zeros_run)

    def _fail_alone(self, lane: Lane, request: Request, error: EngineError, zeros_run: bool | None) -> None:
        """Fail a request whose run failed with no other in it.

        Its rows are at fault if zeros in their place run; or, with a model that refuses zeros or a source
        that is suspect already, if the engine has run other rows recently.
        """
        rejected = self._ran_recently(lane) if zeros_run is None else zeros_run
        if rejected:
            self._scheduler.suspects.add(request, self._clock())
        self._completion.fail_run(request, str(error), rejected=rejected)

    def _ran_recently(self, lane: Lane) -> bool:
        return self._clock() - lane.ran_s < HEALTHY_S

    def _retry_halves(self, batch: Batch, requests: list[Request]) -> None:
        half = len(requests) // 2
        self._retry([(batch, requests[half:]), (batch, requests[:half])])

    def _retry(self, parts: list[tuple[Batch, list[Request]]]) -> None:
        """Queue requests of batches again, the last part first; some may be too late by now."""
        for batch, requests in parts:
            if requests:
                self._scheduler.retry(batch, requests)
        for _, requests in parts:
            for request in requests:
                self._recheck(request)

    def _end_failed(self, batch: Batch) -> None:
        batch.answered_s = now_s = self._clock()
        self._scheduler.charge(batch, now_s)
        if self.on_batch is not None:
            self.on_batch(batch)
        batch.requests = []

    def _on_dead(self, lane: Lane, requests: list[Request], error: EngineError) -> None:
        """Remove a dead engine. Its requests may be the cause, so they are not tried on another one."""
        self._remove(lane)
        first = lane.gone is None
        if lane.gone is None:
            lane.gone = self._completion.engine_gone(str(error))
        self._completion.fail_all(requests, lane.gone)
        if first and not self.lanes:
            self._fail_waiting(lane.gone)
        if first and self._on_lost is not None and not self._scheduler.draining:
            self._on_lost(lane.worker, lane.gone)

    def _watch_next(self, lane: Lane) -> None:
        """Limit the time of the batch that runs now; those behind it have not begun."""
        if lane.watch is not None:
            lane.watch.cancel()
            lane.watch = None
        limit_s = self._execution_timeout_s
        if limit_s is not None and lane.running:
            batch = next(iter(lane.running))
            lane.watch = self._loop.call_later(limit_s, self._give_up, lane, batch, limit_s)

    def _give_up(self, lane: Lane, batch: Batch, limit_s: float) -> None:
        """Give up a hung engine: fail its batch, and run those behind it elsewhere."""
        lane.watch = None
        self._remove(lane)
        del self._all[lane]
        behind = [(one, _unanswered(one)) for one in lane.running if one is not batch]
        lane.running.clear()
        self._retry(behind[::-1])
        now_s = self._clock()
        batch.started_s = max(batch.dispatched_s, now_s - limit_s)  # the engine has not said when
        batch.finished_s = batch.answering_s = now_s
        _note_failed(batch, batch.requests)
        error = ExecutionTimeoutError(self._model, limit_s)
        log.critical("model %s: a batch of %d rows has not ended: %s", self._model, batch.rows, error)
        self._counters.hung += 1
        self._completion.fail_all(batch.requests, error)
        if self._on_lost is not None and self._scheduler.admission.closed is None:
            self._on_lost(lane.worker, error)
        elif not self.lanes:
            self.close(str(error))
        self._decide()
        self._end_failed(batch)

    def close(self, why: str) -> None:
        """Accept nothing and fail all waiting requests. Batches that still run may be answered."""
        self._fail_waiting(self._completion.engine_gone(why))

    def _fail_waiting(self, gone: EngineGoneError) -> None:
        self._scheduler.admission.close(gone)
        self._completion.fail_all(self._scheduler.take_all(), gone)

    def use(self, worker: BatchWorker) -> None:
        """Use another worker in place of one that was lost."""
        admission = self._scheduler.admission
        if not self._scheduler.draining and isinstance(admission.closed, EngineGoneError):
            admission.close(None)
        self._add(worker)
        self._decide()

    def gone(self, error: EngineError) -> None:
        """Close if no engine is left, since no other one can be opened."""
        if not self.lanes:
            self.close(str(error))
            self._decide()


def _unanswered(batch: Batch) -> list[Request]:
    return [request for request in batch.requests if request.state is State.RUNNING]


def _note_failed(batch: Batch, requests: list[Request]) -> None:
    batch.failed = True
    for request in requests:
        request.batch = batch
