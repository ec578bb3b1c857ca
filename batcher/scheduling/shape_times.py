"""The run time of a batch by its shape: longer rows cost more.

One curve by rows is learned (`batcher.scheduling.run_times`), and for each shape a factor: the ratio of its
run times to those of the first shape that was seen. A shape that has not run has factor 1.
"""

from math import inf

from cobatch.batcher.scheduling import tuning
from cobatch.batcher.scheduling.run_times import RunTimeModel, RunTimes
from cobatch.engines.base import RowShapes


class _ScaledRunTimes:
    """The run times of one shape: `factor` times the model's."""

    __slots__ = ("_model", "factor", "last_s")

    def __init__(self, model: RunTimeModel, factor: float) -> None:
        self._model = model
        self.factor = factor
        self.last_s = -inf

    def expected_s(self, rows: int) -> float:
        return self._model.expected_s(rows) * self.factor

    def mean_s(self, rows: int) -> float:
        return self._model.mean_s(rows) * self.factor

    def planned_s(self, rows: int) -> float:
        return self._model.planned_s(rows) * self.factor

    def sure_s(self, rows: int) -> float:
        return self._model.sure_s(rows) * self.factor

    def most_rows(self, budget_s: float, most: int) -> int:
        return self._model.most_rows(budget_s / self.factor, most)

    def ran_s(self, rows: int) -> float:
        # Either the shape or the size may have changed since.
        return min(self.last_s, self._model.ran_s(rows))


class ShapeRunTimes:
    """Run times of one model by shape. `vary`: rows may differ in shape."""

    def __init__(self, model: RunTimeModel, *, vary: bool) -> None:
        self._model = model
        self._vary = vary
        self._shapes: dict[RowShapes, _ScaledRunTimes] = {}
        self._first: RowShapes | None = None

    def of(self, row_shapes: RowShapes) -> RunTimes:
        """Return the run times of rows of this shape."""
        return self._shapes.get(row_shapes, self._model) if self._vary else self._model

    def observe(self, row_shapes: RowShapes, rows: int, run_s: float, now_s: float) -> bool:
        """Add a run; return whether the run times by rows changed."""
        if self._vary and row_shapes != self._first:
            if self._first is not None:
                return self._learn(row_shapes, rows, run_s, now_s)
            self._first = row_shapes  # the others are compared with this one
        return self._model.observe(rows, run_s, now_s)

    def _learn(self, row_shapes: RowShapes, rows: int, run_s: float, now_s: float) -> bool:
        """Measure the shape's factor; and the curve, if the run is as expected: a shape that has become
        slower must not make all others look slower."""
        ratio = run_s / max(self._model.expected_s(rows), 1e-9)
        ratio = min(max(ratio, 1 / tuning.MOST_SHAPE_FACTOR), tuning.MOST_SHAPE_FACTOR)
        scaled = self._shapes.get(row_shapes)
        if scaled is None:
            if len(self._shapes) >= tuning.SHAPES_KEPT:
                del self._shapes[next(iter(self._shapes))]
            scaled = self._shapes[row_shapes] = _ScaledRunTimes(self._model, ratio)
        scaled.last_s = now_s
        usual = abs(ratio - scaled.factor) < tuning.AS_EXPECTED * scaled.factor
        # A run that stalled says little about its shape.
        scaled.factor += min(ratio - scaled.factor, scaled.factor) * tuning.SHAPE_GAIN
        return usual and self._model.observe(rows, run_s / scaled.factor, now_s)
