"""`cobatch bench --find-capacity`: the search on simulated servers, and its result in words."""

from __future__ import annotations

from collections.abc import Callable
from math import inf

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cobatch.server.loadtest.capacity import (
    Capacity,
    CapacityTrial,
    holding_share,
    search,
    violation_share,
)
from cobatch.server.loadtest.messages import Trial
from cobatch.server.loadtest.runner import search_trial_s
from cobatch.server.loadtest.statistics import Tally


def simulate(
    bad: Callable[[float, int], float], start: float, trials: int = 5, limited: bool = False
) -> Capacity:
    """Search with `bad(rate, n)`, the share of late requests in the n-th trial."""
    number = 0

    def run(rate: float, confirms: bool) -> CapacityTrial:
        nonlocal number
        number += 1
        part = bad(rate, number)
        p99_ms = 12.0 if part <= 0.01 else 99.0
        return CapacityTrial(rate, part, p99_ms, limited and part > 0.01, confirms)

    return search(50.0, start, 1.0, trials, run)


@given(st.floats(2.0, 1e5), st.floats(1.0, 1e5))
def test_the_highest_rate_is_found_from_any_start(truth: float, start: float) -> None:
    found = simulate(lambda rate, _: 0.0 if rate <= truth else 1.0, start)
    assert found.rate is not None
    assert found.failed_rate is not None
    assert truth / 1.05 <= found.rate <= truth < found.failed_rate
    assert [one.rate for one in found.confirmed] == [found.rate] * 5
    assert all(one.confirms for one in found.confirmed)


def test_one_disturbance_does_not_mislead_the_search() -> None:
    found = simulate(lambda rate, number: 0.5 if rate > 1000 or number in (1, 4) else 0.0, 700.0)
    assert found.rate is not None
    assert 950 < found.rate <= 1000


def test_a_rate_that_fails_its_confirmation_is_not_reported() -> None:
    seen: dict[float, int] = {}

    def bad(rate: float, number: int) -> float:
        seen[rate] = seen.get(rate, 0) + 1
        return 0.0 if rate < 90 or (rate < 100 and seen[rate] < 3) else 0.02

    found = simulate(bad, 50.0)
    assert found.rate is not None
    assert found.rate < 90
    assert found.failed_rate is not None
    assert found.failed_rate >= 90
    assert "did not hold" in found.sentence()
    # Each rejected rate was one more chance to succeed by luck, so the bound is lower.
    assert found.rejected > 0
    assert f"at least {holding_share(5, found.rejected):.0%} of" in found.sentence()


def test_a_search_without_result_says_so() -> None:
    nothing = simulate(lambda *_: 1.0, 100.0)
    assert nothing.rate is None
    assert min(one.rate for one in nothing.trials) == 1.0
    assert "No rate was found with p99 within 50 ms" in nothing.sentence()
    shaky = simulate(lambda rate, number: 0.0 if len(str(number)) < 2 and rate < 110 else 1.0, 100.0)
    assert shaky.rate is None
    assert "No rate could be confirmed" in shaky.sentence()


def test_a_generator_limit_is_reported_as_a_lower_bound() -> None:
    found = simulate(lambda rate, _: 0.0 if rate <= 500 else 0.3, 100.0, limited=True)
    assert found.limited
    assert found.sentence().startswith("At least 4")
    assert "the server may take it" in found.sentence()


def test_the_confidence_follows_from_the_number_of_trials() -> None:
    # Clopper and Pearson's one-sided bound for n of n: alpha to the 1/n.
    assert holding_share(1, 0) == pytest.approx(0.025)
    assert holding_share(5, 0) == pytest.approx(0.4782, abs=1e-4)
    # Over any number of rates at most 5 % of the reports are wrong.
    assert sum(holding_share(1, rejected) for rejected in range(60)) == pytest.approx(0.05)
    sentence = simulate(lambda rate, _: float(rate > 200), 100.0).sentence()
    assert "5 of 5 trials held (p99 12.00 to 12.00 ms), so with 95 % confidence at least 48%" in sentence


def test_trials_of_a_search_are_long_enough() -> None:
    assert search_trial_s(10.0, 5000.0, 50.0) == 10.0
    assert search_trial_s(2.0, 250.0, 50.0) == 4.0  # a thousand requests
    assert search_trial_s(2.0, 1.0, 50.0) == 10.0  # at most five times --seconds
    # A queue that grows by 0.1 s per second exceeds 1 s after ten seconds.
    assert search_trial_s(2.0, 5000.0, 1000.0) == 20.0


def test_failures_count_as_late() -> None:
    tally = Tally(Trial(None, 1, 1.0), [None, None])
    assert violation_share(tally, 50.0) == 1.0
    for one in tally.callers:
        one.due = 100
        one.latency.add(np.full(90, 10_000.0))
    assert violation_share(tally, 50.0) == 0.0
    tally.callers[0].errors["status 429"] = 10
    tally.callers[1].latency.add(np.full(10, 60_000.0))
    assert violation_share(tally, 50.0) == pytest.approx(0.1)
    refusing = CapacityTrial(1.0, 0.1, inf, False, False)
    assert not refusing.held
    assert "too many failed" in Capacity(50.0, None, 1.0, (), False, [refusing]).sentence()
