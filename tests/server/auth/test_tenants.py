"""From names to accounts: Tenants; and Failures, by address."""

from __future__ import annotations

import gc

import pytest

from cobatch.server.auth.tenants import Tenants
from cobatch.server.auth.throttle import SignatureThrottle
from cobatch.server.settings.auth import TenantRule


class Clock:
    now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


def many(tenants: Tenants, count: int) -> None:
    """So many that come once and are gone."""
    for n in range(count):
        tenants.of(f"passer-by {n}", ())


# Rules


def test_the_first_rule_that_fits_holds() -> None:
    rules = (
        TenantRule(tenant="ann", max_concurrent=1),
        TenantRule(scope="gold", max_concurrent=100, weight=4),
        TenantRule(tenant="bob", max_queue_rows=5),
        TenantRule(requests_per_s=2.5, burst=7),
    )
    tenants = Tenants(rules)
    assert tenants.of("ann", {"gold"}).max_concurrent == 1
    gold = tenants.of("bob", {"infer", "gold"})
    assert (gold.max_concurrent, gold.max_queue_rows, gold.weight) == (100, None, 4)
    assert tenants.of("bob", {"infer"}).max_queue_rows == 5
    other = tenants.of("cy", ()).bucket
    assert other is not None
    assert other.burst == 7
    assert other.window_s == pytest.approx(2.8)


def test_without_a_rule_that_fits_there_is_no_limit() -> None:
    tenants = Tenants((TenantRule(tenant="ann", max_concurrent=1),))
    assert not tenants.of("bob", {"ann"}).limited
    assert tenants.of("", ()).name == ""


def test_one_account_for_a_name_and_a_rule() -> None:
    tenants = Tenants((TenantRule(scope="gold", max_concurrent=9), TenantRule(max_concurrent=1)))
    assert tenants.of("ann", {"gold"}) is tenants.of("ann", {"silver", "gold"})
    assert tenants.of("ann", {"gold"}) is not tenants.of("ann", ())
    assert tenants.of("ann", ()) is not tenants.of("bob", ())


# What is forgotten


def test_idle_accounts_are_forgotten_when_there_are_many() -> None:
    tenants = Tenants((), max_idle=10)
    many(tenants, 1000)
    assert len(tenants._kept) <= 11
    assert len(tenants._all) <= 11


def test_an_account_with_requests_or_an_empty_bucket_is_kept() -> None:
    clock = Clock()
    tenants = Tenants((TenantRule(tenant="slow", requests_per_s=1, burst=2),), clock, max_idle=10)
    tenants.of("open", ()).enter(1, 0.0)
    tenants.of("queued", ()).queued_rows = 1
    slow = tenants.of("slow", ())
    slow.enter(2, 0.0)
    slow.open_requests = 0
    del slow
    many(tenants, 100)
    assert tenants.of("open", ()).open_requests == tenants.of("queued", ()).queued_rows == 1
    assert tenants.of("slow", ()).refusal(1, 1, 0.0, 0.0) is not None
    clock.now_s = 1.99
    many(tenants, 100)
    assert ("slow", 0) in tenants._all
    clock.now_s = 2.0
    many(tenants, 100)
    assert ("slow", 0) not in tenants._all


def test_an_account_that_somebody_refers_to_is_that_tenants_only_one() -> None:
    tenants = Tenants((), max_idle=10)
    held = tenants.of("held", ())
    many(tenants, 100)
    assert tenants.of("held", ()) is held


def test_what_a_held_account_spends_is_known_when_it_is_let_go() -> None:
    tenants = Tenants((TenantRule(tenant="slow", requests_per_s=1, burst=1),), Clock(), max_idle=10)
    held = tenants.of("slow", ())
    # It is idle, and there are many; only a remembered token refers to it.
    many(tenants, 100)
    held.enter(1, 0.0)
    held.open_requests = 0
    del held
    many(tenants, 100)
    assert tenants.of("slow", ()).refusal(1, 1, 0.0, 0.0) is not None


def test_many_that_cannot_be_forgotten_are_not_looked_at_each_time() -> None:
    tenants = Tenants((), max_idle=10)
    for n in range(100):
        tenants.of(str(n), ()).open_requests = 1
    assert len(tenants._kept) == 100
    assert tenants._max_kept >= 100
    for one in tenants._kept.values():
        one.open_requests = 0
    del one
    many(tenants, 200)
    assert tenants._max_kept == 10
    gc.collect()
    assert len(tenants._all) < 100


# Failures


def exhaust(throttle: SignatureThrottle, address: str) -> int:
    """Forge until the address is not heard any more: how often."""
    count = 0
    while throttle.wait_s(address) == 0:
        throttle.charge(address)
        count += 1
        assert count < 10_000
    return count


def test_an_address_has_a_budget_that_comes_back() -> None:
    clock = Clock()
    throttle = SignatureThrottle(clock)
    assert exhaust(throttle, "192.0.2.1") == 100
    assert throttle.wait_s("192.0.2.1") == pytest.approx(0.05)
    assert throttle.wait_s("192.0.2.2") == 0
    clock.now_s = 0.05
    assert exhaust(throttle, "192.0.2.1") == 1
    clock.now_s = 1000.0
    assert exhaust(throttle, "192.0.2.1") == 100


@pytest.mark.parametrize(
    ("first", "second", "same"),
    [
        ("2001:db8::1", "2001:db8::ffff:0:0:1", True),
        ("2001:db8::1", "2001:db8:0:ff::1", True),
        ("2001:db8::1", "2001:db8:0:100::1", False),
        ("fe80::1%eth0", "fe80::2%eth1", True),
        ("::ffff:192.0.2.1", "::ffff:192.0.2.2", False),
        ("::ffff:192.0.2.1", "192.0.2.1", True),
        ("192.0.2.1", "192.0.2.2", False),
        ("a:b", "a:c", False),
        ("", "192.0.2.1", False),
    ],
)
def test_an_ipv6_network_counts_as_one(first: str, second: str, same: bool) -> None:
    throttle = SignatureThrottle(Clock())
    exhaust(throttle, first)
    assert (throttle.wait_s(second) > 0) == same


def test_all_addresses_together_have_a_budget() -> None:
    clock = Clock()
    throttle = SignatureThrottle(clock)
    throttle.charge("198.51.100.1")
    charged = sum(exhaust(throttle, f"192.0.2.{n}") for n in range(16))
    assert 1500 <= charged <= 1516
    assert throttle.wait_s("198.51.100.1") > 0
    # Whoever never failed has nothing to do with it.
    assert throttle.wait_s("198.51.100.2") == 0
    clock.now_s = 1.0
    assert throttle.wait_s("198.51.100.1") == 0


def test_all_that_never_failed_have_a_budget_of_their_own() -> None:
    throttle = SignatureThrottle(Clock())
    throttle.charge("198.51.100.1")
    for n in range(1, 1500):
        assert throttle.wait_s(f"10.0.{n // 256}.{n % 256}") == 0
        throttle.charge(f"10.0.{n // 256}.{n % 256}")
    assert throttle.wait_s("192.0.2.1") > 0
    assert throttle.wait_s("198.51.100.1") == 0


def test_the_address_that_was_quiet_longest_is_forgotten_first() -> None:
    clock = Clock()
    throttle = SignatureThrottle(clock)
    for n in range(4096):
        clock.now_s += 0.001
        throttle.charge(f"10.0.{n // 256}.{n % 256}")
    throttle.charge("10.0.0.0")
    throttle.charge("192.0.2.1")
    assert len(throttle._buckets) == 4096
    assert "10.0.0.0" in throttle._buckets
    assert "10.0.0.1" not in throttle._buckets
