"""Engines over the fake GPU, and batches on them, for the tests of the TensorRT engine."""

from __future__ import annotations

import contextlib
import functools
import importlib
import queue
import tempfile
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cobatch.engines.base import Array, Batching
from cobatch.engines.errors import EngineError
from cobatch.engines.tensorrt import cuda as driver
from cobatch.engines.tensorrt.engine import TensorRTEngine
from cobatch.engines.tensorrt.plans.build import build_plan
from cobatch.engines.tensorrt.plans.manifest import BuildOptions
from cobatch.engines.worker import Job, Outcome, Worker
from tests.support.gpu.fakecuda.control import FakeCuda
from tests.support.gpu.tier import require_fake_gpu

WAIT_S = 60.0


@pytest.fixture
def cuda() -> Iterator[FakeCuda]:
    """The fake driver. At the end no rule may be broken and no object left."""
    fake = require_fake_gpu()
    # It can be imported only now that the fake driver and the stand-ins are loaded.
    planting = importlib.import_module("tensorrt.planting")
    planting.clear()
    driver._corrupt.clear()
    planting.strict_graphs(True)
    yield fake
    planting.clear()
    # A failed test may have left its engine open, which must not fail the next test.
    current = importlib.import_module("pycuda.driver").Context
    while current.get_current() is not None:
        current.pop()
    assert fake.violations() == []
    assert fake.live_objects() == {}
    fake.reset()


@functools.cache
def plan_of(model: bytes, *profiles: str, max_batch_size: int = 8) -> bytes:
    """Build a plan for the stand-ins with our own build code."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        path.write_bytes(model)
        return build_plan(path, BuildOptions(max_batch_size=max_batch_size, profiles=profiles))


def engine_of(
    model: bytes, *profiles: str, max_batch_size: int = 8, built_for: int | None = None, **options: Any
) -> TensorRTEngine:
    """Create an engine of the model. `built_for`: the plan's largest batch."""
    plan = plan_of(model, *profiles, max_batch_size=built_for or max_batch_size)
    options.setdefault("batching", Batching("on"))  # the proof's runs would meet the planted faults
    return TensorRTEngine("model.plan", max_batch_size, plan_source=lambda: plan, **options)


@contextlib.contextmanager
def opened(engine: TensorRTEngine) -> Iterator[TensorRTEngine]:
    """Open an engine and close it at the end."""
    try:
        engine.open()
        yield engine
    finally:
        engine.close()


def start(engine: TensorRTEngine, slot: int, *rows: Array) -> None:
    """Pack rows, an array for each input, and enqueue them."""
    shapes = tuple(array.shape[1:] for array in rows)
    for buffer, array in zip(engine.inputs(slot, len(rows[0]), shapes), rows, strict=True):
        buffer[: len(array)] = array
    del buffer  # an exception that is kept would keep it, too
    engine.enqueue(slot, len(rows[0]), shapes)


def run(engine: TensorRTEngine, *rows: Array, slot: int = 0) -> tuple[Array, ...]:
    """Run a batch and return copies of its outputs."""
    start(engine, slot, *rows)
    return tuple(np.array(output) for output in engine.wait(slot))


def floats(*rows: Sequence[float]) -> Array:
    """Return FP32 rows."""
    return np.array(rows, np.float32)


def start_worker(worker: Worker) -> EngineError | None:
    """Start a worker and wait until its engine is open or has failed to open."""
    answers: queue.SimpleQueue[EngineError | None] = queue.SimpleQueue()
    worker.start(answers.put)
    return answers.get(timeout=WAIT_S)


class WithWorker:
    """An engine under the real worker, driven from the test's thread instead of the event loop."""

    def __init__(self, engine: TensorRTEngine) -> None:
        self.engine = engine
        self.worker = Worker(engine, "trt")
        self.outcome: Outcome | None = None
        self._done = threading.Semaphore(0)
        self.worker.deliver = self._deliver
        assert start_worker(self.worker) is None

    def _deliver(self, job: Job, outcome: Outcome) -> None:
        self.outcome = outcome
        self._done.release()

    def run(self, slot: int, value: float = 1.0, rows: int = 1) -> Array:
        self.engine.inputs(slot, rows, ((3,),))[0][:rows] = value
        self.worker.submit(Job(slot, rows, ((3,),), None))
        assert self._done.acquire(timeout=WAIT_S)
        assert self.outcome is not None
        assert self.outcome.error is None
        assert self.outcome.outputs is not None
        return np.array(self.outcome.outputs[0])

    def end(self) -> None:
        self.outcome = None
        self.worker.stop()
        assert self.worker.join(WAIT_S)
