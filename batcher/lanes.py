"""The way to the engines and back: slots, packing, the workers, handing out, trying halves again.

A slot belongs to a batch from `send` until its rows are handed out, since callers read the slot's
output buffers until then. When a batch comes back and others wait, the engine is given its next one before
the answers of this one are written; when nobody waits, what can be done after them is.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Callable, Sequence
from functools import partial
from itertools import count
from typing import Protocol

from cobatch.batcher.bundle import Bundle
from cobatch.batcher.completion import Answers
from cobatch.batcher.errors import EngineGoneError
from cobatch.batcher.request import Batch, Pad, Request, State, Timer
from cobatch.batcher.rows.packing import pack
from cobatch.batcher.rows.padding import Padder, cut_back
from cobatch.batcher.scheduling.policy import RETRY
from cobatch.batcher.scheduling.run_times import ShapeTimes
from cobatch.batcher.statistics import Counters, EngineTotals
from cobatch.batcher.tenant import Tenant
from cobatch.engines.base import Engine
from cobatch.engines.errors import EngineDeadError, EngineError
from cobatch.engines.jobs import Deliver, Job, Outcome

log = logging.getLogger("cobatch.batcher")

_NUMBERS = count(1)
# What part of a new measurement goes into what is known.
_GAIN = 0.1


class BatchWorker(Protocol):
    """What the batcher needs of `engines.worker.Worker`."""

    deliver: Deliver | None
    warmup_us: dict[int, float]

    @property
    def engine(self) -> Engine: ...

    def submit(self, job: Job) -> None: ...


class Lane:
    """Of one worker. `free_s`: when its engine is expected to have run what it has. `gone`: what its
    callers are told, once the engine has died. `number`: its place among the model's lanes; the lane that is
    opened instead of it inherits that, and `figures` with it."""

    __slots__ = ("engine", "figures", "free_s", "free_slots", "gone", "number", "running", "watch", "worker")

    def __init__(self, worker: BatchWorker, number: int, figures: EngineTotals) -> None:
        self.worker = worker
        self.number = number
        self.figures = figures
        self.engine = worker.engine
        self.free_slots = list(range(worker.engine.slots))
        self.running: dict[Batch, None] = {}  # in the order in which they run
        self.free_s = 0.0
        self.watch: Timer | None = None
        self.gone: EngineGoneError | None = None

    @property
    def in_slots(self) -> int:
        """Batches that hold a slot: with the engine, or being handed out."""
        return self.engine.slots - len(self.free_slots)


class Lanes:
    """Of one model. `lanes` are those whose engines can run something. `decide` is called when a slot may be
    filled. With each batch that ran `on_idle` is called first, to send the engine its next one before the
    answers are written; it says whether it has done what `on_ran` does, which is called after them else.

    `on_dead`: with requests that a lane's engine could not run, nor can it anything else. `on_hung`: it has
    not ended a batch within `execution_timeout_s`. `on_late`: a request is not sent again because it would
    be too late. `on_batch` may be set, to be told of each batch that came back or was given up, once its
    answers are written, while its requests are still in it; it must not raise, nor keep the requests.
    """

    def __init__(
        self,
        workers: Sequence[BatchWorker],
        answers: Answers,
        counters: Counters,
        loop: asyncio.AbstractEventLoop,
        clock: Callable[[], float],
        *,
        times: ShapeTimes,
        decide: Callable[[], None],
        on_idle: Callable[[Lane, Batch], bool],
        on_ran: Callable[[Batch], None],
        on_dead: Callable[[Lane, list[Request], EngineError], None],
        on_hung: Callable[[Lane, Batch, float], None],
        on_late: Callable[[Request], None],
        padder: Padder | None = None,
        execution_timeout_s: float | None = None,
    ) -> None:
        self.on_batch: Callable[[Batch], None] | None = None
        # What comes on top of queue and run, as things are: a request lies unread for as long as a finished
        # batch lies unnoticed, and then answers are written one after another.
        self.overhead_s = 0.0
        self.lanes: list[Lane] = []
        self.retries: deque[list[Request]] = deque()
        self._all: dict[Lane, None] = {}  # with those that are dead and still have batches
        self._decide = decide
        self._on_idle = on_idle
        self._on_ran = on_ran
        self._on_dead = on_dead
        self._on_hung = on_hung
        self._on_late = on_late
        self._times = times
        self._padder = padder
        self._execution_timeout_s = execution_timeout_s
        self._answers = answers
        self._counters = counters
        self._loop = loop
        self._clock = clock
        for worker in workers:
            self.use(worker)

    def use(self, worker: BatchWorker) -> None:
        """Send to this worker too from now on."""
        engines = self._counters.engines
        taken = {lane.number for lane in self.lanes}
        number = next(number for number in range(len(taken) + 1) if number not in taken)
        if number == len(engines):
            engines.append(EngineTotals())
        lane = Lane(worker, number, engines[number])
        self.lanes.append(lane)
        self._all[lane] = None
        worker.deliver = partial(self._deliver, lane)

    def next_lane(self) -> Lane | None:
        """Where the next batch would run first, of the lanes that have room for one."""
        lanes = self.lanes
        if len(lanes) == 1:
            (lane,) = lanes
            return lane if lane.free_slots else None
        best: Lane | None = None
        for lane in lanes:
            if not lane.free_slots:
                continue
            if not lane.running:
                return lane
            if best is None or lane.free_s < best.free_s:
                best = lane
        return best

    @property
    def free_s(self) -> float:
        """When the first engine is expected to have run what it has."""
        lanes = self.lanes
        return lanes[0].free_s if len(lanes) == 1 else min([lane.free_s for lane in lanes], default=0.0)

    @property
    def running(self) -> int:
        """Batches that are with an engine."""
        return sum([len(lane.running) for lane in self._all])

    def awaited(self) -> list[Request]:
        """The requests that were sent, or wait to be sent again, and that somebody waits for."""
        sent = [*self.retries, *(batch.requests for lane in self._all for batch in lane.running)]
        return [request for requests in sent for request in requests if request.state is State.RUNNING]

    def send(
        self, lane: Lane, requests: list[Request], reason: str, shares: dict[Tenant | None, int] | None = None
    ) -> None:
        """Pack a batch into a free slot and give it to the worker. The lane must have a free slot."""
        row_shapes = requests[0].row_shapes
        rows = requests[0].rows if len(requests) == 1 else sum([request.rows for request in requests])
        slot = lane.free_slots.pop()
        batch = Batch(requests, rows, row_shapes, reason, lane.number, next(_NUMBERS), slot)
        if shares is not None:
            batch.shares = shares
        lane.running[batch] = None
        batch.gathered_s = self._clock()
        job = Job(slot, rows, row_shapes, batch)
        try:
            pack(requests, lane.engine.inputs(slot, rows, row_shapes))
        except Exception as error:
            # Nothing was sent, so the batch fails here, like one that the engine refused.
            log.exception("packing a batch failed")
            outcome = Outcome(None, EngineError(f"packing failed: {error!r}"), self._clock(), self._clock())
            self._loop.call_soon(self._on_outcome, lane, job, outcome)
            return
        batch.dispatched_s = now_s = self._clock()
        lane.free_s = max(lane.free_s, now_s) + self._times.of(row_shapes).expected_s(rows)
        lane.worker.submit(job)
        if self._execution_timeout_s is not None and lane.watch is None:
            self._watch_next(lane)

    def _watch_next(self, lane: Lane) -> None:
        """See to it that the batch that runs now ends; one behind it has not begun."""
        if lane.watch is not None:
            lane.watch.cancel()
            lane.watch = None
        limit_s = self._execution_timeout_s
        if limit_s is not None and lane.running:
            batch = next(iter(lane.running))
            lane.watch = self._loop.call_later(limit_s, self._give_up, lane, batch, limit_s)

    def _give_up(self, lane: Lane, batch: Batch, limit_s: float) -> None:
        """The engine hangs. Its slots are its own until it comes back, if ever."""
        lane.watch = None
        if lane in self.lanes:
            self.lanes.remove(lane)
        del self._all[lane]
        waiting = [one.requests for one in lane.running if one is not batch]
        lane.running.clear()
        # They have not begun, and are as good as they were.
        self.retries.extendleft(reversed(waiting))
        now_s = self._clock()
        batch.started_s = max(batch.dispatched_s, now_s - limit_s)  # the engine has yet to say when
        batch.finished_s = batch.answering_s = now_s
        _note_failed(batch, batch.requests)
        self._on_hung(lane, batch, limit_s)
        self._over(batch)

    def send_retry(self, lane: Lane) -> None:
        """Send the next half of a batch that failed, but for those whose callers are gone and those who would
        be too late."""
        requests = []
        start_s = max(self._clock(), lane.free_s)
        for request in self.retries.popleft():
            if request.state is not State.RUNNING:
                continue
            if request.deadline_s < start_s + self._times.of(request.row_shapes).expected_s(request.rows):
                self._on_late(request)
            else:
                requests.append(request)
        if requests:
            self._counters.retries += 1
            self.send(lane, requests, RETRY)

    def _deliver(self, lane: Lane, job: Job, outcome: Outcome) -> None:
        """Called on a worker's thread: the one place where a thread calls into the loop."""
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
        # What is behind it begins now, however long it was expected to take.
        left_s = 0.0
        for one in running:
            left_s += self._times.of(one.row_shapes).expected_s(one.rows)
        now_s = self._clock()
        lane.free_s = now_s + left_s
        batch.started_s = outcome.started_s
        batch.finished_s = outcome.finished_s
        figures = lane.figures
        figures.runs += 1
        figures.busy_s += outcome.finished_s - outcome.started_s
        if outcome.error is not None:
            batch.answering_s = self._clock()
            self._on_error(lane, batch, outcome.error)
            self._over(batch)
        else:
            assert outcome.outputs is not None
            batch.outputs = outcome.outputs
            learnt = self._on_idle(lane, batch)
            batch.answering_s = self._clock()
            self._hand_out(batch)
            batch.answered_s = self._clock()
            overhead_s = now_s + batch.answered_s - 2 * batch.finished_s
            self.overhead_s += (overhead_s - self.overhead_s) * _GAIN
            self._counters.count(batch, None if self._padder is None else self._padder.padded(batch))
            if self.on_batch is not None:
                self.on_batch(batch)
            if not learnt:
                self._on_ran(batch)
            # Whoever keeps the batch must not keep the outputs, and batch and requests not each other.
            batch.outputs = ()
            batch.memo = {}
            batch.requests = []
        lane.free_slots.append(job.slot)
        if len(self._all) > len(self.lanes) and lane not in self.lanes and not running:
            self._all.pop(lane, None)  # it was dead, and this was its last batch
        self._decide()

    def _over(self, batch: Batch) -> None:
        """A batch that failed is dealt with."""
        batch.answered_s = self._clock()
        if self.on_batch is not None:
            self.on_batch(batch)
        batch.requests = []

    def _hand_out(self, batch: Batch) -> None:
        finish = self._answers.finish
        for request in batch.requests:
            if request.state is State.RUNNING:
                request.state = State.DONE
                request.batch = batch
                if request.pad is None:
                    finish(request)
                else:
                    self._hand_out_cut(request, request.pad)

    def _hand_out_cut(self, request: Request, pad: Pad) -> None:
        """The same for one that was padded: its outputs are cut back to its own length."""
        try:
            own = cut_back(request, pad)
        except Exception as error:  # noqa: BLE001 - whatever it is, the caller must hear of it
            self._answers.fail_run(request, f"its outputs cannot be cut back: {error!r}")
        else:
            self._answers.finish(request)
            if own is not None:
                own.outputs = ()
                own.memo = {}

    def _on_error(self, lane: Lane, batch: Batch, error: EngineError) -> None:
        requests = [request for request in batch.requests if request.state is State.RUNNING]
        self._counters.failed_runs += 1
        _note_failed(batch, requests)
        if isinstance(error, EngineDeadError):
            if lane in self.lanes:
                self.lanes.remove(lane)
            self._on_dead(lane, requests, error)
        elif len(batch.requests) > 1:
            # Also with one left: what failed may have been the rows of somebody who is gone by now.
            self._retry_halves(requests)
        elif requests and isinstance(requests[0], Bundle):
            self._retry_halves(requests[0].split())
        elif requests:
            self._answers.fail_run(requests[0], str(error))

    def _retry_halves(self, requests: list[Request]) -> None:
        half = len(requests) // 2
        self.retries.extendleft(part for part in (requests[half:], requests[:half]) if part)


def _note_failed(batch: Batch, requests: list[Request]) -> None:
    """There are no rows, and those who are told so, or lose their patience now, rode in this batch."""
    batch.failed = True
    for request in requests:
        request.batch = batch
