"""A batch of a model in Python: in a process of its own, and in the worker's thread.

`python -m benchmarks.request_cost.process_boundary` prints microseconds of a batch from packing to outputs.
Of many batches the shortest counts, since what else the machine does only adds to it. CPU time is that of
both processes.
"""

from __future__ import annotations

import statistics
import sys
import time
from contextlib import ExitStack, closing
from math import inf
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from rich.table import Table

from benchmarks.request_cost.report import wide_console
from cobatch.engines.base import Engine
from cobatch.engines.loader import EngineOptions, load_engine
from cobatch.engines.python.engine import ProcessEngine

CASES = ((1, 16), (64, 16), (64, 2_048), (8, 150_528))
ROOT = Path(__file__).parents[2]
_TURNS = 9
_BATCHES = 100
_WIDTH = -1
Array = np.ndarray[Any, Any]
Rows = Annotated[Array, "FP32", [-1, _WIDTH]]


def negate(x: Rows) -> Rows:
    """Do as little as a model can with all its numbers."""
    return np.negative(x)


def opened(run_in: str) -> Engine:
    """Return an open engine of `negate`."""
    options = EngineOptions(folder=str(ROOT), in_thread=run_in == "thread")
    most_rows = max(rows for rows, _ in CASES)
    engine = load_engine("python", "benchmarks.request_cost.process_boundary:negate", most_rows, options)
    engine.open()
    return engine


class Measured:
    """An engine, and the time of its batches."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.least_us = inf
        self.cpu_us: list[float] = []
        # The clock of another process's CPU time, as clock_getcpuclockid(3) makes it.
        others = [~engine.pid << 3 | 2] if isinstance(engine, ProcessEngine) else []
        self._clocks = [time.CLOCK_PROCESS_CPUTIME_ID, *others]

    def turn(self, rows: Array) -> None:
        """Run some batches."""
        count, shapes, engine = len(rows), (rows.shape[1:],), self.engine
        before_s = self._cpu_s()
        for _ in range(_BATCHES):
            started_s = time.perf_counter()
            (buffer,) = engine.inputs(0, count, shapes)
            buffer[:count] = rows
            engine.enqueue(0, count, shapes)
            engine.wait(0)
            self.least_us = min(self.least_us, (time.perf_counter() - started_s) * 1e6)
        self.cpu_us.append((self._cpu_s() - before_s) / _BATCHES * 1e6)

    def _cpu_s(self) -> float:
        return sum(map(time.clock_gettime, self._clocks))


def main() -> int:
    """Print the table."""
    heads = ("thread, us", "process, us", "ratio", "CPU, thread", "CPU, process", "ratio")
    table = Table("rows", "floats of a row", *heads)
    for column in table.columns:
        column.justify = "right"
    with ExitStack() as stack:
        engines = [stack.enter_context(closing(opened(where))) for where in ("thread", "process")]
        for count, width in CASES:
            both = [Measured(engine) for engine in engines]
            for _ in range(_TURNS):
                for one in both:
                    one.turn(np.ones((count, width), np.float32))
            wall = [one.least_us for one in both]
            cpu = [statistics.median(one.cpu_us) for one in both]
            cells = (f"{cell:,.0f}" for cell in (*wall, *cpu))
            ratios = (f"{pair[1] / pair[0]:.1f}" for pair in (wall, cpu))
            figures = [next(cells), next(cells), next(ratios), next(cells), next(cells), next(ratios)]
            table.add_row(str(count), f"{width:,}", *figures)
    wide_console().print(table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
