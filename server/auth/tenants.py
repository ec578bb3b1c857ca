"""Tenant accounts: one object per tenant name and `[[auth.tenants]]` rule, and usage totals for metrics.

An account lives while a principal or request refers to it, and beyond that while forgetting it would matter:
while its token bucket is not full again.

There may be any number of tenants, but time series must not grow with them. So the busiest tenants have
totals under their own names and all others share the total `other`. A tenant's own total starts at 0 when it
is first found among the busiest; earlier usage stays in `other`. It loses its place to a tenant that has
recently been much busier. So no total ever decreases, but one may restart at 0. A tenant named `other`
belongs to the others.
"""

import math
import time
from collections.abc import Callable, Collection, Sequence
from typing import NamedTuple
from weakref import WeakValueDictionary, ref

import msgspec

from cobatch.batcher.tenant import Tenant, Usage
from cobatch.server.auth.throttle import Clock
from cobatch.server.settings.auth import TenantRule

OTHER = "other"
_Key = tuple[str, int]  # the tenant's name and the index of its rule
_MAX_IDLE = 10_000  # accounts
_MAX_NAMED_TOTALS = 20
_HALF_LIFE_S = 600.0  # of requests, when tenants are compared
# A tenant has to be this many times busier to take another's place, or two equals would take turns.
_TAKEOVER_RATIO = 2.0
_FORGOTTEN_BELOW = 0.01  # requests, after decay
# Collecting costs 0.25 us per account; with more accounts than this it happens less than once a second.
_ACCOUNTS_PER_S = 2000


class Total(Usage):
    """The usage of one name. `weight` and `queued_rows` are current values; None and 0 for `other`."""

    __slots__ = ("queued_rows", "weight")

    def __init__(self) -> None:
        super().__init__()
        self.weight: float | None = None
        self.queued_rows = 0


class Tenants:
    """All accounts in use, or whose token bucket is not full again. `make` makes one."""

    def __init__(
        self, rules: Sequence[TenantRule], clock: Clock = time.monotonic, *, max_idle: int = _MAX_IDLE
    ) -> None:
        self.make: Callable[..., Tenant] = Tenant
        self._rules = [*rules, TenantRule()]  # the last one fits all, without limits
        self._clock = clock
        self._all: WeakValueDictionary[_Key, Tenant] = WeakValueDictionary()
        self._kept: dict[_Key, Tenant] = {}
        self._max_kept = self._max_idle = max_idle
        self._totals = TenantTotals(_MAX_NAMED_TOTALS, clock)

    def of(self, name: str, values: Collection[str]) -> Tenant:
        """Return the account of a tenant whose credential has these values (scopes, roles)."""
        index = next(
            index
            for index, rule in enumerate(self._rules)
            if (rule.tenant or name) == name and (not rule.scope or rule.scope in values)
        )
        return self.by_rule(name, index)

    def has_rule(self, index: int) -> bool:
        """Return whether there is a rule with this index."""
        return index < len(self._rules)

    def by_rule(self, name: str, index: int) -> Tenant:
        """Return the account of a tenant whose limits are from the rule with this index."""
        key = name, index
        tenant = self._all.get(key)
        if tenant is None:
            limits = msgspec.structs.asdict(self._rules[index])
            del limits["tenant"], limits["scope"]
            self._all[key] = tenant = self.make(name, **limits)
            tenant.rule = index
            self._totals.add(tenant)
        if key not in self._kept:
            self._kept[key] = tenant
            if len(self._kept) > self._max_kept:
                self._drop_idle()
        return tenant

    def totals(self) -> list[tuple[str, Total]]:
        return self._totals.totals()

    def take_refused(self) -> list[tuple[str, int, int]]:
        return self._totals.take_refused()

    def _drop_idle(self) -> None:
        """Drop idle accounts without other references. The limit doubles, so this is amortised O(1)."""
        now_s = self._clock()
        self._kept = {key: tenant for key, tenant in self._kept.items() if not tenant.idle(now_s)}
        # The accounts still alive are in use, and may empty their buckets before they are released.
        self._kept = dict(self._all)
        self._max_kept = max(self._max_idle, 2 * len(self._kept))


def rate_limit_headers(tenant: Tenant, now_s: float) -> tuple[tuple[bytes, bytes], ...]:
    """Return RateLimit and RateLimit-Policy (draft-ietf-httpapi-ratelimit-headers-10), if it has such limits.

    `requests` is the token bucket: `q` requests at once, full again after `w` seconds; `r` are left, and it
    is full in `t` seconds. `concurrent` limits the requests open at the same time.
    """
    policies, left = [], []
    bucket = tenant.bucket
    if bucket is not None:
        policies.append(f'"requests";q={bucket.burst};w={math.ceil(bucket.window_s - 1e-9)}')
        full_s = math.ceil(bucket.until_full_s(now_s) - 1e-9)
        left.append(f'"requests";r={bucket.left(now_s)};t={full_s}')
    if tenant.max_concurrent is not None:
        policies.append(f'"concurrent";q={tenant.max_concurrent};qu="concurrent-requests"')
        left.append(f'"concurrent";r={max(0, tenant.max_concurrent - tenant.open_requests)}')
    fields = (b"ratelimit-policy", policies), (b"ratelimit", left)
    return tuple((name, ", ".join(items).encode()) for name, items in fields if items)


class _Account(NamedTuple):
    """A tenant's usage since the last collection. Outlives the tenant until all is collected."""

    name: str
    rule: int
    usage: Usage
    tenant: ref[Tenant]


class TenantTotals:
    """Usage totals of the `max_named` busiest tenants, and of all others together."""

    def __init__(self, max_named: int, clock: Clock = time.monotonic) -> None:
        self._max_named = max_named
        self._clock = clock
        self._accounts: list[_Account] = []
        self._named: dict[str, Total] = {}
        self._other = Total()
        self._busy: dict[str, float] = {}  # requests by name, decayed
        self._collected_s = clock()

    def add(self, tenant: Tenant) -> None:
        """Include this account's usage, up to the end of its life."""
        self._accounts.append(_Account(tenant.name, tenant.rule, tenant.usage, ref(tenant)))

    def totals(self) -> list[tuple[str, Total]]:
        """Return the busiest tenants' totals, by name, and `other` if it has any."""
        now_s = self._clock()
        accounts = len(self._accounts)
        if accounts < _ACCOUNTS_PER_S or now_s - self._collected_s > accounts / _ACCOUNTS_PER_S:
            self._collect(now_s)
        rest = [(OTHER, self._other)] if self._other.any() else []
        return sorted(self._named.items()) + rest

    def take_refused(self) -> list[tuple[str, int, int]]:
        """Return the tenants with refused requests, as name, rule and requests, and begin again.

        For a process that counts no other usage.
        """
        accounts, self._accounts = self._accounts, [one for one in self._accounts if one.tenant() is not None]
        refused = [(one.name, one.rule, one.usage.refused) for one in accounts if one.usage.refused]
        for account in accounts:
            account.usage.clear()
        return refused

    def _collect(self, now_s: float) -> None:
        new: dict[str, Usage] = {}
        alive = []
        for account in self._accounts:
            if account.tenant() is not None:
                alive.append(account)
            if account.usage.any():
                new.setdefault(account.name, Usage()).add(account.usage)
                account.usage.clear()
        self._accounts = alive
        self._update_busy(new, now_s)
        self._choose_named()
        for name, usage in new.items():
            self._named.get(name, self._other).add(usage)
        for total in self._named.values():
            total.queued_rows = 0
        for account in alive:
            named = self._named.get(account.name)
            if named is not None and (tenant := account.tenant()) is not None:
                named.weight = tenant.weight
                named.queued_rows += tenant.queued_rows

    def _update_busy(self, new: dict[str, Usage], now_s: float) -> None:
        decay, self._collected_s = 0.5 ** ((now_s - self._collected_s) / _HALF_LIFE_S), now_s
        decayed = {name: busy * decay for name, busy in self._busy.items()}
        self._busy = {n: busy for n, busy in decayed.items() if busy > _FORGOTTEN_BELOW or n in self._named}
        for name, usage in new.items():
            self._busy[name] = self._busy.get(name, 0.0) + usage.requests

    def _choose_named(self) -> None:
        named, busy = self._named, self._busy
        waiting = sorted((name for name in busy if name not in named and name != OTHER), key=busy.__getitem__)
        while waiting and self._max_named:
            name = waiting.pop()
            if len(named) >= self._max_named:
                idlest = min(named, key=busy.__getitem__)
                if busy[name] <= _TAKEOVER_RATIO * busy[idlest]:
                    return
                del named[idlest]
            named[name] = Total()
