"""What forged tokens may cost: signature checks that fail, per address and together.

To check a signature takes the loop longer than to serve a small request, and only a check can tell a
forged token from a new one. So an address whose tokens fail is not checked for again for a while. It
costs nobody else anything: a token that was good before is remembered and needs no check, and so are
all refusals that need none (expired, wrong audience, unknown key).
"""

from __future__ import annotations

import ipaddress
from collections.abc import Callable

from cobatch.batcher.tenant import Bucket

_PER_S = 20.0
_BURST = 100
# All addresses together that have failed before, and all that have not: each about a tenth of a core.
_TOTAL_PER_S = 1500.0
_ADDRESSES = 4096


class Failures:
    """`clock` gives seconds and is monotonic."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._total = Bucket(_TOTAL_PER_S, int(_TOTAL_PER_S))
        # Whoever attacks from many addresses must not keep those out that never failed.
        self._new = Bucket(_TOTAL_PER_S, int(_TOTAL_PER_S))
        self._of: dict[str, Bucket] = {}

    def wait_s(self, address: str) -> float:
        """Seconds until a signature of this address will be checked again, 0.0 for now."""
        now_s = self._clock()
        bucket = self._of.get(_network(address))
        if bucket is None:
            return self._new.wait_s(1, now_s)
        return max(bucket.wait_s(1, now_s), self._total.wait_s(1, now_s))

    def charge(self, address: str) -> None:
        """A signature from there was wrong."""
        now_s = self._clock()
        network = _network(address)
        bucket = self._of.pop(network, None)
        together = self._total
        if bucket is None:
            together = self._new
            bucket = Bucket(_PER_S, _BURST)
            if len(self._of) >= _ADDRESSES:
                del self._of[next(iter(self._of))]
        self._of[network] = bucket  # at the end: the one that was quiet longest is forgotten first
        for one in (bucket, together):
            one.take(1, now_s)


def _network(address: str) -> str:
    """An IPv6 client has 2**64 addresses, or with a usual /56 256 times as many: its network counts."""
    if ":" not in address:
        return address
    try:
        parsed = ipaddress.IPv6Address(address.partition("%")[0])
    except ValueError:
        return address
    # Among those of the form ::ffff:192.0.2.1 each is an IPv4 client of its own.
    return str(parsed.ipv4_mapped or ipaddress.ip_network((parsed, 56), strict=False))
