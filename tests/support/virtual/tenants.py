"""Load by tenants in virtual time, and the share of the engine that each received."""

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
from cobatch.engines.worker import Job
from tests.support.virtual.loop import Call, FakeEngine, FakeWorker

# Run times in seconds, by rows.


def flat(rows: int) -> float:
    """A GPU far from saturation: a batch costs the same at any size."""
    return 0.010


def affine(rows: int) -> float:
    """A cost per row and per batch."""
    return 0.004 + 0.002 * rows


def linear(rows: int) -> float:
    """Magika on one core: batching gains nothing."""
    return 0.0105 * rows


class Metered(FakeWorker):
    """Measures each tenant's engine time, by its rows in each run. A row of n numbers costs `wide(n)` times
    `run_s`."""

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
        """Wait until this number of batches has started."""
        if self.batches < batches:
            self._reached = batches, asyncio.Event()
            await self._reached[1].wait()

    def parts(self, *tenants: Tenant) -> list[float]:
        """Return each tenant's share of the engine time of all these tenants."""
        whole_s = sum(self.used_s[tenant] for tenant in tenants)
        return [self.used_s[tenant] / whole_s for tenant in tenants]


class CallWithCallback(Call):
    """A request that calls `then` when it is answered."""

    __slots__ = ("then",)

    def __init__(self, rows: int, width: int, then: Callable[[Call], None]) -> None:
        super().__init__([[1] * width] * rows)
        self.then = then

    def done(self) -> None:
        super().done()
        self.then(self)


class Tenants:
    """Load for one batcher. `latencies_s`: of answered requests, `refused`: number of refusals, by tenant."""

    def __init__(self, batcher: Batcher, seed: int = 1) -> None:
        self.batcher = batcher
        self.seed = seed
        self.latencies_s: dict[Tenant, list[float]] = {}
        self.refused: Counter[Tenant] = Counter()
        self._stopped = False

    def ask(
        self, tenant: Tenant, rows: int = 1, width: int = 1, then: Callable[[], None] | None = None
    ) -> Call:
        """Submit a request. Raises its refusal."""

        def answered(call: Call) -> None:
            call.check()
            self.latencies_s.setdefault(tenant, []).append(call.at_s - call.enqueued_s)
            if then is not None and not self._stopped:
                then()

        call = CallWithCallback(rows, width, answered)
        call.tenant = tenant
        self.batcher.submit(call)
        return call

    def try_to_ask(self, tenant: Tenant) -> None:
        """Submit a request of one row; count it in `refused` if the queue is full."""
        try:
            self.ask(tenant)
        except QueueFullError:
            self.refused[tenant] += 1

    def backlog(self, tenant: Tenant, queued: int, rows: int = 1, width: int = 1) -> None:
        """Keep `queued` requests of a tenant waiting until `stop`."""

        def again() -> None:
            self.ask(tenant, rows, width, again)

        for _ in range(queued):
            again()

    def poisson(self, tenant: Tenant, per_s: float) -> None:
        """Submit requests of one row as a Poisson process until `stop`, at times of the tenant's own."""
        chance = random.Random(f"{self.seed} {tenant.name}")

        def arrive() -> None:
            if self._stopped:
                return
            self.try_to_ask(tenant)
            asyncio.get_running_loop().call_later(chance.expovariate(per_s), arrive)

        asyncio.get_running_loop().call_later(chance.expovariate(per_s), arrive)

    async def stop(self) -> None:
        """Submit nothing more and drain the batcher."""
        self._stopped = True
        with contextlib.suppress(TimeoutError):
            await self.batcher.drain(100)


def percentile(times_s: list[float], part: float) -> float:
    """Return the percentile `part`, from 0 to 1."""
    return sorted(times_s)[min(len(times_s) - 1, int(len(times_s) * part))]
