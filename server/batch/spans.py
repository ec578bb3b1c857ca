"""The items of POST /batch as whoever watches the server sees them.

An item's id is the call's, a dot and the item's place in the call, from 0. Of an item that rode in a batch as
it came nothing is kept but where, in the words that its answer brings anyhow (`server.http.request_id`); of
any other (refused, failed, split, through the application) a record. Where the call is traced, each item gets
spans inside the call's, made when all are over.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence

from cobatch.server.batch.items import AnyItem
from cobatch.server.http.reply import Reply
from cobatch.server.http.request_id import place_of
from cobatch.server.inference.model import Model
from cobatch.server.inference.service import ModelRequest
from cobatch.server.observability.history import LONGEST_PATH, History
from cobatch.server.observability.observer import Tracer
from cobatch.server.observability.record import INFER_ROUTE, RequestRecord

# A traced item's spans take the tenth of a millisecond: others come first after so many.
_AT_ONCE = 8


class Items:
    """A call's items, and what becomes of them. `models`: for which each is; None: it is no infer request, or
    that takes a closer look, and then it is set.

    By their places: `records` of those that go through the application; in `alone` those that are requests of
    their own in the end, or failed in one with others. `together`: the requests of several items each.
    """

    def __init__(self, items: Sequence[AnyItem], models: Sequence[Model | None]) -> None:
        self.items = items
        self.models = list(models)
        self.began_s = time.monotonic()
        self.records: dict[int, RequestRecord] = {}
        self.alone: dict[int, ModelRequest] = {}
        self.together: list[ModelRequest] = []

    def runs(self, index: int, request: ModelRequest) -> None:
        """An item is in this request after all, or failed in it."""
        self.alone[index] = request

    def let_go(self) -> None:
        """Requests and this object keep each other, until the next garbage collection."""
        self.alone.clear()
        self.together.clear()


class ItemsSeen:
    """Tells `recent` of all calls' items, and `tracing`, if there is one, of those of traced calls."""

    def __init__(self, recent: History, tracing: Tracer | None) -> None:
        self._recent = recent
        self._tracing = tracing

    async def all_done(
        self, call: RequestRecord, items: Items, replies: Sequence[Reply], now_s: float
    ) -> None:
        """All items of a call are answered; the call is not."""
        self._recent.on_items(
            call.request_id,
            [reply.request_id or _record(call, items, n, reply, now_s) for n, reply in enumerate(replies)],
        )
        if self._tracing is None or call.trace is None:
            return
        ran = {one.batch.number: one for one in items.together if one.batch is not None}
        for n, reply in enumerate(replies):
            record = _record(call, items, n, reply, now_s)
            place = None if reply.request_id is None else place_of(reply.request_id.decode())
            if place is not None and record.batch is None and place[0] in ran:
                record.ran(ran[place[0]])
                record.rows = 1
            if record.batch is not None and record.batch.answered_s:
                record.answered_s = record.batch.answered_s
            self._tracing.item_done(call, record)
            if n % _AT_ONCE == _AT_ONCE - 1:
                await asyncio.sleep(0)


def _record(call: RequestRecord, items: Items, n: int, reply: Reply, now_s: float) -> RequestRecord:
    """An item's record, complete."""
    item, model = items.items[n], items.models[n]
    record = items.records.get(n)
    if record is None:
        record = RequestRecord("", item.method[:LONGEST_PATH], item.url, items.began_s)
        record.answered_s = now_s
    record.path = record.path[:LONGEST_PATH]
    record.request_id = f"{call.request_id}.{n}"
    record.scheme, record.tenant = call.scheme, call.tenant
    record.status, record.slug = reply.status, reply.slug or record.slug
    if model is not None:
        record.model, record.route = model.name, INFER_ROUTE
    request = items.alone.get(n)
    if request is not None:
        record.ran(request)
        record.rows //= request.callers
    return record
