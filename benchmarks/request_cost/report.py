"""The results as tables and as JSON."""

from __future__ import annotations

import json
import os
import platform
import subprocess
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import median
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from benchmarks.common.turns import Turn
from benchmarks.common.wrk import require_wrk
from benchmarks.request_cost.cases import Figure, Result

_PACKAGES = ("uvicorn", "httptools", "uvloop", "msgspec", "orjson", "pysimdjson", "numpy", "onnxruntime")


def wide_console() -> Console:
    """Return a console on stdout that does not fold tables into 80 columns outside a terminal."""
    console = Console()
    return console if console.is_terminal else Console(width=160)


def show(results: list[Result], console: Console, markdown: bool = False) -> None:
    """Print the ratios with their targets, and the figures behind them."""
    for table in (_ratios(results), _details(results)):
        if markdown:
            table.box = box.MARKDOWN
        console.print(table)
    machine = describe_machine()
    console.print(f"{machine['cpu']}, {machine['cores']} cores, {machine['system']}, {machine['wrk']}")


def write(results: list[Result], file: Path, rounds: int, seconds: int) -> None:
    """Write all turns, the ratios and the machine to a file."""
    file.parent.mkdir(parents=True, exist_ok=True)
    document = {
        "machine": describe_machine(),
        "rounds": rounds,
        "seconds": seconds,
        "cases": [_as_dict(result) for result in results],
    }
    file.write_text(json.dumps(document, indent=2) + "\n")


def describe_machine() -> dict[str, Any]:
    """Return processor, system and versions, on which the figures depend."""
    info = Path("/proc/cpuinfo").read_text().splitlines()
    names = [line.partition(":")[2].strip() for line in info if line.startswith("model name")]
    printed = subprocess.run([require_wrk(), "--version"], capture_output=True, text=True, check=False).stdout
    return {
        "cpu": names[0] if names else platform.machine(),
        "cores": os.cpu_count(),
        "system": f"Linux {platform.release()}, Python {platform.python_version()}",
        "wrk": " ".join(printed.split()[:2]),
        "packages": {name: _version(name) for name in _PACKAGES},
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _as_dict(result: Result) -> dict[str, Any]:
    return {
        **asdict(result.case),
        "title": result.case.title,
        "ratio": result.ratio,
        "ratios": result.ratios,
        "met": result.met,
        "aim_met": result.aim_met,
        "rounds": [asdict(each) for each in result.rounds],
    }


def _ratios(results: list[Result]) -> Table:
    table = Table(title="cobatch's figures (medians of the rounds)")
    for heading in ("case", "figure", "reference", "cobatch", "ratio", "lowest-highest", "target", ""):
        table.add_column(heading, justify="left" if heading in {"case", "figure", ""} else "right")
    for result in results:
        case = result.case
        sign = "≥" if case.figure is Figure.RATE else "≤"
        aim = f" (aim {case.aim:.2f})" if case.aim is not None else ""
        verdict = (
            "[green]met, and the aim" if result.aim_met else "[green]met" if result.met else "[red]not met"
        )
        table.add_row(
            case.title,
            case.figure,
            _amount(case.figure, median(map(result.reference, result.rounds))),
            _amount(case.figure, median(map(result.value, result.rounds))),
            f"{result.ratio:.2f}",
            f"{min(result.ratios):.2f}-{max(result.ratios):.2f}",
            f"{sign} {case.target:.2f}{aim}",
            verdict,
        )
    return table


def _amount(figure: Figure, value: float) -> str:
    return f"{value:,.0f} rows/s" if figure is Figure.RATE else f"{_short(value)} us"


def _short(value: float) -> str:
    """Format a figure, with a decimal if it is small."""
    return f"{value:,.1f}" if value < 100 else f"{value:,.0f}"


def _details(results: list[Result]) -> Table:
    table = Table(title="figures behind them (medians; offline: of a batch)")
    for heading in ("case", "who", "per second", "p50 us", "p99 us", "CPU us", "batch"):
        table.add_column(heading, justify="left" if heading in {"case", "who"} else "right")
    for result in results:
        sides = (
            [each.offline for each in result.rounds],
            [each.floor for each in result.rounds],
            [each.cobatch for each in result.rounds],
        )
        for side in sides:
            turns = [turn for turn in side if turn is not None]
            if turns:
                table.add_row(result.case.title, turns[0].who, *_medians(turns))
    return table


def _medians(turns: list[Turn]) -> list[str]:
    figures = (
        [turn.per_s for turn in turns],
        [turn.p50_us for turn in turns],
        [turn.p99_us for turn in turns],
        [turn.cpu_us for turn in turns],
        [turn.batch for turn in turns],
    )
    return [_short(median(values)) if any(values) else "" for values in figures]
