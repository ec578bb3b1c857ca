"""Counting and judging a trial of `cobatch bench`: histograms, and the generator as the bottleneck."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cobatch.batcher.simulator.traffic import Constant
from cobatch.server.loadtest.messages import Done, Trial
from cobatch.server.loadtest.results import bottlenecks, notes
from cobatch.server.loadtest.statistics import LatencyHistogram, Tally


@given(st.lists(st.floats(1.0, 1e9), min_size=1, max_size=300), st.sampled_from([0.01, 0.5, 0.9, 0.99, 1.0]))
def test_quantiles_are_exact_to_the_width_of_a_bucket(values: list[float], part: float) -> None:
    histogram = LatencyHistogram()
    for some in np.array_split(np.array(values), 3):
        other = LatencyHistogram()
        other.add(some)
        histogram.merge(other)
    exact = float(np.quantile(values, part, method="inverted_cdf"))
    assert exact <= histogram.quantile_us(part) * (1 + 1e-9) <= exact * (1 + 1 / 128) * (1 + 1e-9)
    assert histogram.count == len(values)
    assert histogram.mean_us == pytest.approx(np.mean(values))
    assert (histogram.min_us, histogram.max_us) == (min(values), max(values))
    assert sum(count for _, count in histogram.buckets()) == len(values)


def test_above_counts_durations_over_a_limit() -> None:
    histogram = LatencyHistogram()
    histogram.add(np.array([0.0, 10.0, 990.0, 1100.0, 5e6, 1e13]))
    assert histogram.above(1000.0) == 3
    assert histogram.above(0.0) == 5
    assert histogram.above(1e13) == 0


def test_a_late_or_busy_generator_is_reported_as_the_bottleneck() -> None:
    tally = Tally(Trial(Constant(1.0), 1, 1.0), [None])
    tally.callers[0].latency.add(np.array([20_000.0] * 200))
    tally.send_delay.add(np.array([100.0] * 200))
    tally.done[0] = Done(0.5, 1.0, 1)
    assert bottlenecks(tally) == []
    tally.send_delay.add(np.array([3000.0] * 9))
    assert bottlenecks(tally) == []  # nine late wake-ups in 209 are no evidence
    tally.send_delay.add(np.array([3000.0] * 11))
    (late,) = bottlenecks(tally)
    assert late.startswith("the generator was the bottleneck: it did not keep up; 1 % of the requests")
    tally.done[0] = Done(0.2, 1.0, 1)
    (late,) = bottlenecks(tally)
    assert late.startswith(
        "the machine did not schedule the generator in time, which used 20% of a core; 1 %"
    )
    assert "bottleneck" not in late
    tally.done[1] = Done(0.95, 1.0, 1)
    late_and_busy = bottlenecks(tally)
    assert "95% of a core" in late_and_busy[0]
    assert "3.0" in late_and_busy[1]
    tally.machine_busy = 1.0
    assert any("all cores" in note for note in notes(tally, local=True))
    assert not any("all cores" in note for note in notes(tally, local=False))
