"""Which batch size is worth growing to, read off the warm-up's times."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cobatch.batcher.scheduling.run_times import efficient_rows
from cobatch.batcher.scheduling.tuning import BATCH_OVERHEAD_US, NEAR_BEST

POWERS = [1, 2, 4, 8, 16, 32, 64]


def test_nothing_measured_means_as_large_as_possible() -> None:
    assert efficient_rows({}, 64) == 64


def test_a_model_whose_run_is_almost_free_is_batched_as_far_as_it_goes() -> None:
    assert efficient_rows({rows: 5 + 0.2 * rows for rows in POWERS}, 64) == 64


def test_a_run_of_constant_time_is_batched_to_the_largest_size() -> None:
    assert efficient_rows(dict.fromkeys(POWERS, 10_000), 64) == 64


def test_a_model_that_gains_nothing_is_not_batched() -> None:
    # The times of Magika on one core: eight rows cost more than eight times one.
    assert efficient_rows({1: 10_000, 2: 20_500, 4: 41_000, 8: 84_000}, 8) == 1


def test_growth_ends_where_rows_stop_getting_cheaper() -> None:
    run_us = {rows: 1000.0 * max(rows, 8) for rows in POWERS}
    assert efficient_rows(run_us, 64) == 8


@pytest.mark.parametrize(("factor", "rows"), [(NEAR_BEST - 1e-9, 1), (NEAR_BEST + 1e-9, 2)])
def test_near_best_is_good_enough(factor: float, rows: int) -> None:
    best_us = 1000.0
    run_us = {1: best_us * factor - BATCH_OVERHEAD_US, 2: 2 * best_us - BATCH_OVERHEAD_US}
    assert efficient_rows(run_us, 2) == rows


def test_a_fixed_size_alone_was_measured_and_is_full() -> None:
    assert efficient_rows({5: 1234.0}, 5) == 5


def test_sizes_that_no_batch_can_have_do_not_count() -> None:
    assert efficient_rows({1: 1000, 8: 1000}, 4) == 1
    assert efficient_rows({8: 1000}, 4) == 4


@given(st.dictionaries(st.integers(1, 64), st.floats(0.1, 1e7)), st.integers(1, 64))
def test_the_answer_is_a_measured_size_that_costs_near_the_best(run_us: dict[int, float], most: int) -> None:
    rows = efficient_rows(run_us, most)
    assert 1 <= rows <= most
    fitting = {size: (us + BATCH_OVERHEAD_US) / size for size, us in run_us.items() if size <= most}
    if fitting:
        assert fitting[rows] <= min(fitting.values()) * NEAR_BEST
        assert all(fitting[size] > min(fitting.values()) * NEAR_BEST for size in fitting if size < rows)
