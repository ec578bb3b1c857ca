"""The samples of a trial, counted as they come."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from time import monotonic
from typing import Any

import numpy as np

from cobatch.server.loadtest.histogram import Histogram
from cobatch.server.loadtest.intervals import Column, Intervals
from cobatch.server.loadtest.messages import COLUMNS, Done, NewKind, Pulse, Samples, Trial

_MOST_INTERVALS = 100
_LEAST_INTERVAL_S = 0.1
_RECENT = 30  # of the shortest intervals


@dataclass
class Count:
    """Of the requests of one caller that were due while measured; `answered`: that were answered while."""

    due: int = 0
    answered: int = 0
    good: int = 0  # answered, rightly, within the deadline
    latency: Histogram = field(default_factory=Histogram)
    errors: Counter[str] = field(default_factory=Counter)


class Tally:
    """What was counted. `deadlines_s`: of each caller, None where it has none.

    Latencies count from the due moment, in `sent_latency` from the sending. What was due before the warm-up's
    end is in the intervals and nowhere else, and in `answered` if its answer came later.
    """

    def __init__(self, trial: Trial, deadlines_s: Sequence[float | None]) -> None:
        self.trial = trial
        self.deadlines_s = deadlines_s
        self.intervals = Intervals(max(_LEAST_INTERVAL_S, trial.lasts_s / _MOST_INTERVALS))
        self.recent = Intervals(_LEAST_INTERVAL_S, _RECENT)
        self.callers = [Count() for _ in deadlines_s]
        self.sent_latency = Histogram()
        self.late = Histogram()
        self.waited = 0  # requests for which no connection was free
        self.batches: Counter[int] = Counter()  # answers by the rows of their batch
        self.said: dict[str, str] = {}
        self.pulses: dict[int, Pulse] = {}
        self.done: dict[int, Done] = {}
        self.machine_busy: float | None = None  # part of its cores' time; where it is known
        self.stopped_s: float | None = None  # where it was stopped before its end
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
    def total(self) -> Count:
        """Of all callers."""
        found = Count()
        for one in self.callers:
            found.due += one.due
            found.answered += one.answered
            found.good += one.good
            found.latency.merge(one.latency)
            found.errors.update(one.errors)
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
        meanwhile = fine & (done_s >= first) & (done_s < end)
        self.sent_latency.add((done - sent)[counted & fine] * 1e6)
        self.late.add((taken - due)[counted] * 1e6)
        self.waited += int((counted & (sent - taken > 1e-4)).sum())
        latency = done - due

        def names(kinds: Column) -> dict[str, int]:
            numbers, counts = np.unique(kinds, return_counts=True)
            found = zip(numbers.tolist(), counts.tolist(), strict=True)
            return {self._kinds[process, int(number)]: count for number, count in found}

        for number, (one, deadline_s) in enumerate(zip(self.callers, self.deadlines_s, strict=True)):
            its = caller == number
            one.answered += int((its & meanwhile).sum())
            its = its & counted
            one.due += int(its.sum())
            one.good += int((its & fine & (latency <= (np.inf if deadline_s is None else deadline_s))).sum())
            one.latency.add(latency[its & fine] * 1e6)
            one.errors.update(names(kind[its & ~fine]))
        sizes = batch[fine & counted & (batch > 0)].astype(np.int64)
        rows, counts = np.unique(sizes, return_counts=True)
        self.batches.update(dict(zip(rows.tolist(), counts.tolist(), strict=True)))
        for intervals in (self.intervals, self.recent):
            intervals.add_due(due_s, latency, kind, names)
            intervals.add_done(done_s[fine], batch[fine])
