"""A histogram of durations that are kept as they come and counted into fine buckets many at a time.

To find the bucket of each duration as it comes would cost as much as queueing the request; to append it to a
list costs tens of nanoseconds, and NumPy counts a thousand of them in twenty microseconds. The buckets are
finer than any histogram shown, so percentiles of an interval follow from the counts at its ends; the bounds
of the shown histograms are among theirs, so those are exact.
"""

from __future__ import annotations

import struct
from math import inf

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
    """Durations in seconds. Append to `values`; call `count_in` at `PENDING_LIMIT` of them.

    One thread does that; any thread may read.
    """

    __slots__ = ("_counted", "values")

    def __init__(self) -> None:
        self.values: list[float] = []
        # None while values move from one to the other.
        self._counted: tuple[NDArray[np.int64], float] | None = np.zeros(len(EDGES_S) + 1, np.int64), 0.0

    def read(self) -> tuple[NDArray[np.int64], float]:
        """Return the counts by bucket and the sum: the same array until there are more."""
        while True:
            counted, pending = self._counted, self.values[:]
            if counted is not None and counted is self._counted:
                break  # else another thread counts them in at this moment
        if not pending:
            return counted
        counts, sum_s = counted
        # A third of the time that `np.array` takes, which looks at the type of each.
        values = np.frombuffer(struct.pack(f"{len(pending)}d", *pending))
        added = np.bincount(np.searchsorted(EDGES_S, values), minlength=len(counts))
        return counts + added, sum_s + float(values.sum())

    def count_in(self) -> None:
        """Count the pending values."""
        if self.values:
            counted = self.read()
            self._counted = None
            self.values.clear()
            self._counted = counted

    def counts(self) -> NDArray[np.int64]:
        """Return the counts by bucket."""
        return self.read()[0]

    def add(self, counts: NDArray[np.int64], sum_s: float) -> None:
        """Add the counts by bucket, and the sum, of another one."""
        assert self._counted is not None
        own, own_s = self._counted
        self._counted = own + counts, own_s + sum_s

    def plus(self, other: DurationHistogram) -> DurationHistogram:
        """Return the sum of both."""
        both = DurationHistogram()
        for one in (self, other):
            both.add(*one.read())
        return both

    @property
    def sum_s(self) -> float:
        """The sum of all durations."""
        return self.read()[1]

    @property
    def count(self) -> int:
        """The number of durations."""
        return int(self.read()[0].sum())

    def quantile_s(self, q: float) -> float:
        """Return the upper edge of the q-quantile's bucket, infinite beyond the last; 0 if empty."""
        upto = np.cumsum(self.read()[0])
        at = int(np.searchsorted(upto, q * upto[-1]))
        return 0.0 if not upto[-1] else float(EDGES_S[at]) if at < len(EDGES_S) else inf

    def __repr__(self) -> str:
        p50_s, p99_s = self.quantile_s(0.5), self.quantile_s(0.99)
        return f"<{self.count} durations, sum {self.sum_s:.6g} s, p50 {p50_s:.3g} s, p99 {p99_s:.3g} s>"
