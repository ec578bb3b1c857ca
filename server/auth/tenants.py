"""From a tenant's name to its account: the limits of `[[auth.tenants]]`, one object per tenant."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Sequence
from weakref import WeakValueDictionary

from cobatch.batcher.scheduling.tenant import Tenant
from cobatch.server.auth.tenant_totals import TenantTotals, Total
from cobatch.server.settings.auth import TenantRule

_Key = tuple[str, int]  # the tenant's name, and which rule holds for it
_KEPT = 10_000
# So many of them are shown by name where what tenants have had is shown.
SHOWN = 20


class Tenants:
    """All accounts that anybody uses, or whose rate has not recovered yet.

    An account lives as long as a principal or a request refers to it. Beyond that it is kept while
    forgetting it would make a difference; that is looked at only when there are many.
    """

    def __init__(
        self,
        rules: Sequence[TenantRule],
        clock: Callable[[], float] = time.monotonic,
        *,
        kept: int = _KEPT,
        shown: int = SHOWN,
    ) -> None:
        self._totals = TenantTotals(shown, clock)
        self._rules = rules
        self._clock = clock
        self._all: WeakValueDictionary[_Key, Tenant] = WeakValueDictionary()
        self._kept: dict[_Key, Tenant] = {}
        self._tidy_at = self._least = kept

    def of(self, name: str, values: Collection[str]) -> Tenant:
        """The account of a tenant whose credential has these values (scopes, roles)."""
        key = name, self._rule_for(name, values)
        tenant = self._all.get(key)
        if tenant is None:
            self._all[key] = tenant = self._made(*key)
            self._totals.add(tenant)
        if key not in self._kept:
            self._kept[key] = tenant
            if len(self._kept) > self._tidy_at:
                self._tidy()
        return tenant

    def totals(self) -> list[tuple[str, Total]]:
        """What the busiest tenants have had, by name, and all others together."""
        return self._totals.totals()

    def _rule_for(self, name: str, values: Collection[str]) -> int:
        """The index of the first rule that fits, -1 where none does."""
        for index, rule in enumerate(self._rules):
            if (rule.tenant or name) == name and (not rule.scope or rule.scope in values):
                return index
        return -1

    def _made(self, name: str, index: int) -> Tenant:
        if index < 0:
            return Tenant(name)
        rule = self._rules[index]
        return Tenant(
            name,
            max_concurrent=rule.max_concurrent,
            max_queue_rows=rule.max_queue_rows,
            requests_per_s=rule.requests_per_s,
            burst=rule.burst,
            weight=rule.weight,
        )

    def _tidy(self) -> None:
        """Let go of those that nothing speaks for. The threshold doubles, so this is O(1) amortised."""
        now_s = self._clock()
        self._kept = {key: tenant for key, tenant in self._kept.items() if not tenant.idle(now_s)}
        # Whoever is still here is used by somebody, and may spend its rate before that one goes.
        self._kept = dict(self._all)
        self._tidy_at = max(self._least, 2 * len(self._kept))
