"""The report as one HTML page with SVG charts, without scripts or external resources."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from html import escape
from math import ceil, floor, log10
from operator import attrgetter

from cobatch.server.loadtest.report import Report, machine, table
from cobatch.server.loadtest.results import IntervalSummary, Results, Summary

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
_LINE_LIMIT = 7  # per chart
_POINT_LIMIT = 400  # per line
_SENT = "from the time of sending"
_DASHED = (_SENT, "offered")

Line = Sequence[tuple[float, float]]
# Okabe and Ito's colours, which most people with a colour vision deficiency can tell apart.
_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")
_WIDTH, _HEIGHT = 640, 380
_FONT = 'font-family="sans-serif" font-size="12"'
_LEFT, _RIGHT, _TOP, _BOTTOM = 64, 24, 36, 48
_KEY, _CHARACTER, _NAME_LIMIT = 40, 7, 30  # width of the legend, in all charts

_Plot = tuple[str, str, Mapping[str, str]]  # title, unit, and the attribute of each line
_RATES = {"offered": "offered_rate", "answered": "answered_rate"}
_BATCHES = {"largest": "largest_batch", "mean, weighted by requests": "mean_batch"}
_LATENCIES = {"p99": "latency_ms.p99", "p50": "latency_ms.p50"}
_PLOTS_OVER_TIME: list[_Plot] = [
    ("Latency by due time", "ms", {"max": "latency_ms.max", **_LATENCIES}),
    ("Throughput and offered rate", "per second", _RATES),
    ("Batch sizes (0: no answers)", "rows", _BATCHES),
]
_PLOTS_BY_RATE: list[_Plot] = [
    ("Throughput by offered rate", "per second", {**_RATES, "good": "good_rate"}),
    ("Latency by offered rate", "ms", _LATENCIES),
]


def as_html(report: Report) -> str:
    """Return the whole page."""
    trials, title = report.results, escape(report.title)
    parts = [
        f"<h1>{title}</h1>",
        *(f'<p class="soft">{escape(line)}</p>' for line in (report.load, machine())),
    ]
    if report.capacity is not None:
        parts.append(f"<p><b>{escape(report.capacity.sentence())}</b></p>")
    heads, *rows = table(report)
    parts.append(_table(heads, ("".join(f"<td>{escape(cell)}</td>" for cell in row) for row in rows)))
    if len(trials) > 1:
        totals = sorted((one.total for one in trials), key=attrgetter("offered_rate"))
        charts = _plots(_PLOTS_BY_RATE, "offered per second", totals, "offered_rate")
        histograms = {_load_name(one): one.buckets for one in trials[:_LINE_LIMIT]}
        parts.append(_figures([*charts, _distribution(histograms)]))
    parts += [_trial(results) for results in trials]
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<style>{_STYLE}</style></head>\n<body>{''.join(parts)}</body></html>\n"
    )


def _load_name(results: Results) -> str:
    if results.rate is None:
        return f"{results.connections:,} connections"
    return f"{results.rate:,.0f} requests per second"


def _table(heads: Iterable[str], rows: Iterable[str]) -> str:
    head = "".join(f"<th>{escape(name)}</th>" for name in heads)
    body = "".join(f"<tr>{row}</tr>" for row in rows)
    return f'<div class="wide"><table><tr>{head}</tr>{body}</table></div>'


def _figures(charts: Iterable[str]) -> str:
    return f'<div class="charts">{"".join(f"<figure>{one}</figure>" for one in charts)}</div>'


def _trial(results: Results) -> str:
    generator = results.generator
    shares = ", ".join(f"{share:.0%}" for share in generator.cpu_shares)
    parts = [f"<h2>{escape(_load_name(results))}</h2>"]
    parts += [
        f'<p class="bad">{escape(reason[:1].upper() + reason[1:])}.</p>' for reason in generator.bottlenecks
    ]
    parts += [f"<p>Note: {escape(note)}.</p>" for note in generator.notes]
    parts.append(
        f'<p class="soft">Measured for {results.measured_s:.1f} s after the warm-up. Generator: CPU {shares} '
        f"of a core, {generator.connections} connections, send delay {generator.send_delay_ms['p99']:.2f} ms "
        "(p99).</p>"
    )
    if results.total.errors:
        errors = (
            f'<td>{escape(kind)}</td><td>{count:,}</td><td class="text">{escape(message)}</td>'
            for kind, count, message in results.errors()
        )
        parts.append(_table(["error", "count", ""], errors))
    histograms = {"from the due time": results.buckets, _SENT: results.sent_buckets}
    kinds = {kind: f"errors.{kind}" for kind in list(results.total.errors)[:_LINE_LIMIT]}
    plots = [*_PLOTS_OVER_TIME, ("Errors by due time", "per interval", kinds)]
    charts = _plots(plots, "s", results.intervals, "end_s")
    return "".join([*parts, _figures([_distribution(histograms), *charts])])


def _plots(
    plots: Iterable[_Plot], x_name: str, items: Sequence[IntervalSummary | Summary], x: str
) -> list[str]:
    """Draw each plot over the attribute `x` of the items, and none that has only zeros."""
    charts = []
    for title, y_name, lines in plots:
        points = {
            name: [(getattr(one, x), y) for one in items if (y := _value(one, attribute)) is not None]
            for name, attribute in lines.items()
        }
        if any(y for line in points.values() for _, y in line):
            drawn = {name: line for name, line in points.items() if line}
            charts.append(_chart(title, x_name, y_name, drawn))
    return charts


def _value(item: IntervalSummary | Summary, attribute: str) -> float | None:
    """Return an attribute, or the entry of one: `errors.KIND`. Without answers there is no latency."""
    name, _, key = attribute.partition(".")
    value = getattr(item, name)
    if name == "latency_ms" and not value["max"]:
        return None
    return value.get(key, 0) if key else value  # type: ignore[no-any-return]


def _distribution(histograms: Mapping[str, Sequence[tuple[float, int]]]) -> str:
    """Draw latency by quantile, on an axis where each further nine takes the same space."""
    lines = {name: _nines(buckets) for name, buckets in histograms.items()}
    return _chart("Latency distribution", "share of the answers", "ms", lines, _as_percentage)


def _nines(buckets: Sequence[tuple[float, int]]) -> Line:
    """Return points (-log10 of the share that took longer, ms)."""
    total = sum(count for _, count in buckets)
    points, below = [(0.0, buckets[0][0] / 1000)] if buckets else [], 0
    for bound_us, count in buckets:
        below += count
        # The longest of n has no share above it; it is drawn where one of 2n would be.
        points.append((-log10(max(1 - below / total, 0.5 / total)), bound_us / 1000))
    return [*points[:: max(1, len(points) // _POINT_LIMIT)], *points[-1:]]


def _as_percentage(nines: float) -> str:
    return f"{100 * (1 - 10**-nines):.10g}%" if nines == int(nines) else ""


def _chart(
    title: str,
    x_name: str,
    y_name: str,
    lines: Mapping[str, Line],
    x_text: Callable[[float], str] = "{:g}".format,
) -> str:
    """Draw a line chart with the y axis from 0 as SVG. `x_text`: formats a tick of the x axis."""
    points = [point for line in lines.values() for point in line] or [(0.0, 0.0)]
    xs = _ticks(min(x for x, _ in points), max(x for x, _ in points))
    ys = _ticks(0.0, max(y for _, y in points))

    width = _WIDTH + _KEY + _CHARACTER * _NAME_LIMIT

    def at(x: float, y: float) -> tuple[float, float]:
        across = (x - xs[0]) / (xs[-1] - xs[0]) * (_WIDTH - _LEFT - _RIGHT)
        up = (y - ys[0]) / (ys[-1] - ys[0]) * (_HEIGHT - _TOP - _BOTTOM)
        return _LEFT + across, _HEIGHT - _BOTTOM - up

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {_HEIGHT}" {_FONT}>',
        f'<rect width="{width}" height="{_HEIGHT}" fill="white"/>',
        _text(_WIDTH / 2, 20, title, "middle", 'font-size="14"'),
        _text((_LEFT + _WIDTH - _RIGHT) / 2, _HEIGHT - 12, x_name, "middle"),
        _text(16, _HEIGHT / 2, y_name, "middle", f'transform="rotate(-90 16 {_HEIGHT / 2:g})"'),
    ]
    for x in xs:
        left, bottom = at(x, ys[0])
        parts.append(_stroke([(left, bottom), at(x, ys[-1])], "#e0e0e0", 1))
        parts.append(_text(left, bottom + 16, x_text(x), "middle"))
    for y in ys:
        left, bottom = at(xs[0], y)
        parts.append(_stroke([(left, bottom), at(xs[-1], y)], "#e0e0e0", 1))
        parts.append(_text(left - 6, bottom + 4, f"{y:g}", "end"))
    for number, (name, line) in enumerate(lines.items()):
        colour = _COLOURS[number % len(_COLOURS)]
        dash = "6 4" if name in _DASHED else ""
        parts.append(_stroke([at(x, y) for x, y in line], colour, 2, dash))
        if len(line) <= 20:
            parts += [
                f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{colour}"/>'
                for x, y in (at(*point) for point in line)
            ]
        height = _TOP + 14 + 16 * number
        parts.append(_stroke([(_WIDTH, height - 4), (_WIDTH + 24, height - 4)], colour, 2, dash))
        shown = name if len(name) <= _NAME_LIMIT else name[: _NAME_LIMIT - 1] + "…"
        parts.append(_text(_WIDTH + 30, height, shown))
    return "\n".join([*parts, "</svg>", ""])


def _ticks(low: float, high: float) -> list[float]:
    """Return four to eight round numbers that cover a range."""
    width = (high - low) or 1.0
    step = 10.0 ** floor(log10(width / 4))
    step *= next(factor for factor in (1, 2, 5, 10) if width / (step * factor) <= 7)
    first, last = floor(low / step + 1e-9), ceil(low / step + width / step - 1e-9)
    return [round(number * step, 12) for number in range(first, last + 1)]


def _text(x: float, y: float, text: str, anchor: str = "start", more: str = "") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" {more}>{escape(text)}</text>'


def _stroke(points: Sequence[tuple[float, float]], colour: str, width: int, dash: str = "") -> str:
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    dashes = f' stroke-dasharray="{dash}"' if dash else ""
    return f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="{width}"{dashes}/>'
