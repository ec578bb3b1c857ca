"""The memory for the bodies of requests, shared by all connections of a server.

A body of at most FREE_BYTES needs none of it. A longer one takes its whole length, if that is known, before
it is read on, and gives it back when its request is answered. One client (an address) may hold at most
CLIENT_SHARE times the memory that is left, as in Choudhury and Hahne's "Dynamic queue length thresholds"
(1998): one that fills its share leaves room for others, and has almost all where it is alone. Requests
without room wait unread, in the order of their arrival, up to a number.
"""

import asyncio
import ipaddress
import os
from collections import defaultdict, deque
from pathlib import Path
from typing import Protocol

from cobatch.server.settings.cgroups import CGROUPS, OWN, limits

FREE_BYTES = 1 << 16
# The first share of a body of unknown length; it doubles.
CHUNKED_BYTES = 1 << 20
CLIENT_SHARE = 4
# Each has at most one read (256 KiB) and FREE_BYTES. One client has at most half of the places left.
MOST_WAITING = 256
# Reads of long bodies in one iteration of the event loop, each of at most 256 KiB.
READS_AT_ONCE = 8
_DEFAULT_PART = 8
_LARGEST_DEFAULT = 2 << 30


class Taker(Protocol):
    """A connection, as far as it is known here. `address`: the client's, see `client_of`."""

    address: str

    def on_body_memory(self) -> None: ...


class Reader(Protocol):
    """A connection that is told when it may read on."""

    def on_turn(self) -> None: ...


class ReadTurns:
    """The reads of long bodies on all connections: a few in each iteration of the event loop, in turns.

    A read takes about 0.2 ms, with its copies, and libuv repeats it while the socket has data, up to 32
    times: 400 connections that send at once would keep the loop from all others for a second.
    """

    def __init__(self) -> None:
        self._reads = 0
        self._waiting: deque[Reader] = deque()
        self._scheduled = False

    def may_go_on(self, reader: Reader) -> bool:
        """Count a read; False if the reader must wait for `on_turn` before its next one."""
        self._reads += 1
        if not self._scheduled:
            self._schedule()
        if self._reads <= READS_AT_ONCE:
            return True
        self._waiting.append(reader)
        return False

    def _schedule(self) -> None:
        self._scheduled = True
        asyncio.get_running_loop().call_soon(self._on_iteration)

    def _on_iteration(self) -> None:
        self._reads = 0
        self._scheduled = False
        for _ in range(min(READS_AT_ONCE, len(self._waiting))):
            self._waiting.popleft().on_turn()
        if self._waiting:
            self._schedule()


class BodyMemory:
    """`limit_bytes` for all bodies together, and the connections that wait for some of it."""

    def __init__(self, limit_bytes: int | None) -> None:
        self.limit_bytes = limit_bytes or default_bytes()
        self.turns = ReadTurns()
        self.used_bytes = 0
        self._held: defaultdict[str, int] = defaultdict(int)
        self._waiting: dict[Taker, int] = {}

    def take(self, client: str, size: int, *, first: bool = True) -> bool:
        """Take memory now; False if there is none for this client, or, if it is the `first`, others wait.

        A body that needs more than it has should not wait: those that wait too may have that memory.
        """
        if first and any(self._may_take(taker.address) for taker in self._waiting):
            return False
        return self._take(client, size)

    def wait(self, taker: Taker, size: int) -> bool:
        """Call `on_body_memory` once the memory is taken; False if too many wait."""
        waiting = sum(other.address == taker.address for other in self._waiting)
        if waiting >= MOST_WAITING - len(self._waiting):
            return False
        self._waiting[taker] = size
        return True

    def forget(self, taker: Taker) -> None:
        """Wait no more."""
        if self._waiting.pop(taker, None) is not None:
            self._serve_waiting()

    def give_back(self, client: str, size: int) -> None:
        """Return memory that was taken."""
        self.used_bytes -= size
        self._held[client] -= size
        if not self._held[client]:
            del self._held[client]
        self._serve_waiting()

    def _may_take(self, client: str) -> bool:
        held = self._held.get(client, 0)
        return not held or held < CLIENT_SHARE * (self.limit_bytes - self.used_bytes)

    def _take(self, client: str, size: int) -> bool:
        # A body larger than all the memory is received alone.
        fits = not self.used_bytes or self.used_bytes + size <= self.limit_bytes
        if not fits or not self._may_take(client):
            return False
        self.used_bytes += size
        self._held[client] += size
        return True

    def _serve_waiting(self) -> None:
        for taker, size in list(self._waiting.items()):
            if self._take(taker.address, size):
                del self._waiting[taker]
                taker.on_body_memory()
            elif self._may_take(taker.address):
                return  # none behind it overtakes it, or a large body would wait for ever


def client_of(address: tuple[str, int] | None) -> str:
    """Return the client of a remote address: the host; of IPv6 its network, where a host has any address."""
    if address is None:
        return ""
    host = address[0].partition("%")[0]
    if ":" not in host:
        return host
    return str(ipaddress.IPv6Network((host, 64), strict=False))


def default_bytes() -> int:
    """Return an eighth of the memory that this process may use, at most 2 GiB."""
    return min(memory_bytes() // _DEFAULT_PART, _LARGEST_DEFAULT)


def memory_bytes(cgroups: Path = CGROUPS, own: Path = OWN) -> int:
    """Return the memory that this process may use: the machine's, or the least limit of its cgroups."""
    texts = limits("memory", "memory.max", "memory.limit_in_bytes", cgroups, own)
    machine = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return min([machine, *(int(text) for text in texts if text.isdigit())])
