"""The plots of the page, on logarithmic scales, since the servers differ by a factor of up to 600."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median

from matplotlib.axes import Axes

from benchmarks.peers.results import Results, middle, pick
from benchmarks.peers.tables import TITLES
from benchmarks.peers.turns import Turn
from cobatch.server.cli.plots import COLOURS, chart, draw_lines

Groups = Mapping[str, Mapping[str, float]]  # a server's name to the name of a bar to its value, above 0

_CLOSED_LOOPS = (
    ("cpu", "CPU per request, tiny, 64 connections", "microseconds", "cpu_us", 64, 1.0),
    ("rate", "Requests per second, tiny, 64 connections", "per second", "per_s", 64, 1.0),
    ("latency", "Median latency, tiny, 1 connection", "milliseconds", "p50_us", 1, 1e-3),
)
_BAR, _MARGIN = 0.2, 1.0  # inches


def write_plots(results: Results, folder: Path) -> list[str]:
    """Write the plots, and return their names."""
    plots = []
    curves = _curves(results)
    if curves:
        title = "Tiny, JSON, 1 to 256 connections"
        with chart(
            folder / "throughput.svg", title, "requests per second", "median latency, ms", (7.2, 3.8)
        ) as axes:
            draw_lines(axes, curves, log=True)
        plots.append("throughput")
    for name, title, unit, field, connections, scale in _CLOSED_LOOPS:
        turns = pick(results.turns, model="tiny", connections=connections)
        if turns:
            _write(folder / f"{name}.svg", title, unit, _groups(turns, field, scale))
            plots.append(name)
    if results.overload:
        shares: dict[str, list[float]] = {}
        for one in results.overload:
            shares.setdefault(TITLES[one.peer], []).append(one.share * 100)
        groups = {peer: {"in time": max(median(values), 0.1)} for peer, values in shares.items()}
        title = "Answered in time at 1.5 times capacity, wide"
        _write(folder / "overload.svg", title, "% of capacity", groups)
        plots.append("overload")
    return plots


def _curves(results: Results) -> dict[str, list[tuple[float, float]]]:
    """Return requests per second and median latency of each server, by connections."""
    turns = pick(results.turns, model="tiny", kind="JSON")
    curves: dict[str, list[tuple[float, float]]] = {}
    for peer in dict.fromkeys(turn.peer for turn in turns):
        for connections in sorted({turn.connections for turn in turns}):
            same = pick(turns, peer=peer, connections=connections)
            if same:
                point = middle(same, "per_s"), middle(same, "p50_us") / 1000
                curves.setdefault(TITLES[peer], []).append(point)
    return curves


def _groups(turns: Sequence[Turn], field: str, scale: float) -> Groups:
    groups: dict[str, dict[str, float]] = {}
    for turn in turns:
        same = pick(turns, peer=turn.peer, kind=turn.kind)
        groups.setdefault(TITLES[turn.peer], {})[turn.kind] = middle(same, field) * scale
    return groups


def _write(file: Path, title: str, unit: str, groups: Groups) -> None:
    bars = sum(map(len, groups.values())) + len(groups)
    with chart(file, title, unit, "", (7.2, _MARGIN + _BAR * bars)) as axes:
        draw_bars(axes, groups)


def draw_bars(axes: Axes, groups: Groups) -> None:
    """Draw a group of horizontal bars for each name, from the top, with their values beside them."""
    series = list(dict.fromkeys(name for group in groups.values() for name in group))
    height = 0.8 / max(1, len(series))
    axes.set_xscale("log")
    for number, name in enumerate(series):
        values = {place: group[name] for place, group in enumerate(groups.values()) if name in group}
        places = [place + (number - (len(series) - 1) / 2) * height for place in values]
        bars = axes.barh(places, list(values.values()), height * 0.9, label=name, color=COLOURS[number])
        axes.bar_label(bars, [_short(value) for value in values.values()], padding=4)
    axes.set_yticks(range(len(groups)), list(groups))
    axes.invert_yaxis()
    axes.grid(axis="y", visible=False)
    axes.margins(x=0.15)
    if len(series) > 1:
        axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False)


def _short(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
