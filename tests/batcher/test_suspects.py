"""Sources of failing rows ride apart from others, in a bounded part of the engine's time, until they run."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import random
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import pytest

from cobatch.batcher.errors import (
    BatchFailedError,
    DeadlineUnreachableError,
    ExpiredError,
    InputRejectedError,
    QueueFullError,
)
from cobatch.batcher.request import Batch
from cobatch.batcher.scheduling import policy, tuning
from cobatch.batcher.scheduling.queue import RequestQueue
from cobatch.batcher.scheduling.suspects import Suspects
from cobatch.batcher.tenant import Tenant
from cobatch.engines.errors import EngineError, EngineRunError
from cobatch.engines.worker import Job, Outcome
from tests.support.virtual.loop import Array, Call, FakeEngine, FakeWorker, make_batcher, run
from tests.support.virtual.tenants import Tenants, affine, flat, percentile

BAD = -666
SIZE = 32


class Sent(Call):
    """A request of one row from a source, which calls `then` when it is done."""

    __slots__ = ("number", "origin", "then")

    def __init__(
        self,
        value: int,
        origin: Hashable = None,
        then: Callable[[Sent], None] | None = None,
        width: int = 1,
    ) -> None:
        super().__init__([[value] * width])
        self.origin = origin
        self.then = then
        if isinstance(origin, Tenant):
            self.tenant = origin

    @property
    def source(self) -> Hashable:
        return self.origin

    def done(self) -> None:
        super().done()
        if self.then is not None:
            self.then(self)


class Probing(FakeWorker):
    """A worker that takes as long again for the zeros after a failed request."""

    def time_s(self, job: Job) -> float:
        rows = self.engine.buffers[job.slot][: job.rows]
        failed = self.engine.fails(rows) is not None
        return super().time_s(job) * (2 if failed and job.explain else 1)


def fails_on(*values: int) -> Callable[[Array], EngineError | None]:
    """Fail a run with any of these values in it."""
    return lambda rows: EngineRunError("refused") if np.isin(rows, values).any() else None


class Stage:
    """A batcher of batches of up to 32 rows; `batches` are those that ended, with their sources."""

    def __init__(
        self,
        run_s: Callable[[int], float],
        fails: Callable[[Array], EngineError | None] | None = None,
        slots: int = 2,
    ) -> None:
        engine = FakeEngine(SIZE, slots)
        engine.fails = fails or fails_on(BAD)
        self.worker = Probing(engine, run_s)
        # Known run times, so that the full size is not learned in the test.
        self.worker.warmup_us = {rows: run_s(rows) * 1e6 for rows in (1, 2, 4, 8, 16, SIZE)}
        self.batcher = make_batcher(self.worker)
        self.batches: list[tuple[Batch, set[Any], int]] = []
        self.answered: dict[Hashable, int] = {}
        self.batcher.watch_batches(self._ended)

    def _ended(self, batch: Batch) -> None:
        self.batches.append((batch, {one.source for one in batch.requests}, len(batch.requests)))

    def loop(self, value: int, origin: Hashable) -> None:
        """Send requests of a source one after another."""

        def again(sent: Sent | None) -> None:
            if sent is not None:
                self.answered[origin] = self.answered.get(origin, 0) + 1
            asyncio.get_running_loop().call_soon(self.batcher.submit, Sent(value, origin, again))

        again(None)

    async def send(self, *sent: Sent) -> None:
        """Submit requests together, and wait until all are done."""
        for one in sent:
            self.batcher.submit(one)
        await asyncio.sleep(30)
        assert all(one.answers for one in sent)

    def answers(self, origins: Iterable[Hashable]) -> int:
        return sum(self.answered.get(one, 0) for one in origins)


@pytest.fixture(autouse=True, scope="module")
def _quiet() -> Iterator[None]:
    """Thousands of failures are made here on purpose."""
    logger = logging.getLogger("cobatch")
    logger.setLevel(logging.CRITICAL + 1)
    yield
    logger.setLevel(logging.NOTSET)


# The cost to others


def rates(run_s: Callable[[int], float], good: Sequence[Hashable], others: Sequence[Hashable]) -> list[float]:
    """Return how many answers the good sources get in a second beside others: good ones, then failing.

    Not counted is the first second, in which the failing ones are found.
    """
    kept: list[float] = []

    async def main(value: int) -> None:
        stage = Stage(run_s)
        for one in good:
            stage.loop(7, one)
        for one in others:
            stage.loop(value, one)
        await asyncio.sleep(1)
        before = stage.answers(set(good))
        await asyncio.sleep(1)
        kept.append(stage.answers(set(good)) - before)

    for value in (7, BAD):
        run(main(value))
    return kept


@pytest.mark.parametrize("run_s", [flat, affine])
def test_good_callers_keep_their_rate_beside_failing_ones(run_s: Callable[[int], float]) -> None:
    beside_good, beside_failing = rates(run_s, range(16), range(16, 32))
    assert beside_failing > 0.75 * beside_good


@pytest.mark.parametrize("run_s", [flat, affine])
def test_tenants_keep_their_rate_beside_failing_ones(run_s: Callable[[int], float]) -> None:
    good, failing = Tenant("good"), Tenant("failing")
    beside_good, beside_failing = rates(run_s, [good] * 16, [failing] * 16)
    assert beside_failing > 0.75 * beside_good


def test_a_light_tenants_p99_hardly_rises_beside_a_poisoner() -> None:
    p99_s: list[float] = []

    async def main(poisoned: bool) -> None:
        stage = Stage(affine)
        light, poisoner = Tenant("light"), Tenant("poisoner")
        tenants = Tenants(stage.batcher)
        for _ in range(16 * poisoned):
            stage.loop(BAD, poisoner)
        await asyncio.sleep(1)
        tenants.poisson(light, per_s=30)
        await asyncio.sleep(20)
        p99_s.append(percentile(tenants.latencies_s[light], 0.99))

    run(main(False))
    run(main(True))
    assert p99_s[1] < 1.3 * p99_s[0]


def test_halves_of_a_failed_batch_take_their_tenants_turn() -> None:
    async def main() -> None:
        stage = Stage(affine, fails_on(BAD, 0))  # zeros fail too, so the failing one stays with the others
        failing, other = Tenant("failing"), Tenant("other")
        sent = [Sent(BAD, failing) for _ in range(8)]
        others = [Sent(7, other, width=2) for _ in range(8)]
        await stage.send(*sent, *others)
        assert all(isinstance(one.answer, BatchFailedError) for one in sent)
        order = [next(iter(sources)).name for _, sources, _ in stage.batches]
        assert order[:2] == ["failing", "other"]
        assert stage.batcher.counters.retries == len(order) - 2 == 14

    run(main())


# Who is suspect, and for how long


def test_only_sources_whose_rows_fail_alone_ride_apart() -> None:
    async def main() -> None:
        stage = Stage(affine)
        sent = [Sent(BAD if n == 3 else 7, n) for n in range(8)]
        await stage.send(*sent)
        assert [type(one.answer) for one in sent].count(InputRejectedError) == 1
        stage.batches.clear()
        await stage.send(*[Sent(7, n) for n in range(8)])
        assert [(batch.reason, len(sources)) for batch, sources, _ in stage.batches] == [
            (policy.SUSPECT, 1),
            (policy.IDLE, 7),
        ]
        assert stage.batches[0][1] == {3}

    run(main())


def test_an_engine_that_fails_on_everything_makes_nothing_suspect() -> None:
    async def main() -> None:
        stage = Stage(affine, lambda rows: EngineRunError("broken"))
        sent = [Sent(7, n) for n in range(4)]
        await stage.send(*sent)
        assert all(isinstance(one.answer, BatchFailedError) for one in sent)
        assert not stage.batcher._suspects.marks

    run(main())


@pytest.mark.parametrize("within", [True, False])
def test_where_zeros_tell_nothing_a_recent_run_of_others_does(within: bool) -> None:
    """As with a model that refuses zeros."""

    async def main() -> None:
        stage = Stage(flat)
        deliver = stage.worker.deliver
        assert deliver is not None

        def without_zeros(job: Job, outcome: Outcome) -> None:
            outcome.zeros_run = None
            deliver(job, outcome)

        stage.worker.deliver = without_zeros
        stage.batcher.submit(Sent(7, 1))
        # The good run ends at 10 ms, the failing one and that of zeros 20 ms after it is sent.
        await asyncio.sleep(tuning.HEALTHY_S - 0.010 + (-0.001 if within else 0.001))
        failing = Sent(BAD, 2)
        stage.batcher.submit(failing)
        await asyncio.sleep(1)
        assert isinstance(failing.answer, InputRejectedError if within else BatchFailedError)

    run(main())


def test_a_source_is_trusted_again_after_a_few_runs() -> None:
    """Its batches double. Seven failures have halved them to one row."""

    async def main() -> None:
        stage = Stage(flat)
        tenant = Tenant("mended")
        for _ in range(7):
            await stage.send(Sent(BAD, tenant))
        stage.batches.clear()
        await stage.send(*[Sent(7, tenant) for _ in range(100)])
        runs = [(batch.reason == policy.SUSPECT, requests) for batch, _, requests in stage.batches]
        assert runs == [*((True, 1 << n) for n in range(6)), (False, 32), (False, 5)]

    run(main())


@pytest.mark.parametrize("slots", [1, 2, 3])
def test_suspects_get_a_tenth_of_the_time_while_others_wait(slots: int) -> None:
    async def main() -> None:
        stage = Stage(flat, slots=slots)
        suspect = Tenant("suspect")
        await stage.send(Sent(BAD, suspect))
        for n in range(4 * SIZE):
            stage.loop(7, n)
        await asyncio.sleep(1)
        for _ in range(4):
            stage.loop(BAD, suspect)
        stage.batches.clear()
        await asyncio.sleep(4)
        apart_s = [b.finished_s - b.started_s for b, *_ in stage.batches if b.reason == policy.SUSPECT]
        assert sum(apart_s) / 4 == pytest.approx(tuning.SUSPECT_PART / 2, rel=0.2)

    run(main())


@pytest.mark.parametrize(("others", "within"), [(4 * SIZE, 5), (SIZE // 2, 10), (0, 20)])
def test_a_suspect_that_would_be_late_in_its_part_is_refused(others: int, within: int) -> None:
    """Runs of one row take 10 ms, and requests have half a second: 5 fit into a tenth of it, 10 into a fifth,
    and all 20 where there are no others."""

    async def main() -> None:
        stage = Stage(flat)
        suspect = Tenant("suspect")
        for _ in range(7):
            await stage.send(Sent(BAD, suspect))
        for n in range(others):
            stage.loop(7, n)
        await asyncio.sleep(1.005)
        sent = [Sent(BAD, suspect) for _ in range(20)]
        accepted = []
        for one in sent:
            one.timeout_s = 0.5
            with contextlib.suppress(DeadlineUnreachableError):
                stage.batcher.submit(one)
                accepted.append(one)
        await asyncio.sleep(1)
        assert within - 1 <= len(accepted) <= within + 1
        assert [type(one.answer) for one in accepted] == [InputRejectedError] * len(accepted)

    run(main())


def test_others_are_drained_before_suspects() -> None:
    async def main() -> None:
        stage = Stage(flat)
        suspect, other = Tenant("suspect"), Tenant("other")
        await stage.send(Sent(BAD, suspect))
        for _ in range(100):
            stage.batcher.submit(Sent(BAD, suspect))
        good = [Sent(7, other) for _ in range(4 * SIZE)]
        for one in good:
            stage.batcher.submit(one)
        assert not await stage.batcher.drain(0.1)
        for one in good:
            one.check()

    run(main())


def test_requests_are_moved_once_however_often_the_size_of_batches_changes() -> None:
    """Moving a long queue after each of its bad or good rows would stop the event loop for long."""
    queue, others = (RequestQueue(SIZE, 0.001, ages=False) for _ in range(2))
    suspects = Suspects(queue, others)
    tenant = Tenant("suspect")
    for _ in range(10):
        others.push(Sent(7, tenant))
    suspects.add(Sent(BAD, tenant), 0.0)
    before = [one.entry for one in queue.waiting()]
    assert len(before) == 10
    sizes = []
    for ran in (False, False, True, False, True, True, True):
        if ran:
            suspects.on_ran(Batch([Sent(7, tenant)], 1, ((1,),), policy.SUSPECT), 1.0)
        else:
            suspects.add(Sent(BAD, tenant), 1.0)
        (group,) = queue.groups.values()
        sizes.append(group.most_rows)
        assert [one.entry for one in queue.waiting()] == before
    assert sizes == [8, 4, 8, 4, 8, 16, 32]


@pytest.mark.parametrize(("suspect", "most"), [(Tenant("suspect"), 889), ("a connection", 1000)])
def test_suspects_cannot_fill_the_queue_of_others(suspect: Hashable, most: int) -> None:
    """A queue of 1000 rows, of which a tenant alone may have 8/9."""

    async def main() -> None:
        stage = Stage(flat)
        other = Tenant("other")
        await stage.send(Sent(BAD, suspect))
        for _ in range(most):
            stage.batcher.submit(Sent(BAD, suspect))
        with pytest.raises(QueueFullError):
            stage.batcher.submit(Sent(BAD, suspect))
        assert stage.batcher.refusal(500, other) is None
        assert len(stage.batcher.open_requests()[0]) == 1

    run(main())


def test_marks_are_bounded_in_number_and_age() -> None:
    queue, others = (RequestQueue(SIZE, 0.001, ages=False) for _ in range(2))
    suspects = Suspects(queue, others)
    for n in range(tuning.SUSPECTS_KEPT + 1):
        suspects.add(Sent(BAD, n), n / 1000)
    assert len(suspects.marks) == tuning.SUSPECTS_KEPT
    assert not suspects.holds(Sent(7, 0))
    batch = Batch([], 1, ((1,),), policy.FULL)
    suspects.on_ran(batch, tuning.SUSPECT_S + 0.001)
    assert suspects.holds(Sent(7, 1))
    suspects.on_ran(batch, tuning.SUSPECT_S + 0.002)
    assert not suspects.holds(Sent(7, 1))
    suspects.on_ran(batch, math.inf)
    assert not suspects.marks
    suspects.add(Sent(BAD, None), 0.0)
    assert not suspects.marks, "of an unknown source nothing more can be known"


# Requests that are run again


def test_they_run_before_later_requests_of_their_tenant() -> None:
    async def main() -> None:
        stage = Stage(affine)
        first = [Sent(BAD if n == 0 else 7, n) for n in range(SIZE)]
        packed_ahead = [Sent(7, n) for n in range(100, 100 + SIZE)]
        later = [Sent(7, n) for n in range(200, 200 + SIZE)]
        await stage.send(*first, *packed_ahead, *later)
        assert max(one.at_s for one in first) < min(one.at_s for one in later)

    run(main())


@pytest.mark.parametrize("values", [(7, BAD), (BAD, 7)])
def test_expiry_of_a_request_that_waits_again_is_told_at_once(values: tuple[int, int]) -> None:
    """Not when its half would be sent, behind runs of the other. Runs take 10 ms, its timeout is 30 ms."""

    async def main() -> None:
        stage = Stage(flat, slots=1)
        sent = [Sent(value, n) for n, value in enumerate(values * 8)]
        sent[-1].timeout_s = 0.030
        for one in sent:
            stage.batcher.submit(one)
        await asyncio.sleep(1)
        assert isinstance(sent[-1].answer, ExpiredError)
        assert sent[-1].at_s == pytest.approx(0.020, abs=0.001), "when a run does not fit any more"

    run(main())


@pytest.mark.parametrize("run_s", [flat, affine])
def test_a_client_alone_loses_nothing_by_being_suspect(run_s: Callable[[int], float]) -> None:
    """One of a hundred rows of a server's only client fails; a client without a source is never suspect."""
    answered: list[int] = []

    async def main(origin: Hashable) -> None:
        stage = Stage(run_s)
        chance = random.Random(3)

        def again(sent: Sent | None) -> None:
            value = BAD if chance.random() < 0.01 else 7
            asyncio.get_running_loop().call_soon(stage.batcher.submit, Sent(value, origin, again))

        for _ in range(2 * SIZE):
            again(None)
        await asyncio.sleep(6)
        answered.append(sum(requests for batch, _, requests in stage.batches if not batch.failed))

    run(main(None))
    run(main(Tenant("only")))
    assert answered[1] > 0.95 * answered[0]
