"""Virtual time: an event loop whose clock jumps to the next timer, and a worker that runs in it.

A test of minutes takes milliseconds, nothing sleeps, and deadlines are exact.
"""

from __future__ import annotations

import asyncio
import selectors
from collections import deque
from collections.abc import Callable, Coroutine, Sequence
from typing import Any

import numpy as np

from cobatch.batcher.batcher import Batcher
from cobatch.batcher.request import Request
from cobatch.engines.base import RowShapes, Signature, TensorSpec
from cobatch.engines.errors import EngineError
from cobatch.engines.worker import Deliver, Job, Outcome

Array = np.ndarray[Any, Any]


class _JumpingSelector(selectors.SelectSelector):
    def __init__(self) -> None:
        super().__init__()
        self.now_s = 0.0

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        events = super().select(0)
        if not events:
            if timeout is None:
                raise RuntimeError("deadlock: no timer and no event is left")
            self.now_s += max(0.0, timeout)
        return events


class VirtualLoop(asyncio.SelectorEventLoop):
    """An event loop that starts at 0 s; its time advances only while all tasks wait."""

    def __init__(self) -> None:
        self._jumping = _JumpingSelector()
        super().__init__(self._jumping)

    def time(self) -> float:
        return self._jumping.now_s


def run(main: Coroutine[Any, Any, None]) -> None:
    """Run a test's coroutine in virtual time."""
    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        runner.run(main)


class FakeEngine:
    """Input "x" INT64 [rows, width], output "y" = 2 * x. `fails` returns the error of a batch, if any."""

    platform = "fake"

    def __init__(self, max_batch_size: int = 8, slots: int = 2) -> None:
        self.max_batch_size = max_batch_size
        self.slots = slots
        self.signature = Signature(
            inputs=(TensorSpec("x", "INT64", (-1,)),),
            outputs=(TensorSpec("y", "INT64", (-1,)),),
            fixed_batch=None,
        )
        self.fails: Callable[[Array], EngineError | None] = lambda rows: None
        self.buffers: dict[int, Array] = {}

    def open(self) -> None:
        """Do nothing."""

    def inputs(self, slot: int, rows: int, row_shapes: RowShapes) -> tuple[Array, ...]:
        buffer = np.full((self.max_batch_size, *row_shapes[0]), -1, np.int64)
        self.buffers[slot] = buffer
        return (buffer,)

    def enqueue(self, slot: int, rows: int, row_shapes: RowShapes) -> None:
        """Do nothing."""

    def wait(self, slot: int) -> tuple[Array, ...]:
        raise AssertionError("the fake worker computes")

    def close(self) -> None:
        """Do nothing."""


class FakeWorker:
    """Runs jobs one after another in virtual time. `ran` lists (start, rows) of each. Zeros run for
    `zeros_s` where a failure is to be explained."""

    def __init__(self, engine: FakeEngine, run_s: Callable[[int], float] = lambda rows: 0.010) -> None:
        self.engine = engine
        self.deliver: Deliver | None = None
        # A predicted run time near 0, so that no deadline is refused as unreachable.
        self.warmup_us: dict[int, float] = {engine.max_batch_size: 1e-3}
        self.run_s = run_s
        self.zeros_s = 0.0
        self.ran: list[tuple[float, int]] = []
        self._waiting: deque[Job] = deque()
        self._busy = False

    def submit(self, job: Job) -> None:
        assert job.rows <= self.engine.max_batch_size
        self._waiting.append(job)
        if not self._busy:
            self._start()

    def _start(self) -> None:
        self._busy = True
        loop = asyncio.get_running_loop()
        job = self._waiting.popleft()
        started_s = loop.time()
        self.ran.append((started_s, job.rows))
        loop.call_later(self.time_s(job), self._end, job, started_s)

    def time_s(self, job: Job) -> float:
        """Return the run time of a job."""
        return self.run_s(job.rows)

    def _end(self, job: Job, started_s: float) -> None:
        rows = self.engine.buffers[job.slot][: job.rows]
        error = self.engine.fails(rows)
        loop = asyncio.get_running_loop()
        outcome = Outcome(None if error else (rows * 2,), error, started_s, loop.time())
        if error is None or not job.explain:
            self._deliver(job, outcome)
            return
        outcome.zeros_run = self.engine.fails(np.zeros_like(rows)) is None
        job.zeros_started_s = loop.time()
        if self.zeros_s:
            outcome.finished_s += self.zeros_s
            loop.call_later(self.zeros_s, self._deliver, job, outcome)
        else:
            self._deliver(job, outcome)

    def _deliver(self, job: Job, outcome: Outcome) -> None:
        assert self.deliver is not None
        self.deliver(job, outcome)
        self._busy = False
        if self._waiting:
            self._start()


class Call(Request):
    """A request that records its answers and their time."""

    __slots__ = ("answers", "at_s", "value", "values")

    def __init__(self, values: Sequence[Sequence[int]]) -> None:
        rows = np.array(values, np.int64)
        super().__init__(len(rows), (rows.shape[1:],), [rows.tobytes()])
        self.values = rows
        self.answers: list[Array | Exception] = []
        self.at_s = -1.0

    def done(self) -> None:
        self.at_s = asyncio.get_running_loop().time()
        if self.error is not None:
            self.answers.append(self.error)
        else:
            assert self.batch is not None
            end = self.first_row + self.rows
            self.answers.append(np.array(self.batch.outputs[0][self.first_row : end]))

    @property
    def answer(self) -> Array | Exception:
        """The only answer."""
        (answer,) = self.answers
        return answer

    def check(self) -> None:
        """Check that it was answered once, with twice its own rows."""
        assert isinstance(self.answer, np.ndarray), self.answer
        assert np.array_equal(self.answer, self.values * 2)


def make_batcher(worker: FakeWorker, *, max_queue_rows: int = 1000, **options: Any) -> Batcher:
    """Create a batcher on the running virtual loop."""
    loop = asyncio.get_running_loop()
    return Batcher("fake", [worker], max_queue_rows=max_queue_rows, loop=loop, clock=loop.time, **options)


def calls(count: int, width: int = 2) -> list[Call]:
    """Return one-row requests with distinct values."""
    return [Call([[1000 * n + column for column in range(width)]]) for n in range(count)]
