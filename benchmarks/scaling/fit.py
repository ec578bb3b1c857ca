"""A line of measured points, the curve that is to be expected fitted to it, and whether it grows too fast."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import log

import numpy as np

Point = tuple[float, float]
# What a measurement may be off by.
_NOISE = 1.3
# How fast a cost may grow, as a power of x: not at all; as a heap's logarithm and colder caches do, while a
# walk over all would be 1; in proportion.
FLAT, SHALLOW, LINEAR = 0.0, 0.5, 1.0


@dataclass(frozen=True, slots=True)
class Line:
    """`power`: the fastest that the cost may grow. `straight`: the fitted curve is a line over x. Times are
    microseconds per request."""

    axis: str
    name: str
    points: list[Point]
    fitted: list[Point]
    explained: str
    power: float
    straight: bool


def fit(
    axis: str,
    name: str,
    points: Sequence[Point],
    term: Callable[[float], float],
    words: str,
    power: float,
) -> Line:
    """Points and a + b * term(x) through them; `words` has {a}, {b} and {error}, the mean relative one."""
    xs, ys = [x for x, _ in points], np.array([y for _, y in points])
    # Divided by y, so that the small ones count as much as the large ones.
    basis = np.array([[1.0, term(x)] for x in xs]) / ys[:, None]
    (a, b), *_ = np.linalg.lstsq(basis, np.ones(len(xs)), rcond=None)
    fitted = [(x, float(a + b * term(x))) for x in xs]
    error = float(np.mean([abs(y - at) / y for (_, at), y in zip(fitted, ys, strict=True)]))
    explained = words.format(a=_short(a), b=_short(b), error=f"{error:.0%}")
    return Line(axis, name, list(points), fitted, explained, power, term is float)


def growth(line: Line) -> float:
    """Of the cost, from the first point to the last."""
    return line.points[-1][1] / line.points[0][1]


def verdict(line: Line) -> bool:
    """Whether it grows no faster than it may, between any point and the last."""
    last_x, last_y = line.points[-1]
    return all(
        log(last_y / y) <= line.power * log(last_x / max(x, 1.0)) + log(_NOISE) for x, y in line.points[:-1]
    )


def _short(value: float) -> str:
    return f"{value:.3g}"
