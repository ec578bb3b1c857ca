"""Random scenarios on several engines that fail, die and hang: each request ends once, and nothing is left.

Bundles, requests larger than a batch, suspects, tenants, deadlines and cancels take part; virtual time.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Hashable

import numpy as np
import pytest

from cobatch.batcher.batcher import Batcher
from cobatch.batcher.bundle import Bundle
from cobatch.batcher.errors import BatcherError
from cobatch.batcher.lane import BatchWorker
from cobatch.batcher.request import Request
from cobatch.batcher.tenant import Tenant
from cobatch.engines.errors import EngineDeadError, EngineError, EngineRunError
from tests.support.examples import FACTOR
from tests.support.virtual.loop import Array, Call, FakeEngine, FakeWorker, run

BAD = -666
LIMIT_S = 0.1
STORIES = 20 * FACTOR  # of each kind


class Sent(Call):
    """A request from a source; `left`: it was cancelled."""

    __slots__ = ("left", "origin")

    def __init__(self, values: list[list[int]], origin: Hashable) -> None:
        super().__init__(values)
        self.left = False
        self.origin = origin
        self.tenant = origin if isinstance(origin, Tenant) else None

    @property
    def source(self) -> Hashable:
        return self.origin


class Members(Bundle):
    """A bundle of requests of one source."""

    __slots__ = ("members",)

    def __init__(self, members: list[Sent]) -> None:
        super().__init__(members[0].row_shapes, [member.payloads for member in members])
        self.members = members
        self.tenant = members[0].tenant

    @property
    def source(self) -> Hashable:
        return self.members[0].origin

    def separate(self) -> list[Request]:
        return [*self.members]

    def done(self) -> None:
        for n, member in enumerate(self.members):
            member.batch, member.error, member.first_row = self.batch, self.error, self.first_row + n
            member.done()


class Story:
    """One random scenario."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        choose = self.random.choice
        self.size, self.slots, engines = choose([1, 2, 3, 6]), choose([1, 2, 3]), choose([1, 2, 3])
        self.hangs, self.bad = choose([0, 0.02]), choose([0, 0.05, 0.3])
        self.tenants = [
            Tenant("a"),
            Tenant("b", weight=3.0),
            Tenant("c", max_concurrent=9, max_queue_rows=12),
        ]
        self.sent: list[Sent] = []
        self.bundled: list[Sent] = []
        self.loop = asyncio.get_running_loop()
        self.batcher = Batcher(
            "fake",
            [self.worker() for _ in range(engines)],
            max_queue_rows=choose([5, 40, 1000]),
            max_delay_ms=choose([0, 0, 3.0]),
            execution_timeout_ms=LIMIT_S * 1000,
            on_lost=self.on_lost,
            loop=self.loop,
            clock=self.loop.time,
        )

    def worker(self) -> FakeWorker:
        """Return an engine that may fail without a reason, die or hang."""
        chance, choose = self.random.random, self.random.choice
        flaky, mortal = choose([0, 0, 0.02, 0.1]), choose([0, 0, 0.01])

        def fails(rows: Array) -> EngineError | None:
            if chance() < mortal:
                return EngineDeadError("dead")
            return EngineRunError("no") if chance() < flaky or (rows == BAD).any() else None

        engine = FakeEngine(self.size, self.slots)
        engine.fails = fails
        worker = FakeWorker(
            engine, lambda rows: 5.0 if chance() < self.hangs else choose([0.001, 0.005, 0.01 * rows, 0.03])
        )
        worker.zeros_s = choose([0, 0, 0.005])
        return worker

    def on_lost(self, _: BatchWorker, why: BatcherError) -> None:
        delay_s = self.random.choice([0, 0.01, 0.2])
        if self.random.random() < 0.8:
            self.loop.call_later(delay_s, lambda: self.batcher.use(self.worker()))
        else:
            self.loop.call_later(delay_s, lambda: self.batcher.gone(EngineError("no other")))

    def request(self, rows: int, origin: Hashable, width: int) -> Sent:
        def value() -> int:
            return BAD if self.random.random() < self.bad else self.random.randrange(1000)

        return Sent([[value() for _ in range(width)] for _ in range(rows)], origin)

    async def tell(self) -> None:
        """Send and cancel requests, in bursts and with gaps."""
        chance, choose = self.random.random, self.random.choice
        for _ in range(self.random.randrange(5, 80)):
            origin, kind = choose([None, 1, 2, 3, *self.tenants]), chance()
            timeout_s = choose([None, None, None, 0.005, 0.02, 0.05, 1.0])
            if kind < 0.15:
                width = choose([1, 2])
                members = [self.request(1, origin, width) for _ in range(choose([2, 3, 6]))]
                bundle = Members(members)
                bundle.timeout_s = timeout_s
                self.bundled += members
                bundle.enter(self.batcher.submit)
            elif kind < 0.85:
                self.submit(self.request(choose([1, 1, 1, 2, 3, 9]), origin, choose([1, 1, 1, 2])), timeout_s)
            elif self.sent:
                self.cancel(choose(self.sent))
            if chance() < 0.5:
                await asyncio.sleep(choose([0, 0, 0.001, 0.01, 0.1]))

    def submit(self, request: Sent, timeout_s: float | None) -> None:
        request.timeout_s = timeout_s
        request.priority = self.random.choice([0, 0, 0, 1, 8])
        try:
            self.batcher.submit(request)
        except BatcherError:
            return
        self.sent.append(request)

    def cancel(self, request: Sent) -> None:
        if not request.answers:
            request.left = True
            self.batcher.cancel(request)

    def check(self) -> None:
        """Check the answers, and that nothing is left."""
        batcher = self.batcher
        for request in self.sent + self.bundled:
            assert len(request.answers) == (not request.left)
            if not request.left and isinstance(request.answer, np.ndarray):
                request.check()
                assert not (request.values == BAD).any()
        for queue in (batcher.queue, batcher._apart):
            assert (queue.rows, queue.deadlines, queue.groups) == (0, 0, {})
        for tenant in self.tenants:
            assert (tenant.open_requests, tenant.queued_rows) == (0, 0)
        assert batcher.running_batches == 0
        for lane in batcher.lanes:
            assert sorted(lane.free_slots) == list(range(self.slots))


@pytest.mark.parametrize("drain_s", [None, 0.02, 100.0])
def test_each_request_ends_once_and_nothing_is_left(
    drain_s: float | None, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.CRITICAL + 1, "cobatch.batcher")

    async def main(seed: int) -> None:
        story = Story(seed)
        await story.tell()
        if drain_s is not None:
            await story.batcher.drain(drain_s)
        await asyncio.sleep(60)
        story.check()

    for seed in range(STORIES):
        run(main(seed))
