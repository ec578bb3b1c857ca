"""The way to the engine and back: slots, packing, the worker, handing out, trying halves again.

A slot belongs to a batch from `send` until its rows are handed out, since callers read the slot's
output buffers until then. When a batch comes back and others wait, the engine is given its next one before
the answers of this one are written; when nobody waits, what can be done after them is.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Callable
from typing import Protocol

from batcher.answers import Answers
from batcher.counters import Counters
from batcher.fair import Share
from batcher.latency import LatencyModel
from batcher.packing import pack
from batcher.padding import Pad, cut_back
from batcher.policy import RETRY
from batcher.request import Batch, Request, State
from engines.base import Engine
from engines.errors import EngineDeadError, EngineError
from engines.worker import Deliver, Job, Outcome

log = logging.getLogger("cobatch.batcher")


class BatchWorker(Protocol):
    """What the batcher needs of `engines.worker.Worker`."""

    deliver: Deliver | None
    warmup_us: dict[int, float]

    @property
    def engine(self) -> Engine: ...

    def submit(self, job: Job) -> None: ...


class Dispatcher:
    """Of one model. `decide` is called when a slot may be filled, `on_dead` when the engine is gone,
    `on_hung` when a batch has not ended within `execution_timeout_s`, `on_late` with a request that is not
    sent again because it would be too late.

    With each batch that ran `on_idle` is called first, to send the engine its next one before the answers
    are written; it says whether it has done what `on_ran` does, which is called after them else.
    """

    def __init__(
        self,
        worker: BatchWorker,
        answers: Answers,
        counters: Counters,
        loop: asyncio.AbstractEventLoop,
        clock: Callable[[], float],
        *,
        latency: LatencyModel,
        decide: Callable[[], None],
        on_dead: Callable[[EngineError], None],
        on_idle: Callable[[Batch], bool],
        on_ran: Callable[[Batch], None],
        on_hung: Callable[[Batch, float], None],
        on_late: Callable[[Request], None],
        execution_timeout_s: float | None = None,
    ) -> None:
        self.running: dict[Batch, None] = {}  # in the order in which they run
        self.retries: deque[list[Request]] = deque()
        self.free_s = 0.0  # when the engine is expected to have run what it has
        self._latency = latency
        self._on_idle = on_idle
        self._on_ran = on_ran
        self._on_hung = on_hung
        self._on_late = on_late
        self._execution_timeout_s = execution_timeout_s
        self._watch: asyncio.TimerHandle | None = None
        self._answers = answers
        self._counters = counters
        self._loop = loop
        self._clock = clock
        self._decide = decide
        self._on_dead = on_dead
        self.use(worker)

    def use(self, worker: BatchWorker) -> None:
        """Send to this worker from now on. What another still runs is not waited for any more."""
        self._worker = worker
        self._engine = worker.engine
        self.free_slots = list(range(worker.engine.slots))
        worker.deliver = self._deliver

    @property
    def in_slots(self) -> int:
        """Batches that hold a slot: with the engine, or being handed out."""
        return self._engine.slots - len(self.free_slots)

    def awaited(self) -> list[Request]:
        """The requests that were sent, or wait to be sent again, and that somebody waits for."""
        sent = [*self.retries, *(batch.requests for batch in self.running)]
        return [request for requests in sent for request in requests if request.state is State.RUNNING]

    def send(self, requests: list[Request], reason: str, shares: dict[Share, int] | None = None) -> None:
        """Pack a batch into a free slot and give it to the worker. There must be a free slot."""
        row_shapes = requests[0].row_shapes
        rows = requests[0].rows if len(requests) == 1 else sum([request.rows for request in requests])
        batch = Batch(requests, rows, row_shapes, reason)
        if shares is not None:
            batch.shares = shares
        slot = self.free_slots.pop()
        self.running[batch] = None
        batch.gathered_s = self._clock()
        job = Job(slot, batch.rows, row_shapes, batch)
        try:
            pack(requests, self._engine.inputs(slot, batch.rows, row_shapes))
        except Exception as error:
            # Nothing was sent, so the batch fails here, like one that the engine refused.
            log.exception("packing a batch failed")
            outcome = Outcome(None, EngineError(f"packing failed: {error!r}"), self._clock(), self._clock())
            self._loop.call_soon(self._on_outcome, job, outcome)
            return
        batch.dispatched_s = now_s = self._clock()
        self.free_s = max(self.free_s, now_s) + self._latency.expected_s(batch.rows)
        self._worker.submit(job)
        if self._execution_timeout_s is not None and self._watch is None:
            self._watch_next()

    def _watch_next(self) -> None:
        """See to it that the batch that runs now ends; one behind it has not begun."""
        if self._watch is not None:
            self._watch.cancel()
            self._watch = None
        limit_s = self._execution_timeout_s
        if limit_s is not None and self.running:
            batch = next(iter(self.running))
            self._watch = self._loop.call_later(limit_s, self._give_up, batch, limit_s)

    def _give_up(self, batch: Batch, limit_s: float) -> None:
        """The engine hangs. Its slots are its own until it comes back, if ever: nothing is free."""
        self._watch = None
        self.free_slots.clear()
        waiting = [one.requests for one in self.running if one is not batch]
        self.running.clear()
        # They have not begun, and are as good as they were.
        self.retries.extendleft(reversed(waiting))
        self._on_hung(batch, limit_s)

    def send_retry(self) -> None:
        """Send the next half of a batch that failed, but for those whose callers are gone and those who would
        be too late."""
        requests = []
        start_s = max(self._clock(), self.free_s)
        for request in self.retries.popleft():
            if request.state is not State.RUNNING:
                continue
            if request.deadline_s < start_s + self._latency.expected_s(request.rows):
                self._on_late(request)
            else:
                requests.append(request)
        if requests:
            self._counters.retries += 1
            self.send(requests, RETRY)

    def _deliver(self, job: Job, outcome: Outcome) -> None:
        """Called on the worker's thread: the one place where a thread calls into the loop."""
        try:
            self._loop.call_soon_threadsafe(self._on_outcome, job, outcome)
        except RuntimeError:
            log.warning("a batch came back after the event loop was closed")

    def _on_outcome(self, job: Job, outcome: Outcome) -> None:
        batch = job.context
        assert isinstance(batch, Batch)
        if batch not in self.running:
            return  # it was given up, and its slot with it
        del self.running[batch]
        if self._watch is not None:
            self._watch_next()
        # What is behind it begins now, however long it was expected to take.
        left_s = sum([self._latency.expected_s(one.rows) for one in self.running]) if self.running else 0.0
        self.free_s = self._clock() + left_s
        batch.started_s = outcome.started_s
        batch.finished_s = outcome.finished_s
        if outcome.error is not None:
            self._on_error(batch, outcome.error)
        else:
            assert outcome.outputs is not None
            batch.outputs = outcome.outputs
            learnt = self._on_idle(batch)
            began_s = self._clock()
            self._hand_out(batch)
            self._counters.batch(batch, self._clock() - began_s)
            if not learnt:
                self._on_ran(batch)
            # Whoever keeps the batch must not keep the outputs, and batch and requests not each other.
            batch.outputs = ()
            batch.memo = {}
            batch.requests = []
        self.free_slots.append(job.slot)
        self._decide()

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
            request.batch = None
            self._answers.fail_run(request, f"its outputs cannot be cut back: {error!r}")
        else:
            self._answers.finish(request)
            if own is not None:
                own.outputs = ()
                own.memo = {}

    def _on_error(self, batch: Batch, error: EngineError) -> None:
        requests = [request for request in batch.requests if request.state is State.RUNNING]
        self._counters.failed_runs += 1
        if isinstance(error, EngineDeadError):
            self.retries.appendleft(requests)
            self._on_dead(error)
        elif len(batch.requests) > 1:
            # Also with one left: what failed may have been the rows of somebody who is gone by now.
            half = len(requests) // 2
            self.retries.extendleft(part for part in (requests[half:], requests[:half]) if part)
        elif requests:
            self._answers.fail_run(requests[0], str(error))
