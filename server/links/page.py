"""A page of shared memory in which home tells all fronts how full its queues are, and that it is alive.

Words of 8 bytes, each of which is written and read at once: the heartbeat, then for each model its queued
rows, the rows at which its queue is full (0: closed), the rows of a full batch, and the seconds until its
queue is empty. The rest has the accounts of tenants (`server.links.accounts`).
"""

from __future__ import annotations

import mmap

from cobatch.batcher.scheduling.admission import Admission
from cobatch.batcher.scheduling.queue import RequestQueue
from cobatch.engines.link.slab import mapped
from cobatch.server.links.accounts import AccountTable

_WORD_BYTES = 8
_OF_MODEL = 4


class QueuePage:
    """The words of one model. In a front they are its `Queue` and `Admission`."""

    __slots__ = ("_at", "_numbers", "_seconds")

    def __init__(self, numbers: memoryview[int], seconds: memoryview[float], at: int) -> None:
        self._numbers = numbers
        self._seconds = seconds
        self._at = at

    @property
    def rows(self) -> int:
        """The queued rows."""
        return self._numbers[self._at]

    @property
    def open_rows(self) -> int:
        """The size at which the queue is full; 0 if nothing is accepted."""
        return self._numbers[self._at + 1]

    @property
    def full_rows(self) -> int:
        """The size of a full batch."""
        return self._numbers[self._at + 2]

    @property
    def drain_s(self) -> float:
        """The time until the queue is empty, of a request that is refused because it is full."""
        return self._seconds[self._at + 3]

    def update(self, queue: RequestQueue, admission: Admission) -> None:
        """Write the words."""
        numbers, at = self._numbers, self._at
        numbers[at] = queue.rows
        numbers[at + 1] = admission.open_rows
        numbers[at + 2] = queue.full_rows
        self._seconds[at + 3] = admission.drain_s


def page_bytes(models: int) -> int:
    """Return the least size of a page of this many models."""
    return _WORD_BYTES * (1 + _OF_MODEL * models)


class Page:
    """The page of a life of home, with the accounts of `table`. Closes the descriptor that it is made of.

    Raises ValueError if it is too small for the models.
    """

    def __init__(self, descriptor: int, models: int, table: AccountTable | None, *, writable: bool) -> None:
        protection = mmap.PROT_READ | (mmap.PROT_WRITE if writable else 0)
        memory = memoryview(mapped(descriptor, protection))
        needed = page_bytes(models)
        if len(memory) < needed:
            raise ValueError(f"the page has {len(memory)} bytes, {models} models need {needed}")
        self._seconds = memory.cast("d")
        numbers = memory.cast("q")
        self.queues = [QueuePage(numbers, self._seconds, 1 + _OF_MODEL * index) for index in range(models)]
        if table is not None:
            table.use(numbers, self._seconds, needed // _WORD_BYTES)

    @property
    def heartbeat_s(self) -> float:
        """The monotonic time at which home's event loop ran last; 0 if it never did."""
        return self._seconds[0]

    @heartbeat_s.setter
    def heartbeat_s(self, now_s: float) -> None:
        self._seconds[0] = now_s
