"""Who calls, with what: the requests of a scenario, one after another."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import repeat
from typing import TYPE_CHECKING

import numpy as np

from cobatch.batcher.request import Request
from cobatch.batcher.scheduling.tenant import Tenant
from cobatch.batcher.simulator.arrivals import Arrivals, Trace, TraceError

if TYPE_CHECKING:
    from cobatch.batcher.simulator.nodes import Node
    from cobatch.batcher.simulator.records import Records

_CHUNK = 4096
_SHAPES = ((1,),)


@dataclass(frozen=True)
class Caller:
    """Requests that are alike. `share`: its part of all requests, beside the other callers'.

    `rows`: of each request. `weight` and the limits are the tenant's; callers of one name are one tenant.
    """

    name: str = "default"
    share: float = 1.0
    rows: int = 1
    deadline_ms: float | None = None
    priority: int = 0
    weight: float = 1.0
    max_concurrent: int | None = None
    max_queue_rows: int | None = None


class SimulatedRequest(Request):
    """A request that tells the records when it is done. `came_s`: when it should have come."""

    __slots__ = ("caller", "came_s", "node", "records")

    def __init__(self, caller: int, rows: int, records: Records) -> None:
        super().__init__(rows, _SHAPES, ())
        self.caller = caller
        self.records = records
        self.came_s = 0.0
        self.node: Node

    def done(self) -> None:
        self.node.open_requests -= 1
        self.records.done(self)


class Traffic:
    """Makes the requests: `times` as `VirtualLoop.run` wants them, and `request` for each.

    `arrivals` None: when they come is decided elsewhere.
    """

    def __init__(self, arrivals: Arrivals | None, callers: Sequence[Caller], seed: int) -> None:
        self.callers = callers
        self._arrivals = arrivals
        self._seed = seed
        self._rng = np.random.default_rng([seed, 1])
        tenants = {one.name: _tenant(one) for one in callers}
        # One caller without a name of its own is nobody in particular, as where there is no auth.
        nobody = len(tenants) == 1 and "default" in tenants
        self._tenants = [None if nobody else tenants[one.name] for one in callers]
        self._timeouts_s = [None if one.deadline_ms is None else one.deadline_ms / 1000 for one in callers]
        self._next = self._recorded(arrivals) if isinstance(arrivals, Trace) else self._drawn()

    def times(self) -> Iterator[float]:
        """When requests come."""
        assert self._arrivals is not None
        return self._arrivals.times(np.random.default_rng([self._seed, 0]))

    def request(self, records: Records) -> SimulatedRequest:
        """The next one."""
        caller, rows = next(self._next)
        request = SimulatedRequest(caller, rows, records)
        request.tenant = self._tenants[caller]
        request.timeout_s = self._timeouts_s[caller]
        request.priority = self.callers[caller].priority
        return request

    def _drawn(self) -> Iterator[tuple[int, int]]:
        rows = [one.rows for one in self.callers]
        if len(rows) == 1:
            yield from repeat((0, rows[0]))
        shares = np.cumsum([one.share for one in self.callers])
        while True:
            drawn = np.searchsorted(shares, self._rng.random(_CHUNK) * shares[-1], side="right")
            for caller in drawn.tolist():
                yield caller, rows[caller]

    def _recorded(self, trace: Trace) -> Iterator[tuple[int, int]]:
        numbers = {one.name: number for number, one in enumerate(self.callers)}
        for one in trace.requests:
            caller = numbers.get(one.tenant) if one.tenant else 0
            if caller is None:
                raise TraceError(f"the trace has a tenant {one.tenant!r} that is not described")
            yield caller, one.rows


def _tenant(caller: Caller) -> Tenant:
    return Tenant(
        caller.name,
        weight=caller.weight,
        max_concurrent=caller.max_concurrent,
        max_queue_rows=caller.max_queue_rows,
    )
