"""A histogram of durations that are kept as they come and counted into fine buckets many at a time.

To find the bucket of each duration as it comes would cost as much as queueing the request; to append it to a
list costs tens of nanoseconds, and NumPy counts a thousand of them in twenty microseconds. The buckets are
finer than any histogram shown, so percentiles of an interval follow from the counts at its ends; the bounds
of the shown histograms are among theirs, so those are exact.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

# Durations kept until they are counted.
PENDING_LIMIT = 1024
# The buckets cover these powers of ten of seconds, 10 us to 100 s, with this many steps (8.6 %) each.
_FIRST, _LAST = -5, 2
_STEPS = 28


def _edges() -> NDArray[np.float64]:
    fine = [10.0 ** (_FIRST + step / _STEPS) for step in range((_LAST - _FIRST) * _STEPS + 1)]
    shown = [float(f"{digit}e{power}") for power in range(_FIRST, _LAST) for digit in (1, 2.5, 5)]
    # Where two nearly meet, only the shown one is kept.
    apart = [edge for edge in fine if all(abs(edge / bound - 1) > 1e-3 for bound in shown)]
    return np.array(sorted(apart + shown))


# Bucket i holds durations above edge i - 1 and not above edge i; the last those above all edges.
EDGES_S = _edges()


class DurationHistogram:
    """Durations in seconds. Append to `values`; call `count_in` at `PENDING_LIMIT` of them."""

    __slots__ = ("_counts", "_sum_s", "values")

    def __init__(self) -> None:
        self.values: list[float] = []
        self._counts: NDArray[Any] = np.zeros(len(EDGES_S) + 1, np.int64)
        self._sum_s = 0.0

    def count_in(self) -> None:
        """Count the pending values."""
        if not self.values:
            return
        values = np.fromiter(self.values, np.float64, len(self.values))
        self.values.clear()
        self._counts += np.bincount(np.searchsorted(EDGES_S, values), minlength=len(self._counts))
        self._sum_s += float(values.sum())

    def counts(self) -> NDArray[np.int64]:
        """Return a copy of the counts by bucket."""
        self.count_in()
        return self._counts.copy()

    def add(self, counts: NDArray[np.int64], sum_s: float) -> None:
        """Add the counts by bucket, and the sum, of another one."""
        self._counts += counts
        self._sum_s += sum_s

    def plus(self, other: DurationHistogram) -> DurationHistogram:
        """Return the sum of both."""
        both = DurationHistogram()
        both._counts = self.counts() + other.counts()
        both._sum_s = self._sum_s + other._sum_s
        return both

    @property
    def sum_s(self) -> float:
        """The sum of all durations."""
        self.count_in()
        return self._sum_s

    @property
    def count(self) -> int:
        """The number of durations."""
        return int(self._counts.sum()) + len(self.values)
