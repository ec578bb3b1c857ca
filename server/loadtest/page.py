"""The report as one page of HTML: no script, nothing from elsewhere."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from html import escape
from math import log10

from cobatch.batcher.simulator.svg import Line, chart
from cobatch.server.loadtest.capacity import Capacity
from cobatch.server.loadtest.report import cells
from cobatch.server.loadtest.statistics import Results

_STYLE = """
:root{color-scheme:light dark;--bg:#fff;--fg:#1b1f24;--soft:#59636e;--line:#d8dee4;--bad:#b3261e}
@media(prefers-color-scheme:dark){:root{--bg:#15181c;--fg:#e4e7ea;--soft:#9aa4af;--line:#333a42;--bad:#f2a29b}}
body{margin:0 auto;max-width:84rem;padding:1.5rem 1rem 4rem;font:16px/1.5 system-ui,sans-serif;
color:var(--fg);background:var(--bg)}
h1{font-size:1.6rem;margin:0}h2{font-size:1.25rem;margin:2.5rem 0 .5rem}
.soft{color:var(--soft)}.bad{color:var(--bad);font-weight:600}
.charts{margin-top:1rem;display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,26rem),1fr));gap:1rem}
figure{margin:0;border:1px solid var(--line);border-radius:6px;overflow:hidden}svg{display:block;width:100%}
.wide{overflow-x:auto}table{border-collapse:collapse;font-variant-numeric:tabular-nums}
th,td{padding:.2rem .8rem;text-align:right;border-bottom:1px solid var(--line);white-space:nowrap}
th:first-child,td:first-child{text-align:left;padding-left:0}td.text{text-align:left;white-space:normal}
svg rect{fill:var(--bg)}svg text{fill:var(--fg)}polyline[stroke="#e0e0e0"]{stroke:var(--line)}
polyline[stroke="#000000"]{stroke:var(--fg)}
"""
_MOST_LINES = 7


def page(title: str, about: Sequence[str], found: Sequence[Results], capacity: Capacity | None) -> str:
    """The whole page. `about`: lines on what was measured, and where."""
    parts = [f"<h1>{escape(title)}</h1>", *(f'<p class="soft">{escape(line)}</p>' for line in about)]
    if capacity is not None:
        parts.append(f"<p><b>{escape(capacity.sentence())}</b></p>")
    parts.append(_table(found, capacity))
    if len(found) > 1:
        parts.append(_figures([_throughput(found), _rates_latency(found), _distribution(found)]))
    parts += [_one(results) for results in found]
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<style>{_STYLE}</style></head>\n<body>{''.join(parts)}</body></html>\n"
    )


def load_name(results: Results) -> str:
    """What was put on."""
    if results.rate is None:
        return f"{results.connections:,} connections"
    return f"{results.rate:,.0f} requests per second"


def _table(found: Sequence[Results], capacity: Capacity | None) -> str:
    heads, *rows = cells(found, capacity)
    head = "".join(f"<th>{name}</th>" for name in heads)
    body = "".join(f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>" for row in rows)
    return f'<div class="wide"><table><tr>{head}</tr>{body}</table></div>'


def _one(results: Results) -> str:
    generator = results.generator
    shares = ", ".join(f"{share:.0%}" for share in generator.cpu_shares)
    late = generator.late_ms["p99"]
    lines = [
        f'<p class="bad">The generator was the bottleneck: {escape(limit)}.</p>' for limit in generator.limits
    ]
    lines += [f"<p>Note: {escape(note)}.</p>" for note in generator.notes]
    lines.append(
        f'<p class="soft">Measured for {results.measured_s:.1f} s after the warm-up. Generator: CPU {shares} '
        f"of a core, {generator.connections} connections, sends {late:.2f} ms late (p99).</p>"
    )
    charts = [_distribution([results], both=True), _latency_over_time(results), _rates_over_time(results)]
    if any(moment.most_batch for moment in results.moments):
        charts.append(_batches(results))
    if results.total.errors:
        charts.append(_errors(results))
    kinds = "".join(
        f'<tr><td>{escape(kind)}</td><td>{count:,}</td><td class="text">{escape(said)}</td></tr>'
        for kind, count, said in results.errors_said()
    )
    table = f'<div class="wide"><table><tr><th>error</th><th>times</th><th></th></tr>{kinds}</table></div>'
    return f"<h2>{escape(load_name(results))}</h2>{''.join(lines)}{table if kinds else ''}{_figures(charts)}"


def _figures(charts: Iterable[str]) -> str:
    return f'<div class="charts">{"".join(f"<figure>{one}</figure>" for one in charts)}</div>'


def _distribution(found: Sequence[Results], both: bool = False) -> str:
    """Latency at each part of the requests; the axis has each further nine as far as the one before."""
    if both:
        lines: dict[str, Line] = {"from the intended moment": _nines(found[0].buckets)}
        lines["from the sending"] = _nines(found[0].sent_buckets)
    else:
        lines = {load_name(one): _nines(one.buckets) for one in found[:_MOST_LINES]}
    return chart("Latency distribution", "part of the answers", "ms", lines, ["from the sending"], _as_part)


def _nines(buckets: Sequence[tuple[float, int]]) -> list[tuple[float, float]]:
    """Points (-log10 of the part that took longer, ms)."""
    total = sum(count for _, count in buckets)
    points, before = [(0.0, buckets[0][0] / 1000)] if buckets else [], 0
    for end_us, count in buckets:
        before += count
        # The longest of n stands where one of 2n would: there is no part beyond it.
        points.append((-log10(max(1 - before / total, 0.5 / total)), end_us / 1000))
    return _thinned(points)


def _thinned(points: list[tuple[float, float]], most: int = 400) -> list[tuple[float, float]]:
    step = max(1, len(points) // most)
    return [*points[::step], points[-1]] if points else []


def _as_part(nines: float) -> str:
    return f"{100 * (1 - 10**-nines):.10g}%" if nines == int(nines) else ""


def _latency_over_time(results: Results) -> str:
    def over(name: str) -> Line:
        return [(one.s, one.latency_ms[name]) for one in results.moments if one.latency_ms["max"]]

    return chart(
        "Latency of what was due then", "s", "ms", {name: over(name) for name in ("max", "p99", "p50")}
    )


def _rates_over_time(results: Results) -> str:
    lines: dict[str, Line] = {
        "offered": [(one.s, one.offered_rate) for one in results.moments],
        "answered": [(one.s, one.answered_rate) for one in results.moments],
    }
    return chart("Throughput and offered rate", "s", "per second", lines, ["offered"])


def _batches(results: Results) -> str:
    lines: dict[str, Line] = {
        "largest": [(one.s, one.most_batch) for one in results.moments],
        "mean, as requests see it": [(one.s, one.mean_batch) for one in results.moments],
    }
    return chart("Batch sizes (0: nothing was answered)", "s", "rows", lines)


def _errors(results: Results) -> str:
    kinds = list(results.total.errors)[:_MOST_LINES]
    lines: Mapping[str, Line] = {
        kind: [(one.s, one.errors.get(kind, 0)) for one in results.moments] for kind in kinds
    }
    return chart("Errors of what was due then", "s", "in an interval", lines)


def _throughput(found: Sequence[Results]) -> str:
    points = sorted((one.total for one in found), key=lambda one: one.offered_rate)
    lines: dict[str, Line] = {
        "offered": [(one.offered_rate, one.offered_rate) for one in points],
        "answered": [(one.offered_rate, one.answered_rate) for one in points],
    }
    good = [(one.offered_rate, one.good_rate) for one in points if one.good_rate is not None]
    return chart(
        "Throughput against offered rate",
        "offered per second",
        "per second",
        lines | ({"good": good} if good else {}),
        ["offered"],
    )


def _rates_latency(found: Sequence[Results]) -> str:
    points = sorted((one.total for one in found), key=lambda one: one.offered_rate)
    lines: dict[str, Line] = {
        name: [(one.offered_rate, one.latency_ms[name]) for one in points] for name in ("p99", "p50")
    }
    return chart("Latency against offered rate", "offered per second", "ms", lines)
