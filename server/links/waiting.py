"""The waiting room: requests that wait, in their order, for room in the queue of their model.

A client that is refused can come again; a step of a call that was admitted has no one to do that for it.
"""

import asyncio
import time
from collections import defaultdict
from typing import NamedTuple

from cobatch.batcher.batcher import Batcher
from cobatch.batcher.errors import ExpiredError, QueueFullError, TenantLimitError
from cobatch.batcher.request import Request

# Of one model; more are refused.
MOST_WAITING = 4096
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
    """The requests that wait, by their batchers."""

    def __init__(self) -> None:
        self.waiting = 0
        self._places: defaultdict[Batcher, dict[Waiting, _Place]] = defaultdict(dict)

    def takes(self, batcher: Batcher, request: Waiting) -> bool:
        """Take a request for which there is no room, or before which others wait; else return False."""
        places = self._places[batcher]
        if len(places) >= MOST_WAITING or not (places or _must_wait(batcher, request)):
            return False
        timer, timeout_s = None, request.timeout_s
        if timeout_s is not None:
            loop = asyncio.get_running_loop()
            timer = loop.call_later(timeout_s, self._expire, batcher, request, timeout_s)
        self.waiting += 1
        places[request] = _Place(time.monotonic() + (timeout_s or 0.0), timer)
        return True

    def serve(self, batcher: Batcher) -> bool:
        """Submit the requests for which there is room now; return True if there were any."""
        places = self._places.get(batcher)
        served = False
        for request in list(places or ()):
            if _must_wait(batcher, request):
                if batcher.queue.rows + request.rows > batcher.admission.max_queue_rows:
                    break  # a large one would else be overtaken for ever
                continue  # for room of its tenant
            place = self._leave(batcher, request)
            if request.timeout_s is not None:
                request.timeout_s = max(_LEAST_S, place.ends_s - time.monotonic())
            request.admit()
            served = True
        return served

    def forget(self, batcher: Batcher, request: Waiting) -> None:
        """Let go of a request whose caller left, if it waits."""
        if request in self._places.get(batcher, ()):
            self._leave(batcher, request)

    def _leave(self, batcher: Batcher, request: Waiting) -> _Place:
        place = self._places[batcher].pop(request)
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
