"""Durations counted into buckets, many at a time."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cobatch.batcher.durations import EDGES_S, PENDING_LIMIT, DurationHistogram
from cobatch.server.observability.metric_families import TIME_BOUNDS

DURATIONS = st.floats(min_value=0, max_value=1e4, allow_nan=False)


def samples(*durations: float) -> DurationHistogram:
    made = DurationHistogram()
    made.values.extend(durations)
    return made


def test_the_bounds_that_are_shown_are_edges() -> None:
    assert set(TIME_BOUNDS) <= set(EDGES_S.tolist())


def test_edges_are_as_fine_as_percentiles_need() -> None:
    ratios = EDGES_S[1:] / EDGES_S[:-1]
    assert ratios.min() > 1
    assert ratios.max() <= 1.09


@pytest.mark.parametrize("at", [0, 7, len(EDGES_S) - 1])
def test_an_edge_belongs_to_the_bucket_below_it(at: int) -> None:
    edge = float(EDGES_S[at])
    counts = samples(edge, float(np.nextafter(edge, np.inf))).counts()
    assert counts.nonzero()[0].tolist() == [at, at + 1]


@given(st.lists(DURATIONS, max_size=50), st.lists(DURATIONS, max_size=50))
def test_counts_are_those_of_each_by_itself(first: list[float], second: list[float]) -> None:
    counted = samples(*first)
    counted.count_in()
    counted.values.extend(second)
    both = [*first, *second]
    assert counted.count == len(both)
    upto = np.cumsum(counted.counts())
    for at in (0, 40, 100, len(EDGES_S) - 1):
        assert upto[at] == sum(duration <= EDGES_S[at] for duration in both)
    assert upto[-1] == counted.count == len(both)
    assert counted.sum_s == pytest.approx(sum(both))


def test_counts_are_the_callers_own() -> None:
    counted = samples(1.0)
    counted.counts()[:] = 0
    assert counted.counts().sum() == 1


def test_the_list_stays_the_same_one() -> None:
    """A caller that appends may keep it."""
    counted = DurationHistogram()
    values = counted.values
    values.extend([0.5] * PENDING_LIMIT)
    counted.count_in()
    values.append(0.5)
    assert counted.count == PENDING_LIMIT + 1


def test_two_together() -> None:
    first, second = samples(0.1, 0.2), samples(0.2, 7.0)
    both = first.plus(second)
    assert both.count == 4
    assert both.sum_s == pytest.approx(7.5)
    assert first.count == 2
