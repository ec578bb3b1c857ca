"""The samples of a trial, counted as they arrive: latency histograms, errors, and both over time."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from time import monotonic
from typing import Any, NamedTuple

import numpy as np

from cobatch.server.loadtest.messages import COLUMNS, Done, Heartbeat, NewKind, Samples, Trial

Column = np.ndarray[Any, np.dtype[np.float64]]
Mask = np.ndarray[Any, np.dtype[np.bool_]]

_BUCKETS_PER_OCTAVE = 128
_OCTAVES = 34  # of microseconds: up to five hours
_BUCKETS = _BUCKETS_PER_OCTAVE * _OCTAVES
_INTERVAL_LIMIT = 100  # of a whole trial
_SHORTEST_INTERVAL_S = 0.1
_RECENT_INTERVALS = 30  # of the shortest, for the live view
_WAITED_S = 1e-4  # a request sent this long after it was taken up waited for a connection


class LatencyHistogram:
    """Counts of durations in microseconds, in buckets 0.8 % wide, as HdrHistogram has them.

    Minimum, maximum and mean are exact; 100 million samples take 35 KB. `batcher.durations` is no substitute:
    its 8.6 % buckets, on the bounds of the exported metrics, are too coarse to compare two servers by.
    """

    def __init__(self) -> None:
        self.counts = np.zeros(_BUCKETS, np.int64)
        self.count = 0
        self.total_us = 0.0
        self.min_us = 0.0
        self.max_us = 0.0

    def add(self, values_us: Column) -> None:
        if len(values_us):
            self.counts += np.bincount(_bucket_of(values_us), minlength=_BUCKETS)
            self._extend(len(values_us), values_us.sum(), values_us.min(), values_us.max())

    def merge(self, other: LatencyHistogram) -> None:
        if other.count:
            self.counts += other.counts
            self._extend(other.count, other.total_us, other.min_us, other.max_us)

    def _extend(self, count: int, total_us: float, min_us: float, max_us: float) -> None:
        self.min_us = float(min_us) if not self.count else min(self.min_us, float(min_us))
        self.max_us = max(self.max_us, float(max_us))
        self.count += count
        self.total_us += float(total_us)

    @property
    def mean_us(self) -> float:
        """The mean; 0 if empty."""
        return self.total_us / self.count if self.count else 0.0

    def quantile_us(self, q: float) -> float:
        """Return the upper bound of the q-quantile's bucket; 0 if empty."""
        if not self.count:
            return 0.0
        rank = min(self.count, max(1, int(np.ceil(q * self.count))))
        bucket = int(np.searchsorted(np.cumsum(self.counts), rank))
        return min(self.max_us, max(self.min_us, _bound_us(bucket)))

    def above(self, limit_us: float) -> int:
        """Count durations in buckets above the limit's own."""
        bucket = int(_bucket_of(np.array([limit_us]))[0])
        return int(self.counts[bucket + 1 :].sum())

    def buckets(self) -> list[tuple[float, int]]:
        """Return (upper bound in microseconds, count) of each bucket that is not empty."""
        return [(_bound_us(int(bucket)), int(self.counts[bucket])) for bucket in np.flatnonzero(self.counts)]


def _bucket_of(values_us: Column) -> np.ndarray[Any, np.dtype[np.int64]]:
    mantissa, exponent = np.frexp(np.maximum(values_us, 1.0))
    within_octave = ((mantissa * 2 - 1) * _BUCKETS_PER_OCTAVE).astype(np.int64)
    bucket: np.ndarray[Any, np.dtype[np.int64]] = np.minimum(
        (exponent - 1) * _BUCKETS_PER_OCTAVE + within_octave, _BUCKETS - 1
    )
    return bucket


def _bound_us(bucket: int) -> float:
    octave, step = divmod(bucket, _BUCKETS_PER_OCTAVE)
    return float(2.0**octave * (1 + (step + 1) / _BUCKETS_PER_OCTAVE))


class _Finished(NamedTuple):
    """Finished requests. `success`: which were answered right; `names`: of the kinds of errors."""

    latency_s: Column
    success: Mask
    kind: Column
    batch: Column
    names: Mapping[int, str]


@dataclass
class Counts:
    """Counts of a caller or an interval: requests by due time, and answers by arrival time."""

    due: int = 0
    good: int = 0  # of those due, answered right within the deadline
    latency: LatencyHistogram = field(default_factory=LatencyHistogram)  # of those due and answered
    errors: Counter[str] = field(default_factory=Counter)  # of those due
    answered: int = 0
    batches: Counter[int] = field(default_factory=Counter)  # answers by the rows of their batch, if known

    @property
    def mean_batch(self) -> float:
        """Mean rows of a batch, weighted by answers; 0 if unknown."""
        return sum(rows * n for rows, n in self.batches.items()) / (self.batches.total() or 1)

    def add(self, finished: _Finished, due: Mask, done: Mask, deadline_s: float | None = None) -> None:
        """Count the requests of the mask `due` and the answers of the mask `done`."""
        latency_s = finished.latency_s[due & finished.success]
        self.due += int(due.sum())
        self.good += int((latency_s <= (np.inf if deadline_s is None else deadline_s)).sum())
        self.latency.add(latency_s * 1e6)
        errors = _value_counts(finished.kind[due & ~finished.success])
        self.errors.update({finished.names[number]: count for number, count in errors.items()})
        rows = finished.batch[done & finished.success]
        self.answered += len(rows)
        self.batches.update(_value_counts(rows[rows > 0]))


def total(counts: Iterable[Counts]) -> Counts:
    """Return the sum."""
    result = Counts()
    for one in counts:
        result.due += one.due
        result.good += one.good
        result.latency.merge(one.latency)
        result.errors.update(one.errors)
        result.answered += one.answered
        result.batches.update(one.batches)
    return result


class Intervals:
    """Intervals of `each_s` seconds, numbered from the start; only the last `limit` are kept."""

    def __init__(self, each_s: float, limit: int | None = None) -> None:
        self.each_s = each_s
        self._limit = limit
        self._by_number: dict[int, Counts] = {}

    def __getitem__(self, number: int) -> Counts:
        return self._by_number.get(number) or Counts()

    def add(self, finished: _Finished, due_s: Column, done_s: Column) -> None:
        due, done = ((times_s / self.each_s).astype(np.int64) for times_s in (due_s, done_s))
        for number in np.union1d(due, done).tolist():
            self._by_number.setdefault(number, Counts()).add(finished, due == number, done == number)
        if self._limit is not None and self._by_number:
            oldest = max(self._by_number) - self._limit
            self._by_number = {number: one for number, one in self._by_number.items() if number > oldest}


class Tally:
    """All counts of a trial. `deadlines_s`: of each caller, None without one.

    Latencies count from the due time, in `send_latency` from the time of sending. Requests due in the warm-up
    only count in the intervals, and in `answered` if the answer arrived after it.
    """

    def __init__(self, trial: Trial, deadlines_s: Sequence[float | None]) -> None:
        self.trial = trial
        self.deadlines_s = deadlines_s
        self.intervals = Intervals(max(_SHORTEST_INTERVAL_S, trial.lasts_s / _INTERVAL_LIMIT))
        self.recent = Intervals(_SHORTEST_INTERVAL_S, _RECENT_INTERVALS)
        self.callers = [Counts() for _ in deadlines_s]
        self.send_latency = LatencyHistogram()
        self.send_delay = LatencyHistogram()
        self.waited = 0  # requests that found no idle connection
        self.batches: Counter[int] = Counter()  # answers by the rows of their batch
        self.messages: dict[str, str] = {}  # the server's first message by kind of error
        self.heartbeats: dict[int, Heartbeat] = {}
        self.done: dict[int, Done] = {}
        self.machine_busy: float | None = None  # share of all cores; None if unknown
        self.stopped_s: float | None = None  # seconds from the start, if stopped early
        self._kinds: defaultdict[int, dict[int, str]] = defaultdict(dict)  # by process and number
        self._start_s = 0.0

    def begin(self, at_s: float) -> None:
        self._start_s = at_s

    @property
    def elapsed_s(self) -> float:
        return monotonic() - self._start_s

    @property
    def measured_s(self) -> float:
        """Length of the measured period in seconds."""
        end_s = self.trial.lasts_s if self.stopped_s is None else self.stopped_s
        return max(0.0, min(end_s, self.trial.lasts_s) - self.trial.warmup_s)

    @property
    def total(self) -> Counts:
        return total(self.callers)

    def take(self, process: int, message: object) -> None:
        match message:
            case NewKind(number, name, text):
                self._kinds[process][number] = name
                self.messages.setdefault(name, text)
            case Samples(data):
                self._add(process, np.frombuffer(data).reshape(-1, len(COLUMNS)))
            case Heartbeat():
                self.heartbeats[process] = message
            case Done():
                self.done[process] = message

    def _add(self, process: int, samples: np.ndarray[Any, np.dtype[np.float64]]) -> None:
        due, taken, sent, done, kind, caller, batch = samples.T
        due_s, done_s = due - self._start_s, done - self._start_s
        first_s, end_s = self.trial.warmup_s, self.trial.lasts_s
        success = kind == 0
        counted = (due_s >= first_s) & (due_s < end_s)
        arrived = (done_s >= first_s) & (done_s < end_s)
        self.send_latency.add((done - sent)[counted & success] * 1e6)
        self.send_delay.add((taken - due)[counted] * 1e6)
        self.waited += int((counted & (sent - taken > _WAITED_S)).sum())
        self.batches.update(_value_counts(batch[success & counted & (batch > 0)]))
        finished = _Finished(done - due, success, kind, batch, self._kinds[process])
        for number, (counts, deadline_s) in enumerate(zip(self.callers, self.deadlines_s, strict=True)):
            own = caller == number
            counts.add(finished, own & counted, own & arrived, deadline_s)
        for intervals in (self.intervals, self.recent):
            intervals.add(finished, due_s, done_s)


def _value_counts(values: Column) -> dict[int, int]:
    numbers, counts = np.unique(values.astype(np.int64), return_counts=True)
    return dict(zip(numbers.tolist(), counts.tolist(), strict=True))
