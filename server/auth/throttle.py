"""A budget for failed signature checks, per address and in total.

A signature check takes the event loop longer than a small request, and only a check tells a forged token
from a new one. So an address whose tokens failed is not checked again for a while. Other clients are not
affected: cached tokens and refusals for other reasons need no check.
"""

import ipaddress
from collections.abc import Callable

from cobatch.batcher.tenant import Bucket

Clock = Callable[[], float]  # in seconds

_PER_S = 20.0
_BURST = 100
# Each total is about a tenth of one core: one for all addresses that failed before, one for all others.
_TOTAL_PER_S = 1500.0
_MAX_ADDRESSES = 4096


class SignatureThrottle:
    """Token buckets of failed signature checks. `clock` is monotonic, in seconds.

    Two are totals, so that an attack from many addresses does not exclude addresses that never failed.
    """

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self.divide(1)
        self._buckets: dict[str, Bucket] = {}

    def divide(self, processes: int) -> None:
        """Use the part of one of several processes, each of which has some of an address's connections."""
        per_s = _TOTAL_PER_S / processes
        self._known_total, self._new_total = Bucket(per_s, int(per_s)), Bucket(per_s, int(per_s))
        self._per_s, self._burst = _PER_S / processes, max(1, _BURST // processes)

    def wait_s(self, address: str) -> float:
        """Return the seconds until this address may have a signature checked, 0.0 for now."""
        now_s = self._clock()
        bucket = self._buckets.get(_network(address))
        if bucket is None:
            return self._new_total.wait_s(1, now_s)
        return max(bucket.wait_s(1, now_s), self._known_total.wait_s(1, now_s))

    def charge(self, address: str) -> None:
        """Count a wrong signature from this address."""
        now_s = self._clock()
        network = _network(address)
        bucket = self._buckets.pop(network, None)
        total = self._known_total
        if bucket is None:
            total = self._new_total
            bucket = Bucket(self._per_s, self._burst)
            if len(self._buckets) >= _MAX_ADDRESSES:
                del self._buckets[next(iter(self._buckets))]
        self._buckets[network] = bucket  # at the end, so that the least recent failure is dropped first
        bucket.take(1, now_s)
        total.take(1, now_s)


def _network(address: str) -> str:
    """Return an IPv6 address's /56, since one client commonly has all of it; other addresses unchanged."""
    if ":" not in address:
        return address
    try:
        parsed = ipaddress.IPv6Address(address.partition("%")[0])
    except ValueError:
        return address
    # Each address of the form ::ffff:192.0.2.1 is an IPv4 client of its own.
    return str(parsed.ipv4_mapped or ipaddress.ip_network((parsed, 56), strict=False))
