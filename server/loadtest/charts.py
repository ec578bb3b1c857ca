"""Line charts as SVG: as much of a plotter as the reports need."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from html import escape
from math import ceil, floor, log10

Line = Sequence[tuple[float, float]]
# Okabe and Ito's colours, told apart by most of those who see colours otherwise.
_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")
_WIDTH, _HEIGHT = 640, 380
_FONT = 'font-family="sans-serif" font-size="12"'
_LEFT, _RIGHT, _TOP, _BOTTOM = 64, 24, 36, 48
# The names of the lines stand beside the chart, where no line runs through them.
_KEY, _CHARACTER = 40, 7


def chart(
    title: str,
    x_name: str,
    y_name: str,
    lines: Mapping[str, Line],
    dashed: Sequence[str] = (),
    x_text: Callable[[float], str] = "{:g}".format,
) -> str:
    """A chart of named lines, from 0 upwards on the y axis; those in `dashed` are dashed.

    `x_text`: what stands at a tick, where x is not what it is drawn at, as on a logarithmic axis.
    """
    points = [point for line in lines.values() for point in line] or [(0.0, 0.0)]
    xs = _ticks(min(x for x, _ in points), max(x for x, _ in points))
    ys = _ticks(0.0, max(y for _, y in points))

    width = _WIDTH + _KEY + _CHARACTER * max(map(len, lines), default=0)

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
        dash = "6 4" if name in dashed else ""
        parts.append(_stroke([at(x, y) for x, y in line], colour, 2, dash))
        if len(line) <= 20:
            parts += [
                f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{colour}"/>'
                for x, y in (at(*point) for point in line)
            ]
        height = _TOP + 14 + 16 * number
        parts.append(_stroke([(_WIDTH, height - 4), (_WIDTH + 24, height - 4)], colour, 2, dash))
        parts.append(_text(_WIDTH + 30, height, name))
    return "\n".join([*parts, "</svg>", ""])


def _ticks(low: float, high: float) -> list[float]:
    """Four to eight round numbers that embrace a range."""
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
