"""The worker: one named thread per engine, which alone opens, runs and closes it.

It takes jobs from a queue and gives an `Outcome` for each to `deliver`, on its own thread. It knows
nothing of asyncio: what `deliver` does with it is the caller's matter. The next job is enqueued while
the running one runs, as far as the engine has slots, so that an engine with asynchronous execution
never runs dry. The Python work per batch is kept to a few calls, since it
competes with the event loop for the interpreter lock.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections import deque
from collections.abc import Callable

from cobatch.engines.base import Array, Engine
from cobatch.engines.errors import EngineDeadError, EngineError, EngineLoadError, EngineRunError
from cobatch.engines.jobs import Deliver, Job, Outcome

log = logging.getLogger("cobatch.worker")

_WARMUP_S = 2.0
_WARMUP_RUNS = 20
# What part of the least time known a run is hardly ever shorter than, and what a timer is late by.
_LIKELY = 0.9
_TIMER_S = 0.00005


class Worker:
    """Life: `start` once, `submit` after it called back without an error, `stop` once, `join`.

    `deliver` must be set before the first `submit`. `warmup_us` maps rows to the best microseconds
    that a run of so many took during the warm-up.
    """

    def __init__(self, engine: Engine, name: str, deliver: Deliver | None = None) -> None:
        self.engine = engine
        self.deliver = deliver
        self.warmup_us: dict[int, float] = {}
        self._jobs: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._main, name=f"cobatch-{name}", daemon=True)
        self._on_open: Callable[[EngineError | None], None] = lambda error: None
        # See `Engine`: whether what was enqueued runs before it is waited for.
        self._asynchronous = bool(getattr(engine, "asynchronous", False))
        self._behind_s: dict[int, float] = {}
        self._running: deque[tuple[Job, float]] = deque()
        self._stopping = False
        self._finished_s = 0.0
        self._seen: dict[str, tuple[int, ...]] = {}

    def start(self, on_open: Callable[[EngineError | None], None]) -> None:
        """Start the thread; it opens and warms the engine and then calls `on_open` from there."""
        self._on_open = on_open
        self._thread.start()

    def submit(self, job: Job) -> None:
        """Run this job after those submitted before."""
        self._jobs.put(job)

    def stop(self) -> None:
        """Let the thread end once everything submitted so far has been run and delivered."""
        self._jobs.put(None)

    def join(self, timeout_s: float) -> bool:
        """Wait for the thread's end; whether it has come. True as well if it was never started."""
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
            except Exception:
                log.exception("%s: closing the engine failed", self._thread.name)

    def _open(self) -> EngineError | None:
        try:
            self.engine.open()
            self._warm_up()
        except EngineError as error:
            return error
        except Exception as error:
            log.exception("%s: opening the engine failed", self._thread.name)
            return EngineLoadError(f"opening failed: {error!r}")
        return None

    def _run(self) -> None:
        running = self._running
        slots = self.engine.slots
        while running or not self._stopping:
            if not self._stopping and len(running) < slots and self._begin_next(self._patience_s()):
                continue
            if running:
                self._finish(*running.popleft())

    def _patience_s(self) -> float | None:
        """How long to wait for another job. None: until there is one.

        An engine that runs by itself takes the next batch while one runs, and then needs nobody when that
        one ends; but the thread cannot wait for a job and for the engine at once. So it waits for a job as
        long as the batch that runs is likely to need, and for the engine from then on.
        """
        if not self._running:
            return None
        if not self._asynchronous:
            return 0.0
        job, started_s = self._running[0]
        least_s = min([us for size, us in self.warmup_us.items() if size >= job.rows], default=0.0) / 1e6
        if started_s < self._finished_s:
            # It was enqueued behind another: its copies may be done. At best copying in, running and
            # copying out of three batches overlap; what they do is learned from those that were waited for.
            started_s = self._finished_s
            least_s = self._behind_s.get(job.rows.bit_length(), least_s / 3)
        return started_s + least_s * _LIKELY - _TIMER_S - time.monotonic()

    def _begin_next(self, patience_s: float | None) -> bool:
        """Take a job, once there is one, and enqueue it. False where none came."""
        try:
            if patience_s is None or patience_s > 0:
                job = self._jobs.get(timeout=patience_s)
            else:
                job = self._jobs.get_nowait()
        except queue.Empty:
            return False
        if job is None:
            self._stopping = True
            return True
        started_s = time.monotonic()
        try:
            self.engine.enqueue(job.slot, job.rows, job.row_shapes)
        except Exception as error:  # noqa: BLE001 - whatever an engine raises is its batch's alone
            self._give(job, Outcome(None, _as_engine_error(error), started_s, time.monotonic()))
        else:
            self._running.append((job, started_s))
        return True

    def _finish(self, job: Job, started_s: float) -> None:
        # An engine that runs one after another did not begin this one before the last one's end.
        behind = started_s < self._finished_s
        started_s = max(started_s, self._finished_s)
        waits_s = time.monotonic()
        try:
            outputs = self.engine.wait(job.slot)
            for spec, output in zip(self.engine.signature.outputs, outputs, strict=True):
                # Rows are handed to callers by number: a row too few would be a stranger's answer.
                _check_rows(spec.name, output, job.rows, EngineRunError)
        except Exception as error:  # noqa: BLE001 - the same
            outcome = Outcome(None, _as_engine_error(error), started_s, time.monotonic())
        else:
            outcome = Outcome(outputs, None, started_s, time.monotonic())
        self._finished_s = outcome.finished_s
        if (
            self._asynchronous
            and behind
            and outcome.error is None
            and outcome.finished_s - waits_s > _TIMER_S
        ):
            # It was not done before it was waited for, so this is when it was done.
            self._learn(job.rows.bit_length(), outcome.finished_s - started_s)
        # What waits goes first: the engine is idle, and this batch's callers lose a few microseconds.
        while not self._jobs.empty() and not self._stopping and len(self._running) < self.engine.slots:
            self._begin_next(0.0)
        self._give(job, outcome)

    def _learn(self, size: int, run_s: float) -> None:
        """How long batches of about this size take behind another, rather too short than too long."""
        known_s = self._behind_s.get(size, run_s)
        self._behind_s[size] = known_s + (run_s - known_s) * (0.3 if run_s < known_s else 0.05)

    def _give(self, job: Job, outcome: Outcome) -> None:
        assert self.deliver is not None
        try:
            self.deliver(job, outcome)
        except Exception:
            log.exception("%s: delivering a batch failed", self._thread.name)

    def _warm_up(self) -> None:
        """Run zeros at sizes 1, 2, 4, ... and keep each size's best time.

        In rounds over all sizes, so that a slow second of the machine does not fall on one size
        alone. The rounds end with the budget. A model so slow that the first round does not fit skips
        to the largest size, which always runs: memory that is not there had better show at load.
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
                except Exception as error:  # noqa: BLE001 - zeros may be no valid input; others may be
                    log.warning("%s: warming up with %d rows of zeros: %s", self._thread.name, rows, error)
                    return

    def _warm_up_once(self, rows: int, shapes: tuple[tuple[int, ...], ...]) -> None:
        engine = self.engine
        for buffer in engine.inputs(0, rows, shapes):
            buffer[:rows] = b"" if buffer.dtype == object else 0
        started_s = time.monotonic()
        engine.enqueue(0, rows, shapes)
        outputs = engine.wait(0)
        us = (time.monotonic() - started_s) * 1e6
        for spec, output in zip(engine.signature.outputs, outputs, strict=True):
            _check_rows(spec.name, output, rows, EngineLoadError)
            seen = self._seen.setdefault(spec.name, output.shape[1:])
            if seen != output.shape[1:]:
                raise EngineLoadError(
                    f"output {spec.name!r}: the shape of a row depends on how many rows there are: "
                    f"{list(seen)} and, with {rows} rows, {list(output.shape[1:])}"
                )
        self.warmup_us[rows] = min(us, self.warmup_us.get(rows, us))


def batch_sizes(fixed_batch: int | None, max_batch_size: int) -> list[int]:
    """The sizes to time: powers of two up to the largest and the largest; a fixed size alone."""
    if fixed_batch is not None:
        return [max_batch_size]
    sizes = [1 << n for n in range(max_batch_size.bit_length()) if 1 << n <= max_batch_size]
    return sizes if sizes[-1] == max_batch_size else [*sizes, max_batch_size]


def _check_rows(name: str, output: Array, rows: int, error: type[EngineError]) -> None:
    if output.ndim == 0 or output.shape[0] != rows:
        raise error(
            f"output {name!r} does not follow the batch axis: {rows} rows gave shape {list(output.shape)}"
        )


def _as_engine_error(error: Exception) -> EngineError:
    return error if isinstance(error, EngineError) else EngineRunError(f"{type(error).__name__}: {error}")
