"""What the batcher counts, in plain integers: whoever shows them reads them when asked."""

from __future__ import annotations

from collections import Counter, defaultdict
from math import ceil, prod
from typing import TYPE_CHECKING

from cobatch.batcher.durations import FULL, Samples

if TYPE_CHECKING:
    from cobatch.batcher.request import Batch, Request
    from cobatch.batcher.rows.padding import Padder


# Batches are told apart by which part of them was padding, in steps of 5 %, rounded up.
PADDING_STEPS = 20


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


class EngineFigures:
    """Of one of a model's engines: runs, failed ones included, and the seconds that they took."""

    __slots__ = ("busy_s", "runs")

    def __init__(self) -> None:
        self.busy_s = 0.0
        self.runs = 0


class Counters:
    """Since the model was loaded. Requests, except where the name says runs, rows or batches."""

    __slots__ = (
        "_padder",
        "_reasons",
        "accepted",
        "by_rows",
        "cancelled",
        "engines",
        "expired",
        "failed",
        "failed_runs",
        "failed_s",
        "hung",
        "last_finished_s",
        "padding",
        "padding_shares",
        "queue_delays",
        "refusals",
        "refused",
        "retries",
        "rows",
        "run_times",
    )

    def __init__(self, padder: Padder | None = None) -> None:
        self._padder = padder
        self.padding: dict[tuple[int, ...], PaddingFigures] = {}  # by each length of the bucket
        self.padding_shares = [0] * (PADDING_STEPS + 1)  # batches, by how much of them was padding
        self.queue_delays = Samples()  # of requests that ran: from acceptance until their batch was gathered
        self.run_times = Samples()  # of batches
        self.engines: list[EngineFigures] = []  # by their lanes' numbers
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
        # Not a Counter: that stores through Python's own `__setitem__` look-up, at ten times the cost.
        self._reasons: defaultdict[str, int] = defaultdict(int)
        self.by_rows: dict[int, BatchFigures] = {}

    @property
    def reasons(self) -> Counter[str]:
        """Batches that ran, by why they left."""
        return Counter(self._reasons)

    @property
    def lost(self) -> int:
        """Requests that were refused or given up for want of the engine's time."""
        return self.expired + self.refusals["deadline"]

    @property
    def batches(self) -> int:
        """Batches that ran."""
        return sum(self._reasons.values())

    def batch(self, batch: Batch) -> None:
        """Count a batch that ran, and whose answers are written."""
        figures = self.by_rows.get(batch.rows)
        if figures is None:
            figures = self.by_rows[batch.rows] = BatchFigures()
        figures.batches += 1
        requests, gathered_s = batch.requests, batch.gathered_s
        waiting = self.queue_delays.values
        first = requests[0]
        if len(requests) == 1 and first.callers == 1:
            # Lone requests pay for all of this by themselves.
            delay_s = gathered_s - first.enqueued_s
            figures.requests += 1
            figures.queue_s += delay_s
            waiting.append(delay_s)
        else:
            delays = _delays(requests, gathered_s)
            figures.requests += len(delays)
            figures.queue_s += sum(delays)
            waiting += delays
        run_s = batch.finished_s - batch.started_s
        figures.input_s += batch.dispatched_s - gathered_s
        figures.compute_s += run_s
        figures.output_s += batch.answered_s - batch.answering_s
        if first.tenant is not None:
            _charge_tenants(batch, run_s)
        runs = self.run_times.values
        runs.append(run_s)
        if len(waiting) >= FULL or len(runs) >= FULL:
            self.queue_delays.count_in()
            self.run_times.count_in()
        self.last_finished_s = batch.finished_s
        self.rows += batch.rows
        self._reasons[batch.reason] += 1
        if self._padder is not None:
            self._count_padding(batch, self._padder)

    def _count_padding(self, batch: Batch, padder: Padder) -> None:
        bucket = padder.bucket_of(batch.row_shapes)
        figures = self.padding.get(bucket)
        if figures is None:
            figures = self.padding[bucket] = PaddingFigures()
        figures.batches += 1
        figures.rows += batch.rows
        elements = batch.rows * sum([prod(batch.row_shapes[index]) for index in padder.inputs])
        padding = sum([one.rows * one.pad.row_padding for one in batch.requests if one.pad is not None])
        figures.elements += elements
        figures.padding += padding
        self.padding_shares[ceil(padding * PADDING_STEPS / elements) if elements else 0] += 1

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


def _delays(requests: list[Request], gathered_s: float) -> list[float]:
    """What each caller's request waited."""
    delays = [gathered_s - one.enqueued_s for one in requests]
    callers = [one.callers for one in requests]
    if callers.count(1) == len(callers):
        return delays
    # One request for many callers, or the further parts of a split one, which are nobody's.
    return [delay for delay, times in zip(delays, callers, strict=True) for _ in range(times)]


def _charge_tenants(batch: Batch, run_s: float) -> None:
    for share, rows in batch.shares.items():
        if share.tenant is not None:
            figures = share.tenant.figures
            figures.rows += rows
            figures.engine_s += run_s * rows / batch.rows
