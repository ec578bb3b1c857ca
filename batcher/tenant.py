"""A token bucket in one number: when it will be full again.

That is the generic cell rate algorithm (ITU-T I.371, annex A): no refilling, no timer, O(1).

For whom a request is run: what one tenant has in the batchers now, and how much it may have.

One object per tenant for all models of a process; only the event loop touches it.
"""

from __future__ import annotations

import math

from cobatch.batcher.errors import TenantLimitError, TooManyRowsError

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


class Usage:
    """The usage of a tenant, in requests. `rows` and `engine_s`, its share of the runs' durations, do not
    count retries of failed batches."""

    __slots__ = ("answered", "engine_s", "failed", "refused", "rows")

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        """Start again at 0."""
        self.answered = 0
        self.failed = 0
        self.refused = 0
        self.rows = 0
        self.engine_s = 0.0

    def add(self, other: Usage) -> None:
        """Add the counts of another."""
        self.answered += other.answered
        self.failed += other.failed
        self.refused += other.refused
        self.rows += other.rows
        self.engine_s += other.engine_s

    @property
    def requests(self) -> int:
        """All requests, whatever their outcome."""
        return self.answered + self.failed + self.refused

    def any(self) -> bool:
        """Report whether anything was counted."""
        return bool(self.requests or self.rows)


class Tenant:
    """A tenant's account. Limits are None where there is none; without `burst`, one second's rate.

    `weight`: its part of an engine beside other tenants that have work for it.
    """

    __slots__ = (
        "__weakref__",
        "bucket",
        "limited",
        "max_concurrent",
        "max_queue_rows",
        "name",
        "open_requests",
        "queued_rows",
        "usage",
        "weight",
    )

    def __init__(
        self,
        name: str,
        *,
        max_concurrent: int | None = None,
        max_queue_rows: int | None = None,
        requests_per_s: float | None = None,
        burst: int | None = None,
        weight: float = 1.0,
    ) -> None:
        self.name = name
        self.weight = weight
        self.max_concurrent = max_concurrent
        self.max_queue_rows = max_queue_rows
        self.bucket: Bucket | None = None
        if requests_per_s is not None:
            self.bucket = Bucket(requests_per_s, burst or math.ceil(requests_per_s))
        self.limited = any(limit is not None for limit in (max_concurrent, max_queue_rows, requests_per_s))
        self.usage = Usage()
        self.open_requests = 0  # accepted and not answered yet
        self.queued_rows = 0  # of those, rows that have not been sent to an engine

    def refusal(
        self, requests: int, rows: int, now_s: float, drain_s: float
    ) -> TenantLimitError | TooManyRowsError | None:
        """Why so many more requests, of so many rows together, would be too much now, or None.

        `drain_s` is how long the queue needs to empty, for the hint when to come back.
        """
        most = self.max_concurrent
        if most is not None and self.open_requests + requests > most:
            return TenantLimitError(self.name, "concurrent requests", self.open_requests, most, drain_s)
        most = self.max_queue_rows
        if most is not None and self.queued_rows + rows > most:
            if rows > most:
                return TooManyRowsError(rows, most)
            return TenantLimitError(self.name, "queued rows", self.queued_rows, most, drain_s)
        bucket = self.bucket
        if bucket is not None and (wait_s := bucket.wait_s(requests, now_s)) > 0:
            used = bucket.burst - bucket.left(now_s)
            return TenantLimitError(self.name, "requests at once", used, bucket.burst, wait_s)
        return None

    def enter(self, requests: int, now_s: float) -> None:
        """So many requests are accepted; `refusal` has been asked."""
        self.open_requests += requests
        if self.bucket is not None:
            self.bucket.take(requests, now_s)

    def idle(self, now_s: float) -> bool:
        """Whether forgetting this object would change nothing."""
        at_rest = not self.open_requests and not self.queued_rows
        return at_rest and (self.bucket is None or self.bucket.until_full_s(now_s) == 0)
