"""A lane: one open engine with its worker, its slots and its batches."""

import math
from typing import Protocol

from cobatch.batcher.errors import EngineGoneError
from cobatch.batcher.request import Batch, Timer
from cobatch.batcher.scheduling.tuning import HEALTHY_S
from cobatch.batcher.statistics import EngineTotals
from cobatch.engines.base import Engine
from cobatch.engines.worker import Deliver, Job


class BatchWorker(Protocol):
    """The part of `engines.worker.Worker` that the batcher uses."""

    deliver: Deliver | None
    warmup_us: dict[int, float]

    @property
    def engine(self) -> Engine: ...

    def submit(self, job: Job) -> None: ...


class Lane:
    """One worker and its batches.

    `number`: its place among the model's lanes. `free_s`: when its engine is expected to be idle. `ran_s`:
    when a batch last ran well. `gone`: the error for its callers, once the engine has died.
    """

    def __init__(self, worker: BatchWorker, number: int, totals: EngineTotals) -> None:
        self.worker = worker
        self.number = number
        self.totals = totals
        self.engine = worker.engine
        self.free_slots = list(range(worker.engine.slots))
        self.running: dict[Batch, Job] = {}  # in the order in which they run
        self.free_s = 0.0
        self.ran_s = -math.inf
        self.watch: Timer | None = None
        self.gone: EngineGoneError | None = None

    @property
    def in_slots(self) -> int:
        """Batches that hold a slot: with the engine, or being handed out."""
        return self.engine.slots - len(self.free_slots)

    def ran_recently(self, now_s: float) -> bool:
        """Return whether a batch ran well within the last `HEALTHY_S`."""
        return now_s - self.ran_s < HEALTHY_S
