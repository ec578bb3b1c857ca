"""What happened in each stretch of a trial, for charts over time and for what is shown meanwhile."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from cobatch.server.loadtest.histogram import Histogram

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

    def add(self, other: Interval) -> None:
        """Count what the other has counted."""
        self.due += other.due
        self.latency.merge(other.latency)
        self.errors.update(other.errors)
        self.answered += other.answered
        self.rows += other.rows
        self.with_rows += other.with_rows
        self.most_rows = max(self.most_rows, other.most_rows)


class Intervals:
    """Stretches of `each_s` seconds, numbered from the start. `most`: how many of the last are kept."""

    def __init__(self, each_s: float, most: int | None = None) -> None:
        self.each_s = each_s
        self._most = most
        self._of: dict[int, Interval] = {}

    def __getitem__(self, number: int) -> Interval:
        return self._of.get(number) or Interval()

    def sum(self, numbers: range) -> Interval:
        """Of some of them together."""
        found = Interval()
        for number in numbers:
            found.add(self[number])
        return found

    def add_due(
        self, due_s: Column, latency_s: Column, kind: Column, names: Callable[[Column], dict[str, int]]
    ) -> None:
        """Count requests by when they were due. `names`: of the kinds of errors, with how many."""
        for number, its in self._parts(due_s):
            interval = self._interval(number)
            interval.due += int(its.sum())
            interval.latency.add(latency_s[its & (kind == 0)] * 1e6)
            interval.errors.update(names(kind[its & (kind != 0)]))

    def add_done(self, done_s: Column, batch: Column) -> None:
        """Count right answers by when they came."""
        for number, its in self._parts(done_s):
            interval, rows = self._interval(number), batch[its]
            interval.answered += len(rows)
            interval.rows += int(rows.sum())
            interval.with_rows += int((rows > 0).sum())
            interval.most_rows = max(interval.most_rows, int(rows.max()))
        if self._most is not None and self._of:
            first = max(self._of) - self._most
            for number in [one for one in self._of if one <= first]:
                del self._of[number]

    def _parts(self, at_s: Column) -> list[tuple[int, np.ndarray[Any, np.dtype[np.bool_]]]]:
        numbers = (at_s / self.each_s).astype(np.int64)
        return [(number, numbers == number) for number in np.unique(numbers).tolist()]

    def _interval(self, number: int) -> Interval:
        return self._of.setdefault(number, Interval())
