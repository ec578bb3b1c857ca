"""The event loop's thread, the worker thread and a GPU in virtual time, with the real batcher and worker.

The worker's code runs on its own thread, but never in parallel with another: instead of blocking for a job or
the GPU it hands over to the machine, which continues with the next event in virtual time. Callbacks of the
loop take the time given to `spend`, during which the worker and the GPU go on.
"""

from __future__ import annotations

import asyncio
import queue
import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from heapq import heappop, heappush
from types import SimpleNamespace
from typing import Any, cast
from unittest import mock

import numpy as np

from cobatch.batcher.batcher import Batcher
from cobatch.batcher.request import Request
from cobatch.batcher.simulator.clock import Timer
from cobatch.engines.base import Array, RowShapes, Signature, TensorSpec
from cobatch.engines.errors import EngineError
from cobatch.engines.worker import Job, Worker

WAIT_S = 60.0


class Machine:
    """The virtual clock, the event loop, and the hand-over between its thread and the worker thread."""

    def __init__(self) -> None:
        self.now_s = 0.0
        self._events: list[tuple[float, int, Timer]] = []
        self._number = 0
        self._posted: deque[tuple[Callable[..., object], tuple[Any, ...]]] = deque()
        self._turning = False
        self._loop_s: float | None = None  # the loop's time during one of its callbacks
        self._loop_free_s = 0.0
        self._mine = threading.Semaphore(0)
        self._workers = threading.Semaphore(0)

    def time(self) -> float:
        """Return the time of the caller: the loop in a callback, or the worker."""
        return self.now_s if self._loop_s is None else self._loop_s

    def at(self, time_s: float, callback: Callable[..., object], *args: Any) -> Timer:
        """Schedule an event that does not depend on the loop."""
        timer = Timer(callback, args)
        self._number += 1
        heappush(self._events, (time_s, self._number, timer))
        return timer

    # The loop's methods that the batcher uses

    def call_soon(self, callback: Callable[..., object], *args: Any) -> None:
        self._posted.append((callback, args))
        if not self._turning:
            self._turning = True
            self.at(max(self.time(), self._loop_free_s), self._turn)

    call_soon_threadsafe = call_soon

    def call_later(self, delay_s: float, callback: Callable[..., object], *args: Any) -> Timer:
        timer = Timer(callback, args)

        def due() -> None:
            if timer.callback is not None:
                self.call_soon(timer.callback, *timer.args)

        self.at(self.time() + delay_s, due)
        return timer

    def spend(self, seconds: float) -> None:
        """Advance the loop's time in the running callback; before the machine runs, nothing takes time."""
        if self._loop_s is not None:
            self._loop_s += seconds

    def _turn(self) -> None:
        callback, args = self._posted.popleft()
        self._loop_s = self.now_s
        callback(*args)
        self._loop_free_s, self._loop_s = self._loop_s, None
        self._turning = bool(self._posted)
        if self._turning:
            self.at(self._loop_free_s, self._turn)

    # The worker's thread

    def block(self, until_s: float | None) -> Timer | None:
        """On the worker thread: block until this time, or until `wake`."""
        timer = None if until_s is None else self.at(until_s, self.wake)
        self._mine.release()
        assert self._workers.acquire(timeout=WAIT_S)
        return timer

    def wake(self) -> None:
        """Run the worker until it blocks again."""
        self._workers.release()
        assert self._mine.acquire(timeout=WAIT_S)

    def started(self) -> None:
        """Run the worker thread, which was just started, until it blocks."""
        assert self._mine.acquire(timeout=WAIT_S)

    def ended(self) -> None:
        """On the worker thread: end it without blocking."""
        self._mine.release()

    def run(self, end_s: float) -> None:
        """Run until this time, or until no event is left."""
        while self._events and self._events[0][0] <= end_s:
            time_s, _, timer = heappop(self._events)
            if timer.callback is not None:
                self.now_s = max(self.now_s, time_s)
                timer.callback(*timer.args)
        self.now_s = max(self.now_s, end_s)


class Jobs:
    """The worker's queue. A job arrives after `handover_s`, the time to wake a thread."""

    def __init__(self, machine: Machine, handover_s: float) -> None:
        self._machine = machine
        self._handover_s = handover_s
        self._jobs: deque[Job | None] = deque()
        self._waits = False

    def put(self, job: Job | None) -> None:
        self._machine.at(self._machine.time() + self._handover_s, self._arrive, job)

    def _arrive(self, job: Job | None) -> None:
        self._jobs.append(job)
        if self._waits:
            self._machine.wake()

    def get(self, timeout: float | None = None) -> Job | None:
        if not self._jobs:
            self._waits = True
            timer = self._machine.block(None if timeout is None else self._machine.now_s + timeout)
            self._waits = False
            if timer is not None:
                timer.cancel()
        return self.get_nowait()

    def empty(self) -> bool:
        return not self._jobs

    def get_nowait(self) -> Job | None:
        if not self._jobs:
            raise queue.Empty
        return self._jobs.popleft()


@dataclass(frozen=True)
class Times:
    """Durations in seconds per batch: of the GPU (copy in, run, copy out), of the loop (pack, deliver) and of
    the worker (enqueue, notice the end of a batch, and wake up: `handover_s`)."""

    run_s: float
    in_s: float = 0.0
    out_s: float = 0.0
    pack_s: float = 0.0
    deliver_s: float = 0.0
    enqueue_s: float = 30e-6
    notice_s: float = 30e-6
    handover_s: float = 30e-6


class PipelineEngine:
    """A GPU with a copy engine for each direction and one for kernels. Each row's output is the row."""

    platform = "pipeline"

    def __init__(self, machine: Machine, times: Times, slots: int, max_batch_size: int) -> None:
        self.machine = machine
        self.times = times
        self.slots = slots
        self.max_batch_size = max_batch_size
        self.asynchronous = True
        spec = TensorSpec("x", "INT64", (1,))
        self.signature = Signature((spec,), (TensorSpec("y", "INT64", (1,)),))
        self.buffers = [np.zeros((max_batch_size, 1), np.int64) for _ in range(slots)]
        self.ran: list[tuple[float, float]] = []  # start and end of each batch's kernels
        self.batch_rows: list[int] = []
        self._rows = [0] * slots
        self._done_s = [0.0] * slots
        self._free_s = [0.0, 0.0, 0.0]

    def open(self) -> None:
        """Do nothing."""

    def inputs(self, slot: int, rows: int, row_shapes: RowShapes) -> tuple[Array, ...]:
        self.machine.spend(self.times.pack_s)
        return (self.buffers[slot],)

    def enqueue(self, slot: int, rows: int, row_shapes: RowShapes) -> None:
        self.machine.block(self.machine.now_s + self.times.enqueue_s)
        self._rows[slot] = rows
        self.batch_rows.append(rows)
        end_s = self.machine.now_s
        for stage, stage_s in enumerate((self.times.in_s, self.times.run_s, self.times.out_s)):
            start_s = max(end_s, self._free_s[stage])
            self._free_s[stage] = end_s = start_s + stage_s
            if stage == 1:
                self.ran.append((start_s, end_s))
        self._done_s[slot] = end_s

    def wait(self, slot: int) -> tuple[Array, ...]:
        machine = self.machine
        machine.block(max(machine.now_s, self._done_s[slot]) + self.times.notice_s)
        return (self.buffers[slot][: self._rows[slot]],)

    def close(self) -> None:
        self.machine.ended()


class Caller(Request):
    """A closed-loop client: sends the next request after each answer."""

    __slots__ = ("answered", "ask", "cost_s", "machine", "value")

    def __init__(self, machine: Machine, value: int, ask: Callable[[Caller], None], cost_s: float) -> None:
        super().__init__(1, ((1,),), [np.array([value], np.int64).tobytes()])
        self.machine = machine
        self.value = value
        self.ask = ask
        self.cost_s = cost_s
        self.answered = False

    def done(self) -> None:
        assert self.error is None, self.error
        assert self.batch is not None
        assert int(self.batch.outputs[0][self.first_row, 0]) == self.value, "somebody else's row"
        assert not self.answered
        self.answered = True
        self.machine.spend(self.cost_s)
        self.ask(self)


@dataclass
class Figures:
    """Results of a run's second half. `idle`: share of time without a running kernel."""

    idle: float
    batches: int
    rows: float


def simulate(
    times: Times,
    *,
    slots: int = 2,
    callers: int = 192,
    max_batch_size: int = 64,
    seconds: float = 0.4,
    asynchronous: bool = True,
) -> Figures:
    """Run the pipeline with closed-loop clients."""
    machine = Machine()
    with _virtual(machine) as worker_time:
        engine = PipelineEngine(machine, times, slots, max_batch_size)
        engine.asynchronous = asynchronous
        worker = Worker(engine, "pipeline")
        worker._jobs = cast("queue.SimpleQueue[Job | None]", Jobs(machine, times.handover_s))
        opened: list[EngineError | None] = []
        worker.start(opened.append)
        machine.started()
        while not opened:
            machine.run(machine.now_s + 0.1)
        assert opened == [None]
        engine.ran.clear()
        engine.batch_rows.clear()
        _load(machine, worker, times, callers, machine.now_s + seconds)
        worker.stop()
        machine.run(machine.now_s + 1.0)
        assert worker.join(WAIT_S)
        assert worker_time.calls > 0
    half = len(engine.ran) // 2
    ran = engine.ran[half:-slots]
    rows = engine.batch_rows[half:-slots]
    span_s = ran[-1][1] - ran[0][0]
    busy_s = sum(end_s - start_s for start_s, end_s in ran)
    return Figures(1 - busy_s / span_s, len(ran), sum(rows) / len(rows))


def _load(machine: Machine, worker: Worker, times: Times, callers: int, end_s: float) -> None:
    batcher = Batcher(
        "pipeline",
        [worker],
        max_queue_rows=100 * callers,
        loop=cast("asyncio.AbstractEventLoop", machine),
        clock=machine.time,
    )
    numbers = iter(range(10**9))
    cost_s = times.deliver_s / worker.engine.max_batch_size

    def again(caller: Caller | None = None) -> None:
        if machine.time() < end_s:
            machine.call_soon(batcher.submit, Caller(machine, next(numbers), again, cost_s))

    for _ in range(callers):
        again()
    machine.run(end_s)
    machine.run(end_s + 1.0)
    assert not batcher.queue.rows
    assert not batcher.running_batches


@contextmanager
def _virtual(machine: Machine) -> Iterator[SimpleNamespace]:
    """Replace the worker's clock with the machine's."""
    seen = SimpleNamespace(calls=0)

    def monotonic() -> float:
        seen.calls += 1
        return machine.time()

    with mock.patch("cobatch.engines.worker.time", SimpleNamespace(monotonic=monotonic)):
        yield seen
