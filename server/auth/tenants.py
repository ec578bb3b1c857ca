"""From a tenant's name to its account: the limits of `[[auth.tenants]]`, one object per tenant.

RateLimit and RateLimit-Policy: where a tenant stands (draft-ietf-httpapi-ratelimit-headers-10).

What tenants have had, for those who watch: the busiest by name, all others together.

There may be any number of tenants, and time series must not grow with them. Each account counts for itself
(`batcher.tenant.Usage`); here the counts are gathered into totals when somebody asks. A name has
a total of its own from the time on at which it was found among the busiest; what it had before stays in
`other`. It loses it to a name that has lately been much busier. So no total ever goes back, but one may begin
anew at 0. A tenant that calls itself `other` is one of the others.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Collection, Sequence
from weakref import WeakValueDictionary, ref

from cobatch.batcher.tenant import Tenant, Usage
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


def rate_limit_headers(tenant: Tenant, now_s: float) -> tuple[tuple[bytes, bytes], ...]:
    """The headers for a tenant's answer, none where it has no limit that they can say.

    `requests` is the token bucket: `q` at once, full again after `w` seconds; `r` are left, and in `t`
    seconds all will be. `concurrent` are the requests that may be open at the same time.
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
    if not policies:
        return ()
    return (
        (b"ratelimit-policy", ", ".join(policies).encode()),
        (b"ratelimit", ", ".join(left).encode()),
    )


OTHER = "other"
# Requests count less the longer ago they were: half after so many seconds.
_HALF_LIFE_S = 600.0
# So many times as busy as another must a name be to take its place: or two alike would take turns.
_BUSIER = 2.0
# Who has made less than this of a request is forgotten.
_IDLE = 0.01
# Gathering takes a quarter of a microsecond for each account; where there are so many, it is done less often
# than once a second.
_MANY = 2000


class Total(Usage):
    """Of one name. `weight` and `queued_rows` are as they are now; None and 0 for `other`."""

    __slots__ = ("queued_rows", "weight")

    def __init__(self) -> None:
        super().__init__()
        self.weight: float | None = None
        self.queued_rows = 0


class _Account:
    """What has been gathered of an account already. It outlives the tenant's own object until all is."""

    __slots__ = ("figures", "gathered", "name", "requests", "tenant")

    def __init__(self, tenant: Tenant) -> None:
        self.tenant = ref(tenant)
        self.name = tenant.name
        self.figures = tenant.usage
        self.gathered = Usage()
        self.requests = 0

    def since(self) -> Usage | None:
        """What came since this was asked last, None for nothing."""
        figures = self.figures
        requests = figures.answered + figures.failed + figures.refused
        if requests == self.requests and figures.rows == self.gathered.rows:
            return None
        self.requests = requests
        before, self.gathered = self.gathered, figures.copy()
        return self.gathered.less(before)


class TenantTotals:
    """`most` names have totals of their own."""

    def __init__(self, most: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._most = most
        self._clock = clock
        self._accounts: list[_Account] = []
        self._named: dict[str, Total] = {}
        self._other = Total()
        self._busy: dict[str, float] = {}  # requests, as they count now
        self._at_s = clock()

    def add(self, tenant: Tenant) -> None:
        """Gather this account's counts, too: for as long as it lives, and what it leaves behind."""
        self._accounts.append(_Account(tenant))

    def totals(self) -> list[tuple[str, Total]]:
        """The busiest, by name, and `other` if anything was counted there."""
        now_s = self._clock()
        if len(self._accounts) < _MANY or now_s - self._at_s > len(self._accounts) / _MANY:
            self._gather(now_s)
        rest = [(OTHER, self._other)] if self._other.any() else []
        return sorted(self._named.items()) + rest

    def _gather(self, now_s: float) -> None:
        since: dict[str, Usage] = {}
        gone = []
        for index, account in enumerate(self._accounts):
            if account.tenant() is None:
                gone.append(index)
            some = account.since()
            if some is not None:
                since.setdefault(account.name, Usage()).add(some)
        self._note_how_busy(since, now_s)
        self._choose()
        for name, some in since.items():
            self._named.get(name, self._other).add(some)
        for index in reversed(gone):
            del self._accounts[index]
        self._look_at_named()

    def _note_how_busy(self, since: dict[str, Usage], now_s: float) -> None:
        fading, self._at_s = 0.5 ** ((now_s - self._at_s) / _HALF_LIFE_S), now_s
        faded = {name: busy * fading for name, busy in self._busy.items()}
        self._busy = {name: busy for name, busy in faded.items() if busy > _IDLE or name in self._named}
        for name, some in since.items():
            self._busy[name] = self._busy.get(name, 0.0) + some.answered + some.failed + some.refused

    def _choose(self) -> None:
        """Who has a total of his own."""
        named, busy = self._named, self._busy
        waiting = sorted((name for name in busy if name not in named and name != OTHER), key=busy.__getitem__)
        while waiting and self._most:
            name = waiting.pop()
            if len(named) >= self._most:
                idlest = min(named, key=busy.__getitem__)
                if busy[name] <= _BUSIER * busy[idlest]:
                    return
                del named[idlest]
            named[name] = Total()

    def _look_at_named(self) -> None:
        for total in self._named.values():
            total.queued_rows = 0
        for account in self._accounts:
            total_or_none = self._named.get(account.name)
            tenant = None if total_or_none is None else account.tenant()
            if total_or_none is not None and tenant is not None:
                total_or_none.weight = tenant.weight
                total_or_none.queued_rows += tenant.queued_rows
