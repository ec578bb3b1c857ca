"""What a run takes where rows vary in shape: longer rows cost more, whatever the batch's size.

One curve by rows is learned (`batcher.scheduling.run_times`), and for each shape how many times as long its
runs take as those of the first shape that was seen. A shape that has not run yet is taken to cost what that
one does. Where rows have one shape, or run times do not depend on it, all factors stay 1.
"""

from __future__ import annotations

from math import inf
from typing import Protocol

from cobatch.batcher.scheduling.run_times import LatencyModel
from cobatch.engines.base import RowShapes

_KEPT = 256
# No shape is taken to be so many times as dear as another.
_MOST = 1000.0
# A run that takes longer or shorter by more than this part is not as expected.
_USUAL = 0.1
# What part of a new measurement goes into what is known.
_GAIN = 0.2


class RunTimes(Protocol):
    """Seconds of a run of so many rows, as `LatencyModel` has them."""

    def expected_s(self, rows: int) -> float: ...

    def high_s(self, rows: int) -> float: ...

    def most_rows(self, budget_s: float, most: int) -> int: ...

    def ran_s(self, rows: int) -> float: ...


class _Scaled:
    """Of one shape."""

    __slots__ = ("_latency", "factor", "last_s")

    def __init__(self, latency: LatencyModel) -> None:
        self._latency = latency
        self.factor = 1.0
        self.last_s = -inf

    def expected_s(self, rows: int) -> float:
        return self._latency.expected_s(rows) * self.factor

    def high_s(self, rows: int) -> float:
        return self._latency.high_s(rows) * self.factor

    def most_rows(self, budget_s: float, most: int) -> int:
        return self._latency.most_rows(budget_s / self.factor, most)

    def ran_s(self, rows: int) -> float:
        # Either may be what has changed.
        return min(self.last_s, self._latency.ran_s(rows))


class ShapeTimes:
    """Of one engine. `vary`: whether rows may differ in shape."""

    def __init__(self, latency: LatencyModel, *, vary: bool) -> None:
        self._latency = latency
        self._vary = vary
        self._shapes: dict[RowShapes, _Scaled] = {}
        self._first: RowShapes | None = None

    def of(self, row_shapes: RowShapes) -> RunTimes:
        """The times of runs of rows of this shape."""
        return self._shapes.get(row_shapes, self._latency) if self._vary else self._latency

    def observe(self, row_shapes: RowShapes, rows: int, run_s: float, now_s: float) -> bool:
        """A batch has run; whether anything was learned about run times by rows."""
        if self._vary and row_shapes != self._first:
            if self._first is not None:
                return self._learn(row_shapes, rows, run_s, now_s)
            self._first = row_shapes  # what the others are compared with
        return self._latency.observe(rows, run_s, now_s)

    def _learn(self, row_shapes: RowShapes, rows: int, run_s: float, now_s: float) -> bool:
        """This run is one more measurement of the shape's factor; and of the curve, where it is as expected:
        a shape that has become dearer must not make all others look so."""
        ratio = min(max(run_s / max(self._latency.expected_s(rows), 1e-9), 1 / _MOST), _MOST)
        scaled = self._shapes.get(row_shapes)
        if scaled is None:
            if len(self._shapes) >= _KEPT:
                del self._shapes[next(iter(self._shapes))]
            scaled = self._shapes[row_shapes] = _Scaled(self._latency)
            scaled.factor = ratio
        scaled.last_s = now_s
        usual = abs(ratio - scaled.factor) < _USUAL * scaled.factor
        scaled.factor += (ratio - scaled.factor) * _GAIN
        return usual and self._latency.observe(rows, run_s / scaled.factor, now_s)
