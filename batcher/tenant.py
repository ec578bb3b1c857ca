"""For whom a request is run: what one tenant has in the batchers now, and how much it may have.

One object per tenant for all models of a process; only the event loop touches it. The rate is a token
bucket, kept as the one number that the generic cell rate algorithm needs (ATM Forum TM 4.0, 4.4.2): the
time at which the bucket will be full again.
"""

from __future__ import annotations

import math

from batcher.errors import TenantLimitError, TooManyRowsError


class Tenant:
    """A tenant's account. Limits are None where there is none; `burst` goes with `requests_per_s`."""

    __slots__ = (
        "_full_at_s",
        "_interval_s",
        "burst",
        "limited",
        "max_concurrent",
        "max_queue_rows",
        "name",
        "open_requests",
        "queued_rows",
    )

    def __init__(
        self,
        name: str,
        *,
        max_concurrent: int | None = None,
        max_queue_rows: int | None = None,
        requests_per_s: float | None = None,
        burst: int | None = None,
    ) -> None:
        self.name = name
        self.max_concurrent = max_concurrent
        self.max_queue_rows = max_queue_rows
        self.burst = burst if burst is not None else math.ceil(requests_per_s or 1)
        self.open_requests = 0  # accepted and not answered yet
        self.queued_rows = 0  # of those, rows that have not been sent to an engine
        self._interval_s = None if requests_per_s is None else 1 / requests_per_s
        self._full_at_s = 0.0
        self.limited = not (max_concurrent is max_queue_rows is requests_per_s is None)

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
        if self._interval_s is not None:
            over_s = self._after(requests, now_s) - now_s - self.burst * self._interval_s
            if over_s > 1e-9:  # less is rounding
                used = self.burst - self.remaining(now_s)
                return TenantLimitError(self.name, "requests at once", used, self.burst, over_s)
        return None

    def enter(self, requests: int, now_s: float) -> None:
        """So many requests are accepted; `refusal` has been asked."""
        self.open_requests += requests
        if self._interval_s is not None:
            self._full_at_s = self._after(requests, now_s)

    def _after(self, requests: int, now_s: float) -> float:
        assert self._interval_s is not None
        return max(self._full_at_s, now_s) + requests * self._interval_s

    def remaining(self, now_s: float) -> int:
        """Requests that the bucket would let through at once."""
        if self._interval_s is None:
            return self.burst
        left_s = self.burst * self._interval_s - self.until_full_s(now_s)
        return max(0, math.floor(left_s / self._interval_s + 1e-6))

    def until_full_s(self, now_s: float) -> float:
        """Seconds until the bucket is full if nothing more comes."""
        return max(0.0, self._full_at_s - now_s)

    @property
    def window_s(self) -> float | None:
        """Seconds in which an empty bucket fills, None without a rate."""
        return None if self._interval_s is None else self.burst * self._interval_s

    def idle(self, now_s: float) -> bool:
        """Whether forgetting this object would change nothing."""
        return not self.open_requests and not self.queued_rows and self.until_full_s(now_s) == 0
