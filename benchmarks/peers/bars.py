"""Bars as SVG, on a logarithmic scale: what differs by a factor of 600 cannot be drawn to a linear one."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from math import ceil, floor, log10

_COLOURS = ("#0072b2", "#e69f00")
_WIDTH, _LEFT, _RIGHT, _TOP = 720, 150, 90, 64
_BAR = 15
_FONT = 'font-family="sans-serif" font-size="12"'


def bars(title: str, unit: str, values: Mapping[str, Mapping[str, float]]) -> str:
    """Groups of bars: name to series to a value above 0. All have a number beside them."""
    series = list(dict.fromkeys(name for group in values.values() for name in group))
    every = [value for group in values.values() for value in group.values() if value > 0] or [1.0]
    low, high = floor(log10(min(every)) - 0.01), ceil(log10(max(every)))
    height_of_group = _BAR * len(series) + 10
    height = _TOP + height_of_group * len(values) + 40

    def x(value: float) -> float:
        return _LEFT + (log10(value) - low) / max(1, high - low) * (_WIDTH - _LEFT - _RIGHT)

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {height}" {_FONT}>',
        f'<rect width="{_WIDTH}" height="{height}" fill="white"/>',
        _text(_WIDTH / 2, 20, title, "middle", 'font-size="14"'),
    ]
    for number, name in enumerate(series):
        parts.append(
            f'<rect x="{_LEFT + 130 * number}" y="32" width="12" height="12" fill="{_COLOURS[number]}"/>'
        )
        parts.append(_text(_LEFT + 130 * number + 18, 42, name))
    for power in range(low, high + 1):
        at = x(10.0**power)
        parts.append(
            f'<line x1="{at:.1f}" x2="{at:.1f}" y1="{_TOP - 8}" y2="{height - 36}" stroke="#e0e0e0"/>'
        )
        parts.append(_text(at, height - 22, f"{10.0**power:g}", "middle"))
    parts.append(_text((_LEFT + _WIDTH - _RIGHT) / 2, height - 6, unit, "middle"))
    for place, (name, group) in enumerate(values.items()):
        top = _TOP + place * height_of_group
        parts.append(_text(_LEFT - 8, top + height_of_group / 2, name, "end"))
        for number, one in enumerate(series):
            if group.get(one, 0.0) > 0:
                parts += _bar(top + number * _BAR, x(group[one]), _COLOURS[number], group[one])
    return "\n".join([*parts, "</svg>", ""])


def _bar(top: float, end: float, colour: str, value: float) -> list[str]:
    width = max(1.0, end - _LEFT)
    shown = f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
    return [
        f'<rect x="{_LEFT}" y="{top}" width="{width:.1f}" height="{_BAR - 2}" fill="{colour}"/>',
        _text(_LEFT + width + 5, top + _BAR - 4, shown),
    ]


def _text(x: float, y: float, text: str, anchor: str = "start", more: str = "") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" {more}>{escape(text)}</text>'
