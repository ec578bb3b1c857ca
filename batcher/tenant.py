"""A tenant's account: its limits, its open requests and its usage.

There is one object per tenant for all models of a process; only the event loop touches it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from cobatch.batcher.errors import TenantLimitError, TooManyRowsError

# Sums of intervals are not exact.
_ROUNDING_S = 1e-9


class Bucket:
    """A token bucket: lets through `per_s` a second, and up to `burst` at once.

    Its only state is `full_at_s`, the time at which it will be full again (the generic cell rate algorithm,
    ITU-T I.371, annex A): no refilling, no timer, O(1). Times are seconds of one clock.
    """

    __slots__ = ("_interval_s", "burst", "full_at_s", "window_s")

    def __init__(self, per_s: float, burst: int) -> None:
        self.burst = burst
        self.window_s = burst / per_s  # in which it fills
        self._interval_s = 1 / per_s
        self.full_at_s = -math.inf

    def wait_s(self, count: int, now_s: float) -> float:
        """Return the seconds until `count` would be let through at once; more than `burst` never are."""
        if count > self.burst:
            return math.inf
        wait_s = self.until_full_s(now_s) - (self.burst - count) * self._interval_s
        return wait_s if wait_s > _ROUNDING_S else 0.0

    def take(self, count: int, now_s: float) -> None:
        """Let `count` through; `wait_s` has been asked."""
        self.full_at_s = max(self.full_at_s, now_s) + count * self._interval_s

    def left(self, now_s: float) -> int:
        """Return how many would be let through at once."""
        return max(0, math.floor(self.burst - self.until_full_s(now_s) / self._interval_s + 1e-6))

    def until_full_s(self, now_s: float) -> float:
        """Return the seconds until it is full if nothing is taken."""
        return max(0.0, self.full_at_s - now_s)


@dataclass(slots=True, eq=False)
class Usage:
    """Requests of a tenant; `rows` and `engine_s`, its part of the time, of successful runs."""

    answered: int = 0
    failed: int = 0
    refused: int = 0
    rows: int = 0
    engine_s: float = 0.0

    def clear(self) -> None:
        """Start again at 0."""
        self.answered = self.failed = self.refused = self.rows = 0
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
        """Return whether anything was counted."""
        return bool(self.requests or self.rows)


class Tenant:
    """A tenant's account. A limit that is None does not exist; without `burst`, it is one second's rate.

    `weight`: its share of an engine beside other tenants that have work for it. `open_requests` are accepted
    and not answered; `queued_rows` are those of their rows that have not been sent to an engine. `rule`: the
    index of the rule that its limits are from.
    """

    rule = 0

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
        self.open_requests = 0
        self.queued_rows = 0

    def refusal(
        self, requests: int, rows: int, now_s: float, drain_s: float
    ) -> TenantLimitError | TooManyRowsError | None:
        """Return why `requests` more requests, of `rows` rows together, exceed a limit now, or None.

        `drain_s` is how long the queue needs to empty, for the retry hint.
        """
        most = self.max_concurrent
        if most is not None and self.open_requests + requests > most:
            return TenantLimitError(self.name, "concurrent requests", self.open_requests, most, drain_s)
        most = self.max_queue_rows
        if most is not None and self.queued_rows + rows > most:
            if rows > most:
                return TooManyRowsError(rows, most)
            return TenantLimitError(self.name, "queued rows", self.queued_rows, most, drain_s)
        return self.rate_refusal(requests, now_s)

    def rate_refusal(self, requests: int, now_s: float) -> TenantLimitError | None:
        """Return why `requests` more requests exceed the rate limit now, or None."""
        bucket = self.bucket
        if bucket is not None and (wait_s := bucket.wait_s(requests, now_s)) > 0:
            used = bucket.burst - bucket.left(now_s)
            return TenantLimitError(self.name, "requests of its rate limit", used, bucket.burst, wait_s)
        return None

    def enter(self, requests: int, now_s: float) -> None:
        """Account for accepted requests; `refusal` has been asked."""
        self.open_requests += requests
        if self.bucket is not None:
            self.bucket.take(requests, now_s)

    def idle(self, now_s: float) -> bool:
        """Return whether a new object in place of this one would behave alike."""
        at_rest = not self.open_requests and not self.queued_rows
        return at_rest and (self.bucket is None or self.bucket.until_full_s(now_s) == 0)
