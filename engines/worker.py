"""The worker: one named thread per engine, the only one that opens, runs and closes it.

It takes jobs from a queue and passes an `Outcome` for each to `deliver`, on its own thread, without asyncio.
While the engine has free slots the next job is enqueued during a run, so that an engine with asynchronous
execution is never idle. The Python work per batch is a few calls, since it competes with the event loop for
the interpreter lock.
"""

import logging
import queue
import threading
import time
from collections import deque
from collections.abc import Callable
from math import inf
from typing import Any, Never

import msgspec

from cobatch.engines.base import Array, Engine, RowShapes, batch_sizes
from cobatch.engines.errors import BadRequest, EngineDeadError, EngineError, EngineLoadError, EngineRunError

log = logging.getLogger("cobatch.worker")

_WARMUP_S = 2.0
_WARMUP_RUNS = 20
_SHORTEST_RUN = 0.9  # of the shortest known run time: hardly any run is shorter
_TIMER_DELAY_S = 0.00005  # delay of a thread that wakes up from a timed wait
_SHORTER_WEIGHT, _LONGER_WEIGHT = 0.3, 0.05  # of a new run time that is below or above the average
_OVERLAPPING_STAGES = 3  # copying in, running and copying out of three batches overlap at best


class Job(msgspec.Struct, eq=False):
    """A batch whose rows lie in a slot's input buffers. `context` is for the batcher's own use.

    `explain`: if it fails, find out whether zeros would too. `zeros_started_s`: when that run began.
    """

    slot: int
    rows: int
    row_shapes: RowShapes
    context: Any
    explain: bool = False
    zeros_started_s: float = -inf


class Outcome(msgspec.Struct, eq=False):
    """Outputs or error of a job, and its start and end in `time.monotonic` seconds.

    `zeros_run`: zeros in the same shapes ran right after the error, so the values are at fault; None if that
    was not tried, or the model refuses zeros. `lasting`: the outputs stay valid.
    """

    outputs: tuple[Array, ...] | None
    error: EngineError | None
    started_s: float
    finished_s: float
    zeros_run: bool | None = None
    lasting: bool = False


Deliver = Callable[[Job, Outcome], None]


class Worker:
    """Call `start` once, `submit` after its callback without an error, `stop` once, `join`.

    `deliver` must be set before the first `submit`. `warmup_us` maps batch sizes to the shortest run time of
    the warm-up in microseconds.
    """

    def __init__(self, engine: Engine, name: str, deliver: Deliver | None = None) -> None:
        self.engine = engine
        self.deliver = deliver
        self.warmup_us: dict[int, float] = {}
        self._jobs: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._main, name=f"cobatch-{name}", daemon=True)
        self._on_open: Callable[[EngineError | None], None] = lambda error: None
        self._asynchronous = bool(getattr(engine, "asynchronous", False))
        self._outputs_last = False  # known once the engine is open
        # Run time of batches enqueued behind another, by the bit length of their size.
        self._behind_s: dict[int, float] = {}
        self._running: deque[tuple[Job, float]] = deque()
        self._stopping = False
        self._finished_s = 0.0
        self._output_shapes: dict[str, tuple[int, ...]] = {}

    def start(self, on_open: Callable[[EngineError | None], None]) -> None:
        """Start the thread, which opens and warms up the engine and then calls `on_open`.

        Raises EngineLoadError if the system has no thread left.
        """
        self._on_open = on_open
        try:
            self._thread.start()
        except RuntimeError as error:
            raise EngineLoadError(f"its thread cannot be started: {error}") from error

    def submit(self, job: Job) -> None:
        """Run this job after all jobs submitted before."""
        self._jobs.put(job)

    def stop(self) -> None:
        """End the thread after all jobs submitted so far have been run and delivered."""
        self._jobs.put(None)

    def join(self, timeout_s: float) -> bool:
        """Wait for the thread's end. True if it has ended or was never started."""
        if self._thread.ident is None:
            return True
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def _main(self) -> None:
        try:
            error = self._open()
            self._on_open(error)
            if error is None:
                self._run()
        finally:
            try:
                self.engine.close()
            except BaseException:
                log.exception("%s: closing the engine failed", self._thread.name)

    def _open(self) -> EngineError | None:
        try:
            self.engine.open()
            self._outputs_last = bool(getattr(self.engine, "outputs_last", False))
            self._warm_up()
        except EngineError as error:
            return error
        except BaseException as error:
            log.exception("%s: opening the engine failed", self._thread.name)
            return EngineLoadError(f"opening failed: {_text(error)}")
        return None

    def _run(self) -> None:
        running = self._running
        slots = self.engine.slots
        while running or not self._stopping:
            if not self._stopping and len(running) < slots and self._enqueue_next(self._wait_for_job_s()):
                continue
            if running:
                self._finish(*running.popleft())

    def _wait_for_job_s(self) -> float | None:
        """Return the longest time to wait for another job; None without a limit.

        An asynchronous engine takes the next batch while one runs, but the thread cannot wait for a job and
        for the engine at once. So it waits for a job as long as the running batch will likely take, and for
        the engine from then on.
        """
        if not self._running:
            return None
        if not self._asynchronous:
            return 0.0
        job, started_s = self._running[0]
        least_s = min([us for size, us in self.warmup_us.items() if size >= job.rows], default=0.0) / 1e6
        if started_s < self._finished_s:
            # Enqueued behind another batch, so its copies may be done already.
            started_s = self._finished_s
            least_s = self._behind_s.get(job.rows.bit_length(), least_s / _OVERLAPPING_STAGES)
        return started_s + least_s * _SHORTEST_RUN - _TIMER_DELAY_S - time.monotonic()

    def _enqueue_next(self, wait_s: float | None) -> bool:
        """Wait for a job and enqueue it. False if none arrived in time."""
        wait = wait_s is None or wait_s > 0
        if not wait and self._jobs.empty():
            return False  # an exception would take a microsecond
        try:
            job = self._jobs.get(timeout=wait_s) if wait else self._jobs.get_nowait()
        except queue.Empty:
            return False
        if job is None:
            self._stopping = True
            return True
        started_s = time.monotonic()
        try:
            self.engine.enqueue(job.slot, job.rows, job.row_shapes)
        except BaseException as error:  # noqa: BLE001 - any error of an engine fails only its batch
            self._deliver(job, self._failed(job, error, started_s))
        else:
            self._running.append((job, started_s))
        return True

    def _finish(self, job: Job, started_s: float) -> None:
        # The engine runs one batch at a time: this one did not start before the last one ended.
        behind = started_s < self._finished_s
        started_s = max(started_s, self._finished_s)
        wait_started_s = time.monotonic() if self._asynchronous else inf
        try:
            outputs = self.engine.wait(job.slot)
            for spec, output in zip(self.engine.signature.outputs, outputs, strict=True):
                # Callers get rows by number: with a row too few they would get another caller's answer.
                if not output.ndim or len(output) != job.rows:
                    _refuse(spec.name, output, job.rows, EngineRunError)
        except BaseException as error:  # noqa: BLE001 - see above
            outcome = self._failed(job, error, started_s)
        else:
            outcome = Outcome(outputs, None, started_s, time.monotonic(), None, self._outputs_last)
        self._finished_s = outcome.finished_s
        # After a real wait the end of the wait is the end of the run.
        waited = outcome.finished_s - wait_started_s > _TIMER_DELAY_S
        if waited and behind and outcome.error is None:
            self._learn(job.rows.bit_length(), outcome.finished_s - started_s)
        # Start waiting jobs first: the engine is idle, and this batch's callers lose a few microseconds.
        while not self._jobs.empty() and not self._stopping and len(self._running) < self.engine.slots:
            self._enqueue_next(0.0)
        self._deliver(job, outcome)

    def _failed(self, job: Job, error: BaseException, started_s: float) -> Outcome:
        outcome = Outcome(None, _as_engine_error(error), started_s, 0.0)
        if job.explain and self.warmup_us and not isinstance(outcome.error, EngineDeadError | BadRequest):
            job.zeros_started_s = time.monotonic()
            try:
                self._run_zeros(job.slot, job.rows, job.row_shapes)
                outcome.zeros_run = True
            except BaseException as again:  # noqa: BLE001 - the engine is at fault, or the shape
                outcome.zeros_run = False
                if isinstance(second := _as_engine_error(again), EngineDeadError):
                    outcome.error = second
        outcome.finished_s = time.monotonic()
        return outcome

    def _learn(self, size: int, run_s: float) -> None:
        """Average the run time of batches of about this size behind another, biased to short times."""
        known_s = self._behind_s.get(size, run_s)
        weight = _SHORTER_WEIGHT if run_s < known_s else _LONGER_WEIGHT
        self._behind_s[size] = known_s + (run_s - known_s) * weight

    def _deliver(self, job: Job, outcome: Outcome) -> None:
        assert self.deliver is not None
        try:
            self.deliver(job, outcome)
        except Exception:
            log.exception("%s: delivering a batch failed", self._thread.name)

    def _warm_up(self) -> None:
        """Run batches of zeros at sizes 1, 2, 4, ... and keep the shortest time of each size.

        Rounds over all sizes spread a slow second of the machine over the sizes. They end after _WARMUP_S. If
        the first round takes longer it skips to the largest size, which always runs: a lack of memory must
        show at load.
        """
        engine = self.engine
        shapes = tuple(spec.least_row for spec in engine.signature.inputs)
        sizes = batch_sizes(engine.signature.fixed_batch, engine.max_batch_size)
        until_s = time.monotonic() + _WARMUP_S
        for _ in range(_WARMUP_RUNS):
            for rows in sizes:
                late = time.monotonic() > until_s and bool(self.warmup_us)
                if late and (rows != sizes[-1] or rows in self.warmup_us):
                    continue
                try:
                    self._warm_up_once(rows, shapes)
                except (EngineLoadError, EngineDeadError):
                    raise
                except Exception as error:  # noqa: BLE001 - the model may refuse zeros only
                    log.warning(
                        "%s: warm-up with %d rows of zeros failed: %s", self._thread.name, rows, error
                    )
                    return

    def _run_zeros(self, slot: int, rows: int, shapes: RowShapes) -> tuple[tuple[Array, ...], float]:
        """Run zeros in a slot; return the outputs and the time from its start in microseconds."""
        engine = self.engine
        for buffer in engine.inputs(slot, rows, shapes):
            buffer[:rows] = b"" if buffer.dtype == object else 0
        started_s = time.monotonic()
        engine.enqueue(slot, rows, shapes)
        outputs = engine.wait(slot)
        return outputs, (time.monotonic() - started_s) * 1e6

    def _warm_up_once(self, rows: int, shapes: RowShapes) -> None:
        engine = self.engine
        outputs, us = self._run_zeros(0, rows, shapes)
        for spec, output in zip(engine.signature.outputs, outputs, strict=True):
            if not output.ndim or len(output) != rows:
                _refuse(spec.name, output, rows, EngineLoadError)
            known = self._output_shapes.setdefault(spec.name, output.shape[1:])
            if known != output.shape[1:]:
                raise EngineLoadError(
                    f"output {spec.name!r}: the row shape depends on the number of rows: {list(known)} "
                    f"and, with {rows} rows, {list(output.shape[1:])}"
                )
        self.warmup_us[rows] = min(us, self.warmup_us.get(rows, us))


def _refuse(name: str, output: Array, rows: int, error: type[EngineError]) -> Never:
    raise error(
        f"output {name!r} does not follow the batch axis: {rows} rows gave shape {list(output.shape)}"
    )


def _as_engine_error(error: BaseException) -> EngineError:
    if isinstance(error, EngineError):
        return error
    # An engine that ends its thread, as by `sys.exit`, is dead: the thread goes on only to say so.
    kind = EngineRunError if isinstance(error, Exception) else EngineDeadError
    return kind(_text(error))


def _text(error: BaseException) -> str:
    name = type(error).__name__
    try:
        return f"{name}: {error}"
    except Exception:  # noqa: BLE001 - its own code; without an outcome the batcher would wait for ever
        return name
