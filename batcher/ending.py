"""The end: of an engine that dies or hangs, and of the batcher when the server stops.

Nothing that was accepted is lost in either.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

from cobatch.batcher.completion import Answers
from cobatch.batcher.errors import (
    AbandonedError,
    BatcherError,
    DrainingError,
    EngineGoneError,
    ExecutionTimeoutError,
)
from cobatch.batcher.lanes import BatchWorker, Lane, Lanes
from cobatch.batcher.request import Batch, Request
from cobatch.batcher.scheduling.admission import Admission
from cobatch.batcher.scheduling.queue import RequestQueue
from cobatch.batcher.statistics import Counters
from cobatch.engines.errors import EngineError

log = logging.getLogger("cobatch.batcher")


class Ending:
    """Of one model. `lanes` is set by whoever makes it; `on_lost` is told of each worker whose engine
    died or hung, and which; it opens another one and tells `use`, or else `gone`. `decide`: what waits may
    be sent.
    """

    lanes: Lanes

    def __init__(
        self,
        name: str,
        queue: RequestQueue,
        admission: Admission,
        answers: Answers,
        counters: Counters,
        loop: asyncio.AbstractEventLoop,
        *,
        decide: Callable[[], None],
        on_lost: Callable[[BatchWorker, BatcherError], None] | None,
    ) -> None:
        self.name = name
        self._queue = queue
        self._admission = admission
        self._answers = answers
        self._counters = counters
        self._loop = loop
        self._decide = decide
        self._on_lost = on_lost
        self._drained: asyncio.Future[None] | None = None

    async def drain(self, timeout_s: float) -> bool:
        """Accept nothing more and answer what was accepted.

        False if that took longer than `timeout_s`: whatever was not answered by then was answered with
        `AbandonedError`, and what still runs is left to the engine.
        """
        if self._admission.closed is None:
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
        failed = self._counters.failed
        self._fail_all(AbandonedError(f"model {self.name!r} stopped before the request was done"))
        abandoned = self._counters.failed - failed
        log.error("model %s: %d requests were not done within %g s", self.name, abandoned, timeout_s)

    def on_dead(self, lane: Lane, requests: list[Request], error: EngineError) -> None:
        """What kills engines may be what is in these requests, so that they are not tried on another one. The
        other lanes go on with what waits."""
        first = lane.gone is None
        if lane.gone is None:
            lane.gone = self._answers.engine_gone(str(error))
        self._answers.fail_all(requests, lane.gone)
        if self.lanes.lanes:
            self._lanes_changed()
        elif first:
            self._close(lane.gone)
        if first and self._on_lost is not None and self._drained is None:
            self._on_lost(lane.worker, lane.gone)

    def _close(self, gone: EngineGoneError) -> None:
        """There is no engine."""
        self._admission.closed = gone
        # What still runs comes back with an error of its own, or with answers after all.
        waiting = [request for retry in self.lanes.retries for request in retry]
        self.lanes.retries.clear()
        self._answers.fail_all(waiting + self._queue.take_all(), gone)

    def on_hung(self, lane: Lane, batch: Batch, limit_s: float) -> None:
        error = ExecutionTimeoutError(self.name, limit_s)
        log.critical("model %s: a batch of %d rows has not ended: %s", self.name, batch.rows, error)
        self._counters.hung += 1
        self._answers.fail_all(batch.requests, error)
        if self._on_lost is not None and self._admission.closed is None:
            # What waits goes on with the other lanes, or with the engine that is opened in place of this one.
            self._lanes_changed()
            self._on_lost(lane.worker, error)
        elif not self.lanes.lanes:
            self._close(self._answers.engine_gone(str(error)))
        self._decide()
        self.check_drained()

    def use(self, worker: BatchWorker) -> None:
        """Another engine, in place of one that hung or died; what waits goes on."""
        if self._drained is None and isinstance(self._admission.closed, EngineGoneError):
            self._admission.closed = None
        self.lanes.use(worker)
        self._lanes_changed()
        self._decide()

    def gone(self, error: EngineError) -> None:
        """No other engine can be opened in place of one that hung or died."""
        if not self.lanes.lanes:
            self._close(self._answers.engine_gone(str(error)))
            self.check_drained()

    def _lanes_changed(self) -> None:
        self._admission.lanes = max(1, len(self.lanes.lanes))

    def _fail_all(self, error: Exception) -> None:
        waiting = self.lanes.awaited() + self._queue.take_all()
        self.lanes.retries.clear()
        self._answers.fail_all(waiting, error)

    def check_drained(self) -> None:
        """Something has left; it may have been the last that `drain` waits for."""
        if self._drained is None or self._drained.done():
            return
        # A batch that runs for nobody is not waited for: its callers left or were answered already.
        if not self._queue.rows and not self.lanes.awaited():
            self._drained.set_result(None)
