"""Predicted run times: learned from the last runs, seeded by the warm-up, monotone in rows."""

from __future__ import annotations

import asyncio
import itertools
import math
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cobatch.batcher.scheduling.arrivals import ArrivalRate
from cobatch.batcher.scheduling.run_times import RunTimeModel, monotone
from cobatch.batcher.scheduling.size_runs import time_to_plan_s
from tests.support.virtual.loop import Call, make_batcher, run
from tests.support.virtual.tenants import Metered, affine, flat, linear

MAGIKA_US = {1: 10_000.0, 2: 20_500.0, 4: 41_000.0, 8: 84_000.0}
LEARN_S = 0.05
EPSILON_MS = 1e-6  # times in virtual time are sums


def learn(model: RunTimeModel, rows: int, run_s: float, times: int, now_s: float = 0.0) -> float:
    """Let the model learn from runs; return when the last one ended."""
    for _ in range(times):
        now_s += LEARN_S
        model.observe(rows, run_s, now_s)
    return now_s


# Seeds


def test_the_warm_up_is_believed_until_a_batch_has_run() -> None:
    model = RunTimeModel(8, MAGIKA_US)
    for rows, run_us in MAGIKA_US.items():
        assert model.expected_s(rows) == model.planned_s(rows) == pytest.approx(run_us / 1e6)
    assert model.expected_s(3) == pytest.approx((0.0205 + 0.041) / 2)


def test_without_a_warm_up_a_run_takes_a_millisecond() -> None:
    model = RunTimeModel(16, {})
    assert {model.expected_s(rows) for rows in (1, 7, 16)} == {0.001}
    assert model.full_rows == 16


def test_one_slow_run_does_not_make_a_size_look_bad() -> None:
    model = RunTimeModel(8, MAGIKA_US)
    model.observe(1, 10.0, 1.0)
    assert model.expected_s(1) == pytest.approx(0.010)
    assert model.planned_s(1) == pytest.approx(0.010)
    assert model.mean_s(1) <= 0.020, "at most twice the median"


def test_what_has_not_run_drifts_with_what_has() -> None:
    """Twice as slow as in the warm-up: so are sizes that did not run."""
    model = RunTimeModel(8, MAGIKA_US)
    learn(model, 1, 0.020, 10)
    for rows, run_us in MAGIKA_US.items():
        assert model.expected_s(rows) == pytest.approx(2 * run_us / 1e6)
    assert model.full_rows == 1
    # And what did run is not touched when another size drifts.
    learn(model, 8, 0.084, 10, now_s=1.0)
    assert model.expected_s(1) == pytest.approx(0.020)
    assert model.expected_s(8) == pytest.approx(0.084)


AFFINE_US = {rows: 1000.0 * (8 + rows) for rows in (1, 2, 4, 8)}
# The tail of runs that vary: the median is 1, a quarter takes half as long, a quarter twice as long.
VARYING = [0.5, 1.0, 2.0, 1.0]


def test_few_slow_runs_do_not_make_a_size_look_bad_where_runs_vary() -> None:
    """Three of four runs of a size were slow, as by chance they are for one size in five."""
    model = RunTimeModel(8, AFFINE_US)
    now_s = 0.0
    for factor in VARYING * 10:
        now_s = learn(model, 4, 0.012 * factor, 1, now_s)
    for factor in (2.0, 1.0, 2.0, 2.0):
        now_s = learn(model, 8, 0.016 * factor, 1, now_s)
    assert model.full_rows == model.overloaded_rows == 8
    assert 0.016 < model.expected_s(8) < 0.020
    assert model.expected_s(8) <= model.planned_s(8) <= model.sure_s(8)
    assert model.expected_s(4) == pytest.approx(0.012, rel=0.05)


def test_many_slow_runs_show_that_a_size_is_bad_where_runs_vary() -> None:
    model = RunTimeModel(8, AFFINE_US)
    now_s = 0.0
    for factor in VARYING * 30:
        now_s = learn(model, 4, 0.012 * factor, 1, now_s + LEARN_S)
        now_s = learn(model, 8, 0.048 * factor, 1, now_s - LEARN_S)
    assert model.full_rows == 4
    assert model.expected_s(8) == pytest.approx(0.048, rel=0.3)


def test_steady_runs_are_believed_whatever_the_warm_up_says() -> None:
    model = RunTimeModel(8, AFFINE_US)
    now_s = learn(model, 4, 0.012, 10)
    learn(model, 8, 0.048, 8, now_s)
    assert model.expected_s(8) == pytest.approx(0.048)
    assert model.full_rows == 4


def test_runs_without_a_time_are_counted() -> None:
    """The clock may see no time between the start and the end of a run."""
    model = RunTimeModel(8, AFFINE_US)
    learn(model, 4, 0.0, 10)
    assert 0 <= model.expected_s(4) < 1e-6


# Learning


def test_old_behaviour_is_forgotten_in_seconds() -> None:
    """At 20 batches a second: after the memory's five seconds nothing of the old is left."""
    model = RunTimeModel(8, {8: 10_000.0})
    now_s = learn(model, 8, 0.010, 200)
    learn(model, 8, 0.050, 17, now_s)
    assert model.expected_s(8) == pytest.approx(0.050), "the median follows within 17 runs"
    learn(model, 8, 0.050, 100, now_s)
    assert model.expected_s(8) == model.planned_s(8) == pytest.approx(0.050)
    now_s = learn(model, 8, 0.010, 32, now_s + 10)
    assert model.planned_s(8) == pytest.approx(0.010)


@pytest.mark.parametrize(("gap_s", "believed"), [(5.0 - 4 * LEARN_S, True), (5.0 + LEARN_S, False)])
def test_runs_older_than_the_memory_are_forgotten(gap_s: float, believed: bool) -> None:
    model = RunTimeModel(8, {8: 10_000.0})
    now_s = 1.0
    for _ in range(32):
        model.observe(8, 0.010, now_s)
    for n in range(4):
        model.observe(8, 0.050, now_s + gap_s + n * LEARN_S)
    assert model.expected_s(8) == pytest.approx(0.010 if believed else 0.050)


def test_runs_between_two_looks_are_not_lost() -> None:
    model = RunTimeModel(8, {8: 10_000.0})
    looks = [n for n in range(1, 33) if model.observe(8, 0.010, 1.0 + n * LEARN_S / 100)]
    assert looks == [1, 2, 4, 8, 16, 32]
    for n in range(1, 32):
        assert not model.observe(8, 0.030, 1.0 + (32 + n) * LEARN_S / 100)
    assert model.expected_s(8) == pytest.approx(0.010)
    assert model.observe(8, 0.030, 1.0 + 2 * LEARN_S)
    assert model.expected_s(8) == pytest.approx(0.030)


def test_a_size_that_never_ran_is_learned_at_once() -> None:
    model = RunTimeModel(64, {64: 10_000.0})
    assert model.observe(64, 0.010, 1.0)
    assert model.observe(3, 0.002, 1.0)
    assert model.expected_s(3) == pytest.approx(0.002)
    assert model.expected_s(1) == pytest.approx(0.002), "nothing smaller ever ran"


@pytest.mark.parametrize(
    ("times", "planned"),
    [
        ([1.0] * 20, 1.0),
        ([1.0] * 10 + [1.1] * 10, 1.1),  # a tenth longer, and twice as many are in time
        ([1.0] * 18 + [2.0] * 2, 1.0),  # half as large, for a tenth more in time
        ([1.0] * 19 + [100.0], 1.0),
        ([1.0] * 8 + [1.5] * 12, 1.5),
    ],
    ids=["steady", "two speeds", "few slow ones", "a stall", "many slow ones"],
)
def test_a_deadline_is_planned_with_most_runs_for_their_length(times: list[float], planned: float) -> None:
    assert time_to_plan_s(times) == planned
    model = RunTimeModel(8, {8: 1e6})
    for n in range(6):
        for run_s in times:
            model.observe(8, run_s, (n + 1) * LEARN_S)
    assert model.planned_s(8) == planned
    assert model.planned_s(8) >= model.expected_s(8)
    assert model.sure_s(8) == max(planned, sorted(6 * times)[int(0.9 * 119)])


# Tails


def stalling(median_s: float, stall_s: float, every: int, number: int) -> float:
    """The time of run `number` where each `every`th one stalls."""
    return median_s + (stall_s if number % every == 0 else 0.0)


def test_the_mean_counts_stalls_that_the_median_does_not_see() -> None:
    """2 % of the runs take 50 ms longer, in either size: 1 ms of each run on average."""
    model = RunTimeModel(8, {4: 1_000.0, 8: 2_000.0})
    for n in range(1, 3001):
        for rows, median_s in ((4, 0.001), (8, 0.002)):
            model.observe(rows, stalling(median_s, 0.050, 50, n), n * LEARN_S)
    for rows, median_s in ((4, 0.001), (8, 0.002)):
        assert model.expected_s(rows) == pytest.approx(median_s)
        assert model.mean_s(rows) == pytest.approx(median_s + 0.001, rel=0.15)
        assert model.planned_s(rows) == pytest.approx(median_s)


def test_sizes_follow_from_means() -> None:
    """By their medians four rows are best; a stall costs a run of four rows as much as one of 32."""
    run_us = {1: 1_000.0, 2: 1_300.0, 4: 1_800.0, 8: 4_000.0, 16: 9_000.0, 32: 20_000.0}
    model = RunTimeModel(32, run_us)
    assert model.full_rows == 4
    for n in range(1, 1000):
        model.observe(4, stalling(0.0018, 0.300, 50, n), n * 0.01)
    assert model.full_rows >= 16
    for n in range(1, 6000):
        model.observe(model.full_rows, run_us[model.full_rows] / 1e6, 10 + n * 0.01)
    assert model.full_rows == 4, "and back, when nothing stalls any more"


def test_a_size_with_few_runs_yields_to_its_neighbours() -> None:
    """Its times do not make all larger ones look slow."""
    model = RunTimeModel(8, {1: 1_000.0, 8: 2_000.0})
    for n in range(1, 101):
        model.observe(8, 0.002, n * LEARN_S)
        if n % 20 == 0:
            model.observe(2, 0.008, n * LEARN_S)
    assert model.expected_s(8) < 0.0025


def test_ascending_values_are_the_nearest_ones() -> None:
    assert monotone([1.0, 2.0, 3.0], [1, 1, 1]) == [1.0, 2.0, 3.0]
    assert monotone([1.0, 4.0, 2.0], [5, 1, 3]) == [1.0, 2.5, 2.5]
    assert monotone([3.0, 2.0, 1.0], [1, 1, 2]) == [1.75, 1.75, 1.75]


def test_batches_are_spaced_only_where_runs_stall() -> None:
    """2 % of 50 ms beside 1 ms: E[X] = 1 ms, E[X^2] = 50 ms^2."""
    steady, stalls = RunTimeModel(8, {8: 1_000.0}), RunTimeModel(8, {8: 1_000.0})
    noise = np.random.default_rng(2).gamma(20, 1 / 20, 5000)
    for n in range(1, 5001):
        steady.observe(8, 0.001 * float(noise[n - 1]), n * LEARN_S)
        stalls.observe(8, stalling(0.001, 0.050, 50, n), n * LEARN_S)
    assert steady.spacing_s == 0
    assert stalls.spacing_s == pytest.approx(math.sqrt(1 + 50) / 1000 - 0.001, rel=0.15)


RUNS = st.lists(
    st.tuples(st.integers(1, 32), st.floats(1e-6, 10), st.sampled_from([0.0, 0.01, 0.06, 7.0])), max_size=40
)
SEEDS = st.dictionaries(st.sampled_from([1, 2, 4, 8, 16, 32]), st.floats(0.1, 1e7))


@given(seeds=SEEDS, runs=RUNS)
def test_never_less_for_more_rows_and_never_below_the_centre(
    seeds: dict[int, float], runs: list[tuple[int, float, float]]
) -> None:
    model = RunTimeModel(32, seeds)
    now_s = 0.0
    for rows, run_s, gap_s in runs:
        now_s += gap_s
        model.observe(rows, run_s, now_s)
    expected = [model.expected_s(rows) for rows in range(1, 65)]
    high = [model.planned_s(rows) for rows in range(1, 65)]
    slack = 1 + 1e-9
    assert all(left <= right * slack for left, right in itertools.pairwise(expected))
    assert all(left <= right * slack for left, right in itertools.pairwise(high))
    assert all(centre <= quantile * slack for centre, quantile in zip(expected, high, strict=True))
    assert all(math.isfinite(one) and one > 0 for one in expected)
    assert 1 <= model.full_rows <= 32
    assert model.row_s > 0


@given(seeds=SEEDS, budget_s=st.floats(0, 20), most=st.integers(1, 32))
def test_the_largest_batch_that_fits_a_budget(seeds: dict[int, float], budget_s: float, most: int) -> None:
    model = RunTimeModel(32, seeds)
    rows = model.most_rows(budget_s, most)
    assert rows == max((n for n in range(1, most + 1) if model.planned_s(n) <= budget_s), default=0)


# The full size


@pytest.mark.parametrize(
    ("run_us", "full_rows"),
    [
        (dict.fromkeys((1, 2, 4, 8, 16), 10000.0), 16),
        ({rows: 4_000 + 2_000.0 * rows for rows in (1, 2, 4, 8, 16)}, 16),
        ({rows: 1_000.0 * max(rows, 4) for rows in (1, 2, 4, 8, 16)}, 4),
        (MAGIKA_US | {16: 170_000.0}, 1),
    ],
    ids=["flat", "affine", "full at four", "Magika"],
)
def test_a_batch_grows_only_as_long_as_growing_pays(run_us: dict[int, float], full_rows: int) -> None:
    model = RunTimeModel(16, run_us)
    assert model.full_rows == full_rows


@pytest.mark.parametrize(
    ("run_us", "full_rows"),
    [
        (dict.fromkeys((1, 2, 4, 8, 16), 10000.0), 16),
        ({rows: 4_000 + 2_000.0 * rows for rows in (1, 2, 4, 8, 16)}, 16),
        ({rows: 10_500.0 * rows for rows in (1, 2, 4, 8, 16)}, 1),
        (MAGIKA_US | {16: 170_000.0}, 1),
    ],
    ids=["flat", "affine", "linear", "Magika"],
)
def test_the_same_is_learned_without_a_warm_up(run_us: dict[int, float], full_rows: int) -> None:
    """As soon as there were batches of these sizes."""
    model = RunTimeModel(16, {})
    now_s = 0.0
    for _ in range(3):
        for rows, us in run_us.items():
            now_s = learn(model, rows, us / 1e6, 20, now_s)
    assert model.full_rows == full_rows


@pytest.mark.parametrize("curve", [flat, affine, linear])
def test_the_full_size_is_stable_while_batches_of_all_sizes_run(curve: Callable[[int], float]) -> None:
    """Noise of a tenth, sizes as they come: it does not creep."""
    chance = np.random.default_rng(3)
    model = RunTimeModel(8, {rows: curve(rows) * 1e6 for rows in (1, 2, 4, 8)})
    full = model.full_rows
    for n in range(3000):
        rows = int(chance.integers(1, full + 1))
        model.observe(rows, curve(rows) * float(chance.uniform(0.95, 1.05)), n * 0.02)
        assert model.full_rows == full


def test_a_model_that_turns_out_to_gain_nothing_stops_batching() -> None:
    async def main() -> None:
        worker = Metered(linear)
        worker.warmup_us = dict.fromkeys((1, 2, 4, 8), 10_000.0)
        batcher = make_batcher(worker)
        assert batcher.queue.full_rows == 8
        for rows in (1, 2, 4, 8):
            for _ in range(20):
                batcher.submit(Call([[1]] * rows))
                await asyncio.sleep(0.2)
        assert batcher.queue.full_rows == 1
        ran = len(worker.ran)
        for _ in range(20):
            batcher.submit(Call([[1]]))
        await asyncio.sleep(1)
        assert [rows for _, rows in worker.ran[ran:]] == [1] * 20

    run(main())


# A target for latency


@pytest.mark.parametrize(
    ("target_ms", "full_rows"),
    [
        (40.0 - EPSILON_MS, 7),
        (40.0 + EPSILON_MS, 8),
        (24.0 + EPSILON_MS, 4),
        (12.0 + EPSILON_MS, 1),
        (1.0, 1),
        (1e6, 8),
    ],
)
def test_under_a_latency_target_two_runs_fit(target_ms: float, full_rows: int) -> None:
    async def main() -> None:
        batcher = make_batcher(Metered(affine), latency_target_ms=target_ms)
        assert batcher.queue.full_rows == full_rows

    run(main())


@pytest.mark.parametrize("target_ms", [16.0, 24.0, 40.0])
def test_a_latency_target_is_kept_at_the_load_that_it_leaves(target_ms: float) -> None:
    """As many callers as two batches take: each waits for one and rides in one."""

    async def main() -> None:
        batcher = make_batcher(Metered(affine), latency_target_ms=target_ms + EPSILON_MS)
        times_s: list[float] = []

        class Again(Call):
            def done(self) -> None:
                super().done()
                times_s.append(self.at_s - self.enqueued_s)
                if self.at_s < 5:
                    batcher.submit(Again([[1]]))

        for _ in range(2 * batcher.queue.full_rows):
            batcher.submit(Again([[1]]))
        await asyncio.sleep(6)
        assert max(times_s) <= (target_ms + EPSILON_MS) / 1000
        assert len(times_s) > 500

    run(main())


# How many come


def test_arrivals_are_counted_once_they_are_enough() -> None:
    arrivals = ArrivalRate(0.0)
    assert arrivals.per_s(0.4, 400) is None, "not yet"
    assert arrivals.per_s(0.5, 500) == pytest.approx(1000)
    assert arrivals.per_s(0.9, 5000) == pytest.approx(1000), "the last window's"
    assert arrivals.per_s(1.5, 600) == pytest.approx(100)
    few = ArrivalRate(0.0)
    assert few.per_s(1.0, 9) is None
    assert few.per_s(2.0, 10) == pytest.approx(1)


def test_a_wait_for_company_ends_where_none_is_expected() -> None:
    async def main() -> None:
        worker = Metered()
        batcher = make_batcher(worker, max_delay_ms=50)
        for _ in range(12):
            alone = Call([[1]])
            batcher.submit(alone)
            await asyncio.sleep(1)
        # Known by then: one a second, so a twentieth of one in the time that may be waited.
        assert alone.at_s - alone.enqueued_s == pytest.approx(0.010)
        assert batcher.counters.reasons["idle"] >= 1
        assert batcher.counters.reasons["delay"] >= 1

    run(main())


def test_a_size_that_was_slow_for_a_while_is_tried_again() -> None:
    """Something else had the machine: large batches took three times as long, and then none was made."""
    seeds = {1: 2_000.0, 8: 3_000.0, 64: 6_000.0}
    model = RunTimeModel(64, seeds)
    assert model.full_rows == 64
    for number in range(20):
        model.observe(64, 0.060, 1 + 0.1 * number)
        model.observe(8, 0.003, 1.05 + 0.1 * number)
    assert model.full_rows < 64
    for number in range(200):
        model.observe(8, 0.003, 3.1 + 0.1 * number)
    assert model.full_rows == 64
    assert model.expected_s(64) == pytest.approx(0.006, rel=0.01)


def test_a_size_that_is_forgotten_takes_its_stalls_with_it() -> None:
    model = RunTimeModel(8, {1: 1e4, 2: 2e4, 4: 4e4, 8: 8e4})
    now_s = 0.0
    for n in range(100):
        for rows in (1, 8):
            run_s = 0.010 * rows * (10 if n % 10 == 0 else 1)
            now_s += run_s
            model.observe(rows, run_s, now_s)
    spacings_s = [model.spacing_s]
    for _ in range(100):
        now_s += 0.2
        model.observe(1, 0.010, now_s)
        spacings_s.append(model.spacing_s)
    assert spacings_s == sorted(spacings_s, reverse=True)
