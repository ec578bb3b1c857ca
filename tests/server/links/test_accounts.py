"""Accounts of limited tenants in shared memory: fronts see what home has."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from math import inf
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cobatch.batcher.tenant import Tenant
from cobatch.server.auth.tenants import Tenants
from cobatch.server.links.accounts import AccountTable, FrontTenant, HomeTenant, share_accounts
from cobatch.server.settings.auth import TenantRule

FIRST = 3


def table_of(words: bytearray) -> AccountTable:
    table = AccountTable()
    table.use(memoryview(words).cast("q"), memoryview(words).cast("d"), FIRST)
    return table


def words_for(slots: int) -> bytearray:
    return bytearray(8 * (FIRST + 4 * slots))


def ends(slots: int) -> tuple[Callable[[str], HomeTenant], Callable[[str], FrontTenant]]:
    """Return functions that make a tenant of home, and one of a front with the same memory."""
    words = words_for(slots)
    limits: dict[str, Any] = {"max_concurrent": 3, "requests_per_s": 1.0, "burst": 4}
    home = partial(HomeTenant, table_of(words), **limits)
    front = partial(FrontTenant, table_of(words), **limits)
    return home, front


def state(tenant: Tenant) -> tuple[int, int, float]:
    assert tenant.bucket is not None
    return tenant.open_requests, tenant.queued_rows, tenant.bucket.full_at_s


def test_a_front_sees_an_account_as_it_is() -> None:
    home, front = ends(100)
    tenant, seen, other = home("t"), front("t"), front("other")
    assert state(seen) == (0, 0, -inf)
    tenant.enter(2, 10.0)
    tenant.queued_rows += 5
    assert state(seen) == state(tenant) == (2, 5, 12.0)
    assert state(other) == (0, 0, -inf)
    assert seen.refusal(1, 1, 10.0, 1.0) is None
    tenant.enter(1, 10.0)
    refusal = seen.refusal(1, 1, 10.0, 1.0)
    assert refusal is not None
    assert refusal.what == "concurrent requests"  # type: ignore[union-attr]
    tenant.open_requests -= 3
    assert state(seen) == (0, 5, 13.0)
    assert seen.rate_refusal(2, 10.0) is not None


def test_rules_have_accounts_of_their_own() -> None:
    home, front = ends(100)
    tenant, seen = home("t"), front("t")
    tenant.rule = seen.rule = 1
    tenant.enter(1, 0.0)
    assert (seen.open_requests, front("t").open_requests) == (1, 0)


def test_slots_at_rest_are_used_again() -> None:
    home, front = ends(1)
    one, two = home("one"), home("two")
    one.enter(1, 0.0)
    two.enter(1, 0.0)
    assert (front("one").open_requests, front("two").open_requests) == (1, 0)
    one.open_requests -= 1
    two.enter(1, 0.5)  # the bucket of `one` is not full before 1.0
    assert front("two").open_requests == 0
    seen = front("one")
    assert state(seen) == (0, 0, 1.0)
    two.enter(1, 1.0)
    assert front("two").open_requests == two.open_requests == 3
    assert state(seen) == (0, 0, -inf)
    one.enter(1, 1.0)
    one.open_requests -= 1
    assert front("two").open_requests == 3


def test_a_new_home_begins_anew() -> None:
    words, table = words_for(8), AccountTable()
    seen = FrontTenant(table, "t", max_concurrent=1)
    assert seen.open_requests == 0
    for count in (2, 3):
        home = table_of(words := words_for(8))
        table.use(memoryview(words).cast("q"), memoryview(words).cast("d"), FIRST)
        assert seen.open_requests == 0
        HomeTenant(home, "t", max_concurrent=1).enter(count, 0.0)
        assert seen.open_requests == count


def test_only_limited_tenants_have_accounts_in_shared_memory() -> None:
    tenants = Tenants([TenantRule(tenant="t", max_concurrent=1)])
    share_accounts(tenants, HomeTenant)
    assert type(tenants.of("t", ())) is HomeTenant
    assert type(tenants.of("u", ())) is Tenant


NAMES = [f"tenant {number}" for number in range(30)]


@given(
    st.sampled_from([1, 5, 16]),
    st.lists(st.tuples(st.sampled_from(NAMES), st.integers(0, 2), st.integers(0, 3)), max_size=60),
)
def test_a_front_sees_the_account_or_nothing(slots: int, steps: list[tuple[str, int, int]]) -> None:
    home, front = ends(slots)
    tenants = {name: home(name) for name in NAMES}
    seen = {name: front(name) for name in NAMES}
    now_s = 0.0
    for name, requests, passes in steps:
        now_s += passes
        tenant = tenants[name]
        if tenant.open_requests > 1:
            tenant.open_requests -= 2
        elif requests:
            tenant.enter(requests, now_s)
        for each in NAMES:
            at_rest = (0, 0, -inf)
            got, true = state(seen[each]), state(tenants[each])
            assert got in (true, at_rest)
            if got == at_rest and slots == 16 and sum(not one.idle(now_s) for one in tenants.values()) < 2:
                assert tenants[each].idle(now_s)


@pytest.mark.parametrize("slots", [0, 1, 3])
def test_a_small_table(slots: int) -> None:
    home, front = ends(slots)
    home("t").enter(1, 0.0)
    assert front("t").open_requests == (1 if slots else 0)
