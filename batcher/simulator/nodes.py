"""Nodes, each with an engine of its own, and the router in front of them."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable
from typing import Literal, Protocol, cast

import numpy as np

from cobatch.batcher.batcher import Batcher
from cobatch.batcher.errors import BatcherError
from cobatch.batcher.simulator.clock import VirtualLoop
from cobatch.batcher.simulator.engine import SimulatedWorker
from cobatch.batcher.simulator.traffic import SimulatedRequest

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
