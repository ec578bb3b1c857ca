"""Fair between tenants: shares of engine time, a light tenant beside a flood, credit, bounded waits."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cobatch.batcher.scheduling.fair_queueing import TenantShare, TenantShares
from cobatch.batcher.scheduling.tuning import CREDIT, LEAD_S
from cobatch.batcher.tenant import Tenant
from tests.support.examples import examples
from tests.support.virtual.loop import Call, make_batcher, run
from tests.support.virtual.tenants import Metered, Tenants, affine, flat, linear, percentile

WEIGHTS = (1.0, 2.0, 4.0)
SHARES = [weight / sum(WEIGHTS) for weight in WEIGHTS]
BATCHES = 500
Curve = Callable[[int], float]


def three() -> tuple[Tenant, Tenant, Tenant]:
    one, two, four = (Tenant(f"weight {weight:g}", weight=weight) for weight in WEIGHTS)
    return one, two, four


def measured(
    worker: Metered,
    rows: tuple[int, int, int] = (1, 1, 1),
    width: tuple[int, int, int] = (1, 1, 1),
    batches: int = BATCHES,
) -> list[float]:
    """The parts of engine time that backlogged tenants of weights 1:2:4 get."""
    parts: list[float] = []

    async def main() -> None:
        tenants = three()
        callers = Tenants(make_batcher(worker, max_queue_rows=10_000))
        for tenant, its_rows, its_width in zip(tenants, rows, width, strict=True):
            callers.backlog(tenant, 60, its_rows, its_width)
        await worker.until(batches)
        parts.extend(worker.parts(*tenants))
        await callers.stop()

    run(main())
    return parts


# TenantShares


@pytest.mark.parametrize("curve", [flat, affine, linear])
def test_backlogged_tenants_get_their_shares(curve: Curve) -> None:
    assert measured(Metered(curve)) == pytest.approx(SHARES, rel=0.02)


@pytest.mark.parametrize("rows", [(1, 2, 3), (3, 2, 1), (8, 1, 1), (1, 1, 8), (20, 1, 3)])
@pytest.mark.parametrize("curve", [flat, affine])
def test_large_requests_get_no_larger_share(curve: Curve, rows: tuple[int, int, int]) -> None:
    assert measured(Metered(curve), rows) == pytest.approx(SHARES, rel=0.02)


# Of the last one's thousand batches the first tenant has 30: one more or less is 3 % of its share.
@pytest.mark.parametrize(
    ("curve", "width", "batches"),
    [
        (flat, (1, 2, 3), 1000),
        (affine, (3, 2, 1), 1000),
        (flat, (1, 1, 9), 1000),
        (affine, (9, 1, 3), 4000),
    ],
)
def test_a_tenant_with_expensive_rows_gets_fewer(
    curve: Curve, width: tuple[int, int, int], batches: int
) -> None:
    """Shapes do not ride together, and their runs cost one, two, three or nine times as much."""
    worker = Metered(curve, wide=float)
    assert measured(worker, width=width, batches=batches) == pytest.approx(SHARES, rel=0.02)


def test_time_is_shared_also_while_it_varies() -> None:
    chance = np.random.default_rng(5)
    worker = Metered(lambda rows: 0.010 * chance.choice([0.8, 1.0, 1.0, 1.0, 4.0]))
    worker.warmup_us = {8: 10_000.0}
    assert measured(worker) == pytest.approx(SHARES, rel=0.02)


def test_time_is_shared_however_wrong_the_warm_up_was() -> None:
    worker = Metered(flat)
    worker.warmup_us = {8: 1e-3}
    assert measured(worker) == pytest.approx(SHARES, rel=0.02)


def test_tenants_of_one_weight_get_the_same() -> None:
    async def main() -> None:
        worker = Metered(flat)
        callers = Tenants(make_batcher(worker))
        tenants = [Tenant(f"t{n}") for n in range(7)]
        for n, tenant in enumerate(tenants):
            callers.backlog(tenant, 9 + n)
        await worker.until(BATCHES)
        assert worker.parts(*tenants) == pytest.approx([1 / 7] * 7, rel=0.02)
        await callers.stop()

    run(main())


def test_requests_without_a_tenant_share_one_account() -> None:
    async def main() -> None:
        worker = Metered(flat)
        callers = Tenants(make_batcher(worker))
        tenant = Tenant("told")
        callers.backlog(tenant, 20)

        class Anybody(Call):
            def done(self) -> None:
                super().done()
                if worker.batches < BATCHES:
                    callers.batcher.submit(Anybody([[1]]))

        for _ in range(20):
            callers.batcher.submit(Anybody([[1]]))
        await worker.until(BATCHES)
        used_s = worker.used_s
        assert used_s[None] == pytest.approx(used_s[tenant], rel=0.02)
        await callers.stop()

    run(main())


# Work-conserving


def test_an_unused_share_goes_to_the_others() -> None:
    async def main() -> None:
        worker = Metered(flat)
        callers = Tenants(make_batcher(worker))
        small, large = Tenant("small", weight=1), Tenant("large", weight=1000)
        callers.backlog(small, 40)
        await worker.until(100)
        callers.ask(large)
        await worker.until(200)
        # All of it but that one row, and the engine never stood still.
        assert worker.parts(small)[0] == 1
        assert worker.used_s[large] == pytest.approx(0.010 / 8)
        starts_s = [start_s for start_s, _ in worker.ran]
        assert np.diff(starts_s) == pytest.approx(0.010)
        assert [rows for _, rows in worker.ran[1:]] == [8] * (len(worker.ran) - 1)
        await callers.stop()

    run(main())


@pytest.mark.parametrize("curve", [flat, affine])
def test_with_several_tenants_and_shapes_the_engine_is_never_idle(curve: Curve) -> None:
    async def main() -> None:
        worker = Metered(curve)
        callers = Tenants(make_batcher(worker))
        for n, tenant in enumerate(three()):
            callers.backlog(tenant, 30, width=1 + n)
        await worker.until(200)
        starts_s = [start_s for start_s, _ in worker.ran]
        runs_s = [curve(rows) for _, rows in worker.ran]
        assert np.diff(starts_s) == pytest.approx(runs_s[:-1])
        await callers.stop()

    run(main())


# A light tenant beside a flood


def light_latencies_s(
    curve: Curve, flood_rate: float, part: float, requests: int, seed: int = 1
) -> list[float]:
    """Return the latencies of a light tenant that asks for `part` of the engine's capacity, at times that do
    not depend on the other tenant, which asks for `flood_rate` times the capacity."""
    result: list[float] = []

    async def main() -> None:
        worker = Metered(curve)
        callers = Tenants(make_batcher(worker), seed)
        light, flood = Tenant("light"), Tenant("flood")
        capacity = 8 / curve(8)
        callers.poisson(light, part * capacity)
        if flood_rate:
            callers.poisson(flood, flood_rate * capacity)
        await asyncio.sleep(requests / (part * capacity))
        await callers.stop()
        assert not callers.refused[light], "the flood shut it out"
        assert callers.refused[flood] or not flood_rate
        result.extend(callers.latencies_s[light])

    run(main())
    return result


def light_p99_s(curve: Curve, flood_rate: float, part: float, requests: int, seeds: int) -> float:
    """Return the 99th percentile of all requests of the light tenant, over all seeds."""
    ones = [light_latencies_s(curve, flood_rate, part, requests, seed) for seed in range(1, seeds + 1)]
    return percentile([latency_s for one in ones for latency_s in one], 0.99)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("curve", "full_rows", "part", "requests", "most"),
    [
        (flat, 8, 0.02, 200, 0.99),
        (affine, 8, 0.005, 100, 0.95),
        (affine, 8, 0.02, 200, 0.95),
        (linear, 1, 0.02, 200, 0.99),
    ],
)
def test_a_flood_delays_each_request_of_a_rare_tenant_by_one_batch(
    curve: Curve, full_rows: int, part: float, requests: int, most: float
) -> None:
    """It has credit enough to be always next, so each busy period of its own begins at most one run of the
    flood later than it would alone, or `LEAD_S` more, if it comes just when that run was packed. That holds
    for each request at any seed; but not for the first one, which tells that there are two tenants,
    and, where a run of one row is shorter than a full one, not for those that are close together."""
    alone_s, beside_s = (light_latencies_s(curve, rate, part, requests)[1:] for rate in (0, 3))
    longer_s = [beside - alone for alone, beside in zip(alone_s, beside_s, strict=True)]
    assert percentile(longer_s, most) <= curve(full_rows) + LEAD_S + 1e-9


@pytest.mark.slow
@pytest.mark.parametrize(
    ("curve", "full_rows", "part", "requests", "seeds"),
    [
        (flat, 8, 0.1, 500, 1),
        (flat, 8, 0.3, 1000, 1),
        (affine, 8, 0.1, 400, 3),
        (affine, 8, 0.2, 400, 8),
        (linear, 1, 0.1, 400, 2),
        (linear, 1, 0.2, 400, 6),
    ],
)
def test_a_flood_delays_a_light_tenant_by_one_batch(
    curve: Curve, full_rows: int, part: float, requests: int, seeds: int
) -> None:
    """Its row does not ride with those of the flood, which would take it longer. One seed's percentile is
    a few milliseconds off."""
    alone_s, beside_s = (light_p99_s(curve, rate, part, requests, seeds) for rate in (0, 3))
    assert beside_s <= 1.2 * alone_s + curve(full_rows)


def test_a_light_tenant_makes_every_other_batch_small_at_most() -> None:
    """Otherwise a tenant that always has a row queued would cost all others the gain of batching."""

    async def main() -> None:
        worker = Metered(affine)
        callers = Tenants(make_batcher(worker))
        light, flood = Tenant("light"), Tenant("flood")
        callers.backlog(flood, 100)
        callers.backlog(light, 1)
        await worker.until(100)
        sizes = [rows for _, rows in worker.ran[2:]]
        assert min(sizes) == 1
        assert all(one == 8 or other == 8 for one, other in pairwise(sizes))
        await callers.stop()

    run(main())


def test_a_flood_of_one_shape_does_not_keep_another_waiting() -> None:
    """Ray Serve, Triton: whatever fills batches goes first, and what does not waits for ever."""

    async def main() -> None:
        worker = Metered(flat)
        callers = Tenants(make_batcher(worker))
        flood, rare = Tenant("flood"), Tenant("rare")
        callers.ask(rare, width=3)  # it is known: from now on batches are made up late
        callers.backlog(flood, 100)
        await worker.until(10)
        for _ in range(20):
            asked = callers.ask(rare, width=3)
            await asyncio.sleep(0.0371)
            assert asked.at_s - asked.enqueued_s <= 0.020 + LEAD_S + 1e-9
        await callers.stop()

    run(main())


def test_a_rare_shape_of_the_same_tenant_keeps_its_place_in_the_line() -> None:
    async def main() -> None:
        worker = Metered(flat)
        callers = Tenants(make_batcher(worker))
        tenant = Tenant("one")
        callers.backlog(tenant, 80)
        await worker.until(10)
        asked = callers.ask(tenant, width=3)
        await asyncio.sleep(1)
        # 80 rows were there before it: ten batches, the one that runs, the one that lies ready, its own.
        assert asked.at_s - asked.enqueued_s <= 0.130
        await callers.stop()

    run(main())


# The queue's room


@pytest.mark.parametrize("floods", [1, 2, 5])
def test_a_tenant_that_floods_the_queue_leaves_room_for_others(floods: int) -> None:
    async def main() -> None:
        callers = Tenants(make_batcher(Metered(lambda rows: 1000.0), max_queue_rows=1000))
        tenants = [Tenant(f"flood {n}") for n in range(floods)]
        while not all(callers.refused[tenant] for tenant in tenants):
            for tenant in tenants:
                callers.try_to_ask(tenant)
        queued = [tenant.queued_rows for tenant in tenants]
        assert max(queued) - min(queued) <= 8
        room = 1000 - sum(queued)
        assert room >= 1000 // (8 * floods + 1)
        callers.ask(Tenant("late"), rows=room)

    run(main())


# Credit


@pytest.mark.parametrize("weight", [1.0, 5.0])
def test_a_tenant_has_a_credit_of_a_few_batches_from_idleness(weight: float) -> None:
    async def main() -> None:
        worker = Metered(flat)
        callers = Tenants(make_batcher(worker))
        away, there = Tenant("away", weight=weight), Tenant("there")
        callers.ask(away)
        callers.backlog(there, 40)
        await worker.until(500)
        before_s = worker.used_s.copy()
        callers.backlog(away, 40)
        await worker.until(600)
        used_s = [worker.used_s[tenant] - before_s[tenant] for tenant in (away, there)]
        expected_s = (CREDIT + (100 - CREDIT) * weight / (weight + 1)) * flat(8)
        assert used_s[0] == pytest.approx(expected_s, abs=flat(8))
        await callers.stop()

    run(main())


def test_coming_and_going_earns_nothing() -> None:
    """One that lets its queue run empty again and again gets no more than one that stays."""

    async def main() -> None:
        worker = Metered(flat)
        callers = Tenants(make_batcher(worker))
        stays, comes = Tenant("stays"), Tenant("comes")
        callers.backlog(stays, 40)
        while worker.batches < BATCHES:
            gone = asyncio.Event()
            for n in range(12):
                callers.ask(comes, then=gone.set if n == 11 else None)
            await gone.wait()
        assert worker.used_s[comes] <= 1.02 * worker.used_s[stays]
        await callers.stop()

    run(main())


# The account


def test_a_start_never_goes_back_and_a_credit_is_kept() -> None:
    share = TenantShare(Tenant("t", weight=2.0))
    share.charge(4.0)
    assert share.start_s == 2.0
    share.cost_correction_s = -3.0
    share.charge(1.0)
    assert (share.start_s, share.cost_correction_s) == (2.0, -2.0)
    share.charge(4.0)
    assert (share.start_s, share.cost_correction_s) == (3.0, 0.0)


def test_tenants_that_are_idle_are_forgotten() -> None:
    shares = TenantShares()
    busy = shares.of(Tenant("busy"))
    shares.activate(busy)
    busy.rows = 1
    for n in range(10_000):
        shares.of(Tenant(f"t{n}"))
        assert len(shares._of) <= 70
    assert shares.of(busy.tenant) is busy


# Whatever comes


@examples(20)
@given(
    weights=st.lists(st.sampled_from([0.5, 1.0, 2.0, 8.0]), min_size=2, max_size=5),
    sizes=st.lists(st.tuples(st.integers(1, 10), st.integers(1, 2)), min_size=5, max_size=5),
    curve=st.sampled_from([flat, affine]),
)
def test_every_tenant_gets_its_share_and_a_bounded_wait(
    weights: list[float], sizes: list[tuple[int, int]], curve: Curve
) -> None:
    async def main() -> None:
        worker = Metered(curve)
        callers = Tenants(make_batcher(worker))
        tenants = [Tenant(f"t{n}", weight=weight) for n, weight in enumerate(weights)]
        for tenant, (rows, width) in zip(tenants, sizes, strict=False):
            callers.backlog(tenant, 20, rows, width)
        await worker.until(300)
        whole = sum(weights)
        total_s = sum(worker.used_s.values())
        # SFQ's bound (Goyal et al., theorem 1): two flows differ by at most one of the largest request of
        # each. Beside it, what lies in two slots is charged when it has run.
        largest_s = 4 * curve(8) * 2
        for tenant, weight in zip(tenants, weights, strict=True):
            assert abs(worker.used_s[tenant] - total_s * weight / whole) <= largest_s
        for tenant, weight, (rows, _) in zip(tenants, weights, sizes, strict=False):
            # 20 of it were queued at most, and it is served at its share of the slowest rate.
            bound_s = 20 * rows * curve(1) * whole / weight + 2 * largest_s
            assert max(callers.latencies_s[tenant], default=0.0) <= bound_s
        await callers.stop()

    run(main())
