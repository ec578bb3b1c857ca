"""The random cells: the same again, all kinds drawn, disturbances as they say; and a small comparison."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.scheduling import robustness
from benchmarks.scheduling.cells import Drift, Stalls, cell
from cobatch.batcher.simulator.scenario import Closed

CELLS = [cell(number, 1000) for number in range(150)]


def test_a_cell_follows_from_its_number() -> None:
    again = cell(3, 1000)
    assert again.name == CELLS[3].name
    assert again.scenario.profile.runs == CELLS[3].scenario.profile.runs
    assert again.scenario.seed == CELLS[3].scenario.seed != cell(3, 1000, repeat=1).scenario.seed


def test_cells_of_all_kinds_are_drawn() -> None:
    assert {one.curve for one in CELLS} == {"flat", "affine", "stepped", "superlinear"}
    groups = {group for one in CELLS for group in robustness._groups_of(one)}
    assert {f"tail: {tail}" for tail in ("steady", "log-normal", "bimodal", "stalling")} <= groups
    assert {f"drift: {drift}" for drift in ("steady", "step", "waves", "stands still")} <= groups
    assert {"deadline", "no deadline", "closed", "load 0.3", "load 2"} <= groups
    assert any(isinstance(one.scenario.arrivals, Closed) for one in CELLS)
    for one in CELLS:
        times = [one.scenario.profile.quantile_s(rows, 0.5) for rows in one.scenario.profile.sizes]
        assert times == sorted(times)


def test_runs_drift_in_a_step_or_in_waves() -> None:
    step, waves = Drift(3.0, 10.0, waves=False), Drift(4.0, 8.0, waves=True)
    assert [step(began_s, 1.0) for began_s in (0.0, 9.99, 10.0)] == [1.0, 1.0, 3.0]
    assert [waves(began_s, 1.0) for began_s in (0.0, 2.0, 6.0)] == pytest.approx([1.0, 4.0, 0.25])


@pytest.mark.parametrize(
    ("began_s", "run_s", "takes_s"),
    [
        (0.0, 1.0, 1.0),  # before
        (0.5, 1.0, 1.0),  # ends as it begins
        (1.0, 1.0, 3.0),  # a whole one within
        (2.5, 1.0, 2.0),  # begins within
        (1.0, 3.0, 7.0),  # two
        (8.0, 1.0, 1.0),  # after all
    ],
)
def test_an_engine_that_stands_still_makes_runs_longer(began_s: float, run_s: float, takes_s: float) -> None:
    assert Stalls((1.5, 5.0), 2.0)(began_s, run_s) == takes_s


@pytest.mark.parametrize(
    ("ratios", "decided"),
    [
        ([0.90, 0.91], False),  # two say nothing about their spread
        ([0.90, 0.91, 0.92], True),
        ([0.99, 1.0, 1.01], True),
        ([0.93, 0.97, 1.0], False),
        ([0.93, 0.97, 1.0] * 3, False),
        ([0.95, 0.955, 0.96] * 3, True),
        ([0.94, 1.03] * 5, False),
        ([0.94, 1.03] * 9, False),  # next looked at after twenty
        ([0.94, 1.03] * 10, False),
        ([0.94, 1.03] * 20, True),
    ],
)
def test_a_cell_is_measured_until_its_interval_is_on_one_side(ratios: list[float], decided: bool) -> None:
    assert robustness.is_decided(ratios) == decided


def test_cobatch_is_compared_with_the_baselines(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = tmp_path / "baselines.json"
    arguments = ["--cells", "1", "--requests", "200", "--processes", "1", "--baselines", str(kept)]
    monkeypatch.setattr("sys.argv", ["robustness", *arguments])
    assert robustness.main() in (0, 1)
    first = capsys.readouterr().out
    assert "| all | 1 |" in first
    assert kept.exists()
    robustness.main()
    assert capsys.readouterr().out == first
