"""Records and spans of the items of POST /batch.

An item's id is the call's, a dot and the item's place in the call, from 0. Of an item whose rows were in a
batch as they came, only that batch and row are kept, as the reply's own id names them
(`server.http.request_id`); of any other (refused, failed, split) a record. Where the call is traced, each
item gets spans inside the call's, made when all items are answered.
"""

import asyncio
import time
from collections.abc import Sequence

from cobatch.batcher.bundle import Bundle
from cobatch.batcher.request import Request
from cobatch.server.batch.items import AnyItem
from cobatch.server.http.reply import Reply
from cobatch.server.http.request_id import place_of
from cobatch.server.inference.served import ServedModel
from cobatch.server.observability.history import LONGEST_PATH, History
from cobatch.server.observability.observer import Tracer
from cobatch.server.observability.record import INFER_ROUTE, RequestRecord

# A traced item's spans take 0.1 ms: other work gets its turn after this many items.
_ITEMS_AT_ONCE = 8


class Progress:
    """A call's items and their results, by their places in the call.

    `models`: None where an item names none. `alone`: the requests of items that are not in a bundle, or
    failed in it.
    """

    def __init__(self, items: Sequence[AnyItem]) -> None:
        self.items = items
        self.models: list[ServedModel | None] = [None] * len(items)
        self.replies: list[Reply | None] = [None] * len(items)
        self.alone: dict[int, Request] = {}
        self.bundles: list[Bundle] = []
        self.began_s = time.monotonic()

    def record(self, call: RequestRecord, place: int, reply: Reply, now_s: float) -> RequestRecord:
        """The complete record of an item."""
        item, model, request = self.items[place], self.models[place], self.alone.get(place)
        method, path = item.method[:LONGEST_PATH], item.url[:LONGEST_PATH]
        record = RequestRecord(f"{call.request_id}.{place}", method, path, self.began_s, answered_s=now_s)
        record.scheme, record.tenant = call.scheme, call.tenant
        record.status, record.slug = reply.status, reply.slug
        if model is not None:
            record.model, record.route = model.name, INFER_ROUTE
        if request is not None:
            record.ran(request)
            record.rows //= request.callers
        return record


async def report_items(
    history: History, tracer: Tracer | None, call: RequestRecord, progress: Progress, replies: Sequence[Reply]
) -> None:
    """Report all items of an answered call to `history`, and those of a traced call to `tracer`."""
    now_s = time.monotonic()
    history.on_items(
        call.request_id,
        [reply.request_id or progress.record(call, n, reply, now_s) for n, reply in enumerate(replies)],
    )
    if tracer is None or call.trace is None:
        return
    batches = {one.batch.number: one for one in progress.bundles if one.batch is not None}
    for n, reply in enumerate(replies):
        record = progress.record(call, n, reply, now_s)
        place = None if reply.request_id is None else place_of(reply.request_id.decode())
        if place is not None and record.batch is None and place[0] in batches:
            record.ran(batches[place[0]])
            record.rows = 1
        if record.batch is not None and record.batch.answered_s:
            record.answered_s = record.batch.answered_s
        tracer.item_done(call, record)
        if n % _ITEMS_AT_ONCE == _ITEMS_AT_ONCE - 1:
            await asyncio.sleep(0)
