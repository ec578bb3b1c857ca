"""What the batcher counts, in plain integers: whoever shows them reads them when asked."""

from __future__ import annotations

from collections import Counter

from batcher.request import Batch


class BatchFigures:
    """Of all batches with one number of rows."""

    __slots__ = ("batches", "compute_s")

    def __init__(self) -> None:
        self.batches = 0
        self.compute_s = 0.0


class Counters:
    """Since the model was loaded. Requests, except where the name says runs, rows or batches."""

    __slots__ = (
        "accepted",
        "by_rows",
        "cancelled",
        "failed",
        "failed_runs",
        "reasons",
        "refused",
        "retries",
        "rows",
    )

    def __init__(self) -> None:
        self.accepted = 0
        self.refused = 0
        self.cancelled = 0
        self.failed = 0
        self.failed_runs = 0
        self.retries = 0
        self.rows = 0
        self.reasons: Counter[str] = Counter()
        self.by_rows: dict[int, BatchFigures] = {}

    @property
    def batches(self) -> int:
        """Batches that ran."""
        return self.reasons.total()

    def batch(self, batch: Batch) -> None:
        """Count a batch that ran."""
        figures = self.by_rows.get(batch.rows)
        if figures is None:
            figures = self.by_rows[batch.rows] = BatchFigures()
        figures.batches += 1
        figures.compute_s += batch.finished_s - batch.started_s
        self.rows += batch.rows
        self.reasons[batch.reason] += 1
