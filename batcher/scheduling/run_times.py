"""How long a run of so many rows takes: learned while serving, seeded by the warm-up.

Clipper (Crankshaw et al., NSDI 2017) and Clockwork (Gujarati et al., OSDI 2020) build on the same
observation: the time of a batch is predictable from its size, and the last few runs predict the next. For
each bucket of sizes (1, 2, 3-4, 5-8, ...) the last runs are kept, at most `_KEPT` and none older than
`_MEMORY_S` while there are newer ones; their median is what is expected, their 95th percentile what is
planned with where a deadline depends on it. Between buckets the times are interpolated; they never
fall as rows grow, whatever was measured.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import deque
from collections.abc import Mapping
from math import inf

from cobatch.batcher.scheduling.cost import NEAR_BEST_CROWDED, cost_over_best, efficient_rows

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
        times = sorted([run[2] + (mean - run[1]) * more_row_s for run in runs])
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
        self.crowded_rows = 0  # the same while requests are lost for want of the engine's time
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
        self.crowded_rows = max(self.full_rows, efficient_rows(run_us, self._most, NEAR_BEST_CROWDED))

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
