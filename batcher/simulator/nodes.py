"""What came of each request.

Nodes, each with an engine of its own, and the router in front of them.
"""

from __future__ import annotations

import asyncio
from array import array
from collections import Counter
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal, Protocol, cast

import numpy as np

from cobatch.batcher.batcher import Batcher
from cobatch.batcher.errors import BatcherError, ExpiredError
from cobatch.batcher.simulator.clock import VirtualLoop
from cobatch.batcher.simulator.engine import SimulatedWorker
from cobatch.batcher.simulator.traffic import SimulatedRequest

if TYPE_CHECKING:
    from cobatch.batcher.simulator.clock import VirtualLoop
    from cobatch.batcher.simulator.traffic import SimulatedRequest


ANSWERED, EXPIRED, FAILED, REFUSED = range(4)


class Records:
    """One entry for each request that was answered, given up, or refused; `came` counts those that came.

    The loop is busy for `each_s` with each that comes, and with each that is answered. Latency counts from
    when it should have come.
    """

    def __init__(self, loop: VirtualLoop, each_s: float = 0.0) -> None:
        self._loop = loop
        self._each_s = each_s
        self.came = 0
        self.refusals: Counter[str] = Counter()
        # Told of each end, and whether the request had been accepted.
        self.on_end: Callable[[SimulatedRequest, bool], None] | None = None
        self._ends = array("d")
        self._latencies = array("d")
        self._callers = array("H")
        self._rows = array("H")
        self._fates = array("B")

    def comes(self, request: SimulatedRequest) -> None:
        """It is read, and is about to be submitted."""
        self.came += 1
        request.came_s = self._loop.due_s
        self._loop.spend(self._each_s)

    def done(self, request: SimulatedRequest) -> None:
        """It has its answer, or an error instead."""
        error = request.error
        fate = ANSWERED if error is None else EXPIRED if isinstance(error, ExpiredError) else FAILED
        self._add(request, fate)

    def refused(self, request: SimulatedRequest, why: str) -> None:
        """It was not accepted."""
        self.refusals[why] += 1
        self._add(request, REFUSED)

    def _add(self, request: SimulatedRequest, fate: int) -> None:
        self._loop.spend(self._each_s)
        now_s = self._loop.now_s
        self._ends.append(now_s)
        self._latencies.append(now_s - request.came_s)
        self._callers.append(request.caller)
        self._rows.append(request.rows)
        self._fates.append(fate)
        if self.on_end is not None:
            self.on_end(request, fate != REFUSED)

    def arrays(self) -> dict[str, np.ndarray[Any, Any]]:
        """`ends`, `latencies` in seconds, `callers`, `rows`, `fates`."""
        return {
            "ends": np.array(self._ends),
            "latencies": np.array(self._latencies),
            "callers": np.array(self._callers),
            "rows": np.array(self._rows),
            "fates": np.array(self._fates),
        }


Router = Literal["round-robin", "least-loaded", "two-choices"]
ROUTERS: tuple[Router, ...] = ("round-robin", "least-loaded", "two-choices")


class Node(Protocol):
    """One server. `open_requests`: those that it has accepted and not answered."""

    open_requests: int

    def submit(self, request: SimulatedRequest) -> str | None:
        """Take a request; or the word for why not."""
        ...

    @property
    def batches(self) -> Counter[int]:
        """How many batches of so many rows ran."""
        ...

    @property
    def reasons(self) -> Counter[str]:
        """Why batches left."""
        ...


class CobatchNode:
    """A node that runs this server's own batcher."""

    def __init__(
        self,
        worker: SimulatedWorker,
        loop: VirtualLoop,
        *,
        max_queue_rows: int,
        max_delay_ms: float = 0.0,
        latency_target_ms: float | None = None,
    ) -> None:
        self.open_requests = 0
        self.batcher = Batcher(
            "simulated",
            [worker],
            max_queue_rows=max_queue_rows,
            max_delay_ms=max_delay_ms,
            latency_target_ms=latency_target_ms,
            loop=cast("asyncio.AbstractEventLoop", loop),
            clock=loop.time,
        )

    def submit(self, request: SimulatedRequest) -> str | None:
        """Take a request; or the word for why not."""
        try:
            self.batcher.submit(request)
        except BatcherError as error:
            return error.reason
        self.open_requests += 1
        return None

    @property
    def batches(self) -> Counter[int]:
        """How many batches of so many rows ran."""
        by_rows = self.batcher.counters.by_rows
        return Counter({rows: figures.batches for rows, figures in by_rows.items()})

    @property
    def reasons(self) -> Counter[str]:
        """Why batches left."""
        return self.batcher.counters.reasons


def make_router(kind: Router, nodes: list[Node], seed: int) -> Callable[[], Node]:
    """Who gets the next request. The load of a node is its open requests, known at once."""
    if len(nodes) == 1:
        (only,) = nodes
        return lambda: only
    if kind == "least-loaded":
        return lambda: min(nodes, key=lambda node: node.open_requests)
    if kind == "two-choices":
        return _two_choices(nodes, np.random.default_rng([seed, 3]))
    turn = 0

    def next_in_turn() -> Node:
        nonlocal turn
        turn += 1
        return nodes[turn % len(nodes)]

    return next_in_turn


def _two_choices(nodes: list[Node], rng: np.random.Generator) -> Callable[[], Node]:
    """The less loaded of two nodes drawn by chance (Mitzenmacher, 2001)."""
    drawn: list[list[int]] = []

    def choose() -> Node:
        if not drawn:
            first = rng.integers(len(nodes), size=4096)
            other = (first + rng.integers(1, len(nodes), size=4096)) % len(nodes)
            drawn.extend(np.stack([first, other], axis=1).tolist())
        one, two = (nodes[number] for number in drawn.pop())
        return one if one.open_requests <= two.open_requests else two

    return choose
