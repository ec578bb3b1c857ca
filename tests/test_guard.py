"""The regression guard: what it compares, and, as CI runs it, the request path itself."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import guard
from benchmarks.request_path import CASES
from benchmarks.scaling_fit import fit, growth, verdict

PYTHON = f"{sys.version_info.major}.{sys.version_info.minor}"
COUNTS = shutil.which("valgrind") is not None and (shutil.which("cc") or shutil.which("g++")) is not None


def test_each_case_is_compared_with_the_floor_of_as_many_callers() -> None:
    costs = dict.fromkeys(CASES, 30.0) | {"floor, 64 at once": 20.0, "floor, alone": 60.0}
    found = guard.ratios(costs)
    assert found["JSON, 64 at once"] == 1.5
    assert found["JSON, alone"] == 0.5
    assert not any(case.startswith("floor") for case in found)


def test_ten_percent_is_allowed_and_no_more() -> None:
    baseline = {"a": 1.0, "b": 2.0}
    assert guard.costlier({"a": 1.0999, "b": 2.19}, baseline, 0.10) == []
    assert guard.costlier({"a": 1.1001, "b": 2.19}, baseline, 0.10) == ["a"]
    assert guard.costlier({"new": 0.1}, baseline, 0.10) == ["new"]


def test_the_baseline_knows_every_case() -> None:
    for by_python in json.loads(guard.BASELINE.read_text()).values():
        for known in by_python.values():
            assert known.keys() == {case for case, (who, *_) in CASES.items() if who != "floor"}


@pytest.mark.slow
def test_the_request_path_has_not_become_costlier() -> None:
    if not COUNTS or PYTHON not in json.loads(guard.BASELINE.read_text())["instructions"]:
        pytest.skip(f"needs valgrind, a C compiler and a baseline for Python {PYTHON}")
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.guard"],
        cwd=Path(guard.__file__).parents[1],
        env=os.environ | {"PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_fitted_curve_finds_what_it_was_made_of() -> None:
    line = fit("x", "n", [(x, 3.0 + 2.0 / x) for x in (1, 2, 4, 8)], lambda x: 1 / x, "{a} {b} {error}")
    assert line.explained == "3 2 0%"
    assert growth(line) == pytest.approx(3.25 / 5)


@pytest.mark.parametrize(
    ("power", "idle", "good"),
    [(0.0, True, True), (0.5, True, False), (1.0, False, True), (2.0, False, False)],
)
def test_linear_growth_is_allowed_and_none_with_what_is_idle(power: float, idle: bool, good: bool) -> None:
    points = [(x, x**power) for x in (1.0, 4.0, 16.0, 64.0)]
    assert verdict(fit("x", "n", points, float, "", idle=idle)) is good
