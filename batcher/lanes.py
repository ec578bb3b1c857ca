"""The lanes of a model: batches to its engines and back.

A slot belongs to a batch from `send` until its rows are handed out, because callers read the slot's output
buffers until then. When a batch comes back and others wait, the engine gets its next one before the answers
of this one are written; otherwise everything that can wait is done after them.

A batch that does not end within the limit is given up, and so is its engine; the model opens another one,
which inherits the lane's number.
"""

import asyncio
import logging
from collections.abc import Callable, Sequence
from functools import partial
from itertools import count

from cobatch.batcher.bisection import Bisection
from cobatch.batcher.completion import Completion
from cobatch.batcher.errors import BatcherError, EngineGoneError, ExecutionTimeoutError
from cobatch.batcher.lane import BatchWorker, Lane
from cobatch.batcher.request import Batch, Request, State
from cobatch.batcher.rows.packing import pack
from cobatch.batcher.rows.padding import Padder
from cobatch.batcher.scheduling.policy import SUSPECT
from cobatch.batcher.scheduling.scheduler import Scheduler
from cobatch.batcher.statistics import EngineTotals
from cobatch.batcher.tenant import Tenant
from cobatch.engines.errors import EngineDeadError, EngineEndedError, EngineError
from cobatch.engines.worker import Job, Outcome

log = logging.getLogger("cobatch.batcher")

_NUMBERS = count(1)


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
        self._bisection = Bisection(scheduler, completion, clock, recheck)
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
        sent = [request for lane in self._all for batch in lane.running for request in batch.unanswered()]
        return [*sent, *(one for one in self._completion.joining if one.state is State.RUNNING)]

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
        batch.gathered_s = self._clock()
        explain = alone and (reason != SUSPECT or not lane.ran_recently(batch.gathered_s))
        lane.running[batch] = job = Job(slot, rows, row_shapes, batch, explain)
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
            batch.outputs, batch.lasting = outcome.outputs, outcome.lasting
            lane.ran_s = now_s
            self._answer(batch, now_s, idle=not running)
        else:
            batch.answering_s = self._clock()
            self._on_error(lane, batch, outcome.error, outcome.zeros_run)
            self._end_failed(batch)
        lane.free_slots.append(job.slot)
        if len(self._all) > len(self.lanes) and lane not in self.lanes and not running:
            self._all.pop(lane, None)  # it was dead, and this was its last batch
        if len(lane.free_slots) == 1:  # it had none
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
        requests = batch.unanswered()
        ended = error if isinstance(error, EngineEndedError) and not self._scheduler.draining else None
        if ended is not None and not ended.begun:
            self._bisection.queue_again([(batch, requests)])
            self._on_ended(lane, ended)
            return
        self._counters.failed_runs += 1
        batch.note_failed(requests)
        if ended is not None:
            # Its rows may be the cause, so each request runs alone.
            self._bisection.separate(batch, ended)
            self._on_ended(lane, ended)
        elif isinstance(error, EngineDeadError):
            self._on_dead(lane, requests, error)
        else:
            self._bisection.split(lane, batch, error, zeros_run)

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

    def _on_ended(self, lane: Lane, error: EngineError) -> None:
        """Remove an engine whose process has ended; requests wait for the next one."""
        self._remove(lane)
        if lane.gone is None:
            self._counters.ended += 1
            lane.gone = self._completion.engine_gone(str(error))
            if self._on_lost is not None:
                self._on_lost(lane.worker, lane.gone)

    def ended(self, worker: BatchWorker, error: EngineEndedError) -> None:
        """Remove an idle worker's engine, whose process has ended. A batch that runs tells it itself."""
        lane = next((one for one in self.lanes if one.worker is worker), None)
        if lane is not None and not lane.running:
            self.retire(worker)
            self._on_ended(lane, error)

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
        """Give up a hung engine: fail its batch, and run those behind it elsewhere.

        If the batch has failed and zeros run in its place, they have the same limit again.
        """
        left_s = lane.running[batch].zeros_started_s + limit_s - self._clock()
        if left_s > 0:
            lane.watch = self._loop.call_later(left_s, self._give_up, lane, batch, limit_s)
            return
        lane.watch = None
        self._remove(lane)
        del self._all[lane]
        behind = [(one, one.unanswered()) for one in lane.running if one is not batch]
        lane.running.clear()
        self._bisection.queue_again(behind[::-1])
        now_s = self._clock()
        batch.started_s = max(batch.dispatched_s, now_s - limit_s)  # the engine has not said when
        batch.finished_s = batch.answering_s = now_s
        batch.note_failed(batch.requests)
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

    def retire(self, worker: BatchWorker) -> None:
        """Give a worker no more batches."""
        for lane in [one for one in self.lanes if one.worker is worker]:
            self._remove(lane)
            if not lane.running:
                del self._all[lane]

    def use(self, worker: BatchWorker) -> None:
        """Use another worker in place of one that was lost."""
        admission = self._scheduler.admission
        if not self._scheduler.draining and isinstance(admission.closed, EngineGoneError):
            admission.close(None)
        self._add(worker)
        self._decide()

    def restarting(self, retry_after_s: float) -> None:
        """Refuse and fail requests, if no engine is left, until another one is used."""
        if not self.lanes:
            self._fail_waiting(self._completion.engine_restarting(retry_after_s))
            self._decide()

    def gone(self, error: EngineError) -> None:
        """Close if no engine is left, since no other one can be opened."""
        if not self.lanes:
            self.close(str(error))
            self._decide()
