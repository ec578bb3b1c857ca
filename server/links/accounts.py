"""Accounts of limited tenants, in home's page: fronts refuse a tenant's requests before they read the bodies.

A hash table of slots with four words: the key, the open requests, the queued rows, and the time at which the
token bucket is full again. A tenant without a slot is at rest, or one more than the table takes: then home
alone refuses its requests. Home always decides when it gets the rows; a front knows as much as home does, but
not of requests that are on their way.
"""

from __future__ import annotations

from functools import cached_property
from hashlib import blake2b
from math import inf
from typing import Any

from cobatch.batcher.tenant import Bucket, Tenant
from cobatch.server.auth.tenants import Tenants

_SLOT_WORDS = 4
# Slots in which a tenant's account may be.
_PROBES = 8
_NONE = -1


class AccountTable:
    """The accounts in the page of the present home. Only home writes."""

    def __init__(self) -> None:
        self.use(memoryview(b"").cast("q"), memoryview(b"").cast("d"), 0)

    def use(self, numbers: memoryview[int], seconds: memoryview[float], first: int) -> None:
        """Use the words of a page from `first` on: as whole numbers, and as times."""
        self.numbers, self.seconds = numbers, seconds
        self._first = first
        self._slots = (len(numbers) - first) // _SLOT_WORDS

    def _slots_of(self, key: int) -> list[int]:
        probes = range(key, key + min(_PROBES, self._slots))
        return [self._first + probe % self._slots * _SLOT_WORDS for probe in probes]

    def find(self, key: int) -> int:
        """Return the first word of this key's slot, or -1."""
        return next((at for at in self._slots_of(key) if self.numbers[at] == key), _NONE)

    def claim(self, key: int, now_s: float) -> int:
        """Return the first word of this key's slot, for which one at rest is used, or -1."""
        at = self.find(key)
        if at == _NONE:
            at = next((one for one in self._slots_of(key) if self._rests(one, now_s)), _NONE)
        if at != _NONE:
            self.numbers[at] = key
        return at

    def has(self, at: int, key: int) -> bool:
        """Return whether the slot that begins at this word is the key's."""
        return 0 <= at < len(self.numbers) and self.numbers[at] == key

    def _rests(self, at: int, now_s: float) -> bool:
        return not self.numbers[at + 1] and not self.numbers[at + 2] and self.seconds[at + 3] <= now_s


class LinkedTenant(Tenant):
    """A limited tenant, with an account in the table."""

    _at = _NONE

    def __init__(self, table: AccountTable, name: str, **limits: Any) -> None:
        self._table = table
        super().__init__(name, **limits)

    @cached_property
    def key(self) -> int:
        """The tenant's key in the table, which is the same in all processes."""
        digest = blake2b(b"%d %b" % (self.rule, self.name.encode()), digest_size=8).digest()
        return int.from_bytes(digest, "little", signed=True)


class HomeTenant(LinkedTenant):
    """A tenant in home, whose account the fronts see."""

    _open = _queued = 0

    @property
    def open_requests(self) -> int:
        return self._open

    @open_requests.setter
    def open_requests(self, count: int) -> None:
        self._open = count
        if self._at != _NONE:
            self._table.numbers[self._at + 1] = count

    @property
    def queued_rows(self) -> int:
        return self._queued

    @queued_rows.setter
    def queued_rows(self, rows: int) -> None:
        self._queued = rows
        if self._at != _NONE:
            self._table.numbers[self._at + 2] = rows

    def enter(self, requests: int, now_s: float) -> None:
        self._at = self._table.claim(self.key, now_s)  # an earlier one may be another tenant's
        super().enter(requests, now_s)
        if self._at != _NONE and self.bucket is not None:
            self._table.seconds[self._at + 3] = self.bucket.full_at_s


class FrontTenant(LinkedTenant):
    """A tenant in a front: its account is the one in home."""

    def _slot(self) -> int:
        """Return the first word of the account, or -1 if it is at rest."""
        if not self._table.has(self._at, self.key):
            self._at = self._table.find(self.key)
        return self._at

    def _count(self, word: int) -> int:
        at = self._slot()
        return 0 if at == _NONE else self._table.numbers[at + word]

    @property
    def open_requests(self) -> int:
        return self._count(1)

    @open_requests.setter
    def open_requests(self, count: int) -> None:
        """Home counts."""

    @property
    def queued_rows(self) -> int:
        return self._count(2)

    @queued_rows.setter
    def queued_rows(self, rows: int) -> None:
        """Home counts."""

    @property
    def bucket(self) -> Bucket | None:
        bucket, at = self._bucket, self._slot()
        if bucket is not None:
            bucket.full_at_s = -inf if at == _NONE else self._table.seconds[at + 3]
        return bucket

    @bucket.setter
    def bucket(self, bucket: Bucket | None) -> None:
        self._bucket = bucket


def share_accounts(tenants: Tenants, kind: type[LinkedTenant]) -> AccountTable:
    """Give the limited tenants of this process accounts in a table; return it."""
    table = AccountTable()

    def make(name: str, **limits: Any) -> Tenant:
        tenant = Tenant(name, **limits)
        return kind(table, name, **limits) if tenant.limited else tenant

    tenants.make = make
    return table
