"""The regression guard: its comparison, and its run on the request path."""

import asyncio
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks.request_cost import guard
from benchmarks.request_cost.request_path import CASES, request_of, serving
from benchmarks.request_cost.request_path import Path as RequestPath

PYTHON = f"{sys.version_info.major}.{sys.version_info.minor}"


def test_each_case_is_compared_with_the_floor_of_equally_many_callers() -> None:
    costs = dict.fromkeys(CASES, 30.0) | {"floor, 64 at once": 20.0, "floor, alone": 60.0}
    found = guard.ratios(costs)
    assert found["JSON, 64 at once"] == 1.5
    assert found["JSON, alone"] == 0.5
    assert not any(case.startswith("floor") for case in found)


def test_ten_percent_more_is_the_limit() -> None:
    baseline = {"a": 1.0, "b": 2.0}
    assert guard.costlier({"a": 1.0999, "b": 2.19}, baseline, 0.10) == []
    assert guard.costlier({"a": 1.1001, "b": 2.19}, baseline, 0.10) == ["a"]
    assert guard.costlier({"new": 0.1}, baseline, 0.10) == ["new"]


def test_the_baseline_has_every_case() -> None:
    for by_python in json.loads(guard.BASELINE.read_text()).values():
        for known in by_python.values():
            assert known.keys() == {case for case, (who, *_) in CASES.items() if who != "floor"}


def test_a_costlier_case_is_reported_with_advice(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    costs = dict.fromkeys(CASES, 30.0)
    monkeypatch.setattr(guard, "BASELINE", tmp_path / "guard.json")
    monkeypatch.setattr(guard, "tools", lambda: ("valgrind", "cc"))
    monkeypatch.setattr(guard, "counted", lambda *_: costs)
    assert guard.main([]) == 2  # nothing to compare with
    assert guard.main(["--update"]) == 0
    assert guard.main([]) == 0
    costs["JSON, alone"] *= 1.2
    capsys.readouterr()
    assert guard.main([]) == 1
    said = capsys.readouterr().out
    assert "more than 10%: JSON, alone\n" in said
    assert "python -m benchmarks.request_cost.guard --update`" in said
    assert guard.main(["--update"]) == 0
    assert guard.main([]) == 0


def test_without_valgrind_it_does_not_measure_time_instead(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(guard, "tools", lambda: None)
    assert guard.main([]) == 2
    assert "apt-get install valgrind" in capsys.readouterr().err


async def test_nothing_runs_by_time_while_requests_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    loop = asyncio.get_running_loop()
    delays_s: list[float] = []
    call_at = loop.call_at

    def recorded(when_s: float, *what: Any, **options: Any) -> asyncio.TimerHandle:
        delays_s.append(when_s - loop.time())
        return call_at(when_s, *what, **options)

    monkeypatch.setattr(loop, "call_at", recorded)
    async with serving() as fast, serving(fast_path=False) as through_asgi:
        for make in (fast, through_asgi):
            assert await RequestPath(make, [request_of(binary=False)], 2).serve(2) == 2
        assert min(delays_s) > 3500


@pytest.mark.slow
def test_the_request_path_has_not_become_costlier() -> None:
    if guard.tools() is None or PYTHON not in json.loads(guard.BASELINE.read_text())["instructions"]:
        pytest.skip(f"needs valgrind, a C compiler and a baseline for Python {PYTHON}")
    # In its own process: callgrind cannot attach to a running one.
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.request_cost.guard"],
        cwd=Path(guard.__file__).parents[2],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
