"""What the batcher counts, in plain integers: whoever shows them reads them when asked."""

from __future__ import annotations

from collections import Counter, defaultdict
from math import ceil
from typing import NamedTuple

from cobatch.batcher.durations import PENDING_LIMIT, DurationHistogram
from cobatch.batcher.errors import BatcherError
from cobatch.batcher.request import Batch, Request

# Batches are told apart by which part of them was padding, in steps of 5 %, rounded up.
PADDING_STEPS = 20


class BatchTotals:
    """Of all batches with one number of rows. Seconds are summed over batches, `queue_s` over requests."""

    __slots__ = ("batches", "compute_s", "input_s", "output_s", "queue_s", "requests")

    def __init__(self) -> None:
        self.batches = 0
        self.requests = 0
        self.queue_s = 0.0
        self.input_s = 0.0
        self.compute_s = 0.0
        self.output_s = 0.0


class PaddingTotals:
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


class EngineTotals:
    """Of one of a model's engines: runs, failed ones included, and the seconds that they took."""

    __slots__ = ("busy_s", "runs")

    def __init__(self) -> None:
        self.busy_s = 0.0
        self.runs = 0


class Padded(NamedTuple):
    """The bucket of a batch (its lengths), the elements of its padded inputs and the padding in them."""

    bucket: tuple[int, ...]
    elements: int
    padding: int


class Counters:
    """Since the model was loaded. Requests, except where the name says runs, rows or batches."""

    __slots__ = (
        "_pads",
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

    def __init__(self, *, pads: bool = False) -> None:
        self._pads = pads
        self.padding: dict[tuple[int, ...], PaddingTotals] = {}  # by each length of the bucket
        self.padding_shares = [0] * (PADDING_STEPS + 1)  # batches, by how much of them was padding
        self.queue_delays = (
            DurationHistogram()
        )  # of requests that ran: from acceptance until their batch was gathered
        self.run_times = DurationHistogram()  # of batches
        self.engines: list[EngineTotals] = []  # by their lanes' numbers
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
        self.by_rows: dict[int, BatchTotals] = {}

    @property
    def reasons(self) -> Counter[str]:
        """Batches that ran, by why they left."""
        return Counter(self._reasons)

    @property
    def missed_deadlines(self) -> int:
        """Requests that were refused or given up for want of the engine's time."""
        return self.expired + self.refusals["deadline"]

    @property
    def batches(self) -> int:
        """Batches that ran."""
        return sum(self._reasons.values())

    def count_refusal(self, request: Request, error: BatcherError) -> None:
        """Count a request that was not accepted."""
        self.refused += request.callers
        self.refusals[error.reason] += request.callers
        if request.tenant is not None:
            request.tenant.usage.refused += request.callers

    def count(self, batch: Batch, padded: Padded | None) -> None:
        """Count a batch that ran and whose answers are written."""
        figures = self.by_rows.get(batch.rows)
        if figures is None:
            figures = self.by_rows[batch.rows] = BatchTotals()
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
        if len(waiting) >= PENDING_LIMIT or len(runs) >= PENDING_LIMIT:
            self.queue_delays.count_in()
            self.run_times.count_in()
        self.last_finished_s = batch.finished_s
        self.rows += batch.rows
        self._reasons[batch.reason] += 1
        if padded is not None:
            self._count_padding(batch.rows, padded)

    def _count_padding(self, rows: int, padded: Padded) -> None:
        bucket, elements, padding = padded
        figures = self.padding.get(bucket)
        if figures is None:
            figures = self.padding[bucket] = PaddingTotals()
        figures.batches += 1
        figures.rows += rows
        figures.elements += elements
        figures.padding += padding
        self.padding_shares[ceil(padding * PADDING_STEPS / elements) if elements else 0] += 1

    @property
    def padding_total(self) -> PaddingTotals | None:
        """Totals over all buckets; None if the model pads nothing."""
        if not self._pads:
            return None
        total = PaddingTotals()
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
    for tenant, rows in batch.shares.items():
        if tenant is not None:
            figures = tenant.usage
            figures.rows += rows
            figures.engine_s += run_s * rows / batch.rows
