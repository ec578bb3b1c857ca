"""Accounts by tenant name and rule, and usage totals of the busiest tenants."""

from __future__ import annotations

import gc

import pytest

from cobatch.batcher.tenant import Tenant
from cobatch.server.auth.tenants import OTHER, Tenants, TenantTotals
from cobatch.server.settings.auth import TenantRule


class Clock:
    now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


def visit(tenants: Tenants, count: int) -> None:
    """Create `count` accounts without keeping a reference."""
    for n in range(count):
        tenants.of(f"visitor {n}", ())


# Rules


def test_the_first_matching_rule_applies() -> None:
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


def test_without_a_matching_rule_there_is_no_limit() -> None:
    tenants = Tenants((TenantRule(tenant="ann", max_concurrent=1),))
    assert not tenants.of("bob", {"ann"}).limited
    assert tenants.of("", ()).name == ""


def test_one_account_per_name_and_rule() -> None:
    tenants = Tenants((TenantRule(scope="gold", max_concurrent=9), TenantRule(max_concurrent=1)))
    assert tenants.of("ann", {"gold"}) is tenants.of("ann", {"silver", "gold"})
    assert tenants.of("ann", {"gold"}) is not tenants.of("ann", ())
    assert tenants.of("ann", ()) is not tenants.of("bob", ())


# Forgotten accounts


def test_idle_accounts_are_forgotten_when_there_are_many() -> None:
    tenants = Tenants((), max_idle=10)
    visit(tenants, 1000)
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
    visit(tenants, 100)
    assert tenants.of("open", ()).open_requests == tenants.of("queued", ()).queued_rows == 1
    assert tenants.of("slow", ()).refusal(1, 1, 0.0, 0.0) is not None
    clock.now_s = 1.99
    visit(tenants, 100)
    assert ("slow", 0) in tenants._all
    clock.now_s = 2.0
    visit(tenants, 100)
    assert ("slow", 0) not in tenants._all


def test_a_referenced_account_is_never_replaced() -> None:
    tenants = Tenants((), max_idle=10)
    held = tenants.of("held", ())
    visit(tenants, 100)
    assert tenants.of("held", ()) is held


def test_a_released_account_keeps_its_bucket_until_it_is_full() -> None:
    tenants = Tenants((TenantRule(tenant="slow", requests_per_s=1, burst=1),), Clock(), max_idle=10)
    held = tenants.of("slow", ())
    # The account is idle and only a cached token refers to it.
    visit(tenants, 100)
    held.enter(1, 0.0)
    held.open_requests = 0
    del held
    visit(tenants, 100)
    assert tenants.of("slow", ()).refusal(1, 1, 0.0, 0.0) is not None


def test_many_busy_accounts_are_not_checked_each_time() -> None:
    tenants = Tenants((), max_idle=10)
    for n in range(100):
        tenants.of(str(n), ()).open_requests = 1
    assert len(tenants._kept) == 100
    assert tenants._max_kept >= 100
    for one in tenants._kept.values():
        one.open_requests = 0
    del one
    visit(tenants, 200)
    assert tenants._max_kept == 10
    gc.collect()
    assert len(tenants._all) < 100


# Usage totals


class Accounts:
    """Accounts of tenants and their totals."""

    def __init__(self, most: int) -> None:
        self.clock = Clock()
        self.totals = TenantTotals(most, self.clock)
        self.accounts: dict[str, Tenant] = {}

    def count(self, name: str, requests: int, *, refused: int = 0) -> None:
        """Count answered requests of one row each."""
        if name not in self.accounts:
            self.accounts[name] = Tenant(name, weight=2.0)
            self.totals.add(self.accounts[name])
        figures = self.accounts[name].usage
        figures.answered += requests
        figures.rows += requests
        figures.engine_s += requests * 0.25
        figures.refused += refused

    def leave(self, name: str) -> None:
        del self.accounts[name]
        gc.collect()

    @property
    def shown(self) -> dict[str, int]:
        """Answered requests, by name."""
        return {name: total.answered for name, total in self.totals.totals()}


def test_a_few_tenants_all_have_names() -> None:
    tenants = Accounts(2)
    tenants.count("ann", 3, refused=1)
    tenants.count("bob", 1)
    tenants.accounts["ann"].queued_rows = 7
    (_, ann), (_, bob) = tenants.totals.totals()
    assert (ann.answered, ann.refused, ann.rows, ann.engine_s) == (3, 1, 3, 0.75)
    assert (ann.weight, ann.queued_rows) == (2.0, 7)
    assert (bob.answered, bob.queued_rows) == (1, 0)


def test_a_tenant_named_other_counts_among_the_others() -> None:
    """Otherwise there would be two series of that name."""
    tenants = Accounts(2)
    tenants.count(OTHER, 9)
    tenants.count("ann", 3)
    tenants.count("bob", 2)
    tenants.count("cid", 1)
    assert [name for name, _ in tenants.totals.totals()] == ["ann", "bob", OTHER]
    assert tenants.shown == {"ann": 3, "bob": 2, OTHER: 10}


def test_the_busiest_have_names_and_the_others_one_total() -> None:
    tenants = Accounts(2)
    for n in range(50):
        tenants.count(f"visitor {n}", 1)
    tenants.count("ann", 100)
    tenants.count("bob", 200)
    assert tenants.shown == {"ann": 100, "bob": 200, OTHER: 50}


def test_a_tenant_twice_as_busy_takes_a_place() -> None:
    tenants = Accounts(1)
    tenants.count("ann", 100)
    assert tenants.shown == {"ann": 100}
    tenants.count("bob", 200)
    assert tenants.shown == {"ann": 100, OTHER: 200}
    tenants.count("bob", 1)
    # Bob's earlier requests stay in `other`, so that no total decreases.
    assert tenants.shown == {"bob": 1, OTHER: 200}
    tenants.count("ann", 5)
    assert tenants.shown == {"bob": 1, OTHER: 205}


def test_old_requests_decay() -> None:
    tenants = Accounts(1)
    tenants.count("ann", 1000)
    assert tenants.shown == {"ann": 1000}
    tenants.clock.now_s += 6000.0  # ten half-lives leave about one request
    tenants.count("bob", 3)
    assert tenants.shown == {"bob": 3}


def test_a_dead_account_is_counted_completely_and_once() -> None:
    tenants = Accounts(1)
    tenants.count("ann", 10)
    tenants.count("bob", 1)
    assert tenants.shown == {"ann": 10, OTHER: 1}
    tenants.count("bob", 1)
    tenants.leave("bob")
    assert tenants.shown == {"ann": 10, OTHER: 2}
    tenants.count("bob", 1)
    tenants.leave("ann")
    assert tenants.shown == {"ann": 10, OTHER: 3}
    tenants.count("ann", 1)
    assert tenants.shown == {"ann": 11, OTHER: 3}


def test_two_accounts_of_one_name_share_a_total() -> None:
    tenants = Accounts(3)
    tenants.count("ann", 4)
    second = Tenant("ann")
    tenants.totals.add(second)
    second.usage.answered += 5
    second.queued_rows = 2
    tenants.accounts["ann"].queued_rows = 1
    ((name, total),) = tenants.totals.totals()
    assert (name, total.answered, total.queued_rows) == ("ann", 9, 3)


def test_thousands_of_accounts_are_collected_less_often() -> None:
    tenants = Accounts(1)
    for n in range(4000):
        tenants.count(str(n), 1)
    assert tenants.shown == {}
    tenants.clock.now_s += 2.1
    assert sum(tenants.shown.values()) == 4000


def test_no_named_totals() -> None:
    tenants = Accounts(0)
    tenants.count("ann", 2)
    assert tenants.shown == {OTHER: 2}


def test_engine_seconds_add_up() -> None:
    tenants = Accounts(1)
    tenants.count("ann", 3)
    tenants.count("bob", 1)
    before = tenants.totals.totals()
    assert sum(total.engine_s for _, total in before) == pytest.approx(1.0)
