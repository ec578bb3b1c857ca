"""Statistics of a batched function: sums over the event loops on which it ran."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Protocol

from cobatch.batcher.batcher import Batcher
from cobatch.batcher.durations import DurationHistogram
from cobatch.batcher.statistics import Counters


@dataclass
class Statistics:
    """Counts of a function's calls since the start, unless the name says batches.

    `refused` are those that were not queued, by reason in `refusals`; `failed` those that got an exception,
    `expired` of them at their timeout; `cancelled` those whose callers left. `batches` ran, by their number
    of items in `batch_sizes`; `failed_batches` raised an exception. `queued`: calls that are queued now.
    `full_batch_size`: a larger batch gains nothing, as measured so far (0: not started). `queue_delays` and
    `run_times` have `count`, `sum_s` and `quantile_s`.
    """

    name: str
    max_batch_size: int
    accepted: int = 0
    refused: int = 0
    failed: int = 0
    expired: int = 0
    cancelled: int = 0
    batches: int = 0
    failed_batches: int = 0
    queued: int = 0
    full_batch_size: int = 0
    refusals: Counter[str] = field(default_factory=Counter)
    batch_sizes: Counter[int] = field(default_factory=Counter)
    queue_delays: DurationHistogram = field(default_factory=DurationHistogram)
    run_times: DurationHistogram = field(default_factory=DurationHistogram)

    @property
    def mean_batch_size(self) -> float:
        """The mean number of items of the batches that ran; 0 if none has."""
        items = sum(size * count for size, count in self.batch_sizes.items())
        return items / self.batches if self.batches else 0.0

    def add(self, counters: Counters) -> None:
        """Add the counts of one event loop."""
        self.accepted += counters.accepted
        self.refused += counters.refused
        self.failed += counters.failed
        self.expired += counters.expired
        self.cancelled += counters.cancelled
        self.batches += counters.batches
        self.failed_batches += counters.failed_runs
        self.refusals += counters.refusals.copy()
        sizes = counters.by_rows.copy()  # another thread may add one
        self.batch_sizes.update({size: totals.batches for size, totals in sizes.items()})
        for mine, its in (
            (self.queue_delays, counters.queue_delays),
            (self.run_times, counters.run_times),
        ):
            mine.add(*its.read())


class _Open(Protocol):
    """The part of a runner that is read."""

    batcher: Batcher
    closed: bool


class Ledger:
    """The counters of a function's runners, of which those that have ended are summed."""

    def __init__(self, name: str, max_batch_size: int) -> None:
        self._ended = Statistics(name, max_batch_size)
        self._open: dict[Counters, Callable[[], _Open | None]] = {}
        self._lock = threading.Lock()

    def open(self, counters: Counters, runner: Callable[[], _Open | None]) -> None:
        """Add a runner's counters."""
        with self._lock:
            for mine, ref in list(self._open.items()):
                one = ref()
                if one is None or one.closed:
                    self._ended.add(mine)
                    del self._open[mine]
            self._open[counters] = runner

    def statistics(self) -> Statistics:
        """Return the sums. Any thread may ask."""
        with self._lock:
            total = deepcopy(self._ended)
            for counters, ref in self._open.items():
                total.add(counters)
                runner = ref()
                if runner is not None and not runner.closed:
                    total.queued += runner.batcher.queue.rows
                    total.full_batch_size = runner.batcher.queue.full_rows
        return total
