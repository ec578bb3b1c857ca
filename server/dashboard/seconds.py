"""The live page's data of each second: what every model did in it, and its last batches one by one.

The server counts this anyway, in totals that only grow (`batcher.statistics` and
`server.observability.traffic`). Once a second they are read and the difference to the previous second is
kept, so requests pay nothing. The mean number of waiting requests follows from the time that they waited in
each second (Little's law).
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable, Sequence
from math import fsum
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from cobatch.batcher.batcher import Batcher
from cobatch.batcher.durations import EDGES_S
from cobatch.batcher.request import Batch
from cobatch.server.api.metrics import state_of
from cobatch.server.http.request_id import LEAD
from cobatch.server.inference.model import Model
from cobatch.server.inference.served import ServedPipeline
from cobatch.server.observability.history import BatchRecord
from cobatch.server.observability.traffic import Traffic

Counts = NDArray[np.int64]

# Up to this size each number of rows has its own bin.
_SINGLE_BINS = 16


class Totals(msgspec.Struct, omit_defaults=True):
    """Counts and seconds of one model since it was loaded, or of an interval.

    `requests` ran in batches, `problems` are other answers by kind, `cancelled` are requests of disconnected
    clients, `hung` are runs. `sizes` and `reasons` are batches by bin of rows and by dispatch reason. `queue`
    is the requests' time in the queue, `input` and `output` the event loop's time for packing and delivery,
    `compute` the engines' time, in seconds.
    """

    requests: int = 0
    cancelled: int = 0
    retries: int = 0
    hung: int = 0
    rows: int = 0
    batches: int = 0
    queue: float = 0.0
    input: float = 0.0
    compute: float = 0.0
    output: float = 0.0
    sizes: dict[int, int] = {}
    reasons: dict[str, int] = {}
    problems: dict[str, int] = {}

    def since(self, before: Totals) -> Totals:
        """Return the difference to earlier totals."""
        delta: dict[str, Any] = {}
        for name in self.__struct_fields__:
            now, then = getattr(self, name), getattr(before, name)
            if isinstance(now, dict):
                delta[name] = {key: n - then.get(key, 0) for key, n in now.items() if n != then.get(key, 0)}
            else:
                delta[name] = round(now - then, 6) if isinstance(now, float) else now - then
        return Totals(**delta)


class Second(msgspec.Struct, omit_defaults=True):
    """One model in one second: the change of its totals, and its state at the end.

    `full` are the rows of a full batch, `lanes` the engines in use, `queued` rows and `running` batches.
    `latency` is the index of the first bucket of `EDGES_S` with requests, and the counts from there on.
    """

    state: str
    delta: Totals
    full: int = 0
    lanes: int = 0
    queued: int = 0
    running: int = 0
    latency: list[int] = []


def size_bins(largest: int) -> list[int]:
    """Return the largest number of rows of each bin: small numbers singly, then two bins per doubling."""
    bins = list(range(1, min(largest, _SINGLE_BINS) + 1))
    while bins[-1] < largest:
        last = bins[-1]
        # From a power of two to one and a half times it, and from there to the next power.
        bins.append(min(largest, last * 3 // 2 if last & (last - 1) == 0 else last * 4 // 3))
    return bins


def totals_of(batcher: Batcher, traffics: Iterable[Traffic]) -> Totals:
    """Return the totals of a model since it was loaded."""
    counters = batcher.counters
    bins = size_bins(batcher.max_batch_size)
    sizes: Counter[int] = Counter()
    for rows, totals in counters.by_rows.items():
        sizes[bins[bisect_left(bins, rows)]] += totals.batches
    problems: Counter[str] = Counter()
    for traffic in traffics:
        for (_, slug), count in traffic.problems.items():
            problems[slug] += count
    by_rows = counters.by_rows.values()
    return Totals(
        requests=sum([one.requests for one in by_rows]),
        cancelled=counters.cancelled,
        retries=counters.retries,
        hung=counters.hung,
        rows=counters.rows,
        batches=counters.batches,
        queue=fsum([one.queue_s for one in by_rows]),
        input=fsum([one.input_s for one in by_rows]),
        compute=fsum([one.busy_s for one in counters.engines]),
        output=fsum([one.output_s for one in by_rows]),
        sizes=dict(sizes),
        reasons=dict(counters.reasons),
        problems=dict(problems),
    )


def sparse(counts: Counts) -> list[int]:
    """Return the index of the first count above 0, and the counts from there to the last above 0."""
    return [int(np.flatnonzero(counts)[0]), *np.trim_zeros(counts).tolist()] if counts.any() else []


class ModelSampler:
    """Takes the differences of the totals of a model, or a pipeline, from second to second."""

    def __init__(self, model: Model | ServedPipeline) -> None:
        self.model = model
        self.totals = Totals()
        self._latency: Counts = np.zeros(len(EDGES_S) + 1, np.int64)

    def second(self, draining: bool = False) -> Second:
        """Return the model's work since the previous call. `draining`: the server is stopping."""
        state = state_of(self.model, draining)
        batcher = self.model.batcher
        if batcher is None:
            return Second(state=state, delta=Totals())
        traffics = self.model.traffics
        before, self.totals = self.totals, totals_of(batcher, traffics)
        counts_before = self._latency
        self._latency = sum([one.durations.counts() for one in traffics], np.zeros_like(counts_before))
        return Second(
            state=state,
            delta=self.totals.since(before),
            full=batcher.queue.full_rows,
            lanes=len(batcher.lanes),
            queued=batcher.queue.rows,
            running=batcher.running_batches,
            latency=sparse(self._latency - counts_before),
        )


def timeline(records: Sequence[BatchRecord]) -> list[list[Any]]:
    """Return batches as the page gets them: a list of values each, in the order of `FIELDS` in timeline.js.

    Times are in microseconds since the first batch was gathered.
    """
    return [_values(one.batch, one.queued_s, records[0].batch.gathered_s) for one in records]


def _values(batch: Batch, queued_s: Sequence[float], from_s: float) -> list[Any]:
    times = (
        batch.gathered_s,
        batch.dispatched_s or batch.gathered_s,  # 0: packing failed
        batch.started_s,
        batch.finished_s,
        batch.answering_s,
        batch.answered_s,
    )
    oldest_s = min(queued_s, default=batch.gathered_s)
    return [
        *[round((time_s - from_s) * 1e6) for time_s in times],
        batch.rows,
        len(queued_s),
        batch.reason,
        batch.engine,
        batch.slot,
        max(0, round((batch.gathered_s - oldest_s) * 1e6)),
        batch.number,
        int(batch.failed),
        (LEAD % batch.number).decode() + "0",  # id of the request whose rows are first
    ]
