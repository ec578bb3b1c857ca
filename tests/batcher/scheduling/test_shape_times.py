"""Run times where rows vary in shape: each shape has its own, and does not spoil the others'."""

from __future__ import annotations

import asyncio

import pytest

from cobatch.batcher.errors import DeadlineTooShortError
from cobatch.batcher.scheduling.run_times import RunTimeModel
from cobatch.batcher.scheduling.shape_times import ShapeRunTimes
from tests.support.virtual.loop import Call, make_batcher, run
from tests.support.virtual.tenants import Metered, affine

SHORT, LONG, OTHER = ((8,),), ((64,),), ((512,),)
SEEDS = {rows: affine(rows) * 1e6 for rows in (1, 2, 4, 8)}


def learned() -> ShapeRunTimes:
    """Short rows as the warm-up said, long ones three times as dear, in turns."""
    times = ShapeRunTimes(RunTimeModel(8, SEEDS), vary=True)
    for number in range(200):
        rows = 1 << number % 4
        times.observe(SHORT, rows, affine(rows), 0.1 * number)
        times.observe(LONG, rows, 3 * affine(rows), 0.1 * number + 0.05)
    return times


@pytest.mark.parametrize("rows", [1, 2, 3, 5, 8])
def test_each_shape_has_its_own_times(rows: int) -> None:
    times = learned()
    assert times.of(SHORT).expected_s(rows) == pytest.approx(affine(rows), rel=0.01)
    assert times.of(LONG).expected_s(rows) == pytest.approx(3 * affine(rows), rel=0.01)
    assert times.of(LONG).planned_s(rows) == pytest.approx(3 * affine(rows), rel=0.01)
    assert times.of(OTHER).expected_s(rows) == pytest.approx(affine(rows), rel=0.01)


def test_the_largest_batch_of_each_shape_that_fits_a_time() -> None:
    times = learned()
    assert times.of(SHORT).most_rows(affine(6) + 1e-6, 8) == 6
    assert times.of(LONG).most_rows(3 * affine(6) + 1e-4, 8) == 6
    assert times.of(LONG).most_rows(affine(6), 8) == 0


def test_a_shape_that_becomes_dearer_is_followed() -> None:
    times = learned()
    for number in range(40):
        times.observe(LONG, 4, 6 * affine(4), 100 + 0.1 * number)
        times.observe(SHORT, 4, affine(4), 100 + 0.1 * number + 0.05)
    assert times.of(LONG).expected_s(4) == pytest.approx(6 * affine(4), rel=0.05)
    assert times.of(SHORT).expected_s(4) == pytest.approx(affine(4), rel=0.05)


def test_one_run_that_stalls_does_not_make_its_shape_look_slow() -> None:
    times = learned()
    times.observe(LONG, 4, 100 * affine(4), 100.0)
    assert times.of(LONG).expected_s(4) <= 1.25 * 3 * affine(4)


def test_where_rows_are_alike_shapes_are_not_looked_at() -> None:
    model = RunTimeModel(8, SEEDS)
    times = ShapeRunTimes(model, vary=False)
    times.observe(LONG, 8, 1.0, 1.0)
    assert times.of(LONG) is model


def test_many_shapes_are_forgotten_again() -> None:
    times = ShapeRunTimes(RunTimeModel(8, SEEDS), vary=True)
    for width in range(5000):
        times.observe(((width,),), 1, 0.01, 0.1 * width)
    assert len(times._shapes) <= 256


def test_a_deadline_is_refused_for_long_rows_and_kept_for_short_ones() -> None:
    async def main() -> None:
        worker = Metered(affine, wide=lambda width: width)
        batcher = make_batcher(worker)
        for width in (1, 4) * 5:
            batcher.submit(Call([[7] * width]))
            await asyncio.sleep(0.1)
        timeout_s = 2 * affine(1)
        short, long = Call([[7]]), Call([[7] * 4])
        short.timeout_s = long.timeout_s = timeout_s
        batcher.submit(short)
        await asyncio.sleep(0.1)
        short.check()
        assert short.at_s <= short.deadline_s
        with pytest.raises(DeadlineTooShortError) as refused:
            batcher.submit(long)
        assert refused.value.needed_s == pytest.approx(4 * affine(1), rel=0.05)

    run(main())
