"""Charts of `cobatch simulate --plot` and of the benchmarks, with matplotlib (the extra `cobatch[plots]`)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from cobatch.batcher.simulator.scenario import Results

if TYPE_CHECKING:  # an extra: commands run without it
    from matplotlib.axes import Axes

Line = Sequence[tuple[float, float]]
Runs = Sequence[tuple[float | None, Results]]  # the load, None for a closed loop or a trace
# Okabe and Ito's colours, which most people with a colour vision deficiency can tell apart.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000", "#8c6d31")
_MARKED_POINTS = 20


class PlotError(Exception):
    """A chart cannot be drawn; the text says why."""


def check_plot(file: Path) -> None:
    """Raise PlotError if matplotlib is missing or the format is unknown."""
    if find_spec("matplotlib") is None:
        raise PlotError("plots need matplotlib: pip install 'cobatch[plots]'")
    if file.suffix not in {".svg", ".png", ".pdf"}:
        raise PlotError(f"{file}: expected a file that ends in .svg, .png or .pdf")


@contextmanager
def chart(
    file: Path, title: str, x_name: str, y_name: str, size: tuple[float, float] = (7.2, 3.8)
) -> Iterator[Axes]:
    """Yield the axes of a chart, then write it. `size` is in inches. Raises PlotError, OSError."""
    check_plot(file)
    from matplotlib import rc_context  # noqa: PLC0415 - an extra
    from matplotlib.figure import Figure  # noqa: PLC0415 - an extra

    # In SVG, texts stay texts and the same figures give the same file.
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "cobatch", "font.size": 9}):
        figure = Figure(size, layout="constrained")
        axes = figure.subplots()
        axes.set(title=title, xlabel=x_name, ylabel=y_name)
        axes.grid(color="#e0e0e0")
        axes.set_axisbelow(True)
        yield axes
        figure.savefig(file, metadata={"Date": None} if file.suffix == ".svg" else None)


def draw_lines(
    axes: Axes, lines: Mapping[str, Line], dashed: Sequence[str] = (), *, log: bool = False
) -> None:
    """Draw named lines from 0 upwards or on logarithmic scales, with their names beside the chart."""
    for number, (name, points) in enumerate(lines.items()):
        axes.plot(
            [x for x, _ in points],
            [y for _, y in points],
            label=name,
            color=COLOURS[number % len(COLOURS)],
            linestyle="--" if name in dashed else "-",
            marker="o" if len(points) <= _MARKED_POINTS else None,
            markersize=4,
            zorder=3 - number / 10,  # the first line on top
        )
    if log:
        axes.set(xscale="log", yscale="log")
    else:
        axes.set_ylim(bottom=0)
    axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False)


def plot_runs(file: Path, title: str, runs: Runs) -> None:
    """Draw goodput by load; for a single load the distribution of batch sizes. Raises PlotError, OSError."""
    loads = [(load, results) for load, results in runs if load is not None]
    if len(loads) < 2:
        with chart(file, title, "batch size, rows", "part of all rows, %") as axes:
            batches = runs[0][1].batches
            rows = sum(size * count for size, count in batches.items()) or 1
            points = [(size, 100 * size * count / rows) for size, count in batches.items()]
            draw_lines(axes, {"cobatch": points})
        return
    lines: dict[str, Line] = {"cobatch": [(load, results.total.goodput) for load, results in loads]}
    if all(results.bound is not None for _, results in loads):
        lines["bound"] = [(load, results.bound or 0.0) for load, results in loads]
    with chart(file, title, "load, parts of capacity", "goodput per second") as axes:
        draw_lines(axes, lines, ["bound"])
