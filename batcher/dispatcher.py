"""The way to the engine and back: slots, packing, the worker, handing out, trying halves again.

A slot belongs to a batch from `send` until its rows are handed out, since callers read the slot's
output buffers until then. When a batch comes back, `decide` is called first of all, so that the engine
has its next batch before the answers of this one are written.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Callable
from typing import Protocol

from batcher.answers import Answers
from batcher.counters import Counters
from batcher.packing import pack
from batcher.policy import RETRY
from batcher.request import Batch, Request, State
from engines.base import Engine
from engines.errors import EngineDeadError, EngineError
from engines.worker import Deliver, Job, Outcome

log = logging.getLogger("cobatch.batcher")

# How fast the estimate of the time per row follows the engine: weight of the newest batch.
_PACE_WEIGHT = 0.2


class BatchWorker(Protocol):
    """What the batcher needs of `engines.worker.Worker`."""

    deliver: Deliver | None
    warmup_us: dict[int, float]

    @property
    def engine(self) -> Engine: ...

    def submit(self, job: Job) -> None: ...


class Dispatcher:
    """Of one model. `decide` is called when a slot may be filled, `on_dead` when the engine is gone."""

    def __init__(
        self,
        worker: BatchWorker,
        answers: Answers,
        counters: Counters,
        loop: asyncio.AbstractEventLoop,
        clock: Callable[[], float],
        *,
        decide: Callable[[], None],
        on_dead: Callable[[EngineError], None],
    ) -> None:
        self.free_slots = list(range(worker.engine.slots))
        self.running: set[Batch] = set()
        self.retries: deque[list[Request]] = deque()
        rows, run_us = min(worker.warmup_us.items(), default=(1, 1000.0))
        self.row_s = run_us / rows / 1e6
        self._worker = worker
        self._engine = worker.engine
        self._answers = answers
        self._counters = counters
        self._loop = loop
        self._clock = clock
        self._decide = decide
        self._on_dead = on_dead
        worker.deliver = self._deliver

    @property
    def in_slots(self) -> int:
        """Batches that hold a slot: with the engine, or being handed out."""
        return self._engine.slots - len(self.free_slots)

    def awaited(self) -> list[Request]:
        """The requests that were sent, or wait to be sent again, and that somebody waits for."""
        sent = [*self.retries, *(batch.requests for batch in self.running)]
        return [request for requests in sent for request in requests if request.state is State.RUNNING]

    def send(self, requests: list[Request], reason: str) -> None:
        """Pack a batch into a free slot and give it to the worker. There must be a free slot."""
        row_shapes = requests[0].row_shapes
        batch = Batch(requests, sum([request.rows for request in requests]), row_shapes, reason)
        slot = self.free_slots.pop()
        self.running.add(batch)
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
        batch.dispatched_s = self._clock()
        self._worker.submit(job)

    def send_retry(self) -> None:
        """Send the next half of a batch that failed, unless its callers are gone."""
        requests = [request for request in self.retries.popleft() if request.state is State.RUNNING]
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
        self.running.discard(batch)
        batch.started_s = outcome.started_s
        batch.finished_s = outcome.finished_s
        if outcome.error is not None:
            self._on_error(batch, outcome.error)
        else:
            assert outcome.outputs is not None
            batch.outputs = outcome.outputs
            self.row_s += _PACE_WEIGHT * ((batch.finished_s - batch.started_s) / batch.rows - self.row_s)
            self._decide()
            began_s = self._clock()
            self._hand_out(batch)
            self._counters.batch(batch, self._clock() - began_s)
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
                finish(request)

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
