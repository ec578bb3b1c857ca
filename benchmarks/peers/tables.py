"""The results as tables: figures of each server, and ratios to cobatch."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from statistics import median

from benchmarks.peers.catalogue import KNOWN, OURS
from benchmarks.peers.goals import goals
from benchmarks.peers.results import Results, middle, pick, ratio
from benchmarks.peers.turns import Turn

_Ratio = tuple[float, float, float]
_Choice = Callable[[list[_Ratio]], _Ratio]
TITLES = {peer.name: peer.title for peer in KNOWN}


@dataclass(frozen=True, slots=True)
class Table:
    """A table with two columns of text, and others of figures."""

    title: str
    heads: list[str]
    rows: list[list[str]]

    def markdown(self) -> str:
        """Return the table as Markdown with aligned columns."""
        widths = [max(len(row[at]) for row in [self.heads, *self.rows]) for at in range(len(self.heads))]
        rule = ["-" * width if at < 2 else "-" * (width - 1) + ":" for at, width in enumerate(widths)]
        lines = [_line(self.heads, widths), "| " + " | ".join(rule) + " |"]
        return "\n".join([*lines, *(_line(row, widths) for row in self.rows)])


def tables(results: Results) -> list[Table]:
    """Return all tables: goals, ratios, figures, overload."""
    every = [_goals(results), _ahead(results)] if any(name != OURS.name for name in results.peers()) else []
    cases = dict.fromkeys((turn.model, turn.kind) for turn in results.turns)
    every += [_figures(results.turns, model, kind) for model, kind in cases]
    return [*every, _overload(results)] if results.overload else every


def _goals(results: Results) -> Table:
    rows = []
    for goal in goals(results):
        factor = "" if goal.found is None else f"{goal.found:.2f}"
        met = {True: "yes", False: "no", None: "unknown"}[goal.met]
        if goal.missing:
            met += f" (not measured: {', '.join(TITLES[peer] for peer in goal.missing)})"
        rows.append([goal.text, goal.where, f"{goal.at_least:g}", factor, met])
    heads = ["cobatch is better by a factor", "worst case", "at least", "found", "met"]
    return Table("goals (medians of ratios within a round; the worst of all servers and cases)", heads, rows)


def _figures(turns: list[Turn], model: str, kind: str) -> Table:
    ours = pick(turns, model=model, kind=kind)
    levels = sorted({turn.connections for turn in ours})
    heads = ["server", "body"]
    heads += [f"{level} conn.: req/s, p50/p99 ms, CPU us, batch" for level in levels]
    heads += ["MB", "failed"]
    rows = []
    for peer in dict.fromkeys(turn.peer for turn in ours):
        turns_of_peer = pick(ours, peer=peer)
        cells = [_cell(pick(turns_of_peer, connections=level)) for level in levels]
        memory = f"{max(turn.memory for turn in turns_of_peer) / 1e6:,.0f}"
        failed = f"{sum(turn.failures for turn in turns_of_peer):,}"
        rows.append([TITLES[peer], turns_of_peer[0].body, *cells, memory, failed])
    return Table(f"{model}, {kind}", heads, rows)


def _cell(turns: list[Turn]) -> str:
    if not turns:
        return ""
    latency = f"{_ms(middle(turns, 'p50_us'))}/{_ms(middle(turns, 'p99_us'))}"
    cpu, batch = middle(turns, "cpu_us"), middle(turns, "batch")
    return f"{middle(turns, 'per_s'):,.0f}, {latency}, {short(cpu)}, {batch:.0f}"


def _overload(results: Results) -> Table:
    heads = [
        "server",
        "body",
        "capacity/s",
        "offered/s",
        "200s/s",
        "in time/s",
        "in time / capacity",
        "p50/p99 ms",
    ]
    rows = []
    for peer in dict.fromkeys(one.peer for one in results.overload):
        ones = [one for one in results.overload if one.peer == peer]

        def mid(name: str, ones: list[object] = list(ones)) -> float:  # noqa: B006 - bound here
            return median(float(getattr(one, name)) for one in ones)

        counts = [f"{mid(name):,.0f}" for name in ("capacity", "offered", "answered", "goodput")]
        latency = f"{mid('p50_ms'):,.0f}/{mid('p99_ms'):,.0f}"
        rows.append([TITLES[peer], ones[0].body, *counts, f"{mid('share'):.0%}", latency])
    return Table("overload: 1.5 times capacity, 100 ms deadline, wide", heads, rows)


def _ahead(results: Results) -> Table:
    """Return ratios formed within each round; of several cases the worst one for cobatch."""
    turns = results.turns
    heads = ["", "", "CPU, tiny JSON", "CPU, tiny binary", "req/s, tiny", "req/s, wide", "unloaded p50, tiny"]
    heads += ["req/s, magika", "p50, magika"]
    rows = []
    for peer in results.peers():
        if peer == OURS.name:
            continue
        row = [TITLES[peer], "theirs / ours"]
        row += [_cpu(turns, peer, kind) for kind in ("JSON", "binary")]
        row += [
            _worst(turns, peer, "per_s", model, lambda level: level >= 16, max) for model in ("tiny", "wide")
        ]
        row.append(_worst(turns, peer, "p50_us", "tiny", lambda level: level == 1, min))
        row.append(_worst(turns, peer, "per_s", "magika", lambda level: level >= 16, max))
        row.append(_worst(turns, peer, "p50_us", "magika", lambda level: level >= 16, min))
        rows.append(row)
    return Table(
        "beside cobatch (64 connections for CPU; worst of 16 and more for req/s; medians of rounds)",
        heads,
        rows,
    )


def _cpu(turns: list[Turn], peer: str, kind: str) -> str:
    return _with_range(ratio(turns, peer, lambda turn: turn.cpu_us, model="tiny", connections=64, kind=kind))


def _worst(
    turns: list[Turn], peer: str, name: str, model: str, levels: Callable[[int], bool], worse: _Choice
) -> str:
    cases = dict.fromkeys(
        (turn.connections, turn.kind)
        for turn in pick(turns, model=model, peer=peer)
        if levels(turn.connections)
    )
    ratios = [
        ratio(turns, peer, lambda turn: float(getattr(turn, name)), model=model, connections=level, kind=kind)
        for level, kind in cases
    ]
    known = [one for one in ratios if one is not None]
    return _with_range(worse(known)) if known else ""


def _with_range(ratio_: _Ratio | None) -> str:
    if ratio_ is None:
        return ""
    return f"{ratio_[0]:.2f} ({ratio_[1]:.2f}-{ratio_[2]:.2f})"


def short(value: float) -> str:
    return f"{value:,.1f}" if value < 100 else f"{value:,.0f}"


def _ms(us: float) -> str:
    value = us / 1000
    return f"{value:.2f}" if value < 1 else f"{value:.1f}" if value < 10 else f"{value:,.0f}"


def _line(cells: Iterable[str], widths: list[int]) -> str:
    padded = (
        cell.ljust(width) if at < 2 else cell.rjust(width)
        for at, (cell, width) in enumerate(zip(cells, widths, strict=True))
    )
    return "| " + " | ".join(padded) + " |"
