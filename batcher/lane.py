"""A lane: one open engine with its worker, its slots, and what runs there.

A model has one, or one for each instance of it (`instances`, `devices`); all are fed from one queue, by
whichever is free first.
"""

from __future__ import annotations

from typing import Protocol

from batcher.errors import EngineGoneError
from batcher.request import Batch, Timer
from engines.base import Engine
from engines.jobs import Deliver, Job


class BatchWorker(Protocol):
    """What the batcher needs of `engines.worker.Worker`."""

    deliver: Deliver | None
    warmup_us: dict[int, float]

    @property
    def engine(self) -> Engine: ...

    def submit(self, job: Job) -> None: ...


class Lane:
    """Of one worker. `free_s`: when its engine is expected to have run what it has. `gone`: what its
    callers are told, once the engine has died."""

    __slots__ = ("engine", "free_s", "free_slots", "gone", "running", "watch", "worker")

    def __init__(self, worker: BatchWorker) -> None:
        self.worker = worker
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
