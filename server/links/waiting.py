"""The waiting room: requests that wait for room in the queue of their model, tenants in turns.

A client that is refused can come again; a step of a call that was admitted has no one to do that for it.
"""

import asyncio
import time
from collections import defaultdict, deque
from typing import NamedTuple

from cobatch.batcher.batcher import Batcher
from cobatch.batcher.errors import ExpiredError, QueueFullError, TenantLimitError
from cobatch.batcher.request import Request
from cobatch.batcher.tenant import Tenant

# Of one tenant for one model, and of all; more are refused.
MOST_WAITING = 4096
_MOST_OF_ALL = 4 * MOST_WAITING
_LEAST_S = 1e-3


class Waiting(Request):
    """A request that may wait."""

    __slots__ = ()

    def admit(self) -> None:
        """Submit it: there is room."""
        raise NotImplementedError

    def refuse(self, error: Exception) -> None:
        """Answer it with an error."""
        raise NotImplementedError


class _Place(NamedTuple):
    ends_s: float
    timer: asyncio.TimerHandle | None


class WaitingRoom:
    """The requests that wait, by their batchers and tenants."""

    def __init__(self) -> None:
        self.waiting = 0
        self._lines: defaultdict[Batcher, dict[Tenant | None, dict[Waiting, _Place]]] = defaultdict(dict)

    def takes(self, batcher: Batcher, request: Waiting) -> bool:
        """Take a request for which there is no room, or before which others wait; else return False."""
        lines = self._lines[batcher]
        line = lines.get(request.tenant, {})
        if len(line) >= MOST_WAITING or self.waiting >= _MOST_OF_ALL:
            return False
        if not (lines or _must_wait(batcher, request)):
            return False
        timer, timeout_s = None, request.timeout_s
        if timeout_s is not None:
            loop = asyncio.get_running_loop()
            timer = loop.call_later(timeout_s, self._expire, batcher, request, timeout_s)
        self.waiting += 1
        line[request] = _Place(time.monotonic() + (timeout_s or 0.0), timer)
        lines.setdefault(request.tenant, line)
        return True

    def serve(self, batcher: Batcher) -> bool:
        """Submit the requests for which there is room now; return True if there were any.

        Looks at the first one of each tenant, and at one more for each that is submitted.
        """
        lines = self._lines[batcher]
        turns, served = deque(lines), False
        while turns:
            tenant = turns.popleft()
            request = next(iter(lines.get(tenant, ())), None)
            if request is None:
                continue
            if _must_wait(batcher, request):
                if batcher.queue.rows + request.rows > batcher.admission.max_queue_rows:
                    break  # a large one would else be overtaken for ever
                continue  # for room of its tenant
            place = self._leave(batcher, request)
            if request.timeout_s is not None:
                request.timeout_s = max(_LEAST_S, place.ends_s - time.monotonic())
            request.admit()
            served = True
            if tenant in lines:
                lines[tenant] = lines.pop(tenant)  # it is the last one now, also next time
                turns.append(tenant)
        return served

    def forget(self, batcher: Batcher, request: Waiting) -> None:
        """Let go of a request whose caller left, if it waits."""
        if request in self._lines[batcher].get(request.tenant, ()):
            self._leave(batcher, request)

    def _leave(self, batcher: Batcher, request: Waiting) -> _Place:
        lines = self._lines[batcher]
        place = lines[request.tenant].pop(request)
        if not lines[request.tenant]:
            del lines[request.tenant]
        self.waiting -= 1
        if place.timer is not None:
            place.timer.cancel()
        return place

    def _expire(self, batcher: Batcher, request: Waiting, timeout_s: float) -> None:
        self._leave(batcher, request)
        batcher.counters.expired += request.callers
        request.refuse(ExpiredError(timeout_s))


def _must_wait(batcher: Batcher, request: Waiting) -> bool:
    refusal = batcher.refusal(request.rows, request.tenant, request.entrants)
    return isinstance(refusal, QueueFullError | TenantLimitError)
