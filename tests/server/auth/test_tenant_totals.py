"""Who is shown by name among tenants without number, and that nothing is lost or counted twice."""

from __future__ import annotations

import gc

import pytest

from cobatch.batcher.tenant import Tenant
from cobatch.server.auth.tenants import OTHER, TenantTotals


class Clock:
    now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


class Tenants:
    """Accounts of tenants, and what is shown of them."""

    def __init__(self, most: int) -> None:
        self.clock = Clock()
        self.totals = TenantTotals(most, self.clock)
        self.accounts: dict[str, Tenant] = {}

    def ask(self, name: str, requests: int, *, refused: int = 0) -> None:
        """So many requests of one row are answered."""
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
        """Requests answered, by name."""
        return {name: total.answered for name, total in self.totals.totals()}


def test_all_by_name_where_there_are_few() -> None:
    tenants = Tenants(2)
    tenants.ask("ann", 3, refused=1)
    tenants.ask("bob", 1)
    tenants.accounts["ann"].queued_rows = 7
    (_, ann), (_, bob) = tenants.totals.totals()
    assert (ann.answered, ann.refused, ann.rows, ann.engine_s) == (3, 1, 3, 0.75)
    assert (ann.weight, ann.queued_rows) == (2.0, 7)
    assert (bob.answered, bob.queued_rows) == (1, 0)


def test_a_tenant_called_other_is_one_of_the_others() -> None:
    """Or there would be two series of that name."""
    tenants = Tenants(2)
    tenants.ask(OTHER, 9)
    tenants.ask("ann", 3)
    tenants.ask("bob", 2)
    tenants.ask("cid", 1)
    assert [name for name, _ in tenants.totals.totals()] == ["ann", "bob", OTHER]
    assert tenants.shown == {"ann": 3, "bob": 2, OTHER: 10}


def test_the_busiest_have_names_and_the_others_are_one() -> None:
    tenants = Tenants(2)
    for n in range(50):
        tenants.ask(f"passer-by {n}", 1)
    tenants.ask("ann", 100)
    tenants.ask("bob", 200)
    assert tenants.shown == {"ann": 100, "bob": 200, OTHER: 50}


def test_a_name_gives_way_to_one_twice_as_busy() -> None:
    tenants = Tenants(1)
    tenants.ask("ann", 100)
    assert tenants.shown == {"ann": 100}
    tenants.ask("bob", 200)
    assert tenants.shown == {"ann": 100, OTHER: 200}
    tenants.ask("bob", 1)
    # What bob had before stays where it was counted, so that no total goes back.
    assert tenants.shown == {"bob": 1, OTHER: 200}
    tenants.ask("ann", 5)
    assert tenants.shown == {"bob": 1, OTHER: 205}


def test_what_was_long_ago_does_not_count() -> None:
    tenants = Tenants(1)
    tenants.ask("ann", 1000)
    assert tenants.shown == {"ann": 1000}
    tenants.clock.now_s += 6000.0  # ten half-lives: about one request is left
    tenants.ask("bob", 3)
    assert tenants.shown == {"bob": 3}


def test_who_is_gone_is_counted_to_the_end_and_once() -> None:
    tenants = Tenants(1)
    tenants.ask("ann", 10)
    tenants.ask("bob", 1)
    assert tenants.shown == {"ann": 10, OTHER: 1}
    tenants.ask("bob", 1)
    tenants.leave("bob")
    assert tenants.shown == {"ann": 10, OTHER: 2}
    tenants.ask("bob", 1)
    tenants.leave("ann")
    assert tenants.shown == {"ann": 10, OTHER: 3}
    tenants.ask("ann", 1)
    assert tenants.shown == {"ann": 11, OTHER: 3}


def test_two_accounts_of_one_name_are_one() -> None:
    tenants = Tenants(3)
    tenants.ask("ann", 4)
    second = Tenant("ann")
    tenants.totals.add(second)
    second.usage.answered += 5
    second.queued_rows = 2
    tenants.accounts["ann"].queued_rows = 1
    ((name, total),) = tenants.totals.totals()
    assert (name, total.answered, total.queued_rows) == ("ann", 9, 3)


def test_thousands_are_looked_at_less_often() -> None:
    tenants = Tenants(1)
    for n in range(4000):
        tenants.ask(str(n), 1)
    assert tenants.shown == {}
    tenants.clock.now_s += 2.1
    assert sum(tenants.shown.values()) == 4000


def test_none_by_name_if_so_wished() -> None:
    tenants = Tenants(0)
    tenants.ask("ann", 2)
    assert tenants.shown == {OTHER: 2}


def test_figures_of_engines_add_up() -> None:
    tenants = Tenants(1)
    tenants.ask("ann", 3)
    tenants.ask("bob", 1)
    before = tenants.totals.totals()
    assert sum(total.engine_s for _, total in before) == pytest.approx(1.0)
