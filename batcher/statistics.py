"""Counters of one model, in plain integers and floats that are read when they are shown."""

from collections import Counter, defaultdict
from dataclasses import astuple, dataclass, field
from math import ceil
from typing import NamedTuple

from cobatch.batcher.durations import PENDING_LIMIT, DurationHistogram
from cobatch.batcher.errors import BatcherError
from cobatch.batcher.request import Batch, Request

# Batches are counted by their part of padding, in steps of 5 %, rounded up.
PADDING_STEPS = 20


@dataclass(slots=True)
class BatchTotals:
    """Totals of all batches of one size. `queue_s` is summed over requests, the rest over batches."""

    batches: int = 0
    requests: int = 0
    queue_s: float = 0.0
    input_s: float = 0.0
    compute_s: float = 0.0
    output_s: float = 0.0


@dataclass(slots=True)
class PaddingTotals:
    """Totals of one bucket, over the elements of inputs that may be padded; `elements` includes `padding`."""

    batches: int = 0
    rows: int = 0
    elements: int = 0
    padding: int = 0

    @property
    def waste(self) -> float:
        """The part of the elements that is padding."""
        return self.padding / self.elements if self.elements else 0.0

    def add(self, rows: int, elements: int, padding: int) -> None:
        """Add a batch."""
        self.batches += 1
        self.rows += rows
        self.elements += elements
        self.padding += padding


@dataclass(slots=True)
class EngineTotals:
    """Runs of one engine, with failed ones, and their seconds."""

    busy_s: float = 0.0
    runs: int = 0


class Padded(NamedTuple):
    """The bucket of a batch (its lengths), the elements of its padded inputs and the padding in them."""

    bucket: tuple[int, ...]
    elements: int
    padding: int


@dataclass(slots=True, eq=False)
class Counters:
    """Counts since the model was loaded: requests, unless the name says runs, rows or batches."""

    pads: bool = False  # the model pads inputs
    accepted: int = 0
    refused: int = 0
    refusals: Counter[str] = field(default_factory=Counter)  # by `BatcherError.reason`
    cancelled: int = 0
    expired: int = 0
    failed: int = 0
    failed_s: float = 0.0
    failed_runs: int = 0
    hung: int = 0  # runs that did not end within the limit
    ended: int = 0  # processes of engines, by themselves
    retries: int = 0  # runs
    rows: int = 0
    last_finished_s: float | None = None
    by_rows: dict[int, BatchTotals] = field(default_factory=dict)
    engines: list[EngineTotals] = field(default_factory=list)  # by the lane's number
    queue_delays: DurationHistogram = field(default_factory=DurationHistogram)  # of requests that ran
    run_times: DurationHistogram = field(default_factory=DurationHistogram)  # of batches
    padding: dict[tuple[int, ...], PaddingTotals] = field(default_factory=dict)  # by bucket
    padding_shares: list[int] = field(default_factory=lambda: [0] * (PADDING_STEPS + 1))  # batches
    # Not a Counter, whose stores go through Python's `__setitem__` look-up at ten times the cost.
    _reasons: defaultdict[str, int] = field(default_factory=lambda: defaultdict(int))

    @property
    def reasons(self) -> Counter[str]:
        """Batches that ran, by the reason why they left."""
        return Counter(self._reasons)

    @property
    def batches(self) -> int:
        """Batches that ran."""
        return sum(self._reasons.values())

    @property
    def missed_deadlines(self) -> int:
        """Requests that were refused or expired for want of engine time."""
        return self.expired + self.refusals["deadline"]

    @property
    def padding_total(self) -> PaddingTotals | None:
        """Totals over all buckets; None if the model pads nothing."""
        columns = zip(*[astuple(one) for one in self.padding.values()], strict=True)
        return PaddingTotals(*[sum(column) for column in columns]) if self.pads else None

    def count_refusal(self, request: Request, error: BatcherError) -> None:
        """Count a request that was not accepted."""
        self.refused += request.callers
        self.refusals[error.reason] += request.callers
        if request.tenant is not None:
            request.tenant.usage.refused += request.entrants

    def count(self, batch: Batch, padded: Padded | None) -> None:
        """Count a batch that ran and whose answers are written."""
        totals = self.by_rows.get(batch.rows)
        if totals is None:
            totals = self.by_rows[batch.rows] = BatchTotals()
        totals.batches += 1
        requests, gathered_s = batch.requests, batch.gathered_s
        waiting = self.queue_delays.values
        first = requests[0]
        if len(requests) == 1 and first.callers == 1:
            # A lone request pays for all of this alone.
            delay_s = gathered_s - first.enqueued_s
            totals.requests += 1
            totals.queue_s += delay_s
            waiting.append(delay_s)
        else:
            # A bundle has many callers; the parts of a cut request after the first have none.
            if len(requests) == 1:
                delays = [gathered_s - first.enqueued_s] * first.callers
            else:
                delays = [gathered_s - one.enqueued_s for one in requests for _ in range(one.callers)]
            totals.requests += len(delays)
            totals.queue_s += sum(delays)
            waiting += delays
        run_s = batch.finished_s - batch.started_s
        totals.input_s += batch.dispatched_s - gathered_s
        totals.compute_s += run_s
        totals.output_s += batch.answered_s - batch.answering_s
        if first.tenant is not None:
            for tenant, rows in batch.shares.items():
                if tenant is not None:
                    tenant.usage.rows += rows
                    tenant.usage.engine_s += run_s * rows / batch.rows
        runs = self.run_times.values
        runs.append(run_s)
        if len(waiting) >= PENDING_LIMIT:
            self.queue_delays.count_in()
        if len(runs) >= PENDING_LIMIT:
            self.run_times.count_in()
        self.last_finished_s = batch.finished_s
        self.rows += batch.rows
        self._reasons[batch.reason] += 1
        if padded is not None:
            bucket, elements, padding = padded
            self.padding.setdefault(bucket, PaddingTotals()).add(batch.rows, elements, padding)
            self.padding_shares[ceil(padding * PADDING_STEPS / elements) if elements else 0] += 1
