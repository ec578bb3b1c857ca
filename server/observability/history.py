"""The last batches and requests of a process, for `cobatch explain` and the live page.

Of each request in a batch, only its arrival time, rows and tenant are kept: an id of ours names the batch and
the row where it ran (`server.http.request_id`). Full records are kept of requests with a client's own id, of
refused ones and of those on other routes. This costs a request about 0.1 us.
"""

import re
from collections import defaultdict, deque
from collections.abc import Iterator, Sequence
from itertools import chain, islice
from typing import NamedTuple

from cobatch.batcher.batcher import Batcher
from cobatch.batcher.request import Batch
from cobatch.server.http.request_id import place_of
from cobatch.server.observability.record import RequestRecord

# Of all models together; each has its share.
_BATCHES = 4096
_RECORDS = 2048
_ITEMS = 16_384
# Longer paths are cut.
LONGEST_PATH = 500
# An item of a batch call: the call's id and the item's index (`server.batch.spans`).
_ITEM = re.compile(r"(.+)\.([0-9]{1,5})")


class BatchRecord(NamedTuple):
    """A finished batch. Of its requests, in order: `queued_s`, `rows` and `tenants`.

    `rows` is empty where each request has one, `tenants` without authentication.
    """

    model: str
    batch: Batch
    queued_s: list[float]
    rows: list[int]
    tenants: list[str]


_Parts = tuple[str, Batch, list[float], list[int], list[str]]


class History:
    """The last batches and requests. `on_batch` and `on_request` are for the observer."""

    def __init__(self, models: int = 1) -> None:
        # By model: the fields of a `BatchRecord`, which is made when it is asked for.
        share = _BATCHES // models
        self._batches: defaultdict[str, deque[_Parts]] = defaultdict(lambda: deque(maxlen=share))
        self._records: dict[str, RequestRecord] = {}
        self._items: dict[str, Sequence[bytes | RequestRecord]] = {}  # by the call's id
        self._items_kept = 0

    def on_batch(self, batcher: Batcher, batch: Batch) -> None:
        """Keep a batch without its requests."""
        requests = batch.requests
        if len(requests) == 1 and requests[0].callers <= 1:
            # The common case at low load, where no other request shares the cost.
            one = requests[0]
            rows = [] if batch.rows == 1 else [batch.rows]
            tenants = [] if one.tenant is None else [one.tenant.name]
            self._batches[batcher.name].append((batcher.name, batch, [one.enqueued_s], rows, tenants))
            return
        if len(requests) != batch.rows:
            # Items of a batch call that were queued as one request count as one each.
            requests = [one for one in requests for _ in range(one.callers or 1)]
        queued_s = [one.enqueued_s for one in requests]
        alike = len(requests) == batch.rows
        rows = [] if alike else [one.rows // (one.callers or 1) for one in requests]
        first = requests[0].tenant if requests else None
        tenants = [] if first is None else [one.tenant.name if one.tenant else "" for one in requests]
        self._batches[batcher.name].append((batcher.name, batch, queued_s, rows, tenants))

    def on_request(self, record: RequestRecord) -> None:
        """Keep a record, unless its id names its place in a batch."""
        # A client must not choose how much memory is kept.
        record.path = record.path[:LONGEST_PATH]
        record.tracestate = ""
        if place_of(record.request_id) is None:
            self._records.pop(record.request_id, None)  # a repeated id is the newest
            self._records[record.request_id] = record
            if len(self._records) > _RECORDS:
                del self._records[next(iter(self._records))]

    def on_items(self, call_id: str, items: Sequence[bytes | RequestRecord]) -> None:
        """Keep a batch call's items, in order: ids that name a place in a batch, or records."""
        kept = self._items
        self._items_kept += len(items) - len(kept.pop(call_id, ()))
        kept[call_id] = items
        while self._items_kept > _ITEMS and len(kept) > 1:
            self._items_kept -= len(kept.pop(next(iter(kept))))

    def record(self, request_id: str) -> RequestRecord | None:
        """Return the record of a request, if one was kept."""
        return self._records.get(request_id)

    def items(self, call_id: str) -> Sequence[bytes | RequestRecord]:
        """Return the items of a batch call, none if it is unknown."""
        return self._items.get(call_id, ())

    def item(self, request_id: str) -> bytes | RequestRecord | None:
        """Return the item of a batch call with this id."""
        named = _ITEM.fullmatch(request_id)
        items = () if named is None else self.items(named[1])
        return items[int(named[2])] if named is not None and int(named[2]) < len(items) else None

    def batches(self, model: str) -> Iterator[Batch]:
        """Iterate over a model's batches, the oldest first."""
        return (parts[1] for parts in self._batches.get(model, ()))

    def last(self, model: str, limit: int) -> list[BatchRecord]:
        """Return the newest batches of a model, the newest last."""
        newest = list(islice(reversed(self._batches.get(model, ())), limit))
        return [BatchRecord(*parts) for parts in reversed(newest)]

    def batch(self, number: int) -> BatchRecord | None:
        """Return the batch with this number, if it is still kept."""
        kept = chain.from_iterable(self._batches.values())
        return next((BatchRecord(*parts) for parts in kept if parts[1].number == number), None)
