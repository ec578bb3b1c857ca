"""A worker's jobs and their outcomes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from cobatch.engines.base import Array
from cobatch.engines.errors import EngineError


class Job:
    """A batch whose rows lie in a slot's input buffers. `context` is for the batcher's own use."""

    __slots__ = ("context", "row_shapes", "rows", "slot")

    def __init__(self, slot: int, rows: int, row_shapes: tuple[tuple[int, ...], ...], context: Any) -> None:
        self.slot = slot
        self.rows = rows
        self.row_shapes = row_shapes
        self.context = context


class Outcome:
    """Outputs or error of a job, and its start and end in `time.monotonic` seconds."""

    __slots__ = ("error", "finished_s", "outputs", "started_s")

    def __init__(
        self,
        outputs: tuple[Array, ...] | None,
        error: EngineError | None,
        started_s: float,
        finished_s: float,
    ) -> None:
        self.outputs = outputs
        self.error = error
        self.started_s = started_s
        self.finished_s = finished_s


Deliver = Callable[[Job, Outcome], None]
