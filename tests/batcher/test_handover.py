"""The batcher and the real worker, two real threads: the handover, its order, and a loop that goes away.

The engine stands at a gate that each test opens; nothing sleeps. `WAIT_S` only bounds a test that would
otherwise hang.
"""

from __future__ import annotations

import asyncio
import logging
import queue
import threading
from collections.abc import AsyncIterator

import numpy as np
import pytest

from cobatch.batcher.batcher import Batcher
from cobatch.batcher.errors import AbandonedError, EngineGoneError, InputRejectedError
from cobatch.engines.base import RowShapes
from cobatch.engines.errors import EngineDeadError, EngineError, EngineRunError
from cobatch.engines.worker import Worker
from tests.support.virtual.loop import Array, Call, FakeEngine

WAIT_S = 60.0


class Gated(FakeEngine):
    """y = 2 * x in buffers that are used again. With the gate shut, a run says so in `began` and stands."""

    def __init__(self, max_batch_size: int = 4, slots: int = 2) -> None:
        super().__init__(max_batch_size, slots)
        self.began: queue.SimpleQueue[list[int]] = queue.SimpleQueue()
        self.gate: threading.Semaphore | None = None
        self.threads: set[str] = set()
        self.outputs: dict[int, Array] = {}
        self._rows: dict[int, int] = {}

    def enqueue(self, slot: int, rows: int, row_shapes: RowShapes) -> None:
        self._rows[slot] = rows

    def wait(self, slot: int) -> tuple[Array, ...]:
        self.threads.add(threading.current_thread().name)
        x = self.buffers[slot][: self._rows[slot]]
        if self.gate is not None:
            self.began.put(x[:, 0].tolist())
            assert self.gate.acquire(timeout=WAIT_S)
        error = self.fails(x)
        if error is not None:
            raise error
        # The rows of the slot's last batch are gone as soon as this one has run.
        y = self.outputs.setdefault(slot, np.zeros((self.max_batch_size, x.shape[1]), np.int64))
        np.multiply(x, 2, out=y[: len(x)])
        return (y[: len(x)],)


class Waiting(Call):
    """A caller with an event for its answer."""

    __slots__ = ("answered", "thread")

    def __init__(self, *values: int) -> None:
        super().__init__([[value] for value in values])
        self.answered = asyncio.Event()
        self.thread = ""

    def done(self) -> None:
        super().done()
        self.thread = threading.current_thread().name
        self.answered.set()

    async def own_rows(self) -> None:
        """Wait for the answer; it must be twice its own rows."""
        await asyncio.wait_for(self.answered.wait(), WAIT_S)
        self.check()


class Stage:
    """An engine, its worker and its batcher on the running loop."""

    def __init__(self, engine: Gated) -> None:
        self.engine = engine
        self.worker = Worker(engine, "fake")
        opened: queue.SimpleQueue[EngineError | None] = queue.SimpleQueue()
        self.worker.start(opened.put)
        assert opened.get(timeout=WAIT_S) is None
        self.worker.warmup_us = {}  # whatever was measured here, batches grow to the engine's limit
        loop = asyncio.get_running_loop()
        self.batcher = Batcher("fake", [self.worker], max_queue_rows=10_000, loop=loop)

    def shut(self) -> None:
        """From now on each run waits for a `go`."""
        self.engine.gate = threading.Semaphore(0)

    def go(self, runs: int = 1) -> None:
        """Let `runs` runs pass the gate."""
        assert self.engine.gate is not None
        self.engine.gate.release(runs)

    async def began(self) -> list[int]:
        """The first column of the next batch that reaches the gate."""
        return await asyncio.to_thread(self.engine.began.get, timeout=WAIT_S)

    def submit(self, *callers: Waiting) -> None:
        for caller in callers:
            self.batcher.submit(caller)

    def end(self) -> None:
        """The worker ends, whatever stands at the gate."""
        if self.engine.gate is not None:
            self.engine.gate.release(1000)
        self.worker.stop()
        assert self.worker.join(WAIT_S)


@pytest.fixture
async def stage() -> AsyncIterator[Stage]:
    made = Stage(Gated())
    yield made
    made.end()


async def test_rows_go_to_the_workers_thread_and_answers_come_back_to_the_loops(stage: Stage) -> None:
    callers = [Waiting(number) for number in range(10)]
    stage.submit(*callers)
    for caller in callers:
        await caller.own_rows()
        assert caller.thread == threading.current_thread().name
    assert stage.engine.threads == {"cobatch-fake"}
    assert stage.batcher.counters.rows == 10


async def test_batches_run_and_are_answered_in_order(stage: Stage) -> None:
    stage.shut()
    first = Waiting(1)
    stage.submit(first)
    assert await stage.began() == [1]
    callers = [Waiting(number) for number in range(2, 12)]
    stage.submit(*callers)
    answered: list[int] = []

    async def note(caller: Waiting) -> None:
        await caller.own_rows()
        answered.append(int(caller.values[0, 0]))

    async with asyncio.TaskGroup() as group:
        for caller in (first, *callers):
            group.create_task(note(caller))
        for expected in ([2, 3, 4, 5], [6, 7, 8, 9], [10, 11]):
            stage.go()
            assert await stage.began() == expected
        stage.go()
    assert answered == list(range(1, 12))
    assert stage.batcher.counters.reasons == {"idle": 2, "full": 2}


async def test_a_full_batch_is_packed_while_another_runs(stage: Stage) -> None:
    stage.shut()
    running = Waiting(1)
    stage.submit(running)
    await stage.began()
    callers = [Waiting(number) for number in range(2, 6)]
    stage.submit(*callers)
    await _iterations(20)  # more than the batcher takes to decide
    assert stage.batcher.running_batches == 2
    assert stage.batcher.queue.rows == 0
    assert stage.engine.began.empty(), "it is only enqueued: the worker runs one after another"
    stage.go(2)
    for caller in (running, *callers):
        await caller.own_rows()


async def test_a_caller_that_leaves_while_its_batch_runs_hears_nothing(stage: Stage) -> None:
    stage.shut()
    leaving, staying = Waiting(1), Waiting(2)
    stage.submit(leaving, staying)
    assert await stage.began() == [1, 2]
    stage.batcher.cancel(leaving)
    stage.go()
    await staying.own_rows()
    assert leaving.answers == []


async def test_a_failing_run_fails_only_the_request_at_fault(
    stage: Stage, caplog: pytest.LogCaptureFixture
) -> None:
    stage.engine.fails = lambda rows: EngineRunError("thirteen") if 13 in rows else None
    callers = [Waiting(number) for number in (12, 13, 14)]
    stage.submit(*callers)
    await asyncio.wait_for(callers[1].answered.wait(), WAIT_S)
    await callers[0].own_rows()
    await callers[2].own_rows()
    assert isinstance(callers[1].answer, InputRejectedError)
    assert callers[1].answer.reference in caplog.text


async def test_an_engine_that_dies_takes_what_waits_for_it_along(stage: Stage) -> None:
    stage.shut()
    stage.engine.fails = lambda rows: EngineDeadError("gone")
    callers = [Waiting(number) for number in range(20)]
    stage.submit(*callers)
    await stage.began()
    stage.go(1000)
    for caller in callers:
        await asyncio.wait_for(caller.answered.wait(), WAIT_S)
        assert isinstance(caller.answer, EngineGoneError)
    with pytest.raises(EngineGoneError):
        stage.submit(Waiting(1))


async def test_draining_leaves_a_run_that_does_not_end_to_the_worker(stage: Stage) -> None:
    stage.shut()
    running, queued = Waiting(1), Waiting(2)
    stage.submit(running)
    await stage.began()
    stage.submit(queued)
    assert not await stage.batcher.drain(0)
    for caller in (running, queued):
        assert isinstance(caller.answer, AbandonedError)
    stage.worker.stop()
    assert not stage.worker.join(0)
    stage.go()
    assert await asyncio.to_thread(stage.worker.join, WAIT_S)
    await _iterations(3)
    assert stage.batcher.running_batches == 0
    assert len(running.answers) == 1


async def test_many_callers_from_many_tasks_each_get_their_own_rows(stage: Stage) -> None:
    async def call(number: int) -> None:
        for turn in range(20):
            start = 10_000 * number + 100 * turn
            caller = Waiting(*range(start, start + (number + turn) % 9 + 1))
            stage.submit(caller)
            if (number + turn) % 11 == 0:
                stage.batcher.cancel(caller)
                assert caller.answers == []
            else:
                await caller.own_rows()

    async with asyncio.TaskGroup() as group:
        for number in range(50):
            group.create_task(call(number))
    assert stage.batcher.queue.rows == 0
    assert await stage.batcher.drain(WAIT_S)
    assert stage.batcher.running_batches == 0


def test_a_batch_that_comes_back_after_the_loop_closed_is_dropped(
    caplog: pytest.LogCaptureFixture,
) -> None:
    kept: list[Stage] = []

    async def main() -> None:
        made = Stage(Gated())
        kept.append(made)
        made.shut()
        made.submit(Waiting(1))
        assert await made.began() == [1]

    with caplog.at_level(logging.WARNING):
        asyncio.run(main())
        (made,) = kept
        made.end()
    assert "a batch came back after the event loop was closed" in caplog.text


async def _iterations(count: int) -> None:
    """Give way to the loop's other work."""
    for _ in range(count):
        await asyncio.sleep(0)
