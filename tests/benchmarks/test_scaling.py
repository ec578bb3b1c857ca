"""The cost of a request as something grows: fits, verdicts, the page, the count of requests."""

import json
import resource
import xml.etree.ElementTree as ET
from functools import partial
from pathlib import Path

import pytest

from benchmarks.request_cost import request_path
from benchmarks.scaling import __main__ as scaling
from benchmarks.scaling import cases as scaling_cases
from benchmarks.scaling.fit import FLAT, LINEAR, SHALLOW, Line, fit, growth, verdict

XS = (1.0, 4.0, 16.0, 64.0)


def _grown(power: float, allowed: float) -> Line:
    return fit("x", "n", [(x, x**power) for x in XS], float, "", allowed)


def _one(power: float, _quick: bool) -> list[Line]:
    return [_grown(power, FLAT)]


def test_a_fit_finds_the_coefficients() -> None:
    points = [(x, 3.0 + 2.0 / x) for x in XS]
    line = fit("x", "n", points, lambda x: 1 / x, "{a} {b} {error}", FLAT)
    assert line.explained == "3 2 0%"
    assert growth(line) == pytest.approx((3 + 2 / 64) / 5)


@pytest.mark.parametrize(
    ("power", "allowed", "good"),
    [
        (0.0, FLAT, True),
        (0.5, FLAT, False),
        (-1.0, FLAT, True),
        (0.5, SHALLOW, True),
        (1.0, SHALLOW, False),
        (1.0, LINEAR, True),
        (2.0, LINEAR, False),
    ],
)
def test_the_verdict_depends_on_the_growth_allowed(power: float, allowed: float, good: bool) -> None:
    assert verdict(_grown(power, allowed)) is good


@pytest.mark.parametrize(("last", "good"), [(12.9, True), (13.1, False)])
def test_zero_is_a_size_too(last: float, good: bool) -> None:
    assert verdict(fit("x", "n", [(0.0, 10.0), (64.0, last)], float, "", FLAT)) is good


def test_the_page_has_a_plot_for_each_axis_and_marks_fast_growth(tmp_path: Path) -> None:
    lines = [_grown(0.0, FLAT), fit("row size in JSON (floats)", "J", [(1, 1), (9, 99)], float, "", LINEAR)]
    scaling.write(lines, tmp_path)
    text = (tmp_path / "README.md").read_text()
    assert text.count("**too fast**") == 1
    for plot in ("x", "row-size-in-JSON"):
        assert f"({plot}.svg)" in text
        ET.fromstring((tmp_path / f"{plot}.svg").read_text())
    assert [line["name"] for line in json.loads((tmp_path / "scaling.json").read_text())["lines"]] == [
        "n",
        "J",
    ]


def test_a_check_fails_if_a_cost_grows_too_fast(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    arguments = ["--only", "batch", "--results", str(tmp_path)]
    for power, status in ((0.0, 0), (1.0, 1)):
        monkeypatch.setitem(scaling._CASES, "batch", partial(_one, power))
        assert scaling.main(arguments) == 0
        assert scaling.main([*arguments, "--check"]) == status


def test_the_limit_of_open_files_is_raised_or_the_error_says_how(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[tuple[int, int]] = []
    monkeypatch.setattr(resource, "getrlimit", lambda _: (1024, 4096))
    monkeypatch.setattr(resource, "setrlimit", lambda _, limits: said.append(limits))
    scaling_cases.allow_files(1024)
    assert said == []
    scaling_cases.allow_files(4096)
    assert said == [(4096, 4096)]
    with pytest.raises(OSError, match="ulimit -Hn 4097"):
        scaling_cases.allow_files(4097)


async def test_the_number_of_served_requests_is_rounded_up_and_returned() -> None:
    async with request_path.serving() as make:
        path = request_path.Path(make, [request_path.request_of(False)], 8)
        assert await path.serve(11) == 16
        assert await path.serve(16) == 16


async def test_rows_that_arrive_in_pieces_are_served() -> None:
    async with request_path.serving(elements=50_176) as make:
        path = request_path.Path(make, [request_path.request_of(False, elements=50_176)], 8)
        assert await path.serve(8) == 8
