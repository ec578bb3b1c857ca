"""Every policy in the simulator: reproducible, no request lost, none above the bound; comparisons."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.scheduling import __main__ as scheduling
from benchmarks.scheduling.policies import POLICIES, Policy, parse_policy
from cobatch.batcher.simulator.bound import capacity
from cobatch.batcher.simulator.engine import load_profile
from cobatch.batcher.simulator.scenario import Results, Scenario, results_of
from cobatch.batcher.simulator.traffic import Caller, Poisson
from cobatch.server.cli.simulate import OptionError
from tests.support.virtual.profiles import linear

LINEAR = linear("linear", fixed_us=5000, row_us=100, max_rows=64)
CONSTANT = linear("constant", fixed_us=1000, row_us=0, max_rows=8)
SETTINGS: dict[str, dict[str, Any]] = {
    "fixed-window": {"window_ms": 5},
    "size-or-timeout": {"timeout_ms": 5},
    "clipper": {"objective_ms": 20},
}


@pytest.fixture(params=POLICIES)
def policy(request: pytest.FixtureRequest) -> Policy:
    return Policy(request.param, SETTINGS.get(request.param, {}))


def test_the_same_seed_gives_the_same_run(policy: Policy) -> None:
    def once(seed: int) -> Results:
        noisy = load_profile("resnet50-v100")
        callers = (Caller("a", deadline_ms=100), Caller("b", share=2, deadline_ms=100))
        scenario = Scenario(noisy, Poisson(2000), callers, seconds=0.3, nodes=2, seed=seed)
        results = results_of(policy.run(scenario))
        results.took_s = 0.0
        return results

    assert once(1) == once(1)
    assert once(1) != once(2)


@pytest.mark.parametrize("load", [0.7, 1.5])
def test_no_request_is_lost_or_answered_twice(policy: Policy, load: float) -> None:
    rate = load * capacity(LINEAR, 64)[0]
    run = policy.run(Scenario(LINEAR, Poisson(rate), (Caller(deadline_ms=30),), seconds=0.5, warmup_s=0.0))
    total = results_of(run).total
    assert total.failed == 0
    assert run.records.arrived == total.answered + total.expired + total.refused + run.open_requests
    assert run.records.arrived == pytest.approx(rate / 2, rel=0.1)


@pytest.mark.parametrize("name", ["cobatch", "triton"])
@pytest.mark.parametrize("load", [0.5, 0.8])
def test_without_batching_it_is_an_m_d_1_queue(name: str, load: float) -> None:
    # Pollaczek and Khinchine: a mean wait of load / (2 * (1 - load)) services.
    scenario = Scenario(CONSTANT, Poisson(load * 1000), seconds=30, max_batch_size=1, max_queue_rows=10**6)
    run = Policy(name).run(scenario)
    latencies = run.records.array()["latency_s"]
    assert latencies.mean() * 1000 == pytest.approx(1 + load / (2 * (1 - load)), rel=0.05)
    assert set(run.batches) == {1}
    assert results_of(run).utilisation == pytest.approx(load, rel=0.02)


@pytest.mark.parametrize("load", [0.8, 2.0])
def test_no_policy_exceeds_the_bound(policy: Policy, load: float) -> None:
    rate = load * capacity(LINEAR, 64, 0.05)[0]
    results = results_of(policy.run(Scenario(LINEAR, Poisson(rate), (Caller(deadline_ms=50),), seconds=1.5)))
    assert results.bound is not None
    # At most one batch began before the measured time and ends in it.
    assert results.total.goodput <= results.bound + 2 * 64 / 1.5


def test_a_policy_is_parsed_with_its_settings() -> None:
    text = "triton:preferred=32/64,delay_ms=5"
    assert parse_policy(text) == Policy("triton", {"preferred": (32, 64), "delay_ms": 5.0}, text)
    assert parse_policy("cobatch:max_delay_ms=2").settings == {"max_delay_ms": 2.0}
    assert parse_policy("size-or-timeout:timeout_ms=1,drops=true").settings == {
        "timeout_ms": 1.0,
        "drops": True,
    }


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("best", "expected one of cobatch, fixed-window"),
        ("fixed-window", "fixed-window needs window_ms"),
        ("fixed-window:window_ms=5,max_queue_rows=9", "no setting 'max_queue_rows'"),
        ("triton:speed=1", "no setting 'speed'"),
        ("triton:delay_ms=soon", "'soon' is not a valid delay_ms"),
    ],
)
def test_an_invalid_policy_is_refused(text: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(OptionError, match=message):
        parse_policy(text)
    assert scheduling.main(["resnet50-v100", "--policy", text]) == 2
    assert message in capsys.readouterr().err


def test_given_policies_are_compared_at_several_loads(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    figures = tmp_path / "figures.json"
    triton = "triton:preferred=32/64,delay_ms=5"
    arguments = ["bert-large-a100", "--deadline-ms", "100", "--load", "0.5,0.9", "--requests", "1500"]
    arguments += ["--policy", "cobatch", "--policy", triton, "--json", str(figures), "--processes", "1"]
    assert scheduling.main(arguments) == 0
    assert capsys.readouterr().out.count(triton) == 2
    runs = json.loads(figures.read_text())
    assert [(run["policy"], run["load"]) for run in runs] == [
        (policy, load) for load in (0.5, 0.9) for policy in ("cobatch", triton)
    ]
    assert runs[0]["total"]["goodput"] == pytest.approx(runs[0]["bound"], rel=0.1)
