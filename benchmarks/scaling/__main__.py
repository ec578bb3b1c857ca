"""The cost of a request as something grows: at most linear, and constant with idle things.

`python -m benchmarks.scaling [--quick] [--only batch,row,models,connections,queue,tenants] [--check]`: CPU
time per request, of all threads. Batch size, row size and number of models are measured in one process
without sockets (`benchmarks.request_cost.request_path`), connections with a real server and `wrk`, the
queue's length and the number of tenants in the batcher alone (`benchmarks.scaling.queue_cost`). A curve of
the expected form is fitted to each line (least squares of relative errors); its slope is the cost of one
more. Prints, and writes benchmarks/results/scaling (`--quick`, or a part: benchmarks/out/scaling). Takes
about three minutes. docs/scaling.md explains the figures.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

import uvloop

from benchmarks.common.models import OUT
from benchmarks.common.processes import ROOT, some_of
from benchmarks.request_cost.report import describe_machine
from benchmarks.scaling import cases
from benchmarks.scaling.fit import Line, Point, growth, verdict
from cobatch.server.cli.plots import chart, draw_lines

_INTRODUCTION = """\
Made by `python -m benchmarks.scaling`: do not edit. CPU per request in microseconds; the growth is the ratio
of the last figure to the first, and its explanation is fitted ([more](../../../docs/scaling.md)). A cost may
not grow with the batch size or with idle objects; it must grow more slowly than the square root of
connections, queued requests or tenants; and at most in proportion to the floats in a row and the models in
use.
"""
_CASES: dict[str, Callable[[bool], list[Line]]] = {
    "batch": lambda quick: uvloop.run(cases.batch(quick)),
    "row": lambda quick: uvloop.run(cases.row(quick)),
    "models": lambda quick: uvloop.run(cases.models(quick)),
    "connections": cases.connections,
    "queue": lambda quick: asyncio.run(cases.queue(quick)),
    "tenants": lambda quick: asyncio.run(cases.tenants(quick)),
}


def main(arguments: list[str] | None = None) -> int:
    """Return 0; with --check 1 if a cost grows too fast."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.scaling", description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a few short rounds of few sizes")
    parser.add_argument(
        "--only", type=some_of(tuple(_CASES)), default=tuple(_CASES), help=f"some of {','.join(_CASES)}"
    )
    parser.add_argument("--check", action="store_true", help="exit status 1 if a cost grows too fast")
    parser.add_argument("--results", type=Path, metavar="FOLDER")
    options = parser.parse_args(arguments)
    lines: list[Line] = []
    for name in options.only:
        lines += (measured := _CASES[name](options.quick))
        print("\n".join(_printed(line) for line in measured), flush=True)
    whole = not options.quick and options.only == tuple(_CASES)
    folder = options.results or (ROOT / "benchmarks" / "results" / "scaling" if whole else OUT / "scaling")
    write(lines, folder)
    bad = [line.name for line in lines if not verdict(line)]
    print(f"written to {folder}" + (f"; too fast: {', '.join(bad)}" if bad else ""))
    return 1 if options.check and bad else 0


def write(lines: Sequence[Line], folder: Path) -> None:
    """Write scaling.json, a plot for each x axis, and README.md."""
    folder.mkdir(parents=True, exist_ok=True)
    machine = describe_machine()
    document = {"machine": machine, "lines": [asdict(line) for line in lines]}
    (folder / "scaling.json").write_text(json.dumps(document, indent=1) + "\n")
    parts = [
        "# The cost of a request as something grows\n",
        _INTRODUCTION,
        f"{machine['cpu']}, {machine['cores']} cores, {machine['system']}.\n",
    ]
    for axis in dict.fromkeys(line.axis for line in lines):
        same_axis = [line for line in lines if line.axis == axis]
        name = re.sub(r"\W+", "-", axis.removesuffix(" (floats)")).strip("-")
        _plot(folder / f"{name}.svg", axis, same_axis)
        parts += [f"## By {axis}\n", _table(same_axis), f"\n![{axis}]({name}.svg)\n"]
    (folder / "README.md").write_text("\n".join(parts))


def _table(lines: Sequence[Line]) -> str:
    rows = []
    for line in lines:
        figures = ", ".join(f"{x:g}: {_us(y)}" for x, y in line.points)
        mark = "" if verdict(line) else " **too fast**"
        rows.append(f"| {line.name} | {figures} | {growth(line):.2f}{mark} | {line.explained} |")
    return "\n".join(["| | us by size | growth | explanation |", "|---|---|---:|---|", *rows])


def _plot(file: Path, axis: str, lines: Sequence[Line]) -> None:
    """Draw measured points and fitted curves, on a logarithmic axis if some of these are not straight."""
    straight = all(line.straight for line in lines)
    drawn: dict[str, Sequence[Point]] = {}
    for line in lines:
        for name, points in ((line.name, line.points), (f"{line.name}, fitted", line.fitted)):
            # A logarithmic axis has no zero: it is drawn at one.
            drawn[name] = points if straight else [(max(x, 1.0), y) for x, y in points]
    with chart(file, f"CPU per request by {axis}", axis, "microseconds") as axes:
        draw_lines(axes, drawn, [name for name in drawn if name.endswith(", fitted")])
        if straight:
            axes.xaxis.set_major_formatter("{x:,.0f}")
        else:
            axes.set_xscale("log", base=2)
            sizes = [max(x, 1.0) for x, _ in lines[0].points]
            axes.set_xticks(sizes, [f"{size:,.0f}" for size in sizes])


def _us(value: float) -> str:
    return f"{value:,.2f}" if value < 10 else f"{value:,.1f}" if value < 100 else f"{value:,.0f}"


def _printed(line: Line) -> str:
    figures = "  ".join(f"{x:g}: {_us(y)}" for x, y in line.points)
    mark = "" if verdict(line) else "  TOO FAST"
    return f"{line.axis}; {line.name}: {figures}\n    growth {growth(line):.2f}{mark}; {line.explained}"


if __name__ == "__main__":
    sys.exit(main())
