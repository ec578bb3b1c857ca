"""A token bucket in one number: when it will be full again.

That is the generic cell rate algorithm (ITU-T I.371, annex A): no refilling, no timer, O(1).
"""

from __future__ import annotations

import math

# Sums of intervals are not exact.
_ROUNDING_S = 1e-9


class Bucket:
    """Lets through `per_s` a second, and up to `burst` at once. Times are seconds of one clock."""

    __slots__ = ("_full_at_s", "_interval_s", "burst")

    def __init__(self, per_s: float, burst: int) -> None:
        self.burst = burst
        self._interval_s = 1 / per_s
        self._full_at_s = -math.inf

    def wait_s(self, count: int, now_s: float) -> float:
        """Seconds until so many would be let through at once, 0.0 for now; more than `burst` never are."""
        if count > self.burst:
            return math.inf
        wait_s = self.until_full_s(now_s) - (self.burst - count) * self._interval_s
        return wait_s if wait_s > _ROUNDING_S else 0.0

    def take(self, count: int, now_s: float) -> None:
        """So many are let through; `wait_s` has been asked."""
        self._full_at_s = max(self._full_at_s, now_s) + count * self._interval_s

    def left(self, now_s: float) -> int:
        """How many would be let through at once."""
        return max(0, math.floor(self.burst - self.until_full_s(now_s) / self._interval_s + 1e-6))

    def until_full_s(self, now_s: float) -> float:
        """Seconds until it is full if nothing is taken."""
        return max(0.0, self._full_at_s - now_s)

    @property
    def window_s(self) -> float:
        """Seconds in which it fills."""
        return self.burst * self._interval_s
