"""The run time of a batch by its rows, and the batch size that is worth growing to.

**By rows.** The time of a batch is predictable from its size, and the last few runs predict the next
(Clipper, Crankshaw et al., NSDI 2017; Clockwork, Gujarati et al., OSDI 2020). For each bucket of sizes (1, 2,
3-4, 5-8, ...) the last runs are kept (`batcher.scheduling.size_runs`). Times between buckets are
interpolated, and made to grow with the rows.

**The mean.** A run that stalls costs a whole run, whatever its rows. Runs are renewals, so the rows per
second of a size are its rows divided by the *mean* time of a run (docs/scheduling.md), and the sizes of
batches follow from means. Few runs have most of the tail, so the mean excess over the median is averaged
over hundreds of runs, where the median follows a change within 16; a size with few runs has the excess of
all sizes.

**Spacing.** Where stalls take much of the engine's time, running at once what little is queued makes more
runs, so more stalls. If batches leave at least T apart, a request waits for E[C^2] / 2 E[C] on average, C
being the longer of T and a run, and that is least where T = E[C^2] / 2 E[C]: with the excess X over the
median, T = sqrt(E[X]^2 + E[X^2]) - E[X].

**The full size.** On GPUs and wide CPU models a row gets cheaper the more rows share a run. On others it does
not (Magika on one core: 10 ms for one row, 84 ms for eight), and a larger batch only makes requests wait for
each other. Clipper searches for the size by additive increase; here it is read off the mean times.
"""

from bisect import bisect_left
from collections.abc import Mapping
from math import inf, sqrt
from typing import Protocol

from cobatch.batcher.scheduling import tuning
from cobatch.batcher.scheduling.size_runs import SizeRuns


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

    def mean_s(self, rows: int) -> float: ...

    def planned_s(self, rows: int) -> float: ...

    def sure_s(self, rows: int) -> float: ...

    def most_rows(self, budget_s: float, most: int) -> int: ...

    def ran_s(self, rows: int) -> float: ...


class RunTimeModel:
    """Run times of one model by rows, without the wait for the engine.

    `seed_us` maps rows to microseconds measured by the warm-up; without any, a run is taken to cost a
    millisecond at any size. Growing a batch pays up to `full_rows`, in overload up to `overloaded_rows`.
    `row_s` are the mean seconds per row in a full batch. `spacing_s`: batches that are not full should leave
    this far apart; 0 where runs hardly stall.
    """

    def __init__(self, max_batch_size: int, seed_us: Mapping[int, float]) -> None:
        self._most = max_batch_size
        self._buckets: dict[int, SizeRuns] = {}
        self._rows: list[float] = []
        self._known_s: dict[int, float] = {}
        self._expected_s: list[float] = []
        self._planned_s: list[float] = []
        self._sure_s: list[float] = []
        self.full_rows = 0
        self.overloaded_rows = 0
        self.row_s = 0.0
        self._learned_s = -inf
        self.spacing_s = 0.0
        self._excess_s = 0.0  # the mean over all sizes
        self._mean_s: list[float] = []
        for rows, run_us in sorted(seed_us.items()) or [(max_batch_size, 1000.0)]:
            self._buckets[(rows - 1).bit_length()] = SizeRuns(rows, max(run_us / 1e6, tuning.LEAST_RUN_S))
        self._refresh()
        # The curve of the seeds alone, to tell by how much the machine has changed since the warm-up.
        self._seeds = (self._rows, self._expected_s)

    def observe(self, rows: int, run_s: float, now_s: float) -> bool:
        """Add a run that ended at `now_s`; return whether the curves changed.

        They change at most 20 times a second, and after the first, second, fourth ... run of a size.
        """
        number = (rows - 1).bit_length()
        bucket = self._buckets.get(number)
        if bucket is None:
            bucket = self._buckets[number] = SizeRuns(rows)
        bucket.runs.append((now_s, rows, max(run_s, tuning.LEAST_RUN_S)))
        bucket.new += 1
        bucket.count += 1
        if bucket.count & (bucket.count - 1) and now_s < self._learned_s + tuning.LEARN_S:
            return False
        for number, each in self._buckets.items():
            if each.new:
                self._learn_excess(each, each.learn(now_s, self._more_row_s(number)))
        self._learned_s = now_s
        self._adapt_seeds(now_s)
        self._refresh()
        return True

    def _learn_excess(self, bucket: SizeRuns, excess_s: list[float]) -> None:
        """Average how much longer runs take than expected. One run at most doubles the mean of its size."""
        most_s = self._mean_of(bucket) * (bucket.known + tuning.MEAN_PRIOR)
        fade = tuning.MEAN_RUNS / (tuning.MEAN_RUNS + len(excess_s))
        for each in self._buckets.values():
            each.excess_s *= fade
            each.excess_s2 *= fade
            each.known *= fade
        limited_s = [min(one_s, most_s) for one_s in excess_s]
        bucket.excess_s += sum(limited_s)
        bucket.known += len(limited_s)
        bucket.excess_s2 += sum([one_s * one_s for one_s in limited_s])

    def _more_row_s(self, number: int) -> float:
        low, high = (1 << number) // 2, 1 << number
        return (self.expected_s(high) - self.expected_s(low)) / (high - low) if low else 0.0

    def _drift(self) -> float:
        """Return how many times longer than in the warm-up runs take now, over the sizes that have run."""
        ran = [one for one in self._buckets.values() if one.observed]
        # By the runs since the warm-up: a size of few runs is still near its seed.
        weights = [min(one.count, tuning.RUNS_KEPT) for one in ran]
        ratios = [one.median_s / _interpolated(*self._seeds, one.rows) for one in ran]
        return sum([weight * ratio for weight, ratio in zip(weights, ratios, strict=True)]) / sum(weights)

    def _adapt_seeds(self, now_s: float) -> None:
        """Scale the times of sizes that have not run since the warm-up, which had the machine to itself: else
        they would look better than sizes that are used. A size of few runs that vary gets a time between
        that and its own. A size above the full one that has not run for long returns to its seed: if it was
        slow while the machine was held up, it would never be tried again."""
        drift = self._drift()
        ran = [one for one in self._buckets.values() if one.observed]
        spread = sum([len(one.runs) * one.spread for one in ran]) / sum([len(one.runs) for one in ran])
        for bucket in self._buckets.values():
            unused = bucket.observed and bucket.rows > self.full_rows
            if unused and bucket.runs[-1][0] < now_s - bucket.stale_s:
                bucket.forget()
            if bucket.seed_s is not None:
                bucket.predict(_interpolated(*self._seeds, bucket.rows) * drift, spread)

    def _refresh(self) -> None:
        """Recompute the curves through the buckets, and what follows from them."""
        buckets = sorted(self._buckets.values(), key=lambda one: one.rows)
        self._rows = [one.rows for one in buckets]
        known = tuning.MEAN_PRIOR + sum([one.known for one in buckets])
        self._excess_s = sum([one.excess_s for one in buckets]) / known
        mean_square_s2 = sum([one.excess_s2 for one in buckets]) / known
        self._known_s.clear()
        weights = [len(one.runs) for one in buckets]
        self._expected_s = monotone([one.expected_s for one in buckets], weights)
        self._planned_s = monotone([one.planned_s for one in buckets], weights)
        self._sure_s = monotone([one.sure_s for one in buckets], weights)
        self._mean_s = monotone([self._mean_of(one) for one in buckets], weights)
        # At the buckets' upper ends: their means follow the batches that were made, and a size chosen by
        # them would creep.
        largest = max(self._buckets)
        run_us = {n: self.mean_s(n) * 1e6 for n in (min(1 << b, self._most) for b in range(largest + 1))}
        per_row = _per_row(run_us)
        full_rows, now = efficient_rows(run_us, self._most), self.full_rows
        now_us = per_row.get(now, inf)
        is_worse = now_us > min(per_row.values()) * tuning.WORTH_CHANGING
        if is_worse or (full_rows < now and per_row[full_rows] <= now_us * tuning.AS_GOOD):
            self.full_rows = full_rows
        self.overloaded_rows = max(
            self.full_rows, efficient_rows(run_us, self._most, tuning.NEAR_BEST_OVERLOADED)
        )
        self.row_s = self.mean_s(self.full_rows) / self.full_rows
        spacing_s = sqrt(self._excess_s**2 + mean_square_s2) - self._excess_s
        least_s = max(tuning.STALLING * self.expected_s(1), tuning.TIMER_S)
        self.spacing_s = spacing_s if spacing_s > least_s else 0.0

    def _mean_of(self, bucket: SizeRuns) -> float:
        """Return the mean time of a run, with the excess of all sizes until enough runs tell its own."""
        prior = tuning.MEAN_PRIOR
        excess_s = (bucket.excess_s + prior * self._excess_s) / (bucket.known + prior)
        return bucket.expected_s + max(excess_s, -bucket.expected_s / 2)

    def mean_s(self, rows: int) -> float:
        """Return the mean time."""
        return _interpolated(self._rows, self._mean_s, rows)

    def expected_s(self, rows: int) -> float:
        """Return the median time."""
        known_s = self._known_s.get(rows)
        if known_s is None:
            known_s = self._known_s[rows] = _interpolated(self._rows, self._expected_s, rows)
        return known_s

    def planned_s(self, rows: int) -> float:
        """Return the time to plan a deadline with."""
        return max(_interpolated(self._rows, self._planned_s, rows), self.expected_s(rows))

    def sure_s(self, rows: int) -> float:
        """Return the time within which nine of ten runs end, at least the planned one."""
        return max(_interpolated(self._rows, self._sure_s, rows), self.planned_s(rows))

    def ran_s(self, rows: int) -> float:
        """Return when a run of about this size last ended, -inf if none has."""
        bucket = self._buckets.get((rows - 1).bit_length())
        return -inf if bucket is None or not bucket.runs else bucket.runs[-1][0]

    def most_rows(self, budget_s: float, most: int) -> int:
        """Return the largest batch, up to `most` rows, whose planned time is in the budget; or 0."""
        if self.planned_s(most) <= budget_s:
            return most
        low, high = 0, most
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if self.planned_s(middle) <= budget_s else (low, middle)
        return low


def monotone(values: list[float], weights: list[int]) -> list[float]:
    """Return the ascending values that are nearest in weighted squares: neighbours in the wrong order are
    averaged (isotonic regression by pooling adjacent violators). So a size of few runs yields to others."""
    pools: list[tuple[float, float, int]] = []  # value, weight, length
    for value, weight in zip(values, weights, strict=True):
        pool = (value, float(weight), 1)
        while pools and pools[-1][0] >= pool[0]:
            before, known, length = pools.pop()
            total = known + pool[1]
            pool = ((before * known + pool[0] * pool[1]) / total, total, length + pool[2])
        pools.append(pool)
    return [value for value, _, length in pools for _ in range(length)]


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
