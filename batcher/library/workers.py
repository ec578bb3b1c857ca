"""Workers of batched functions: a thread for a function, tasks for a coroutine function.

A worker belongs to the batcher of one event loop. Its thread has no reference to it while it waits, so the
garbage collector may take it, with batcher and loop; the thread ends then.
"""

from __future__ import annotations

import asyncio
import contextvars
import time
import weakref
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Any

import numpy as np

from cobatch.batcher.library.call import Gathered
from cobatch.batcher.request import Batch
from cobatch.engines.base import Array
from cobatch.engines.errors import EngineError
from cobatch.engines.function import FunctionEngine, FunctionWorker, as_caller_error
from cobatch.engines.worker import Deliver, Job, Outcome


class _Worker:
    """What both have in common: the items of calls that were cancelled are not run."""

    def __init__(self, engine: FunctionEngine) -> None:
        self.engine = engine
        self.deliver: Deliver | None = None
        self.warmup_us: dict[int, float] = {}
        self._places: dict[int, Array] = {}  # of the results of a slot's batch of which some are missing

    def _fill(self, job: Job) -> bool:
        """Give the engine the items of a batch; return False if none is left, and the batch has ended."""
        batch = job.context
        assert isinstance(batch, Batch)
        requests: list[Any] = batch.requests  # each is a Call or Gathered
        items = list(requests[0].items)  # the function may change it
        for request in requests[1:]:
            items += request.items
        if True in [isinstance(request, Gathered) and request.pending.left > 0 for request in requests]:
            live = [not future.done() for request in requests for future in request.futures]
            items = [item for item, is_live in zip(items, live, strict=True) if is_live]
            job.rows = len(items)
            self._places[job.slot] = np.maximum(np.cumsum(live) - 1, 0)  # any result will do for the others
        self.engine.fill(job.slot, items)
        if not items:
            now_s = time.monotonic()
            self.hand_over(job, Outcome((np.empty(1, object),), None, now_s, now_s))
        return bool(items)

    def hand_over(self, job: Job, outcome: Outcome) -> None:
        """Deliver an outcome, with a result for each row."""
        places = self._places.pop(job.slot, None)
        if places is not None and outcome.outputs is not None:
            outcome.outputs = (outcome.outputs[0][places],)
        if self.deliver is not None:
            self.deliver(job, outcome)


class ThreadWorker(_Worker):
    """Runs a function in a thread of its own. `name` is the function's; `ready` is called by the thread, once
    the engine is open."""

    def __init__(self, engine: FunctionEngine, name: str) -> None:
        super().__init__(engine)
        self.ready: Callable[[], object] = lambda: None
        this = weakref.ref(self)

        def deliver(job: Job, outcome: Outcome) -> None:
            worker = this()
            if worker is not None:
                worker.hand_over(job, outcome)

        def on_open(_: EngineError | None) -> None:  # a FunctionEngine has none
            worker = this()
            if worker is not None:
                with suppress(RuntimeError):  # the loop is closed
                    worker.ready()

        self._worker = FunctionWorker(engine, name, deliver)
        self._on_open = on_open
        self.stop = weakref.finalize(self, self._worker.stop)

    def start(self) -> None:
        """Start the thread, which opens the engine."""
        self._worker.start(self._on_open)

    def submit(self, job: Job) -> None:
        """Run a batch."""
        if self._fill(job):
            self._worker.submit(job)

    def join(self, timeout_s: float) -> None:
        """Wait for the thread's end, after `stop`."""
        self._worker.join(timeout_s)


class TaskWorker(_Worker):
    """Runs a coroutine function on the event loop, one batch at a time."""

    def __init__(
        self,
        engine: FunctionEngine,
        name: str,
        function: Callable[[Any], Awaitable[Any]],
        loop: asyncio.AbstractEventLoop,
    ) -> None:
        engine.slots = 1
        super().__init__(engine)
        self._name = name
        self._function = function
        self._loop = loop
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Do nothing: there is no thread."""

    def submit(self, job: Job) -> None:
        """Run a batch, in no caller's context."""
        if self._fill(job):
            self._task = self._loop.create_task(self._run(job), context=contextvars.Context())

    async def _run(self, job: Job) -> None:
        outputs, error = None, None
        started_s = time.monotonic()
        try:
            results = await self._function(self.engine.take(job.slot))
            outputs = (self.engine.checked(results, job.rows),)
        except BaseException as raised:
            error = as_caller_error(raised, self._name)
            if isinstance(raised, asyncio.CancelledError | SystemExit | KeyboardInterrupt):
                raise
        finally:
            self.hand_over(job, Outcome(outputs, error, started_s, time.monotonic()))
            error = None  # its traceback refers to this frame, a cycle

    def stop(self) -> None:
        """Cancel the batch that runs."""
        if self._task is not None:
            self._task.cancel()

    def join(self, timeout_s: float) -> None:
        """Do nothing: there is no thread."""
