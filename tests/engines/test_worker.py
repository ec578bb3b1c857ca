"""The worker thread: its life, the order of calls with two slots, and failures.

The engines here are fakes whose runs wait for an event, so each test says what happens when; nothing
sleeps. `WAIT_S` only bounds a test that would otherwise hang.
"""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable
from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import pytest

from cobatch.engines.base import Array, RowShapes, Signature, TensorSpec, batch_sizes
from cobatch.engines.errors import EngineDeadError, EngineError, EngineLoadError, EngineRunError
from cobatch.engines.worker import Job, Outcome, Worker

WAIT_S = 60.0
SHAPES: RowShapes = ((2,),)


class Gated:
    """y = 2 * x, INT64 [rows, 2]. With `gate` set to an event, each run waits for a `release`."""

    platform = "fake"

    def __init__(self, max_batch_size: int = 4, slots: int = 2, fixed_batch: int | None = None) -> None:
        self.max_batch_size = max_batch_size
        self.slots = slots
        specs = (TensorSpec("x", "INT64", (2,)),), (TensorSpec("y", "INT64", (2,)),)
        self.signature = Signature(*specs, fixed_batch)
        self.buffers = [np.full((max_batch_size, 2), -1, np.int64) for _ in range(slots)]
        self.rows = [0] * slots
        self.events: queue.SimpleQueue[str] = queue.SimpleQueue()
        self.threads: set[str] = set()
        self.asynchronous = False
        self.gate: threading.Semaphore | None = None
        self.fails: Callable[[str, Array], None] = lambda what, rows: None
        self.answer: Callable[[Array], Array] = lambda rows: rows * 2

    def _note(self, what: str) -> None:
        self.threads.add(threading.current_thread().name)
        self.events.put(what)

    def open(self) -> None:
        self._note("open")
        self.fails("open", self.buffers[0])

    def inputs(self, slot: int, rows: int, row_shapes: RowShapes) -> tuple[Array, ...]:
        assert row_shapes == SHAPES
        return (self.buffers[slot],)

    def enqueue(self, slot: int, rows: int, row_shapes: RowShapes) -> None:
        self._note(f"enqueue {slot}")
        self.rows[slot] = rows
        self.fails("enqueue", self.buffers[slot][:rows])

    def wait(self, slot: int) -> tuple[Array, ...]:
        self._note(f"wait {slot}")
        if self.gate is not None:
            assert self.gate.acquire(timeout=WAIT_S)
        rows = self.buffers[slot][: self.rows[slot]]
        self.fails("wait", rows)
        return (self.answer(rows),)

    def close(self) -> None:
        self._note("close")
        self.fails("close", self.buffers[0])

    def seen(self) -> list[str]:
        """Return the calls since the last time."""
        return [self.events.get_nowait() for _ in range(self.events.qsize())]

    def next(self) -> str:
        """Wait for the next call."""
        return self.events.get(timeout=WAIT_S)


class Served:
    """An open worker over an engine; records its outcomes and their thread."""

    def __init__(self, engine: Gated) -> None:
        self.engine = engine
        self.outcomes: queue.SimpleQueue[tuple[Job, Outcome, str]] = queue.SimpleQueue()
        self.worker = Worker(engine, "fake")
        self.worker.deliver = self.deliver
        assert start(self.worker) is None
        engine.seen()

    def deliver(self, job: Job, outcome: Outcome) -> None:
        self.outcomes.put((job, outcome, threading.current_thread().name))

    def submit(self, slot: int, value: int, rows: int = 1, explain: bool = False) -> Job:
        self.engine.buffers[slot][:rows] = value
        job = Job(slot, rows, SHAPES, value, explain)
        self.worker.submit(job)
        return job

    def outcome(self, job: Job) -> Outcome:
        """Wait for the next outcome, which must be this job's."""
        got, outcome, _ = self.outcomes.get(timeout=WAIT_S)
        assert got is job
        return outcome

    def end(self) -> None:
        self.worker.stop()
        assert self.worker.join(WAIT_S)


def start(worker: Worker) -> EngineError | None:
    """Start the worker and wait until its engine is open or has failed to open."""
    answers: queue.SimpleQueue[EngineError | None] = queue.SimpleQueue()
    worker.start(answers.put)
    return answers.get(timeout=WAIT_S)


def rejecting(what: str, error: BaseException, value: int) -> Callable[[str, Array], None]:
    """Make an engine raise in this step if a row has the value."""

    def fails(step: str, rows: Array) -> None:
        if step == what and (rows == value).any():
            raise error

    return fails


def test_a_worker_from_start_to_join() -> None:
    engine = Gated(max_batch_size=1)
    served = Served(engine)
    assert served.worker._thread.name == "cobatch-fake"
    assert served.worker._thread.daemon
    outcome = served.outcome(served.submit(0, 21))
    assert outcome.error is None
    assert outcome.outputs is not None
    assert outcome.outputs[0].tolist() == [[42, 42]]
    assert outcome.started_s <= outcome.finished_s
    assert engine.seen() == ["enqueue 0", "wait 0"]
    served.end()
    assert engine.seen() == ["close"]
    assert engine.threads == {"cobatch-fake"}


def test_deliver_may_be_given_at_the_start_and_runs_on_the_workers_thread() -> None:
    delivered: queue.SimpleQueue[str] = queue.SimpleQueue()
    worker = Worker(
        Gated(), "mine", deliver=lambda job, outcome: delivered.put(threading.current_thread().name)
    )
    assert start(worker) is None
    worker.submit(Job(0, 1, SHAPES, None))
    assert delivered.get(timeout=WAIT_S) == "cobatch-mine"
    worker.stop()
    assert worker.join(WAIT_S)


def test_joining_a_worker_that_was_never_started() -> None:
    assert Worker(Gated(), "fake").join(0)


def test_join_times_out_while_a_batch_runs() -> None:
    engine = Gated()
    served = Served(engine)
    engine.gate = threading.Semaphore(0)
    job = served.submit(0, 1)
    assert [engine.next(), engine.next()] == ["enqueue 0", "wait 0"]
    served.worker.stop()
    assert not served.worker.join(0)
    engine.gate.release()
    assert served.outcome(job).error is None
    assert served.worker.join(WAIT_S)


def test_jobs_submitted_before_the_stop_are_delivered() -> None:
    engine = Gated(slots=4)
    served = Served(engine)
    engine.gate = threading.Semaphore(0)
    jobs = [served.submit(slot, slot) for slot in range(4)]
    served.worker.stop()
    engine.gate.release(4)
    assert served.worker.join(WAIT_S)
    for job in jobs:
        outputs = served.outcome(job).outputs
        assert outputs is not None
        assert outputs[0].tolist() == [[job.context * 2] * 2]
    assert engine.seen()[-1] == "close"


def test_the_next_batch_is_enqueued_before_the_wait_for_the_running_one() -> None:
    engine = Gated(slots=2)
    served = Served(engine)
    engine.gate = threading.Semaphore(0)
    first = served.submit(0, 1)
    assert [engine.next(), engine.next()] == ["enqueue 0", "wait 0"]
    # Both arrive during the wait for slot 0; the third is for slot 0 again, as from the batcher.
    second = served.submit(1, 2)
    third = Job(0, 1, SHAPES, 3)
    served.worker.submit(third)
    assert engine.seen() == []
    engine.gate.release()
    served.outcome(first)
    # Slot 0 is free and has a job, which is enqueued before the wait for slot 1.
    assert [engine.next() for _ in range(3)] == ["enqueue 1", "enqueue 0", "wait 1"]
    engine.gate.release()
    served.outcome(second)
    assert engine.next() == "wait 0"
    engine.gate.release()
    served.outcome(third)
    served.end()


def test_an_asynchronous_engine_gets_the_next_batch_during_a_run() -> None:
    engine = Gated(slots=2)
    engine.asynchronous = True
    served = Served(engine)
    # A long run time from the warm-up: the worker waits a minute for jobs unless both slots run.
    served.worker.warmup_us = {4: 60e6}
    first = served.submit(0, 1)
    assert engine.next() == "enqueue 0"
    second = served.submit(1, 2)
    assert [engine.next(), engine.next()] == ["enqueue 1", "wait 0"]
    served.outcome(first)
    # It now waits for a third job; a stop ends the wait.
    assert engine.seen() == []
    served.worker.stop()
    served.outcome(second)
    assert served.worker.join(WAIT_S)


def test_an_asynchronous_engine_is_waited_for_once_it_may_be_done() -> None:
    engine = Gated(slots=2)
    engine.asynchronous = True
    served = Served(engine)
    served.worker.warmup_us = {1: 100.0, 4: 60e6}
    assert served.outcome(served.submit(0, 1)).error is None
    served.end()


def test_waiting_jobs_are_enqueued_before_the_last_outputs_are_delivered() -> None:
    engine = Gated(slots=2)
    served = Served(engine)
    engine.gate = threading.Semaphore(0)
    seen: list[str] = []
    deliver = served.deliver

    def look(job: Job, outcome: Outcome) -> None:
        seen.extend(engine.seen())
        deliver(job, outcome)

    served.worker.deliver = look
    first = served.submit(0, 1)
    assert [engine.next(), engine.next()] == ["enqueue 0", "wait 0"]
    second = served.submit(1, 2)
    engine.gate.release()
    served.outcome(first)
    assert seen == ["enqueue 1"]
    engine.gate.release()
    served.outcome(second)
    served.end()


def test_an_engine_that_dies_in_its_warm_up_is_not_served() -> None:
    engine = Gated()
    engine.fails = rejecting("wait", EngineDeadError("gone"), 0)
    worker = Worker(engine, "fake")
    assert isinstance(start(worker), EngineDeadError)
    assert worker.join(WAIT_S)
    assert engine.seen()[-1] == "close"


def test_at_most_one_batch_per_slot_runs() -> None:
    engine = Gated(slots=2)
    served = Served(engine)
    engine.gate = threading.Semaphore(0)
    jobs = [served.submit(0, 1)]
    assert [engine.next(), engine.next()] == ["enqueue 0", "wait 0"]
    for slot in (1, 0, 1):
        jobs.append(Job(slot, 1, SHAPES, None))
        served.worker.submit(jobs[-1])
    engine.gate.release(4)
    for job in jobs:
        served.outcome(job)
    served.end()
    running = 0
    for event in engine.seen():
        running += event.startswith("enqueue") - event.startswith("wait")
        assert running <= 2


def test_a_batch_behind_another_starts_when_that_one_ends() -> None:
    engine = Gated(slots=3)
    served = Served(engine)
    engine.gate = threading.Semaphore(0)
    jobs = [served.submit(slot, slot) for slot in range(3)]
    engine.gate.release(3)
    outcomes = [served.outcome(job) for job in jobs]
    for before, after in pairwise(outcomes):
        assert before.finished_s <= after.started_s <= after.finished_s
    served.end()


@pytest.mark.parametrize("step", ["enqueue", "wait"])
def test_a_failing_batch_fails_alone(step: str) -> None:
    engine = Gated()
    served = Served(engine)
    engine.fails = rejecting(step, EngineRunError("bad row"), 13)
    good, bad = served.submit(0, 1), served.submit(1, 13)
    # A batch that cannot be enqueued fails at once, perhaps before the running one ends.
    got = [served.outcomes.get(timeout=WAIT_S)[:2] for _ in range(2)]
    outcomes = dict(got)
    assert outcomes[good].error is None
    failed = outcomes[bad]
    assert (failed.outputs, str(failed.error)) == (None, "bad row")
    again = served.submit(1, 5)
    outputs = served.outcome(again).outputs
    assert outputs is not None
    assert outputs[0].tolist() == [[10, 10]]
    served.end()


@pytest.mark.parametrize("step", ["enqueue", "wait"])
def test_any_exception_becomes_an_engine_error(step: str) -> None:
    engine = Gated()
    served = Served(engine)
    engine.fails = rejecting(step, MemoryError("no more"), 13)
    error = served.outcome(served.submit(0, 13)).error
    assert isinstance(error, EngineRunError)
    assert str(error) == "MemoryError: no more"
    assert served.outcome(served.submit(0, 1)).error is None
    served.end()


class UnprintableError(Exception):
    def __str__(self) -> str:
        raise TypeError("no text")


@pytest.mark.parametrize("step", ["enqueue", "wait"])
def test_an_error_without_a_text_fails_its_batch_only(step: str) -> None:
    """The thread would end, and the batcher wait for ever."""
    served = Served(engine := Gated())
    engine.fails = rejecting(step, UnprintableError(), 13)
    error = served.outcome(served.submit(0, 13)).error
    assert isinstance(error, EngineRunError)
    assert str(error) == "UnprintableError"
    assert served.outcome(served.submit(0, 1)).error is None
    served.end()


@pytest.mark.parametrize("step", ["enqueue", "wait"])
def test_an_engine_that_would_end_the_thread_is_dead(step: str) -> None:
    """Nothing would tell the batcher, which would wait for ever."""
    served = Served(engine := Gated())
    engine.fails = rejecting(step, SystemExit(3), 13)
    error = served.outcome(served.submit(0, 13, explain=True)).error
    assert isinstance(error, EngineDeadError)
    assert str(error) == "SystemExit: 3"
    assert served.outcome(served.submit(0, 1)).error is None, "the thread goes on until it is stopped"
    served.end()


@pytest.mark.parametrize("step", ["enqueue", "wait"])
@pytest.mark.parametrize(
    ("zeros", "explain", "expected"),
    [(None, True, True), (None, False, None), (EngineRunError("also zeros"), True, False)],
)
def test_zeros_tell_the_fault_of_the_values(
    step: str, zeros: EngineError | None, explain: bool, expected: bool | None
) -> None:
    served = Served(engine := Gated())
    bad = rejecting(step, EngineRunError("bad row"), 13)
    also = rejecting(step, zeros, 0) if zeros is not None else bad

    def fails(what: str, rows: Array) -> None:
        bad(what, rows)
        also(what, rows)

    engine.fails = fails
    outcome = served.outcome(job := served.submit(1, 13, rows=3, explain=explain))
    assert (str(outcome.error), outcome.zeros_run) == ("bad row", expected)
    assert (outcome.started_s <= job.zeros_started_s <= outcome.finished_s) == explain
    assert engine.rows[1] == 3, "as many rows, since the size may be the reason"
    assert served.outcome(served.submit(1, 5)).error is None
    served.end()


def test_zeros_that_kill_the_engine() -> None:
    served = Served(engine := Gated())
    bad, dead = rejecting("wait", EngineRunError("bad row"), 13), EngineDeadError("gone")

    def fails(what: str, rows: Array) -> None:
        bad(what, rows)
        rejecting("wait", dead, 0)(what, rows)

    engine.fails = fails
    assert served.outcome(served.submit(0, 13, explain=True)).error is dead
    served.end()


def test_an_engine_error_is_passed_on_unchanged() -> None:
    engine = Gated()
    served = Served(engine)
    dead = EngineDeadError("gone")
    engine.fails = rejecting("wait", dead, 13)
    assert served.outcome(served.submit(0, 13)).error is dead
    served.end()


@pytest.mark.parametrize("rows", [1, 3])
def test_outputs_with_a_wrong_number_of_rows_are_not_delivered(rows: int) -> None:
    engine = Gated()
    served = Served(engine)
    engine.answer = lambda x: np.zeros((rows, 2), np.int64)
    outcome = served.outcome(served.submit(0, 1, rows=2))
    assert outcome.outputs is None
    assert isinstance(outcome.error, EngineRunError)
    assert "'y' does not follow the batch axis: 2 rows gave shape" in str(outcome.error)
    served.end()


def test_a_raising_deliver_is_logged_and_the_next_batch_runs(caplog: pytest.LogCaptureFixture) -> None:
    served = Served(Gated())
    failed = threading.Event()

    def deliver(job: Job, outcome: Outcome) -> None:
        failed.set()
        raise ValueError("the receiver's own")

    served.worker.deliver = deliver
    served.submit(0, 1)
    assert failed.wait(WAIT_S)
    served.worker.deliver = served.deliver
    assert served.outcome(served.submit(1, 2)).error is None
    served.end()
    assert "cobatch-fake: delivering a batch failed" in caplog.text


@pytest.mark.parametrize(
    "error", [EngineLoadError("no such file"), OSError("disk"), SystemExit("3"), UnprintableError()]
)
def test_an_engine_that_cannot_be_opened_is_closed_and_the_thread_ends(
    error: BaseException, caplog: pytest.LogCaptureFixture
) -> None:
    engine = Gated()

    def fails(what: str, rows: Array) -> None:
        if what == "open":
            raise error

    engine.fails = fails
    worker = Worker(engine, "fake")
    failure = start(worker)
    assert isinstance(failure, EngineLoadError)
    text = "UnprintableError" if isinstance(error, UnprintableError) else str(error)
    assert text in str(failure)
    assert worker.join(WAIT_S)
    assert engine.seen() == ["open", "close"]
    assert ("opening the engine failed" in caplog.text) == (not isinstance(error, EngineError))


def test_a_close_that_fails_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    engine = Gated()
    served = Served(engine)
    engine.fails = rejecting("close", ValueError("stuck"), 0)
    served.submit(0, 0)
    served.end()
    assert "cobatch-fake: closing the engine failed" in caplog.text


def test_batch_sizes() -> None:
    assert batch_sizes(None, 1) == [1]
    assert batch_sizes(None, 8) == [1, 2, 4, 8]
    assert batch_sizes(None, 12) == [1, 2, 4, 8, 12]
    assert batch_sizes(5, 5) == [5]


def test_warm_up_times_every_size_with_zeros() -> None:
    engine = Gated(max_batch_size=6)
    rows_seen: set[tuple[int, int]] = set()
    engine.fails = lambda what, rows: (
        rows_seen.add((len(rows), int(abs(rows).max()))) if what == "wait" else None
    )
    worker = Worker(engine, "fake")
    assert start(worker) is None
    worker.stop()
    assert worker.join(WAIT_S)
    assert rows_seen == {(1, 0), (2, 0), (4, 0), (6, 0)}
    assert sorted(worker.warmup_us) == [1, 2, 4, 6]


def test_warm_up_keeps_the_best_time(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Gated(max_batch_size=1)
    now_s = 0.0
    took_s = iter([5e-3, 2e-3, 3e-3])
    monkeypatch.setattr("cobatch.engines.worker._WARMUP_RUNS", 3)
    monkeypatch.setattr("cobatch.engines.worker.time", SimpleNamespace(monotonic=lambda: now_s))

    def answer(rows: Array) -> Array:
        nonlocal now_s
        now_s += next(took_s)
        return rows

    engine.answer = answer
    worker = Worker(engine, "fake")
    assert start(worker) is None
    worker.stop()
    assert worker.join(WAIT_S)
    assert worker.warmup_us == {1: pytest.approx(2000)}


def test_warm_up_of_a_slow_model_skips_to_the_largest_size(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Gated(max_batch_size=64)
    now_s = 0.0
    monkeypatch.setattr("cobatch.engines.worker.time", SimpleNamespace(monotonic=lambda: now_s))

    def answer(rows: Array) -> Array:
        nonlocal now_s
        now_s += len(rows)
        return rows

    engine.answer = answer
    worker = Worker(engine, "fake")
    assert start(worker) is None
    worker.stop()
    assert worker.join(WAIT_S)
    assert worker.warmup_us == {1: 1e6, 2: 2e6, 64: 64e6}
    assert engine.seen().count("wait 0") == 3


def test_a_warm_up_that_fails_on_zeros_is_only_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    engine = Gated()
    engine.fails = rejecting("wait", EngineRunError("zero"), 0)
    with caplog.at_level(logging.WARNING):
        served = Served(engine)
    assert served.worker.warmup_us == {}
    assert "warm-up with 1 rows of zeros failed: zero" in caplog.text
    engine.fails = rejecting("wait", EngineRunError("13"), 13)
    assert served.outcome(served.submit(0, 13, explain=True)).zeros_run is None
    assert served.outcome(served.submit(0, 1)).error is None
    served.end()


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (lambda rows: rows.sum(), "output 'y' does not follow the batch axis: 1 rows gave shape []"),
        (lambda rows: rows[:1], "output 'y' does not follow the batch axis: 2 rows gave shape [1, 2]"),
        (lambda rows: rows @ rows.T, "the row shape depends on the number of rows"),
    ],
)
def test_outputs_that_cannot_be_split_into_rows_fail_the_load(
    answer: Callable[[Array], Array], message: str
) -> None:
    engine = Gated()
    engine.answer = answer
    worker = Worker(engine, "fake")
    error = start(worker)
    assert isinstance(error, EngineLoadError)
    assert message in str(error)
    assert worker.join(WAIT_S)
    assert engine.seen()[-1] == "close"
