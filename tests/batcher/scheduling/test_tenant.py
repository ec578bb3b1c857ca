"""A tenant's account: the bucket against one simulated step by step, and its refusals."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cobatch.batcher.errors import TenantLimitError, TooManyRowsError
from cobatch.batcher.tenant import Bucket, Tenant


class Simulated:
    """The token bucket of the textbooks, in exact numbers: it fills as time goes by."""

    def __init__(self, per_s: Fraction, burst: int) -> None:
        self.per_s = per_s
        self.burst = burst
        self.tokens = Fraction(burst)
        self.now_s = Fraction(0)

    def goes_on(self, seconds: Fraction) -> None:
        self.now_s += seconds
        self.tokens = min(Fraction(self.burst), self.tokens + seconds * self.per_s)


# In quarters and eighths, which floats have exactly; so the algorithms are compared exactly.
STEPS = st.lists(
    st.tuples(st.integers(0, 40).map(lambda n: Fraction(n, 8)), st.integers(1, 6)), min_size=1, max_size=60
)


@given(
    st.sampled_from([Fraction(1, 4), Fraction(1, 2), Fraction(1), Fraction(2), Fraction(4)]),
    st.integers(1, 5),
    STEPS,
)
def test_it_lets_through_what_a_token_bucket_lets_through(
    per_s: Fraction, burst: int, steps: list[tuple[Fraction, int]]
) -> None:
    bucket, simulated = Bucket(float(per_s), burst), Simulated(per_s, burst)
    for pause_s, count in steps:
        simulated.goes_on(pause_s)
        now_s = float(simulated.now_s)
        assert bucket.left(now_s) == math.floor(simulated.tokens)
        assert bucket.until_full_s(now_s) == (burst - simulated.tokens) / per_s
        wait_s = bucket.wait_s(count, now_s)
        if count > burst:
            assert wait_s == math.inf
            continue
        assert wait_s == max(Fraction(0), (count - simulated.tokens) / per_s)
        if wait_s == 0:
            bucket.take(count, now_s)
            simulated.tokens -= count


@given(
    st.floats(1e-3, 1e6),
    st.integers(1, 1000),
    st.floats(0, 1e9),
    st.lists(st.floats(0, 10), min_size=1, max_size=50),
)
def test_a_client_that_waits_as_told_is_let_through(
    per_s: float, burst: int, now_s: float, waits: list[float]
) -> None:
    bucket = Bucket(per_s, burst)
    for wait in waits:
        now_s += wait / per_s
        now_s += bucket.wait_s(1, now_s)
        # Of clocks that count in large numbers the last digit is more than the rounding that is allowed for.
        assert bucket.wait_s(1, now_s) <= 1e-9 + math.ulp(now_s) * 4
        bucket.take(1, now_s)
        assert 0 <= bucket.left(now_s) < burst or burst == 1
        assert 0 <= bucket.until_full_s(now_s) <= bucket.window_s * (1 + 1e-9) + 1e-6


@pytest.mark.parametrize(("per_s", "burst"), [(3.0, 3), (7.0, 10), (0.1, 1), (1e6, 1_000_000)])
def test_the_whole_burst_at_once_and_not_one_more(per_s: float, burst: int) -> None:
    bucket = Bucket(per_s, burst)
    bucket.take(burst - 1, 1000.0)
    assert (bucket.left(1000.0), bucket.wait_s(1, 1000.0)) == (1, 0.0)
    bucket.take(1, 1000.0)
    assert bucket.left(1000.0) == 0
    assert bucket.wait_s(1, 1000.0) == pytest.approx(1 / per_s)
    assert bucket.window_s == pytest.approx(burst / per_s)


# The account


def test_without_limits_nothing_is_refused() -> None:
    tenant = Tenant("t")
    assert not tenant.limited
    tenant.enter(1_000_000, 0.0)
    assert tenant.refusal(1_000_000, 1_000_000, 0.0, 1.0) is None
    assert not tenant.idle(0.0)


def test_concurrent_requests() -> None:
    tenant = Tenant("t", max_concurrent=3)
    assert tenant.limited
    assert tenant.refusal(3, 1, 0.0, 1.0) is None
    assert isinstance(tenant.refusal(4, 1, 0.0, 1.0), TenantLimitError)
    tenant.enter(2, 0.0)
    assert tenant.refusal(1, 1, 0.0, 1.0) is None
    refusal = tenant.refusal(2, 1, 0.0, 2.5)
    assert isinstance(refusal, TenantLimitError)
    assert (refusal.tenant, refusal.used, refusal.limit, refusal.retry_after_s) == ("t", 2, 3, 2.5)
    tenant.open_requests = 0
    assert tenant.idle(0.0)


def test_rows() -> None:
    tenant = Tenant("t", max_queue_rows=8)
    assert tenant.refusal(1, 8, 0.0, 1.0) is None
    assert isinstance(tenant.refusal(1, 9, 0.0, 1.0), TooManyRowsError)
    tenant.queued_rows = 5
    assert tenant.refusal(1, 3, 0.0, 1.0) is None
    refusal = tenant.refusal(1, 4, 0.0, 1.0)
    assert isinstance(refusal, TenantLimitError)
    assert (refusal.used, refusal.limit) == (5, 8)
    # Later there will be room for eight, never for nine.
    assert isinstance(tenant.refusal(1, 9, 0.0, 1.0), TooManyRowsError)
    assert not tenant.idle(0.0)


def test_a_rate() -> None:
    tenant = Tenant("t", requests_per_s=2, burst=4)
    assert tenant.refusal(4, 1, 0.0, 1.0) is None
    tenant.enter(3, 0.0)
    tenant.open_requests = 0
    refusal = tenant.refusal(2, 1, 0.0, 1.0)
    assert isinstance(refusal, TenantLimitError)
    assert (refusal.used, refusal.limit, refusal.retry_after_s) == (3, 4, 0.5)
    assert tenant.refusal(2, 1, 0.5, 1.0) is None
    # Forgotten before it is full again, it would have more than it may.
    assert not tenant.idle(1.25)
    assert tenant.idle(1.5)


@pytest.mark.parametrize(("per_s", "burst"), [(0.1, 1), (1.0, 1), (1.5, 2), (10.0, 10)])
def test_without_burst_one_seconds_rate(per_s: float, burst: int) -> None:
    bucket = Tenant("t", requests_per_s=per_s).bucket
    assert bucket is not None
    assert bucket.burst == burst
