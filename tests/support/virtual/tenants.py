"""Tenants in virtual time: who sends how much, and what each got of the engine."""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections import Counter, defaultdict
from collections.abc import Callable

from cobatch.batcher.batcher import Batcher
from cobatch.batcher.errors import QueueFullError
from cobatch.batcher.request import Batch
from cobatch.batcher.tenant import Tenant
from cobatch.engines.jobs import Job
from tests.support.virtual.loop import Call, FakeEngine, FakeWorker

# Seconds of a run by its rows.


def flat(rows: int) -> float:
    """As of a GPU that is far from full: a batch costs the same at any size."""
    return 0.010


def affine(rows: int) -> float:
    """As of one that pays for each row, and for each batch."""
    return 0.004 + 0.002 * rows


def linear(rows: int) -> float:
    """As of Magika on one core: nothing is gained by batching."""
    return 0.0105 * rows


class Metered(FakeWorker):
    """Knows what each tenant had of the engine: of each run, according to its rows. A row of n numbers
    costs `wide(n)` times what `run_s` says."""

    def __init__(
        self,
        run_s: Callable[[int], float] = flat,
        *,
        max_batch_size: int = 8,
        wide: Callable[[int], float] = lambda width: 1.0,
    ) -> None:
        super().__init__(FakeEngine(max_batch_size), run_s)
        sizes = {1 << power for power in range(max_batch_size.bit_length())} | {max_batch_size}
        self.warmup_us = {rows: run_s(rows) * 1e6 for rows in sizes}
        self.wide = wide
        self.used_s: defaultdict[Tenant | None, float] = defaultdict(float)
        self.batches = 0
        self._reached: tuple[int, asyncio.Event] | None = None

    def time_s(self, job: Job) -> float:
        batch = job.context
        assert isinstance(batch, Batch)
        run_s = self.run_s(job.rows) * self.wide(job.row_shapes[0][0])
        self.batches += 1
        if self._reached is not None and self.batches == self._reached[0]:
            self._reached[1].set()
        for request in batch.requests:
            self.used_s[request.tenant] += run_s * request.rows / job.rows
        return run_s

    async def until(self, batches: int) -> None:
        """Until so many have begun."""
        if self.batches < batches:
            self._reached = batches, asyncio.Event()
            await self._reached[1].wait()

    def parts(self, *tenants: Tenant) -> list[float]:
        """Each one's part of what they had together."""
        whole_s = sum(self.used_s[tenant] for tenant in tenants)
        return [self.used_s[tenant] / whole_s for tenant in tenants]


class Asked(Call):
    """A caller that has `then` called when it has been answered."""

    __slots__ = ("then",)

    def __init__(self, rows: int, width: int, then: Callable[[Call], None]) -> None:
        super().__init__([[1] * width] * rows)
        self.then = then

    def done(self) -> None:
        super().done()
        self.then(self)


class Tenants:
    """Callers of one batcher. `latencies_s` by tenant, of those that were answered; `refused` the others."""

    def __init__(self, batcher: Batcher, seed: int = 1) -> None:
        self.batcher = batcher
        self.chance = random.Random(seed)
        self.latencies_s: dict[Tenant, list[float]] = {}
        self.refused: Counter[Tenant] = Counter()
        self._stopped = False

    def ask(
        self, tenant: Tenant, rows: int = 1, width: int = 1, then: Callable[[], None] | None = None
    ) -> Call:
        """Submit one; raises where it is refused."""

        def answered(call: Call) -> None:
            call.check()
            self.latencies_s.setdefault(tenant, []).append(call.at_s - call.enqueued_s)
            if then is not None and not self._stopped:
                then()

        asked = Asked(rows, width, answered)
        asked.tenant = tenant
        self.batcher.submit(asked)
        return asked

    def try_to_ask(self, tenant: Tenant) -> None:
        """Submit one of one row, or count it as refused because the queue is full."""
        try:
            self.ask(tenant)
        except QueueFullError:
            self.refused[tenant] += 1

    def backlog(self, tenant: Tenant, queued: int, rows: int = 1, width: int = 1) -> None:
        """From now on as many requests of it wait, until `stop`."""

        def again() -> None:
            self.ask(tenant, rows, width, again)

        for _ in range(queued):
            again()

    def poisson(self, tenant: Tenant, per_s: float) -> None:
        """From now on requests of one row come at random, until `stop`."""

        def arrive() -> None:
            if self._stopped:
                return
            self.try_to_ask(tenant)
            asyncio.get_running_loop().call_later(self.chance.expovariate(per_s), arrive)

        asyncio.get_running_loop().call_later(self.chance.expovariate(per_s), arrive)

    async def stop(self) -> None:
        """Nobody comes any more; those that wait are answered."""
        self._stopped = True
        with contextlib.suppress(TimeoutError):
            await self.batcher.drain(100)


def percentile(times_s: list[float], part: float) -> float:
    """The time that so large a part of them does not exceed."""
    return sorted(times_s)[min(len(times_s) - 1, int(len(times_s) * part))]
