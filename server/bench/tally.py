"""The samples of a trial, counted as they come."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from time import monotonic
from typing import Any

import numpy as np

from server.bench.histogram import Histogram
from server.bench.plan import COLUMNS, Done, NewKind, Pulse, Samples, Trial

_MOST_INTERVALS = 100
_LEAST_INTERVAL_S = 0.1

Column = np.ndarray[Any, np.dtype[np.float64]]


@dataclass
class Interval:
    """A stretch of time: what was due in it, and what was answered in it."""

    due: int = 0
    latency: Histogram = field(default_factory=Histogram)  # of what was due in it
    errors: Counter[str] = field(default_factory=Counter)  # the same
    answered: int = 0
    rows: int = 0  # of the batches of what was answered in it, and how many said so
    with_rows: int = 0
    most_rows: int = 0


@dataclass
class Count:
    """Of the requests of one caller that were due while measured."""

    due: int = 0
    good: int = 0  # answered, rightly, within the deadline
    latency: Histogram = field(default_factory=Histogram)
    errors: Counter[str] = field(default_factory=Counter)


class Tally:
    """What was counted. `deadlines_s`: of each caller, None where it has none.

    Latencies count from the due moment, in `sent_latency` from the sending. What was due before the warm-up's
    end is in the intervals and nowhere else; `answered` counts answers by when they came.
    """

    def __init__(self, trial: Trial, deadlines_s: Sequence[float | None]) -> None:
        self.trial = trial
        self.interval_s = max(_LEAST_INTERVAL_S, trial.lasts_s / _MOST_INTERVALS)
        self.intervals: dict[int, Interval] = {}
        self.callers = [Count() for _ in deadlines_s]
        self.sent_latency = Histogram()
        self.late = Histogram()
        self.waited = 0  # requests for which no connection was free
        self.answered = 0
        self.batches: Counter[int] = Counter()  # answers by the rows of their batch
        self.said: dict[str, str] = {}
        self.pulses: dict[int, Pulse] = {}
        self.done: dict[int, Done] = {}
        self.machine_busy: float | None = None  # part of its cores' time; where it is known
        self.stopped_s: float | None = None  # where it was stopped before its end
        self._deadlines_s = np.array([np.inf if one is None else one for one in deadlines_s])
        self._kinds: dict[tuple[int, int], str] = {}
        self._start_s = 0.0

    def begin(self, at_s: float) -> None:
        """Moments count from here."""
        self._start_s = at_s

    @property
    def elapsed_s(self) -> float:
        """Seconds since its begin."""
        return monotonic() - self._start_s

    @property
    def measured_s(self) -> float:
        """Seconds that were measured."""
        until_s = self.trial.lasts_s if self.stopped_s is None else self.stopped_s
        return max(0.0, min(until_s, self.trial.lasts_s) - self.trial.warmup_s)

    @property
    def latency(self) -> Histogram:
        """Of all callers."""
        found = Histogram()
        for one in self.callers:
            found.merge(one.latency)
        return found

    def take(self, process: int, message: object) -> None:
        """Count what a process tells."""
        match message:
            case NewKind(number, name, said):
                self._kinds[process, number] = name
                self.said.setdefault(name, said)
            case Samples(data):
                self._add(process, np.frombuffer(data).reshape(-1, len(COLUMNS)))
            case Pulse():
                self.pulses[process] = message
            case Done():
                self.done[process] = message

    def _add(self, process: int, samples: np.ndarray[Any, np.dtype[np.float64]]) -> None:
        due, taken, sent, done, kind, caller, batch = samples.T
        due_s, done_s = due - self._start_s, done - self._start_s
        first, end = self.trial.warmup_s, self.trial.lasts_s
        fine = kind == 0
        counted = (due_s >= first) & (due_s < end)
        self.answered += int((fine & (done_s >= first) & (done_s < end)).sum())
        self.sent_latency.add((done - sent)[counted & fine] * 1e6)
        self.late.add((taken - due)[counted] * 1e6)
        self.waited += int((counted & (sent - taken > 1e-4)).sum())
        latency = done - due
        for number, one in enumerate(self.callers):
            its = counted & (caller == number)
            one.due += int(its.sum())
            one.good += int((its & fine & (latency <= self._deadlines_s[number])).sum())
            one.latency.add(latency[its & fine] * 1e6)
            one.errors.update(self._names(process, kind[its & ~fine]))
        sizes = batch[fine & counted & (batch > 0)].astype(np.int64)
        rows, counts = np.unique(sizes, return_counts=True)
        self.batches.update(dict(zip(rows.tolist(), counts.tolist(), strict=True)))
        self._add_due(process, due_s, latency, kind)
        self._add_done(done_s[fine], batch[fine])

    def _names(self, process: int, kinds: Column) -> dict[str, int]:
        numbers, counts = np.unique(kinds, return_counts=True)
        return {
            self._kinds[process, int(number)]: int(count)
            for number, count in zip(numbers, counts, strict=True)
        }

    def _add_due(self, process: int, due_s: Column, latency_s: Column, kind: Column) -> None:
        at = (due_s / self.interval_s).astype(np.int64)
        for number in np.unique(at).tolist():
            interval, its = self._interval(number), at == number
            interval.due += int(its.sum())
            interval.latency.add(latency_s[its & (kind == 0)] * 1e6)
            interval.errors.update(self._names(process, kind[its & (kind != 0)]))

    def _add_done(self, done_s: Column, batch: Column) -> None:
        at = (done_s / self.interval_s).astype(np.int64)
        for number in np.unique(at).tolist():
            interval, rows = self._interval(number), batch[at == number]
            interval.answered += len(rows)
            interval.rows += int(rows.sum())
            interval.with_rows += int((rows > 0).sum())
            interval.most_rows = max(interval.most_rows, int(rows.max()))

    def _interval(self, number: int) -> Interval:
        return self.intervals.setdefault(number, Interval())
