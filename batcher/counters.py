"""What the batcher counts, in plain integers: whoever shows them reads them when asked."""

from __future__ import annotations

from collections import Counter

from batcher.request import Batch


class BatchFigures:
    """Of all batches with one number of rows. Seconds are summed over batches, `queue_s` over requests."""

    __slots__ = ("batches", "compute_s", "input_s", "output_s", "queue_s", "requests")

    def __init__(self) -> None:
        self.batches = 0
        self.requests = 0
        self.queue_s = 0.0
        self.input_s = 0.0
        self.compute_s = 0.0
        self.output_s = 0.0


class Counters:
    """Since the model was loaded. Requests, except where the name says runs, rows or batches."""

    __slots__ = (
        "accepted",
        "by_rows",
        "cancelled",
        "expired",
        "failed",
        "failed_runs",
        "failed_s",
        "hung",
        "last_finished_s",
        "reasons",
        "refusals",
        "refused",
        "retries",
        "rows",
    )

    def __init__(self) -> None:
        self.accepted = 0
        self.refused = 0
        self.refusals: Counter[str] = Counter()  # by the word for why
        self.cancelled = 0
        self.expired = 0
        self.failed = 0
        self.failed_runs = 0
        self.failed_s = 0.0
        self.hung = 0  # runs that did not end within the limit
        self.last_finished_s: float | None = None
        self.retries = 0
        self.rows = 0
        self.reasons: Counter[str] = Counter()
        self.by_rows: dict[int, BatchFigures] = {}

    @property
    def batches(self) -> int:
        """Batches that ran."""
        return self.reasons.total()

    def batch(self, batch: Batch, output_s: float) -> None:
        """Count a batch that ran, and whose answers took `output_s` seconds to write."""
        figures = self.by_rows.get(batch.rows)
        if figures is None:
            figures = self.by_rows[batch.rows] = BatchFigures()
        figures.batches += 1
        figures.requests += sum([request.callers for request in batch.requests])
        gathered_s = batch.gathered_s
        figures.queue_s += sum([(gathered_s - one.enqueued_s) * one.callers for one in batch.requests])
        figures.input_s += batch.dispatched_s - batch.gathered_s
        figures.compute_s += batch.finished_s - batch.started_s
        figures.output_s += output_s
        self.last_finished_s = batch.finished_s
        self.rows += batch.rows
        self.reasons[batch.reason] += 1
