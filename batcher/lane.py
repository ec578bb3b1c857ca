"""A lane: one open engine with its worker, its slots, and what runs there.

A model has one, or one for each instance of it (`instances`, `devices`); all are fed from one queue, by
whichever is free first.
"""

from __future__ import annotations

from typing import Protocol

from cobatch.batcher.errors import EngineGoneError
from cobatch.batcher.request import Batch, Timer
from cobatch.batcher.statistics import EngineFigures
from cobatch.engines.base import Engine
from cobatch.engines.jobs import Deliver, Job


class BatchWorker(Protocol):
    """What the batcher needs of `engines.worker.Worker`."""

    deliver: Deliver | None
    warmup_us: dict[int, float]

    @property
    def engine(self) -> Engine: ...

    def submit(self, job: Job) -> None: ...


class Lane:
    """Of one worker. `free_s`: when its engine is expected to have run what it has. `gone`: what its
    callers are told, once the engine has died. `number`: its place among the model's lanes; the lane that is
    opened instead of it inherits that, and `figures` with it."""

    __slots__ = ("engine", "figures", "free_s", "free_slots", "gone", "number", "running", "watch", "worker")

    def __init__(self, worker: BatchWorker, number: int, figures: EngineFigures) -> None:
        self.worker = worker
        self.number = number
        self.figures = figures
        self.engine = worker.engine
        self.free_slots = list(range(worker.engine.slots))
        self.running: dict[Batch, None] = {}  # in the order in which they run
        self.free_s = 0.0
        self.watch: Timer | None = None
        self.gone: EngineGoneError | None = None

    @property
    def in_slots(self) -> int:
        """Batches that hold a slot: with the engine, or being handed out."""
        return self.engine.slots - len(self.free_slots)
