"""A place of a pool's process where one call runs: to the batcher, a worker whose batches are one call."""

from __future__ import annotations

import time
from typing import Protocol

import numpy as np

from cobatch.batcher.request import Batch
from cobatch.engines.base import Array, RowShapes, Signature
from cobatch.engines.errors import EngineError
from cobatch.engines.worker import Deliver, Job, Outcome
from cobatch.server.pipelines.request import PipelineRequest


class CallEngine:
    """What the batcher knows of a seat: calls have no tensors, and run one at a time."""

    platform = "python"
    max_batch_size = 1
    slots = 1
    signature = Signature((), ())

    def inputs(self, slot: int, rows: int, row_shapes: RowShapes) -> tuple[Array, ...]:
        """Return no buffers."""
        return ()

    def open(self) -> None:
        """Do nothing: the pool starts the process."""

    def enqueue(self, slot: int, rows: int, row_shapes: RowShapes) -> None:
        """Do nothing: the seat sends the call."""

    def wait(self, slot: int) -> tuple[Array, ...]:
        """Return no outputs."""
        return ()

    def close(self) -> None:
        """Do nothing: the pool ends the process."""


class Runner(Protocol):
    """The process of a seat."""

    def begin(self, seat: Seat, request: PipelineRequest) -> None: ...


class Seat:
    """One call at a time of a process."""

    def __init__(self, process: Runner) -> None:
        self.engine = CallEngine()
        self.deliver: Deliver | None = None
        self.warmup_us: dict[int, float] = {}
        self.process = process
        self.request: PipelineRequest | None = None
        self.begun = False  # the process has received the call
        self._job: Job | None = None
        self._started_s = 0.0

    def submit(self, job: Job) -> None:
        """Run a batch, which is one call."""
        assert isinstance(job.context, Batch)
        (request,) = job.context.requests
        assert isinstance(request, PipelineRequest)
        self._job, self.request, self._started_s = job, request, time.monotonic()
        self.begun = False
        self.process.begin(self, request)

    def end(self, error: EngineError | None = None) -> None:
        """Tell the batcher that the call has ended."""
        job, self._job, self.request = self._job, None, None
        if job is None or self.deliver is None:
            return
        outputs = None if error is not None else (_NO_OUTPUT,)
        self.deliver(job, Outcome(outputs, error, self._started_s, time.monotonic(), zeros_run=False))


_NO_OUTPUT = np.empty(1, object)
