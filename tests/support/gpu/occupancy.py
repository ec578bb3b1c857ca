"""GPU occupancy in virtual time, and the measured cost of a batch for the worker thread.

    python -m tests.support.gpu.occupancy

The first table runs the real batcher and worker over a GPU whose times are given
(tests/support/gpu/pipeline.py). The second runs the TensorRT engine over the fake driver with real PyCUDA:
its time is that of our Python code, PyCUDA, and the fake driver, which is slower than a real one because it
checks every call; kernels are not run. It needs CUDA's headers and g++ (./scripts/fake-gpu).
"""

from __future__ import annotations

import statistics
import sys
import threading
import time
from collections import Counter
from types import FrameType
from typing import Any

from cobatch.engines.tensorrt.engine import TensorRTEngine
from tests.support.gpu.engine import WithWorker, opened, plan_of
from tests.support.gpu.pipeline import Times, simulate
from tests.support.gpu.tier import require_fake_gpu
from tests.support.models import models

_BATCHES = 2000
_SHARES = (0.0, 0.3, 0.6, 0.8, 0.95, 1.2, 1.5, 2.0)


def model() -> None:
    """Print the idle share by slots and by the time for packing and delivery as a share of a run."""
    print("GPU idle, %, batches of 64 full; packing + delivery as a share of a run:")
    print(f"{'run':>8} {'slots':>6} {'copies':>7}" + "".join(f"{share:>8}" for share in _SHARES))
    for run_s in (0.0005, 0.002, 0.02):
        for slots, copies in ((1, 0.0), (2, 0.0), (2, 0.3), (3, 0.3)):
            row = []
            for share in _SHARES:
                times = Times(
                    run_s,
                    in_s=copies * run_s * 2 / 3,
                    out_s=copies * run_s / 3,
                    pack_s=0.4 * share * run_s,
                    deliver_s=0.6 * share * run_s,
                )
                figures = simulate(times, slots=slots, callers=256, seconds=min(1.0, 250 * run_s))
                row.append(f"{figures.idle * 100:8.1f}")
            print(f"{run_s * 1e3:6.1f}ms {slots:6} {copies:7}" + "".join(row))


class Calls:
    """Counts calls in our code on the worker thread; a profiler for `threading.setprofile`."""

    def __init__(self) -> None:
        self.count = 0
        self.on = False

    def __call__(self, frame: FrameType, event: str, _argument: Any) -> None:
        if self.on and event in {"call", "c_call"} and "/engines/" in frame.f_code.co_filename:
            self.count += 1


def engine(graphs: bool) -> TensorRTEngine:
    """Return an engine with one input and one output of three numbers per row."""
    plan = plan_of(models.negate(), max_batch_size=8)
    return TensorRTEngine("bench.plan", 8, graphs=graphs, plan_source=lambda: plan)


def enqueue_us(graphs: bool) -> tuple[float, float]:
    """Return the median microseconds of `enqueue`, and of `wait` without the GPU's run time."""
    fake = require_fake_gpu()
    fake.mode("threaded")
    enqueues, waits = [], []
    with opened(engine(graphs)) as open_engine:
        done = open_engine._slots[0]._event
        open_engine.inputs(0, 1, ((3,),))[0].fill(1)
        for _ in range(_BATCHES):
            begun = time.perf_counter()
            open_engine.enqueue(0, 1, ((3,),))
            enqueued = time.perf_counter()
            done.synchronize()
            ran = time.perf_counter()
            open_engine.wait(0)
            waits.append(time.perf_counter() - ran)
            enqueues.append(enqueued - begun)
    fake.mode("lazy")
    return statistics.median(enqueues) * 1e6, statistics.median(waits) * 1e6


def worker_calls(graphs: bool) -> tuple[float, float, Counter[str]]:
    """Return per batch: calls in our code, CPU microseconds of the worker thread, calls of the driver."""
    fake = require_fake_gpu()
    calls = Calls()
    threading.setprofile(calls)
    profiled = WithWorker(engine(graphs))
    threading.setprofile(None)
    calls.on = True
    for batch in range(100):
        profiled.run(batch % 2)
    calls.on = False
    profiled.end()

    plain = WithWorker(engine(graphs))
    thread = next(each for each in threading.enumerate() if each.name == "cobatch-trt")
    clock = time.pthread_getcpuclockid(thread.ident or 0)
    plain.run(0)
    fake.forget_calls()
    before = time.clock_gettime(clock)
    for batch in range(_BATCHES):
        plain.run(batch % 2)
    used = time.clock_gettime(clock) - before
    driver = fake.calls()
    plain.end()
    return calls.count / 100, used / _BATCHES * 1e6, driver


def measure() -> None:
    """Print the second table."""
    print("\nThe worker's thread, per batch of 1 row (fake driver, real PyCUDA and cuda-bindings):")
    for graphs in (False, True):
        enqueue, wait = enqueue_us(graphs)
        calls, used, driver = worker_calls(graphs)
        shown = ", ".join(f"{name} {count / _BATCHES:g}" for name, count in sorted(driver.items()))
        print(
            f"  {'CUDA graphs' if graphs else 'call by call'}: enqueue {enqueue:.1f} us, wait {wait:.1f} us"
        )
        print(f"    thread {used:.0f} us of processor time, {calls:.0f} calls in our code; driver: {shown}")


def main() -> int:
    """Print both tables."""
    model()
    measure()
    return 0


if __name__ == "__main__":
    sys.exit(main())
