"""Which batch size is worth growing to, from measured run times.

On a GPU and on wide CPU models a row gets cheaper the more rows share a run; on others (Magika on
one core: 10 ms for one row, 84 ms for eight) it does not, and a larger batch only makes everyone
wait for everyone. Clipper (Crankshaw et al., NSDI 2017) searches for the size by additive increase;
here the sizes were already timed by the warm-up, so it can be read off.

How long a run of so many rows takes: learned while serving, seeded by the warm-up.

Clipper (Crankshaw et al., NSDI 2017) and Clockwork (Gujarati et al., OSDI 2020) build on the same
observation: the time of a batch is predictable from its size, and the last few runs predict the next. For
each bucket of sizes (1, 2, 3-4, 5-8, ...) the last runs are kept, at most `_KEPT` and none older than
`_MEMORY_S` while there are newer ones; their median is what is expected, their 95th percentile what is
planned with where a deadline depends on it. Between buckets the times are interpolated; they never
fall as rows grow, whatever was measured.

What a run takes where rows vary in shape: longer rows cost more, whatever the batch's size.

One curve by rows is learned (`batcher.scheduling.run_times`), and for each shape how many times as long its
runs take as those of the first shape that was seen. A shape that has not run yet is taken to cost what that
one does. Where rows have one shape, or run times do not depend on it, all factors stay 1.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import deque
from collections.abc import Mapping
from math import inf
from typing import Protocol

from cobatch.engines.base import RowShapes

# What a batch costs beside the engine's run: waking the worker, the callback, taking a slot. Counted
# in so that a model whose own run is almost free is still batched as far as it goes.
BATCH_OVERHEAD_US = 100.0
# A size counts as good enough when a row costs at most this many times the best size's.
NEAR_BEST = 1.03
# The same while requests are lost for want of the engine's time: then rows per second are all that counts.
NEAR_BEST_OVERLOADED = 1.003


def efficient_rows(run_us: Mapping[int, float], max_batch_size: int, near: float = NEAR_BEST) -> int:
    """Smallest batch size at which a row is about as cheap as it gets: at most `near` times that.

    `run_us` maps rows to the microseconds of one run. Nothing measured: `max_batch_size`.
    """
    per_row = _per_row({rows: us for rows, us in run_us.items() if rows <= max_batch_size})
    if not per_row:
        return max_batch_size
    good = min(per_row.values()) * near
    return min(rows for rows, us in per_row.items() if us <= good)


def cost_over_best(run_us: Mapping[int, float], rows: int) -> float:
    """How many times the best size's cost a row has at this size; infinite where that was not measured."""
    per_row = _per_row(run_us)
    return per_row[rows] / min(per_row.values()) if rows in per_row else inf


def _per_row(run_us: Mapping[int, float]) -> dict[int, float]:
    return {rows: (us + BATCH_OVERHEAD_US) / rows for rows, us in run_us.items()}


_KEPT = 32
_MEMORY_S = 5.0
# What a size was measured to take so long ago says less than what the warm-up and other sizes say. Each time
# that this is found so it is twice as long: a size that is no good is tried less and less often.
_STALE_S = 10.0
_MOST_STALE_S = 600.0
# So many of the newest runs are believed however old they are: there is nothing better.
_ALWAYS = 4
_HIGH = 0.95
_LEARN_S = 0.05
# What counts as full stays so until a row in such a batch costs so many times what it would at best.
_WORTH_CHANGING = 1.1
# Or until it costs no more in a smaller one, but for so much.
_AS_GOOD = 1.01
_RATE_WINDOW_S = 0.5
_RATE_LEAST = 10


class _Bucket:
    """The runs of one range of sizes. `rows` is their median size."""

    __slots__ = ("expected_s", "high_s", "new", "observed", "rows", "runs", "seed_rows", "seed_s", "stale_s")

    def __init__(self, rows: int, seed_s: float | None = None) -> None:
        self.rows = float(rows)
        self.seed_rows = rows
        self.seed_s = seed_s
        self.stale_s = _STALE_S
        self.observed = False
        self.new = False
        self.expected_s = self.high_s = seed_s or 0.0
        self.runs: deque[tuple[float, int, float]] = deque(maxlen=_KEPT)  # when, rows, seconds
        self._sow()

    def _sow(self) -> None:
        if self.seed_s is not None:
            # Twice, so that one run that was held up does not make the size look bad.
            self.runs.extend([(-inf, self.seed_rows, self.seed_s)] * 2)

    def forget(self) -> None:
        """Only the warm-up's word counts again, where there is one."""
        if self.seed_s is not None:
            self.observed = False
            self.stale_s = min(2 * self.stale_s, _MOST_STALE_S)
            self.rows = float(self.seed_rows)
            self.runs.clear()
            self._sow()

    def learn(self, now_s: float, more_row_s: float) -> None:
        """Take in the runs that were added; `more_row_s` is what one row more costs at about this size.

        Runs of different sizes are compared at their mean size: else the larger ones would make the high
        quantile, and the median's time and the mean's rows would not belong together.
        """
        runs = self.runs
        self.new = False
        self.observed = True
        while len(runs) > _ALWAYS and runs[0][0] < now_s - _MEMORY_S:
            runs.popleft()
        self.rows = mean = sum([run[1] for run in runs]) / len(runs)
        # Never below the proportional part of a larger run: rows cost nothing less than that.
        times = sorted(
            [max(t + (mean - rows) * more_row_s, t * min(1.0, mean / rows)) for _, rows, t in runs]
        )
        self.expected_s = times[len(times) // 2]
        self.high_s = times[min(len(times) - 1, int(len(times) * _HIGH))]


class LatencyModel:
    """Of one engine. Times are seconds of a run, without the wait for it.

    `seed_us` maps rows to microseconds, as the warm-up measured them. With none, a run is taken to cost a
    millisecond, however many rows it has, until one has run.
    """

    def __init__(self, max_batch_size: int, seed_us: Mapping[int, float]) -> None:
        self._most = max_batch_size
        self._buckets: dict[int, _Bucket] = {}
        self._rows: list[float] = []
        self._known_s: dict[int, float] = {}
        self._expected_s: list[float] = []
        self._high_s: list[float] = []
        self.full_rows = 0  # growing pays up to here
        self.overloaded_rows = 0  # the same while requests are lost for want of the engine's time
        self._learned_s = -inf
        for rows, run_us in sorted(seed_us.items()) or [(max_batch_size, 1000.0)]:
            self._buckets[(rows - 1).bit_length()] = _Bucket(rows, run_us / 1e6)
        self._refresh()
        # What the seeds alone would say: for how the machine has changed since.
        self._seeds = (self._rows, self._expected_s)

    def observe(self, rows: int, run_s: float, now_s: float) -> bool:
        """A batch of so many rows has run; `now_s` is when it ended. Whether anything was learned.

        Sorting a few dozen runs would cost as much as all else in a batch of one, so they are taken in
        a few times a second, and at once where a size has never run.
        """
        number = (rows - 1).bit_length()
        bucket = self._buckets.get(number)
        if bucket is None:
            bucket = self._buckets[number] = _Bucket(rows)
        bucket.runs.append((now_s, rows, run_s))
        bucket.new = True
        if bucket.observed and now_s < self._learned_s + _LEARN_S:
            return False
        self._learned_s = now_s
        for number, each in self._buckets.items():
            if each.new:
                each.learn(now_s, self._more_row_s(number))
        self._adapt_seeds(bucket.expected_s / self._seeded_s(bucket.rows), now_s)
        self._refresh()
        return True

    def _more_row_s(self, number: int) -> float:
        """What a row more costs within a bucket, as far as is known."""
        low, high = (1 << number) // 2, 1 << number
        return (self.expected_s(high) - self.expected_s(low)) / (high - low) if low else 0.0

    def _seeded_s(self, rows: float) -> float:
        sizes, times_s = self._seeds
        return self._between(sizes, times_s, rows)

    def _adapt_seeds(self, drift: float, now_s: float) -> None:
        """The warm-up had the machine to itself. What has not run since is taken to have become as much
        slower as what has, or sizes that are never used would look better than those that are. So is a larger
        size than batches grow to that has not run for long: one that was slow while something else held the
        machine up would look so for ever, since nobody would try it again."""
        for bucket in self._buckets.values():
            unused = bucket.observed and bucket.rows > self.full_rows
            if unused and bucket.runs[-1][0] < now_s - bucket.stale_s:
                bucket.forget()
            if not bucket.observed and bucket.seed_s is not None:
                bucket.expected_s = bucket.high_s = bucket.seed_s * drift

    def _refresh(self) -> None:
        """The curves through the buckets' medians, made monotone; and the size that growing pays up to."""
        nodes = sorted([(one.rows, one.expected_s, one.high_s) for one in self._buckets.values()])
        self._rows = [node[0] for node in nodes]
        self._known_s.clear()
        self._expected_s, self._high_s = [], []
        expected_s = high_s = 0.0
        for _, expected, high in nodes:
            expected_s, high_s = max(expected_s, expected), max(high_s, high)
            self._expected_s.append(expected_s)
            self._high_s.append(high_s)
        # At the buckets' upper ends: their medians follow the batches that were made, and a size chosen by
        # what was made because of it would creep.
        largest = max(self._buckets)
        run_us = {n: self.expected_s(n) * 1e6 for n in (min(1 << b, self._most) for b in range(largest + 1))}
        full_rows, now = efficient_rows(run_us, self._most), self.full_rows
        if now:
            over_best = cost_over_best(run_us, now)
            as_good = full_rows < now and cost_over_best(run_us, full_rows) <= over_best * _AS_GOOD
        if not now or over_best > _WORTH_CHANGING or as_good:
            self.full_rows = full_rows
        self.overloaded_rows = max(self.full_rows, efficient_rows(run_us, self._most, NEAR_BEST_OVERLOADED))

    def expected_s(self, rows: int) -> float:
        """The time that a run of so many rows takes as often less as more."""
        known_s = self._known_s.get(rows)
        if known_s is None:
            known_s = self._known_s[rows] = self._at(self._expected_s, rows)
        return known_s

    def high_s(self, rows: int) -> float:
        """The time that it hardly ever exceeds."""
        # Beyond what was ever run, the steeper of the two goes on.
        return max(self._at(self._high_s, rows), self.expected_s(rows))

    def ran_s(self, rows: int) -> float:
        """When a run of about so many rows last ended; long ago where none has."""
        bucket = self._buckets.get((rows - 1).bit_length())
        return -inf if bucket is None or not bucket.runs else bucket.runs[-1][0]

    @property
    def row_s(self) -> float:
        """Seconds per row in batches that are worth their size: one over the most rows per second."""
        return self.expected_s(self.full_rows) / self.full_rows

    def most_rows(self, budget_s: float, most: int) -> int:
        """The largest batch, up to `most` rows, that hardly ever takes longer than the budget; 0 for none."""
        if self.high_s(most) <= budget_s:
            return most
        low, high = 0, most
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if self.high_s(middle) <= budget_s else (low, middle)
        return low

    def _at(self, times_s: list[float], rows: int) -> float:
        return self._between(self._rows, times_s, rows)

    @staticmethod
    def _between(sizes: list[float], times_s: list[float], rows: float) -> float:
        index = bisect_left(sizes, rows)
        if index == 0:
            return times_s[0]
        if index == len(sizes):
            # Beyond what was ever run: each further row as dear as between the two largest that were.
            run_s = times_s[-1]
            before = (sizes[-2], times_s[-2]) if len(sizes) > 1 else (0.0, 0.0)
            return run_s + (run_s - before[1]) / (sizes[-1] - before[0]) * (rows - sizes[-1])
        left, right = sizes[index - 1], sizes[index]
        part = (rows - left) / (right - left)
        return times_s[index - 1] + part * (times_s[index] - times_s[index - 1])


class Arrivals:
    """How many requests arrive in a second, of late."""

    def __init__(self, now_s: float) -> None:
        self._at_s = now_s
        self._count = 0
        self._rate: float | None = None

    def rate(self, now_s: float, count: int) -> float | None:
        """`count`: how many have come so far. None until the first second and ten of them are over."""
        passed_s = now_s - self._at_s
        if passed_s >= _RATE_WINDOW_S:
            new = (count - self._count) / passed_s
            known = self._rate is not None or count >= _RATE_LEAST
            self._rate = new if known else None
            self._at_s, self._count = now_s, count
        return self._rate


_MOST_SHAPES = 256
# No shape is taken to be so many times as dear as another.
_MOST = 1000.0
# A run that takes longer or shorter by more than this part is not as expected.
_USUAL = 0.1
# What part of a new measurement goes into what is known.
_GAIN = 0.2


class RunTimes(Protocol):
    """Seconds of a run of so many rows, as `LatencyModel` has them."""

    def expected_s(self, rows: int) -> float: ...

    def high_s(self, rows: int) -> float: ...

    def most_rows(self, budget_s: float, most: int) -> int: ...

    def ran_s(self, rows: int) -> float: ...


class _Scaled:
    """Of one shape."""

    __slots__ = ("_latency", "factor", "last_s")

    def __init__(self, latency: LatencyModel) -> None:
        self._latency = latency
        self.factor = 1.0
        self.last_s = -inf

    def expected_s(self, rows: int) -> float:
        return self._latency.expected_s(rows) * self.factor

    def high_s(self, rows: int) -> float:
        return self._latency.high_s(rows) * self.factor

    def most_rows(self, budget_s: float, most: int) -> int:
        return self._latency.most_rows(budget_s / self.factor, most)

    def ran_s(self, rows: int) -> float:
        # Either may be what has changed.
        return min(self.last_s, self._latency.ran_s(rows))


class ShapeTimes:
    """Of one engine. `vary`: whether rows may differ in shape."""

    def __init__(self, latency: LatencyModel, *, vary: bool) -> None:
        self._latency = latency
        self._vary = vary
        self._shapes: dict[RowShapes, _Scaled] = {}
        self._first: RowShapes | None = None

    def of(self, row_shapes: RowShapes) -> RunTimes:
        """The times of runs of rows of this shape."""
        return self._shapes.get(row_shapes, self._latency) if self._vary else self._latency

    def observe(self, row_shapes: RowShapes, rows: int, run_s: float, now_s: float) -> bool:
        """A batch has run; whether anything was learned about run times by rows."""
        if self._vary and row_shapes != self._first:
            if self._first is not None:
                return self._learn(row_shapes, rows, run_s, now_s)
            self._first = row_shapes  # what the others are compared with
        return self._latency.observe(rows, run_s, now_s)

    def _learn(self, row_shapes: RowShapes, rows: int, run_s: float, now_s: float) -> bool:
        """This run is one more measurement of the shape's factor; and of the curve, where it is as expected:
        a shape that has become dearer must not make all others look so."""
        ratio = min(max(run_s / max(self._latency.expected_s(rows), 1e-9), 1 / _MOST), _MOST)
        scaled = self._shapes.get(row_shapes)
        if scaled is None:
            if len(self._shapes) >= _MOST_SHAPES:
                del self._shapes[next(iter(self._shapes))]
            scaled = self._shapes[row_shapes] = _Scaled(self._latency)
            scaled.factor = ratio
        scaled.last_s = now_s
        usual = abs(ratio - scaled.factor) < _USUAL * scaled.factor
        scaled.factor += (ratio - scaled.factor) * _GAIN
        return usual and self._latency.observe(rows, run_s / scaled.factor, now_s)
