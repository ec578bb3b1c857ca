"""Measure a model's latency profile: runs of zeros at many batch sizes, with all times kept."""

import time
from collections.abc import Callable

import numpy as np

from cobatch.batcher.simulator.engine import Profile
from cobatch.engines.base import Engine, RowShapes, batch_sizes

_LEVELS = (0.0, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99, 1.0)
_TAIL = (0.999, 0.9999, 0.99999)
_MIN_RUNS = 3
# A profile is noisy if the mean of a size is this many times its median.
_NOISY = 1.25


def measure(
    engine: Engine, name: str, seconds: float, clock: Callable[[], float] = time.perf_counter
) -> Profile:
    """Measure an open engine for `seconds`, at least three runs of each size.

    Sizes are powers of two and those halfway between. They take turns, so that a slow second of the machine
    does not fall on one size alone.
    """
    powers = batch_sizes(engine.signature.fixed_batch, engine.max_batch_size)
    sizes = sorted({*powers, *(3 * rows // 2 for rows in powers[1:] if 3 * rows // 2 < powers[-1])})
    shapes = tuple(spec.least_row for spec in engine.signature.inputs)
    times: dict[int, list[float]] = {rows: [] for rows in sizes}
    for rows in sizes:
        _run_s(engine, rows, shapes, clock)  # the first run allocates
    until_s = clock() + seconds
    while clock() < until_s or len(times[sizes[-1]]) < _MIN_RUNS:
        for rows in sizes:
            times[rows].append(_run_s(engine, rows, shapes, clock))
    count = len(times[sizes[-1]])
    # Times between quantiles are interpolated. One slow run must count as one, so the others have their end.
    others = round(1 - 1 / count, 6)
    levels = sorted({*_LEVELS, *(level for level in (*_TAIL, others) if _LEVELS[-2] < level <= others)})
    runs = {
        rows: dict(zip(levels, (np.quantile(run_s, levels) * 1e6).tolist(), strict=True))
        for rows, run_s in times.items()
    }
    return Profile(
        name, runs, source=f"measured by cobatch profile: {engine.platform}, {count} runs of each size"
    )


def _run_s(engine: Engine, rows: int, shapes: RowShapes, clock: Callable[[], float]) -> float:
    for buffer in engine.inputs(0, rows, shapes):
        buffer[:rows] = b"" if buffer.dtype == object else 0
    began_s = clock()
    engine.enqueue(0, rows, shapes)
    engine.wait(0)
    return clock() - began_s


def noise_of(profile: Profile) -> str | None:
    """Return, in a sentence, that a profile is noisy, with its worst size; None if it is not."""
    ratios = {rows: profile.mean_s(rows) / profile.quantile_s(rows, 0.5) for rows in profile.sizes}
    rows = max(ratios, key=ratios.__getitem__)
    if ratios[rows] < _NOISY:
        return None
    mean, half, most = (
        f"{1000 * time_s:.3g} ms"
        for time_s in (profile.mean_s(rows), profile.quantile_s(rows, 0.5), profile.quantile_s(rows, 0.99))
    )
    return (
        f"the profile is noisy: with {rows} rows a run takes {mean} on average, {half} in the median, "
        f"{most} at the 99th percentile. Measure again if the machine will be quieter when it serves"
    )
