"""Simulated requests, the nodes that serve them, the router, and the records of outcomes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from itertools import cycle, repeat
from operator import attrgetter
from random import Random
from struct import Struct
from typing import Any, Literal, Protocol

import numpy as np

from cobatch.batcher.errors import ExpiredError
from cobatch.batcher.request import Request
from cobatch.batcher.simulator.clock import VirtualLoop
from cobatch.batcher.simulator.traffic import Caller, Trace, TraceError
from cobatch.batcher.tenant import Tenant

ANSWERED, EXPIRED, FAILED, REFUSED = range(4)
_CHUNK = 4096
_SHAPES = ((1,),)
_ENTRY = Struct("=ddHHB")
_FIELDS = [("end_s", "f8"), ("latency_s", "f8"), ("caller", "u2"), ("rows", "u2"), ("outcome", "u1")]
Entries = np.ndarray[Any, Any]


class Node(Protocol):
    """One server. `open_requests` counts those accepted and not answered.

    `submit` accepts a request, or returns the reason of a refusal. `batches` counts batches by their rows,
    `reasons` by the reason of their dispatch.
    """

    open_requests: int

    def submit(self, request: SimulatedRequest) -> str | None: ...

    @property
    def batches(self) -> Counter[int]: ...

    @property
    def reasons(self) -> Counter[str]: ...


class SimulatedRequest(Request):
    """A request that adds its outcome to `records`. `due_s` is the time of its arrival in the traffic."""

    __slots__ = ("caller", "due_s", "node", "records")

    def __init__(self, caller: int, rows: int, records: Records) -> None:
        super().__init__(rows, _SHAPES, ())
        self.caller = caller
        self.records = records
        self.due_s = 0.0
        self.node: Node

    def done(self) -> None:
        self.node.open_requests -= 1
        error = self.error
        outcome = ANSWERED if error is None else EXPIRED if isinstance(error, ExpiredError) else FAILED
        self.records.add(self, outcome)


class Records:
    """One entry for each request that was answered, expired, failed or was refused.

    The loop spends `overhead_s` on each arrival and on each outcome. Latency counts from the time that a
    request was due.
    """

    def __init__(self, loop: VirtualLoop, overhead_s: float = 0.0) -> None:
        self._loop = loop
        self._overhead_s = overhead_s
        self.arrived = 0
        self.refusals: Counter[str] = Counter()
        # Called with each outcome, and whether the request had been accepted.
        self.on_end: Callable[[bool], None] | None = None
        self._entries = bytearray()

    def arrive(self, request: SimulatedRequest) -> None:
        """Count an arrival, before it is submitted."""
        self.arrived += 1
        request.due_s = self._loop.due_s
        self._loop.spend(self._overhead_s)

    def refuse(self, request: SimulatedRequest, reason: str) -> None:
        """Add a request that was not accepted."""
        self.refusals[reason] += 1
        self.add(request, REFUSED)

    def add(self, request: SimulatedRequest, outcome: int) -> None:
        """Add an outcome."""
        self._loop.spend(self._overhead_s)
        now_s = self._loop.now_s
        entry = (now_s, now_s - request.due_s, request.caller, request.rows, outcome)
        self._entries += _ENTRY.pack(*entry)
        if self.on_end is not None:
            self.on_end(outcome != REFUSED)

    def array(self) -> Entries:
        """Return the fields `end_s`, `latency_s`, `caller`, `rows` and `outcome` of all entries."""
        return np.frombuffer(bytes(self._entries), _FIELDS)


def make_requests(
    records: Records, callers: Sequence[Caller], seed: int, trace: Trace | None = None
) -> Iterator[SimulatedRequest]:
    """Yield requests: the rows of a trace, or of callers drawn by their shares."""
    tenants = {
        one.name: Tenant(
            one.name,
            weight=one.weight,
            max_concurrent=one.max_concurrent,
            max_queue_rows=one.max_queue_rows,
        )
        for one in callers
    }
    # A single caller without a name has no tenant, as on a server without authentication.
    anonymous = len(tenants) == 1 and "default" in tenants
    for number, rows in _drawn(callers, seed) if trace is None else _recorded(callers, trace):
        caller = callers[number]
        request = SimulatedRequest(number, rows, records)
        request.tenant = None if anonymous else tenants[caller.name]
        request.timeout_s = caller.timeout_s
        request.priority = caller.priority
        yield request


def _drawn(callers: Sequence[Caller], seed: int) -> Iterator[tuple[int, int]]:
    """Yield callers' numbers with their rows."""
    rows = [one.rows for one in callers]
    if len(rows) == 1:
        yield from repeat((0, rows[0]))
    rng = np.random.default_rng([seed, 1])
    shares = np.cumsum([one.share for one in callers])
    while True:
        drawn = np.searchsorted(shares, rng.random(_CHUNK) * shares[-1], side="right")
        for caller in drawn.tolist():
            yield caller, rows[caller]


def _recorded(callers: Sequence[Caller], trace: Trace) -> Iterator[tuple[int, int]]:
    numbers = {"": 0} | {one.name: number for number, one in enumerate(callers)}
    for one in trace.requests:
        if one.tenant not in numbers:
            raise TraceError(f"the trace has a tenant {one.tenant!r} that is not described")
        yield numbers[one.tenant], one.rows


Router = Literal["round-robin", "least-loaded", "two-choices"]
ROUTERS: tuple[Router, ...] = ("round-robin", "least-loaded", "two-choices")


def make_router(kind: Router, nodes: list[Node], seed: int) -> Callable[[], Node]:
    """Return a function that chooses the next request's node. A node's load is its open requests."""
    if len(nodes) == 1 or kind == "round-robin":
        return cycle(nodes).__next__
    load = attrgetter("open_requests")
    if kind == "least-loaded":
        return lambda: min(nodes, key=load)
    # The less loaded of two random nodes (Mitzenmacher, 2001).
    rng = Random(seed)  # noqa: S311 - no secret
    return lambda: min(rng.sample(nodes, 2), key=load)
