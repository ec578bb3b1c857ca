"""The batcher alone, with many requests queued: the cost to submit, cancel and dispatch one.

It runs in its own loop, before an engine that never finishes. Each round restores the state: submitted
requests are cancelled, and those taken into a batch are submitted again.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from cobatch.batcher.batcher import Batcher
from cobatch.batcher.request import Request
from cobatch.batcher.scheduling.fair_queueing import Group
from cobatch.batcher.scheduling.formation import form
from cobatch.batcher.tenant import Tenant
from cobatch.engines.base import RowShapes, Signature, TensorSpec
from cobatch.engines.worker import Deliver, Job

BATCH = 64
ROUNDS = 200
OPERATIONS = ("submit", "cancel", "dispatch")
ROW_SHAPES: RowShapes = ((1,),)
PAYLOADS = [bytes(8)]


class Ask(Request):
    """A request that is never answered."""

    def done(self) -> None:
        """Do nothing."""


class Stuck:
    """An engine and its worker that finish no batch."""

    platform = "stuck"
    max_batch_size = BATCH
    slots = 1
    signature = Signature((TensorSpec("x", "INT64", (1,)),), (TensorSpec("y", "INT64", (1,)),), None)

    def __init__(self) -> None:
        self.deliver: Deliver | None = None
        self.warmup_us = {BATCH: 1000.0}
        self._buffer = np.zeros((BATCH, 1), np.int64)

    @property
    def engine(self) -> Any:
        return self

    def inputs(self, *_: object) -> tuple[np.ndarray[Any, Any], ...]:
        """Return the same buffer for all."""
        return (self._buffer,)

    def submit(self, job: Job) -> None:
        """Drop the job."""


@dataclass(frozen=True, slots=True)
class Kind:
    """The kind of requests: the number of tenants (0: no tenants), with deadlines, with priorities."""

    tenants: int
    deadlines: bool = False
    priorities: bool = False

    def __str__(self) -> str:
        who = {0: "no tenants", 1: "1 tenant"}.get(self.tenants, f"{self.tenants:,} tenants")
        more = [word for word, has in (("deadlines", self.deadlines), ("priorities", self.priorities)) if has]
        return ", ".join([who, *more])


class Bench:
    """A batcher with `queued` requests behind a running batch."""

    def __init__(self, kind: Kind, queued: int) -> None:
        self._kind = kind
        self._random = random.Random(1)
        tenants = [Tenant(f"t{n}") for n in range(kind.tenants)]
        self._tenants: list[Tenant | None] = list(tenants) or [None]
        self._turn = 0
        self.batcher = Batcher(
            "stuck",
            [Stuck()],
            max_queue_rows=2 * queued + 100 * BATCH,
            loop=asyncio.get_running_loop(),
        )
        for request in self.make(BATCH + queued):
            self.batcher.submit(request)
        self.batcher.decide()
        assert self.batcher.queue.rows == queued

    def make(self, count: int) -> list[Request]:
        return [self._make() for _ in range(count)]

    def _make(self) -> Request:
        request = Ask(1, ROW_SHAPES, PAYLOADS)
        request.tenant = self._tenants[self._turn % len(self._tenants)]
        self._turn += 1
        if self._kind.deadlines:
            request.timeout_s = 1e6 + self._random.random()
        if self._kind.priorities:
            request.priority = self._random.randint(1, 8)
        return request

    def round(self) -> dict[str, float]:
        """Return the microseconds per request of each operation."""
        batcher = self.batcher
        requests = self.make(BATCH)
        submit_us = timed(requests, batcher.submit)
        self._random.shuffle(requests)
        cancel_us = timed(requests, batcher.cancel)
        began = time.thread_time_ns()
        taken = self._take()
        dispatch_us = (time.thread_time_ns() - began) / 1000 / len(taken)
        for request in self.make(len(taken)):
            batcher.submit(request)
        return {"submit": submit_us, "cancel": cancel_us, "dispatch": dispatch_us}

    def _take(self) -> list[Request]:
        """Form a batch as a dispatch does, without packing it."""
        queue = self.batcher.queue
        group: Group = queue.next_group
        taken = queue.take_plain(group, BATCH) or form(queue, group, BATCH)
        queue.shares.settle(taken.shares, 0.001 / BATCH - queue.row_s)
        for request in taken.requests:
            if request.expiry is not None:
                request.expiry.cancel()
        return taken.requests


def timed(requests: list[Request], operation: Callable[[Request], None]) -> float:
    """Return the microseconds per request."""
    began = time.thread_time_ns()
    for request in requests:
        operation(request)
    return (time.thread_time_ns() - began) / 1000 / len(requests)
