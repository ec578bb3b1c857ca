"""Measured points, a fitted curve of the expected form, and a verdict on their growth."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import log

import numpy as np

Point = tuple[float, float]
# The error of a measurement, as a factor.
_NOISE = 1.3
# The fastest growth allowed, as a power of x: constant; like a heap's logarithm with colder caches (a scan
# would be 1); linear.
FLAT, SHALLOW, LINEAR = 0.0, 0.5, 1.0


@dataclass(frozen=True, slots=True)
class Line:
    """Measured and fitted points, in microseconds per request. `power` is the fastest growth allowed.

    `straight`: the fitted curve is linear in x.
    """

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
    """Fit a + b * term(x) to the points. `words` explains it with {a}, {b} and {error} (mean, relative)."""
    xs, ys = [x for x, _ in points], np.array([y for _, y in points])
    # Divided by y, so that small values count as much as large ones.
    basis = np.array([[1.0, term(x)] for x in xs]) / ys[:, None]
    (a, b), *_ = np.linalg.lstsq(basis, np.ones(len(xs)), rcond=None)
    fitted = [(x, float(a + b * term(x))) for x in xs]
    error = float(np.mean([abs(y - at) / y for (_, at), y in zip(fitted, ys, strict=True)]))
    explained = words.format(a=_short(a), b=_short(b), error=f"{error:.0%}")
    return Line(axis, name, list(points), fitted, explained, power, term is float)


def growth(line: Line) -> float:
    """Return the ratio of the last cost to the first."""
    return line.points[-1][1] / line.points[0][1]


def verdict(line: Line) -> bool:
    """Return True if the cost grows as slowly as required from each point to the last."""
    last_x, last_y = line.points[-1]
    return all(
        log(last_y / y) <= line.power * log(last_x / max(x, 1.0)) + log(_NOISE) for x, y in line.points[:-1]
    )


def _short(value: float) -> str:
    return f"{value:.3g}"
