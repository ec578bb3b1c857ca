"""Durations in buckets whose width is within 0.8 % of their value, so that 100 million take 35 KB.

As HdrHistogram does it, over NumPy: what its Python port records one by one is added here in one go. The
server's own (`batcher.durations`) has buckets of 8.6 %, on bounds that its metrics show: enough to watch a
server by, and too coarse to compare two.
"""

from __future__ import annotations

from typing import Any

import numpy as np

Values = np.ndarray[Any, np.dtype[np.float64]]

_PER_OCTAVE = 128
_OCTAVES = 34  # of microseconds: five hours
_SIZE = _PER_OCTAVE * _OCTAVES


class Histogram:
    """Counts of durations in microseconds. `total_us`, `least_us` and `most_us` are exact."""

    def __init__(self) -> None:
        self.counts = np.zeros(_SIZE, np.int64)
        self.count = 0
        self.total_us = 0.0
        self.least_us = 0.0
        self.most_us = 0.0

    def add(self, values_us: Values) -> None:
        """Count these."""
        if not len(values_us):
            return
        self.counts += np.bincount(_index(values_us), minlength=_SIZE)
        self._extend(len(values_us), values_us.sum(), values_us.min(), values_us.max())

    def merge(self, other: Histogram) -> None:
        """Count what the other has counted."""
        if other.count:
            self.counts += other.counts
            self._extend(other.count, other.total_us, other.least_us, other.most_us)

    def _extend(self, count: int, total_us: float, least_us: float, most_us: float) -> None:
        self.least_us = float(least_us) if not self.count else min(self.least_us, float(least_us))
        self.most_us = max(self.most_us, float(most_us))
        self.count += count
        self.total_us += float(total_us)

    @property
    def mean_us(self) -> float:
        """0 where there is nothing."""
        return self.total_us / self.count if self.count else 0.0

    def quantile_us(self, part: float) -> float:
        """What this part of all did not exceed: its bucket's end; 0 where there is none."""
        if not self.count:
            return 0.0
        rank = min(self.count, max(1, int(np.ceil(part * self.count))))
        bucket = int(np.searchsorted(np.cumsum(self.counts), rank))
        return min(self.most_us, max(self.least_us, _end_us(bucket)))

    def over(self, limit_us: float) -> int:
        """How many are longer than this, within the width of a bucket: those in its own do not count."""
        bucket = int(_index(np.array([limit_us]))[0])
        return int(self.counts[bucket + 1 :].sum())

    def buckets(self) -> list[tuple[float, int]]:
        """Each bucket that holds something: where it ends, in microseconds, and its count."""
        return [(_end_us(int(one)), int(self.counts[one])) for one in np.flatnonzero(self.counts)]


def _index(values_us: Values) -> np.ndarray[Any, np.dtype[np.int64]]:
    mantissa, exponent = np.frexp(np.maximum(values_us, 1.0))
    index = (exponent - 1) * _PER_OCTAVE + ((mantissa * 2 - 1) * _PER_OCTAVE).astype(np.int64)
    bounded: np.ndarray[Any, np.dtype[np.int64]] = np.minimum(index, _SIZE - 1)
    return bounded


def _end_us(bucket: int) -> float:
    octave, part = divmod(bucket, _PER_OCTAVE)
    return float(2.0**octave * (1 + (part + 1) / _PER_OCTAVE))
