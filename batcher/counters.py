"""What the batcher counts, in plain integers: whoever shows them reads them when asked."""

from __future__ import annotations

from collections import Counter
from math import prod
from typing import TYPE_CHECKING

from batcher.request import Batch

if TYPE_CHECKING:
    from batcher.padding import Padder


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


class PaddingFigures:
    """Of one bucket. Elements are those of the inputs that may be padded; `elements` includes `padding`."""

    __slots__ = ("batches", "elements", "padding", "rows")

    def __init__(self) -> None:
        self.batches = 0
        self.rows = 0
        self.elements = 0
        self.padding = 0

    @property
    def waste(self) -> float:
        """Which part of the elements is padding."""
        return self.padding / self.elements if self.elements else 0.0


class Counters:
    """Since the model was loaded. Requests, except where the name says runs, rows or batches."""

    __slots__ = (
        "_padder",
        "accepted",
        "by_rows",
        "cancelled",
        "expired",
        "failed",
        "failed_runs",
        "failed_s",
        "hung",
        "last_finished_s",
        "padding",
        "reasons",
        "refusals",
        "refused",
        "retries",
        "rows",
    )

    def __init__(self, padder: Padder | None = None) -> None:
        self._padder = padder
        self.padding: dict[tuple[int, ...], PaddingFigures] = {}  # by each length of the bucket
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
        requests, gathered_s = batch.requests, batch.gathered_s
        if len(requests) == 1:
            (one,) = requests
            figures.requests += one.callers
            figures.queue_s += (gathered_s - one.enqueued_s) * one.callers
        else:
            figures.requests += sum([one.callers for one in requests])
            figures.queue_s += sum([(gathered_s - one.enqueued_s) * one.callers for one in requests])
        figures.input_s += batch.dispatched_s - batch.gathered_s
        figures.compute_s += batch.finished_s - batch.started_s
        figures.output_s += output_s
        self.last_finished_s = batch.finished_s
        self.rows += batch.rows
        self.reasons[batch.reason] += 1
        if self._padder is not None:
            self._count_padding(batch, self._padder)

    def _count_padding(self, batch: Batch, padder: Padder) -> None:
        bucket = padder.bucket_of(batch.row_shapes)
        figures = self.padding.get(bucket)
        if figures is None:
            figures = self.padding[bucket] = PaddingFigures()
        figures.batches += 1
        figures.rows += batch.rows
        figures.elements += batch.rows * sum([prod(batch.row_shapes[index]) for index in padder.inputs])
        for request in batch.requests:
            if request.pad is not None:
                figures.padding += request.rows * request.pad.row_padding

    @property
    def padding_total(self) -> PaddingFigures | None:
        """Of all buckets together; None where nothing may be padded."""
        if self._padder is None:
            return None
        total = PaddingFigures()
        for figures in self.padding.values():
            total.batches += figures.batches
            total.rows += figures.rows
            total.elements += figures.elements
            total.padding += figures.padding
        return total
