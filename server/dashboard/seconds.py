"""What every model did in each of the last seconds, and its last batches one by one, for the live page.

All this is counted anyway, in numbers that only grow (`batcher.statistics`, `server.observability.observer`).
Once a second they are read, and the difference to the second before is kept, so that requests pay nothing for
it. How many requests waited on average needs no looking either: it is what they waited, all together, in each
second (Little's law).

The single batches are those that `server.observability.history` keeps.
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
from cobatch.server.http.request_id import id_lead
from cobatch.server.inference.model import Model
from cobatch.server.observability.history import BatchRecord
from cobatch.server.observability.traffic import Traffic

Counts = NDArray[np.int64]

# Up to this size every number of rows is a bin of its own.
_EACH = 16


class Figures(msgspec.Struct, omit_defaults=True):
    """Of one model, since it was loaded or in some time: the difference of two is one as well.

    `requests` rode in batches, `problems` are answers without rows by their kind, `cancelled` requests whose
    callers left, `retries` and `hung` runs, `sizes` and `reasons` batches by the bin of their rows and by why
    they left.
    `queue` is what the requests waited, `input` and `output` what the event loop packed and delivered,
    `compute` what the engines ran, in seconds all together.
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

    def since(self, before: Figures) -> Figures:
        """What was added."""
        made: dict[str, Any] = {}
        for name in self.__struct_fields__:
            now, then = getattr(self, name), getattr(before, name)
            if isinstance(now, dict):
                made[name] = {key: n - then.get(key, 0) for key, n in now.items() if n != then.get(key, 0)}
            else:
                made[name] = round(now - then, 6) if isinstance(now, float) else now - then
        return Figures(**made)


class Second(msgspec.Struct, omit_defaults=True):
    """One model in one second, as it is sent. `full`: rows of a full batch; `lanes`: engines in use.

    `queued` rows and `running` batches are those at its end. `latency` are counts of requests by the buckets
    of `batcher.durations.EDGES_S`, the number of the first bucket before them.
    """

    state: str
    did: Figures
    full: int = 0
    lanes: int = 0
    queued: int = 0
    running: int = 0
    latency: list[int] = []


def size_bins(most: int) -> list[int]:
    """The largest number of rows of each bin: all small numbers, then two bins to each doubling."""
    bins = list(range(1, min(most, _EACH) + 1))
    while bins[-1] < most:
        last = bins[-1]
        # From a power of two to the one and a half of it, and from there to the next.
        bins.append(min(most, last * 3 // 2 if last & (last - 1) == 0 else last * 4 // 3))
    return bins


def figures(batcher: Batcher, traffics: Iterable[Traffic]) -> Figures:
    """What a model has done since it was loaded."""
    counters = batcher.counters
    bins = size_bins(batcher.max_batch_size)
    sizes: Counter[int] = Counter()
    by_rows = counters.by_rows
    for rows, of_size in by_rows.items():
        sizes[bins[bisect_left(bins, rows)]] += of_size.batches
    slugs: Counter[str] = Counter()
    for traffic in traffics:
        for (_, slug), count in traffic.problems.items():
            slugs[slug] += count
    return Figures(
        requests=sum([one.requests for one in by_rows.values()]),
        cancelled=counters.cancelled,
        retries=counters.retries,
        hung=counters.hung,
        rows=counters.rows,
        batches=counters.batches,
        queue=fsum([one.queue_s for one in by_rows.values()]),
        input=fsum([one.input_s for one in by_rows.values()]),
        compute=fsum([one.busy_s for one in counters.engines]),
        output=fsum([one.output_s for one in by_rows.values()]),
        sizes=dict(sizes),
        reasons=dict(counters.reasons),
        problems=dict(slugs),
    )


def sparse(counts: Counts) -> list[int]:
    """The number of the first bucket that has any, and the counts from there to the last one that has."""
    found = np.flatnonzero(counts)
    if not len(found):
        return []
    first, last = int(found[0]), int(found[-1])
    return [first, *counts[first : last + 1].tolist()]


class ModelRecent:
    """One model from second to second."""

    def __init__(self, model: Model) -> None:
        self.model = model
        self.total = Figures()
        self._latency: Counts = np.zeros(len(EDGES_S) + 1, np.int64)

    def second(self, draining: bool = False) -> Second:
        """What it did since this was last asked. `draining`: the server is about to stop."""
        batcher = self.model.batcher
        if batcher is None:
            return Second(state=state_of(self.model, draining), did=Figures())
        traffics = (self.model.traffic, self.model.infer_traffic)
        before, self.total = self.total, figures(batcher, traffics)
        latency = traffics[0].durations.counts() + traffics[1].durations.counts()
        lately, self._latency = latency - self._latency, latency
        return Second(
            state=state_of(self.model, draining),
            did=self.total.since(before),
            full=batcher.full_rows,
            lanes=batcher.lanes,
            queued=batcher.queued_rows,
            running=batcher.running_batches,
            latency=sparse(lately),
        )


def timeline(kept: Sequence[BatchRecord]) -> list[list[Any]]:
    """Batches as they are sent: a list of values for each, times in microseconds from the first's gathering.

    The last value is the id of the request whose rows come first in it (`server.observability.history` tells
    more of it).
    """
    from_s = kept[0].batch.gathered_s if kept else 0.0
    return [_row(one.batch, one.queued_s, from_s) for one in kept]


def _row(batch: Batch, queued_s: Sequence[float], from_s: float) -> list[Any]:
    dispatched_s = batch.dispatched_s or batch.gathered_s  # packing it failed
    times = (
        batch.gathered_s,
        dispatched_s,
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
        f"{id_lead(batch).decode()}0",
    ]
