"""The engine's stand-in: takes as long as its profile says, in virtual time, and computes nothing."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator

import numpy as np

from cobatch.batcher.simulator.clock import VirtualLoop
from cobatch.batcher.simulator.profile import Profile
from cobatch.engines.base import Array, RowShapes, Signature
from cobatch.engines.jobs import Deliver, Job, Outcome

_CHUNK = 4096


class Clockwork:
    """How long runs take. All policies of a comparison draw the same numbers in the same order."""

    def __init__(self, profile: Profile, seed: int) -> None:
        self._profile = profile
        self._numbers = self._drawn(np.random.default_rng([seed, 2]))
        self._busy_s = 0.0
        self._ends_s = 0.0

    @staticmethod
    def _drawn(rng: np.random.Generator) -> Iterator[float]:
        while True:
            yield from rng.random(_CHUNK).tolist()

    def run_s(self, rows: int, began_s: float) -> float:
        """Of the next run, which begins now, or has while the loop did something else."""
        run_s = self._profile.draw_s(rows, next(self._numbers))
        self._busy_s += run_s
        self._ends_s = began_s + run_s
        return run_s

    def busy_until(self, now_s: float) -> float:
        """How long runs have taken so far, all together."""
        return self._busy_s - max(0.0, self._ends_s - now_s)


class SimulatedEngine:
    """What the batcher asks of an engine: how large batches may be, and how many it holds."""

    platform = "simulated"
    signature = Signature(inputs=(), outputs=(), fixed_batch=None)

    def __init__(self, max_batch_size: int, slots: int) -> None:
        self.max_batch_size = max_batch_size
        self.slots = slots

    def inputs(self, slot: int, rows: int, row_shapes: RowShapes) -> tuple[Array, ...]:  # noqa: ARG002
        """No inputs: nothing to pack."""
        return ()

    def open(self) -> None:
        """Nothing to open."""

    def enqueue(self, slot: int, rows: int, row_shapes: RowShapes) -> None:
        """The worker keeps the time."""

    def wait(self, slot: int) -> tuple[Array, ...]:  # noqa: ARG002
        """The same."""
        return ()

    def close(self) -> None:
        """Nothing to close."""


class SimulatedWorker:
    """Runs one batch after another, as `engines.worker.Worker` does.

    `handover_s`: how long a batch is on its way from the loop to the engine, and its outcome back.
    """

    def __init__(
        self,
        profile: Profile,
        *,
        max_batch_size: int,
        slots: int,
        loop: VirtualLoop,
        clockwork: Clockwork,
        handover_s: float = 0.0,
    ) -> None:
        self.engine = SimulatedEngine(max_batch_size, slots)
        self.deliver: Deliver | None = None
        self.warmup_us = warmup_us(profile, max_batch_size)
        self._loop = loop
        self._clockwork = clockwork
        self._handover_s = handover_s
        self._waiting: deque[Job] = deque()
        self._busy = False

    def submit(self, job: Job) -> None:
        """Run this job after those submitted before."""
        at_s = self._loop.now_s
        if self._handover_s:
            at_s += self._handover_s
            self._loop.call_at(at_s, self._arrive, job, at_s)
        else:
            self._arrive(job, at_s)

    # The engine does not wait for the loop: what happens here happens at its own time, however late the loop
    # comes to call it.

    def _arrive(self, job: Job, at_s: float) -> None:
        self._waiting.append(job)
        if not self._busy:
            self._start(at_s)

    def _start(self, at_s: float) -> None:
        self._busy = True
        job = self._waiting.popleft()
        end_s = at_s + self._clockwork.run_s(job.rows, at_s)
        self._loop.call_at(end_s, self._end, job, at_s, end_s)

    def _end(self, job: Job, started_s: float, ended_s: float) -> None:
        outcome = Outcome((), None, started_s, ended_s)
        if self._waiting:
            self._start(ended_s)
        else:
            self._busy = False
        deliver: Callable[[Job, Outcome], None] | None = self.deliver
        assert deliver is not None
        if self._handover_s:
            self._loop.call_at(ended_s + self._handover_s, deliver, job, outcome)
        else:
            deliver(job, outcome)


def warmup_us(profile: Profile, max_batch_size: int) -> dict[int, float]:
    """What the warm-up would have found: the best time of each power of two, and of the largest."""
    sizes = {1 << n for n in range(max_batch_size.bit_length()) if 1 << n <= max_batch_size}
    return {rows: profile.quantile_s(rows, 0.0) * 1e6 for rows in sorted({*sizes, max_batch_size})}
