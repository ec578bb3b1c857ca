"""The run time of a batch by its rows and shape, and the batch size that is worth growing to.

**By rows.** The time of a batch is predictable from its size, and the last few runs predict the next
(Clipper, Crankshaw et al., NSDI 2017; Clockwork, Gujarati et al., OSDI 2020). For each bucket of sizes (1, 2,
3-4, 5-8, ...) the last runs are kept, seeded by the warm-up. Their median is the expected time, their 95th
percentile is used where a deadline depends on it. Times between buckets are interpolated and never fall as
rows grow.

**The full size.** On GPUs and wide CPU models a row gets cheaper the more rows share a run. On others it does
not (Magika on one core: 10 ms for one row, 84 ms for eight), and a larger batch only makes requests wait for
each other. Clipper searches for the size by additive increase; here it is read off the measured times.

**By shape.** Longer rows cost more. One curve by rows is learned, and for each shape a factor: the ratio of
its run times to those of the first shape that was seen. A shape that has not run has factor 1.
"""

from bisect import bisect_left
from collections import deque
from collections.abc import Mapping
from math import inf
from typing import Protocol

from cobatch.batcher.scheduling import tuning
from cobatch.engines.base import RowShapes


def efficient_rows(run_us: Mapping[int, float], max_batch_size: int, near: float = tuning.NEAR_BEST) -> int:
    """Return the smallest batch size at which a row costs at most `near` times the least.

    `run_us` maps rows to the microseconds of one run. If none was measured: `max_batch_size`.
    """
    per_row = _per_row({rows: us for rows, us in run_us.items() if rows <= max_batch_size})
    if not per_row:
        return max_batch_size
    good = min(per_row.values()) * near
    return min(rows for rows, us in per_row.items() if us <= good)


def _per_row(run_us: Mapping[int, float]) -> dict[int, float]:
    return {rows: (us + tuning.BATCH_OVERHEAD_US) / rows for rows, us in run_us.items()}


class RunTimes(Protocol):
    """Predicted seconds of a run by its rows; see `RunTimeModel`."""

    def expected_s(self, rows: int) -> float: ...

    def high_s(self, rows: int) -> float: ...

    def most_rows(self, budget_s: float, most: int) -> int: ...

    def ran_s(self, rows: int) -> float: ...


class _Bucket:
    """The runs of one range of sizes. `rows` is their mean size."""

    __slots__ = ("expected_s", "high_s", "new", "observed", "rows", "runs", "seed_rows", "seed_s", "stale_s")

    def __init__(self, rows: int, seed_s: float | None = None) -> None:
        self.rows = float(rows)
        self.seed_rows = rows
        self.seed_s = seed_s
        self.stale_s = tuning.STALE_S
        self.observed = False
        self.new = False
        self.expected_s = self.high_s = seed_s or 0.0
        self.runs: deque[tuple[float, int, float]] = deque(maxlen=tuning.RUNS_KEPT)  # when, rows, seconds
        self._sow()

    def _sow(self) -> None:
        if self.seed_s is not None:
            # Twice, so that one run that was held up does not make the size look bad.
            self.runs.extend([(-inf, self.seed_rows, self.seed_s)] * 2)

    def forget(self) -> None:
        """Return to the warm-up's measurement, if there is one."""
        if self.seed_s is not None:
            self.observed = False
            self.stale_s = min(2 * self.stale_s, tuning.MOST_STALE_S)
            self.rows = float(self.seed_rows)
            self.runs.clear()
            self._sow()

    def learn(self, now_s: float, more_row_s: float) -> None:
        """Take in new runs; `more_row_s` is the cost of one more row at about this size.

        Runs are compared at their mean size. Otherwise the larger ones would make the high quantile, and the
        median of the times would not belong to the mean of the rows.
        """
        runs = self.runs
        self.new = False
        self.observed = True
        while len(runs) > tuning.ALWAYS_KEPT and runs[0][0] < now_s - tuning.MEMORY_S:
            runs.popleft()
        self.rows = mean = sum([run[1] for run in runs]) / len(runs)
        # A larger run is never scaled below its proportional part: a run of no rows costs at least nothing.
        times = sorted(
            [max(s + (mean - rows) * more_row_s, s * min(1.0, mean / rows)) for _, rows, s in runs]
        )
        self.expected_s = times[len(times) // 2]
        self.high_s = times[min(len(times) - 1, int(len(times) * tuning.HIGH_QUANTILE))]


class RunTimeModel:
    """Run times of one model by rows, without the wait for the engine.

    `seed_us` maps rows to microseconds measured by the warm-up; without any, a run is taken to cost a
    millisecond at any size. Growing a batch pays up to `full_rows`, in overload up to `overloaded_rows`.
    `row_s` are the seconds per row in a full batch.
    """

    def __init__(self, max_batch_size: int, seed_us: Mapping[int, float]) -> None:
        self._most = max_batch_size
        self._buckets: dict[int, _Bucket] = {}
        self._rows: list[float] = []
        self._known_s: dict[int, float] = {}
        self._expected_s: list[float] = []
        self._high_s: list[float] = []
        self.full_rows = 0
        self.overloaded_rows = 0
        self.row_s = 0.0
        self._learned_s = -inf
        for rows, run_us in sorted(seed_us.items()) or [(max_batch_size, 1000.0)]:
            self._buckets[(rows - 1).bit_length()] = _Bucket(rows, run_us / 1e6)
        self._refresh()
        # The curve of the seeds alone, to tell by how much the machine has changed since the warm-up.
        self._seeds = (self._rows, self._expected_s)

    def observe(self, rows: int, run_s: float, now_s: float) -> bool:
        """Add a run that ended at `now_s`; return whether the curves changed.

        They change a few times a second at most, and at once where a size has never run.
        """
        number = (rows - 1).bit_length()
        bucket = self._buckets.get(number)
        if bucket is None:
            bucket = self._buckets[number] = _Bucket(rows)
        bucket.runs.append((now_s, rows, run_s))
        bucket.new = True
        if bucket.observed and now_s < self._learned_s + tuning.LEARN_S:
            return False
        self._learned_s = now_s
        for number, each in self._buckets.items():
            if each.new:
                each.learn(now_s, self._more_row_s(number))
        self._adapt_seeds(bucket.expected_s / _interpolated(*self._seeds, bucket.rows), now_s)
        self._refresh()
        return True

    def _more_row_s(self, number: int) -> float:
        low, high = (1 << number) // 2, 1 << number
        return (self.expected_s(high) - self.expected_s(low)) / (high - low) if low else 0.0

    def _adapt_seeds(self, drift: float, now_s: float) -> None:
        """Scale the times of sizes that have not run since the warm-up, which had the machine to itself: else
        they would look better than sizes that are used. A size above the full one that has not run for long
        returns to its seed: if it was slow while the machine was held up, it would never be tried again."""
        for bucket in self._buckets.values():
            unused = bucket.observed and bucket.rows > self.full_rows
            if unused and bucket.runs[-1][0] < now_s - bucket.stale_s:
                bucket.forget()
            if not bucket.observed and bucket.seed_s is not None:
                bucket.expected_s = bucket.high_s = bucket.seed_s * drift

    def _refresh(self) -> None:
        """Recompute the curves through the buckets, made monotone, and the full size."""
        nodes = sorted([(one.rows, one.expected_s, one.high_s) for one in self._buckets.values()])
        self._rows = [node[0] for node in nodes]
        self._known_s.clear()
        self._expected_s, self._high_s = [], []
        expected_s = high_s = 0.0
        for _, expected, high in nodes:
            expected_s, high_s = max(expected_s, expected), max(high_s, high)
            self._expected_s.append(expected_s)
            self._high_s.append(high_s)
        # At the buckets' upper ends: their means follow the batches that were made, and a size chosen by
        # them would creep.
        largest = max(self._buckets)
        run_us = {n: self.expected_s(n) * 1e6 for n in (min(1 << b, self._most) for b in range(largest + 1))}
        per_row = _per_row(run_us)
        full_rows, now = efficient_rows(run_us, self._most), self.full_rows
        now_us = per_row.get(now, inf)
        is_worse = now_us > min(per_row.values()) * tuning.WORTH_CHANGING
        if is_worse or (full_rows < now and per_row[full_rows] <= now_us * tuning.AS_GOOD):
            self.full_rows = full_rows
        self.overloaded_rows = max(
            self.full_rows, efficient_rows(run_us, self._most, tuning.NEAR_BEST_OVERLOADED)
        )
        self.row_s = self.expected_s(self.full_rows) / self.full_rows

    def expected_s(self, rows: int) -> float:
        """Return the median time."""
        known_s = self._known_s.get(rows)
        if known_s is None:
            known_s = self._known_s[rows] = _interpolated(self._rows, self._expected_s, rows)
        return known_s

    def high_s(self, rows: int) -> float:
        """Return the 95th percentile; beyond the largest size that ran, the steeper of both curves."""
        return max(_interpolated(self._rows, self._high_s, rows), self.expected_s(rows))

    def ran_s(self, rows: int) -> float:
        """Return when a run of about this size last ended, -inf if none has."""
        bucket = self._buckets.get((rows - 1).bit_length())
        return -inf if bucket is None or not bucket.runs else bucket.runs[-1][0]

    def most_rows(self, budget_s: float, most: int) -> int:
        """Return the largest batch, up to `most` rows, whose 95th percentile is in the budget; or 0."""
        if self.high_s(most) <= budget_s:
            return most
        low, high = 0, most
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if self.high_s(middle) <= budget_s else (low, middle)
        return low


def _interpolated(sizes: list[float], times_s: list[float], rows: float) -> float:
    """Return the time at a size between measured ones; beyond the largest, each row costs as the last did."""
    index = bisect_left(sizes, rows)
    if index == 0:
        return times_s[0]
    if index == len(sizes):
        run_s = times_s[-1]
        before = (sizes[-2], times_s[-2]) if len(sizes) > 1 else (0.0, 0.0)
        return run_s + (run_s - before[1]) / (sizes[-1] - before[0]) * (rows - sizes[-1])
    left, right = sizes[index - 1], sizes[index]
    part = (rows - left) / (right - left)
    return times_s[index - 1] + part * (times_s[index] - times_s[index - 1])


class _ScaledRunTimes:
    """The run times of one shape: `factor` times the model's."""

    __slots__ = ("_model", "factor", "last_s")

    def __init__(self, model: RunTimeModel, factor: float) -> None:
        self._model = model
        self.factor = factor
        self.last_s = -inf

    def expected_s(self, rows: int) -> float:
        return self._model.expected_s(rows) * self.factor

    def high_s(self, rows: int) -> float:
        return self._model.high_s(rows) * self.factor

    def most_rows(self, budget_s: float, most: int) -> int:
        return self._model.most_rows(budget_s / self.factor, most)

    def ran_s(self, rows: int) -> float:
        # Either the shape or the size may have changed since.
        return min(self.last_s, self._model.ran_s(rows))


class ShapeRunTimes:
    """Run times of one model by shape. `vary`: rows may differ in shape."""

    def __init__(self, model: RunTimeModel, *, vary: bool) -> None:
        self._model = model
        self._vary = vary
        self._shapes: dict[RowShapes, _ScaledRunTimes] = {}
        self._first: RowShapes | None = None

    def of(self, row_shapes: RowShapes) -> RunTimes:
        """Return the run times of rows of this shape."""
        return self._shapes.get(row_shapes, self._model) if self._vary else self._model

    def observe(self, row_shapes: RowShapes, rows: int, run_s: float, now_s: float) -> bool:
        """Add a run; return whether the run times by rows changed."""
        if self._vary and row_shapes != self._first:
            if self._first is not None:
                return self._learn(row_shapes, rows, run_s, now_s)
            self._first = row_shapes  # the others are compared with this one
        return self._model.observe(rows, run_s, now_s)

    def _learn(self, row_shapes: RowShapes, rows: int, run_s: float, now_s: float) -> bool:
        """Measure the shape's factor; and the curve, if the run is as expected: a shape that has become
        slower must not make all others look slower."""
        ratio = run_s / max(self._model.expected_s(rows), 1e-9)
        ratio = min(max(ratio, 1 / tuning.MOST_SHAPE_FACTOR), tuning.MOST_SHAPE_FACTOR)
        scaled = self._shapes.get(row_shapes)
        if scaled is None:
            if len(self._shapes) >= tuning.SHAPES_KEPT:
                del self._shapes[next(iter(self._shapes))]
            scaled = self._shapes[row_shapes] = _ScaledRunTimes(self._model, ratio)
        scaled.last_s = now_s
        usual = abs(ratio - scaled.factor) < tuning.AS_EXPECTED * scaled.factor
        scaled.factor += (ratio - scaled.factor) * tuning.SHAPE_GAIN
        return usual and self._model.observe(rows, run_s / scaled.factor, now_s)
