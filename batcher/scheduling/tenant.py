"""For whom a request is run: what one tenant has in the batchers now, and how much it may have.

One object per tenant for all models of a process; only the event loop touches it.
"""

from __future__ import annotations

import math

from cobatch.batcher.errors import TenantLimitError, TooManyRowsError
from cobatch.batcher.scheduling.bucket import Bucket


class Figures:
    """What an account has had so far, in requests. `rows`, and `engine_s`, its part of the runs that they
    rode in, do not count what is run again after a failure."""

    __slots__ = ("answered", "engine_s", "failed", "refused", "rows")

    def __init__(self) -> None:
        self.answered = 0
        self.failed = 0
        self.refused = 0
        self.rows = 0
        self.engine_s = 0.0

    def add(self, other: Figures, sign: int = 1) -> None:
        """Count another's, too."""
        self.answered += sign * other.answered
        self.failed += sign * other.failed
        self.refused += sign * other.refused
        self.rows += sign * other.rows
        self.engine_s += sign * other.engine_s

    def copy(self) -> Figures:
        """As they are now."""
        copied = Figures()
        copied.add(self)
        return copied

    def less(self, earlier: Figures) -> Figures:
        """What came since."""
        since = self.copy()
        since.add(earlier, -1)
        return since

    def any(self) -> bool:
        """Whether there was anything."""
        return bool(self.answered or self.failed or self.refused or self.rows)


class Tenant:
    """A tenant's account. Limits are None where there is none; without `burst`, one second's rate.

    `weight`: its part of an engine beside other tenants that have work for it.
    """

    __slots__ = (
        "__weakref__",
        "bucket",
        "figures",
        "limited",
        "max_concurrent",
        "max_queue_rows",
        "name",
        "open_requests",
        "queued_rows",
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
        self.figures = Figures()
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
