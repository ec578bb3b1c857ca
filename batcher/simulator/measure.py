"""Measuring a model's latency profile: runs of zeros at many sizes, as the warm-up does, but with all times
kept and not only the best."""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np

from cobatch.batcher.simulator.engine import Profile
from cobatch.engines.base import Engine
from cobatch.engines.worker import batch_sizes

LEVELS = (0.0, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99, 1.0)
_LEAST_RUNS = 3


def measure(
    engine: Engine, name: str, seconds: float, clock: Callable[[], float] = time.perf_counter
) -> Profile:
    """The profile of an open engine. In rounds over all sizes, so that a slow second of the machine does not
    fall on one size alone; at least three rounds, and more until `seconds` are over."""
    sizes = _sizes(engine)
    shapes = tuple(spec.least_row for spec in engine.signature.inputs)
    times: dict[int, list[float]] = {rows: [] for rows in sizes}
    for rows in sizes:
        _run_s(engine, rows, shapes, clock)  # the first run allocates
    until_s = clock() + seconds
    while clock() < until_s or len(times[sizes[-1]]) < _LEAST_RUNS:
        for rows in sizes:
            times[rows].append(_run_s(engine, rows, shapes, clock))
    found = {rows: np.quantile(runs, LEVELS).tolist() for rows, runs in times.items()}
    return Profile(
        name,
        {
            rows: {level: second * 1e6 for level, second in zip(LEVELS, seconds_, strict=True)}
            for rows, seconds_ in found.items()
        },
        source=f"measured by cobatch profile: {engine.platform}, {len(times[sizes[-1]])} runs of each size",
    )


def _sizes(engine: Engine) -> list[int]:
    """Powers of two and what lies halfway between them."""
    sizes = batch_sizes(engine.signature.fixed_batch, engine.max_batch_size)
    return sorted({*sizes, *(3 * rows // 2 for rows in sizes[1:] if 3 * rows // 2 < sizes[-1])})


def _run_s(
    engine: Engine, rows: int, shapes: tuple[tuple[int, ...], ...], clock: Callable[[], float]
) -> float:
    for buffer in engine.inputs(0, rows, shapes):
        buffer[:rows] = b"" if buffer.dtype == object else 0
    began_s = clock()
    engine.enqueue(0, rows, shapes)
    engine.wait(0)
    return clock() - began_s
