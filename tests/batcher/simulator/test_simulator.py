"""The simulator agrees with queueing theory."""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest

from cobatch.batcher.simulator.bound import capacity, path_bound
from cobatch.batcher.simulator.clock import VirtualLoop
from cobatch.batcher.simulator.engine import Profile, ProfileError, included, load_profile
from cobatch.batcher.simulator.nodes import Router
from cobatch.batcher.simulator.scenario import Closed, Results, Scenario, results_of, run
from cobatch.batcher.simulator.traffic import (
    Bursty,
    Caller,
    Constant,
    Diurnal,
    Poisson,
    TraceError,
    read_trace,
)
from tests.support.virtual.profiles import linear

LINEAR = linear("linear", fixed_us=5000, row_us=100, max_rows=64)
CONSTANT = linear("constant", fixed_us=1000, row_us=0, max_rows=8)


def simulated(scenario: Scenario) -> Results:
    results = results_of(run(scenario))
    results.took_s = 0.0
    return results


def test_events_run_in_order() -> None:
    loop = VirtualLoop()
    seen: list[tuple[str, float]] = []

    def see(what: str) -> None:
        seen.append((what, loop.time()))

    def arrive() -> None:
        see("came")
        loop.call_soon(see, "soon")

    loop.call_later(2.0, see, "second")
    loop.call_later(1.0, see, "first")
    loop.call_later(1.5, see, "never").cancel()
    loop.run(iter([1.0, 1.0, 3.0]), arrive)
    assert seen == [
        ("came", 1.0), ("came", 1.0), ("soon", 1.0), ("soon", 1.0), ("first", 1.0), ("second", 2.0),
        ("came", 3.0), ("soon", 3.0),
    ]  # fmt: skip


def test_no_event_runs_at_the_end_or_after() -> None:
    loop = VirtualLoop()
    seen: list[float] = []
    loop.call_later(2.0, lambda: seen.append(loop.time()))
    loop.run(iter([1.0, 2.5]), lambda: seen.append(loop.time()), 2.0)
    assert seen == [1.0]
    assert loop.time() == 2.0


def test_a_single_request_takes_a_run() -> None:
    results = simulated(Scenario(CONSTANT, Constant(500), seconds=2))
    assert results.total.latency_ms["p99.9"] == pytest.approx(1.0)
    assert results.total.goodput == 500


def test_a_closed_loop_is_as_fast_as_the_engine() -> None:
    results = simulated(Scenario(CONSTANT, Closed(1), seconds=1))
    assert results.total.goodput == pytest.approx(1000, rel=0.01)
    slow = simulated(Scenario(CONSTANT, Closed(1, think_ms=1), seconds=1))
    assert slow.total.goodput == pytest.approx(500, rel=0.01)


def test_the_handover_adds_to_the_latency_twice() -> None:
    results = simulated(Scenario(CONSTANT, Constant(100), seconds=1, handover_ms=0.25))
    assert results.total.latency_ms["p50"] == pytest.approx(1.5)


def test_the_event_loop_adds_its_time_to_the_latency() -> None:
    results = simulated(Scenario(CONSTANT, Constant(100), seconds=1, request_us=500))
    assert results.total.latency_ms["p50"] == pytest.approx(1.5)


def test_an_event_loop_that_is_the_bottleneck_leaves_the_engine_idle() -> None:
    # Runs of a millisecond for up to 64 rows; the loop handles 1,000 requests per second.
    ran = run(Scenario(CONSTANT, Closed(64), seconds=2, request_us=1000))
    results = results_of(ran)
    assert results.total.goodput == pytest.approx(1000, rel=0.02)
    assert results.utilisation < 0.9


def test_latency_includes_the_wait_for_a_busy_event_loop() -> None:
    """A loop that takes 1 ms for each request is an M/D/1 queue before an engine that takes no time.

    Half of it is spent on the answer, which waits for requests that arrived meanwhile.
    """
    instant = linear("instant", 1e-3, 0, 1)
    load = 0.5
    ran = run(Scenario(instant, Poisson(load * 1000), seconds=20, request_us=1000))
    latencies = ran.records.array()["latency_s"]
    queue_ms = load / (2 * (1 - load))
    assert 1 + 0.7 * queue_ms <= latencies.mean() * 1000 <= 1 + 1.5 * queue_ms


def test_the_engine_does_not_wait_for_a_busy_event_loop() -> None:
    # Both are busy nearly all the time: with two slots the next batch is ready.
    one = linear("one at a time", 1000, 0, 1)
    ran = run(Scenario(one, Closed(8), seconds=2, max_batch_size=1, request_us=800))
    assert results_of(ran).total.goodput == pytest.approx(1000, rel=0.05)


def test_backlogged_tenants_have_their_shares() -> None:
    weights = {"a": 1.0, "b": 2.0, "c": 4.0}
    callers = tuple(Caller(name, weight=weight) for name, weight in weights.items())
    rate = 3 * capacity(LINEAR, 64)[0]
    results = simulated(Scenario(LINEAR, Poisson(rate), callers, seconds=2))
    for name, weight in weights.items():
        assert results.tenants[name].rows_share == pytest.approx(weight / 7, rel=0.02)


@pytest.mark.parametrize("router", ["least-loaded", "two-choices"])
def test_a_router_that_knows_the_load_is_better_if_runs_differ(router: Router) -> None:
    # With equal runs round-robin is best.
    uneven = Profile("uneven", {1: {0.0: 500.0, 0.9: 500.0, 0.91: 5000.0, 1.0: 5000.0}})

    def p99(name: Router) -> float:
        return simulated(Scenario(uneven, Poisson(3000), seconds=2, nodes=4, router=name)).total.latency_ms[
            "p99"
        ]

    assert p99(router) < 0.8 * p99("round-robin")


def test_the_capacity_is_that_of_the_best_size_within_the_deadline() -> None:
    for deadline_s, rows, run_s in ((None, 64, 0.0114), (0.0080, 30, 0.0080)):
        rate, best_rows = capacity(LINEAR, 64, deadline_s)
        assert best_rows == rows
        assert rate == pytest.approx(rows / run_s)
    assert capacity(LINEAR, 64, 0.0050)[0] == 0


def arrivals_and_limits() -> Iterator[tuple[list[float], float]]:
    rng = np.random.default_rng(5)
    for _ in range(60):
        yield sorted(rng.uniform(0, 6, size=7).tolist()), float(rng.uniform(1, 4))


def test_the_bound_equals_that_of_an_exhaustive_search() -> None:
    def feasible(times: tuple[float, ...], limit_s: float) -> bool:
        free_s = 0.0
        for time_s in times:
            free_s = max(free_s, time_s) + 1.0
            if free_s > time_s + limit_s:
                return False
        return True

    for times, limit_s in arrivals_and_limits():
        sizes = range(len(times), -1, -1)
        best = next(n for n in sizes if any(feasible(some, limit_s) for some in combinations(times, n)))
        assert path_bound(times, 1.0, limit_s, 0.0, 100.0) == best


def test_a_profile_is_written_and_read(tmp_path: Path) -> None:
    path = tmp_path / "p.json"
    noisy = load_profile("bert-large-a100")
    path.write_text(json.dumps(noisy.as_json()))
    again = load_profile(str(path))
    assert again.as_json() == noisy.as_json()
    for rows in (1, 5, 32, 100, 128):
        drawn = [again.quantile_s(rows, number / 1000) for number in range(1000)]
        assert drawn == sorted(drawn)
        assert np.mean(drawn) == pytest.approx(again.mean_s(rows), rel=1e-3)
    assert again.quantile_s(64, 0.5) == pytest.approx(0.0262)
    assert again.quantile_s(64, 1.0) == pytest.approx(0.02652)


def test_the_included_profiles_name_their_sources() -> None:
    assert len(included()) >= 2
    for name in included():
        profile = load_profile(name)
        assert "github.com" in profile.source
        assert profile.approximate
        times = [profile.quantile_s(rows, 0.5) for rows in range(1, profile.max_rows + 1)]
        assert times == sorted(times)


@pytest.mark.parametrize("text", ["{}", "[1]", '{"name": "x", "runs": []}', "no JSON"])
def test_an_invalid_profile_is_refused(text: str, tmp_path: Path) -> None:
    path = tmp_path / "p.json"
    path.write_text(text)
    with pytest.raises(ProfileError):
        load_profile(str(path))
    with pytest.raises(ProfileError, match="bert-large-a100"):
        load_profile(str(tmp_path / "none.json"))


@pytest.mark.parametrize(
    "process", [Poisson(1000), Constant(1000), Bursty(1000, burst_s=0.05), Diurnal(1000, period_s=5)]
)
def test_arrival_processes_have_their_rate(process: Poisson | Constant | Bursty | Diurnal) -> None:
    times = np.fromiter(until(process, 50), float)
    assert np.all(np.diff(times) >= 0)
    assert len(times) == pytest.approx(50_000, rel=0.06)
    counts = np.histogram(times, bins=500)[0]
    spread = counts.var() / counts.mean()
    expected = {Constant: (0, 0.1), Poisson: (0.8, 1.2), Bursty: (5, 1000), Diurnal: (5, 1000)}[type(process)]
    assert expected[0] <= spread <= expected[1]


def until(process: Poisson | Constant | Bursty | Diurnal, end_s: float) -> Iterator[float]:
    for time_s in process.times(np.random.default_rng(1)):
        if time_s >= end_s:
            return
        yield time_s


def test_a_trace_is_replayed(tmp_path: Path) -> None:
    path = tmp_path / "trace.csv"
    path.write_text("seconds,rows,tenant\n# from somewhere\n10.0,2,b\n10.5\n\n12,1,a\n")
    trace = read_trace(path, speed=2)
    assert trace.requests == [(0.0, 2, "b"), (0.25, 1, ""), (1.0, 1, "a")]
    ran = run(Scenario(LINEAR, trace, (Caller("a"), Caller("b")), seconds=3, warmup_s=0))
    records = ran.records.array()
    assert sorted(zip(records["caller"].tolist(), records["rows"].tolist(), strict=True)) == [
        (0, 1),
        (0, 1),
        (1, 2),
    ]
    with pytest.raises(TraceError, match="tenant 'b'"):
        run(Scenario(LINEAR, trace, (Caller("a"),), seconds=3))


@pytest.mark.parametrize("text", ["", "x\ny\n", "1,0\n", "1\n2,two\n", "1\n-1\n"])
def test_an_invalid_trace_is_refused(text: str, tmp_path: Path) -> None:
    path = tmp_path / "trace.csv"
    path.write_text(text)
    with pytest.raises(TraceError):
        read_trace(path)
