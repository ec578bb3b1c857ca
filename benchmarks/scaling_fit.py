"""A line of measured points, the curve that is to be expected fitted to it, and whether it grows too fast."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import log

import numpy as np

Point = tuple[float, float]
# What is idle may cost no more than the noise of a measurement.
_NOISE = 1.3
# And what grows may do so in proportion, with as much noise in the exponent.
_LINEAR = 1.1


@dataclass(frozen=True, slots=True)
class Line:
    """`idle`: what grows has nothing to do, so the cost may not. Times are microseconds per request."""

    axis: str
    name: str
    points: list[Point]
    fitted: list[Point]
    explained: str
    idle: bool


def fit(
    axis: str,
    name: str,
    points: Sequence[Point],
    term: Callable[[float], float],
    words: str,
    *,
    idle: bool = False,
) -> Line:
    """Points and a + b * term(x) through them; `words` has {a}, {b} and {error}, the mean relative one."""
    xs, ys = [x for x, _ in points], np.array([y for _, y in points])
    # Divided by y, so that the small ones count as much as the large ones.
    basis = np.array([[1.0, term(x)] for x in xs]) / ys[:, None]
    (a, b), *_ = np.linalg.lstsq(basis, np.ones(len(xs)), rcond=None)
    fitted = [(x, float(a + b * term(x))) for x in xs]
    error = float(np.mean([abs(y - at) / y for (_, at), y in zip(fitted, ys, strict=True)]))
    explained = words.format(a=_short(a), b=_short(b), error=f"{error:.0%}")
    return Line(axis, name, list(points), fitted, explained, idle)


def growth(line: Line) -> float:
    """Of the cost, from the first point to the last."""
    return line.points[-1][1] / line.points[0][1]


def verdict(line: Line) -> bool:
    """Whether it grows as it may: not at all where idle, else no faster than in proportion, between any
    point and the last."""
    if line.idle:
        return growth(line) <= _NOISE
    last_x, last_y = line.points[-1]
    return all(
        log(last_y / y) <= _LINEAR * log(last_x / x) + log(_NOISE) for x, y in line.points[:-1] if x > 0
    )


def _short(value: float) -> str:
    return f"{value:.3g}"
