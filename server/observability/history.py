"""Explain my latency: what a recent request waited for, in which company it rode, and why its batch left.

The last batches are kept, with no more of each request than when it was queued, its rows and its tenant; an
id of ours says in which of them a request rode (`server.http.request_id`). Of requests that have an id of
their caller's, that were refused, or that came another way, the last records are kept. So this can always be
asked, and costs each request the tenth of a microsecond.
"""

from __future__ import annotations

import re
import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Sequence
from datetime import UTC, datetime
from itertools import accumulate, chain, islice
from typing import Any, NamedTuple

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from cobatch.batcher.batcher import Batcher
from cobatch.batcher.request import Batch
from cobatch.batcher.scheduling import policy
from cobatch.server.api.routing import guarded, json
from cobatch.server.http.problem import Problem
from cobatch.server.http.problem_kinds import KINDS
from cobatch.server.http.request_id import place_of
from cobatch.server.inference.service import Inference
from cobatch.server.observability.record import Record

# Of all models together; each has its share.
_MOST_BATCHES = 4096
_MOST_RECORDS = 2048
_MOST_ITEMS = 16_384
# Of a path this much is kept.
LONGEST_PATH = 500
# An item of a batch call: the call's id, and the item's place (`server.batch.spans`).
_ITEM = re.compile(r"(.+)\.([0-9]{1,5})")

WHY = {
    policy.FULL: "it had grown as far as growing pays",
    policy.IDLE: "the engine was idle, so nothing was to be gained by waiting",
    policy.SHAPE: "what else waited had another shape, or belonged to others whose turn came later",
    policy.DELAY: "its oldest request had waited for company as long as it may, or that company was there",
    policy.DEADLINE: "a deadline left no time to wait, or to grow",
    policy.DRAIN: "the server was about to stop",
    policy.RETRY: "it is a part of a batch that failed, run again to find the request that is to blame, "
    "or it lay behind a run that hung",
}


class Kept(NamedTuple):
    """A batch that is over. Of its requests, in order: `queued_s`, `rows` and `tenants`."""

    model: str
    batch: Batch
    queued_s: list[float]
    rows: list[int]
    tenants: list[str]


_Parts = tuple[str, Batch, list[float], list[int], list[str]]


class Recent:
    """The last batches, of so many models, and records; `on_batch` and `on_request` are for the observer."""

    def __init__(self, models: int = 1, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        # By model, what a `Kept` is made of: it is made when somebody asks.
        most = _MOST_BATCHES // models
        self._batches: defaultdict[str, deque[_Parts]] = defaultdict(lambda: deque(maxlen=most))
        self._records: dict[str, Record] = {}
        self._items: dict[str, Sequence[bytes | Record]] = {}  # by the call's id
        self._items_kept = 0

    def on_batch(self, batcher: Batcher, batch: Batch) -> None:
        """Keep it, without its requests."""
        requests = batch.requests
        if len(requests) == 1 and requests[0].callers <= 1:
            # Lone requests pay for all of this by themselves.
            one = requests[0]
            rows = [] if batch.rows == 1 else [batch.rows]
            tenants = [] if one.tenant is None else [one.tenant.name]
            self._batches[batcher.name].append((batcher.name, batch, [one.enqueued_s], rows, tenants))
            return
        if len(requests) != batch.rows:
            # Items of a batch call that came together are a request each (the further parts of one are none).
            requests = [one for one in requests for _ in range(one.callers or 1)]
        queued_s = [one.enqueued_s for one in requests]
        alike = len(requests) == batch.rows
        rows = [] if alike else [one.rows // (one.callers or 1) for one in requests]
        # Without authentication nobody has a tenant.
        first = requests[0].tenant if requests else None
        tenants = [] if first is None else [one.tenant.name if one.tenant else "" for one in requests]
        self._batches[batcher.name].append((batcher.name, batch, queued_s, rows, tenants))

    def on_request(self, record: Record) -> None:
        """Keep it, unless its id says where it rode."""
        # What is kept must not be as long as a caller likes. The rest has been read by now.
        record.path = record.path[:LONGEST_PATH]
        record.tracestate = ""
        if place_of(record.request_id) is None:
            self._records.pop(record.request_id, None)  # an id that comes again is the newest
            self._records[record.request_id] = record
            if len(self._records) > _MOST_RECORDS:
                del self._records[next(iter(self._records))]

    def on_items(self, call_id: str, items: Sequence[bytes | Record]) -> None:
        """Keep what is known of a batch call's items, in order: ids that say where they rode, or records."""
        kept = self._items
        self._items_kept += len(items) - len(kept.pop(call_id, ()))
        kept[call_id] = items
        while self._items_kept > _MOST_ITEMS and len(kept) > 1:
            self._items_kept -= len(kept.pop(next(iter(kept))))

    def last(self, model: str, most: int) -> list[Kept]:
        """The newest batches of a model, the newest last."""
        newest = list(islice(reversed(self._batches.get(model, ())), most))
        return [Kept(*kept) for kept in reversed(newest)]

    def explain(self, request_id: str) -> dict[str, Any]:
        """All that is known of it. Raises Problem where that is nothing."""
        record = self._records.get(request_id)
        found = self._of_record(record) if record is not None else self._of_item(request_id)
        found = found or self._by_place(request_id)
        if found is None:
            detail = f"there was no request {request_id!r}, or it is too long ago"
            raise Problem("unknown-request", detail, id=request_id)
        return found

    def _of_item(self, request_id: str) -> dict[str, Any] | None:
        named = _ITEM.fullmatch(request_id)
        items = () if named is None else self._items.get(named[1], ())
        if named is None or int(named[2]) >= len(items):
            return None
        item = items[int(named[2])]
        found = self._of_record(item) if isinstance(item, Record) else self._by_place(item.decode())
        return None if found is None else found | {"id": request_id}

    def _by_place(self, request_id: str) -> dict[str, Any] | None:
        place = place_of(request_id)
        kept = None if place is None else self._kept(place[0])
        if place is None or kept is None:
            return None
        rows = kept.rows or [1] * len(kept.queued_s)
        firsts = [0, *accumulate(rows)][:-1]
        if place[1] not in firsts:
            return None
        index = firsts.index(place[1])
        said: dict[str, Any] = {"id": request_id, "model": kept.model, "rows": rows[index]}
        if not kept.batch.failed:
            said["status"] = 200
        if kept.tenants:
            said["tenant"] = kept.tenants[index]
        return self._complete(said, kept.queued_s[index], kept.batch.answered_s, [kept.batch])

    def _of_record(self, record: Record) -> dict[str, Any]:
        said: dict[str, Any] = {"id": record.request_id, "method": record.method, "path": record.path}
        said |= {"model": record.model} if record.model else {}
        said |= {"tenant": record.tenant} if record.tenant else {}
        said |= {"status": record.status}
        said |= {"problem": record.slug} if record.slug else {}
        said |= {"rows": record.rows} if record.rows else {}
        items = self._items.get(record.request_id)
        said |= {"items": len(items)} if items else {}
        batch = record.batch
        batches = [] if batch is None else list(batch.joined) or [batch]
        return self._complete(said, record.enqueued_s or record.received_s, record.answered_s, batches)

    def _complete(
        self, said: dict[str, Any], from_s: float, to_s: float, batches: list[Batch]
    ) -> dict[str, Any]:
        """With when it was, where its time went, and why."""
        came = datetime.fromtimestamp(time.time() - self._clock() + from_s, UTC)
        said["time"] = came.isoformat(timespec="milliseconds")
        said["times_us"] = {"total": _us(to_s - from_s)}
        if batches:
            first, last = batches[0], max(batches, key=lambda one: one.finished_s)
            said["times_us"] = _times(from_s, to_s, first, last)
            said["batches"] = [self._described(one) for one in batches]
            said["waited_for"] = self._waited_for(said.get("model", ""), from_s, first)
        said["in_words"] = list(_in_words(said))
        return said

    def _described(self, batch: Batch) -> dict[str, Any]:
        kept = self._kept(batch.number)
        said: dict[str, Any] = {
            "number": batch.number,
            "rows": batch.rows,
            "requests": None if kept is None else len(kept.queued_s),
            "reason": batch.reason,
            "why": WHY.get(batch.reason, batch.reason),
            "engine": batch.engine,
            "slot": batch.slot,
            "compute_us": _us(batch.finished_s - batch.started_s),
        }
        if batch.failed:
            said["failed"] = True
        if kept is not None and kept.tenants:
            shares: dict[str, int] = {}
            for tenant, rows in zip(kept.tenants, kept.rows or [1] * len(kept.tenants), strict=True):
                shares[tenant] = shares.get(tenant, 0) + rows
            said["tenants"] = shares
        return said

    def _waited_for(self, model: str, from_s: float, batch: Batch) -> list[dict[str, Any]]:
        """The runs of other batches between its coming and its own batch's run."""
        waits = []
        for _, one, *_ in self._batches.get(model, ()):
            if one is batch or one.engine != batch.engine:
                continue
            overlap_s = min(one.finished_s, batch.started_s) - max(one.started_s, from_s)
            if overlap_s > 0:
                waits.append({"batch": one.number, "rows": one.rows, "us": _us(overlap_s)})
        return waits

    def _kept(self, number: int) -> Kept | None:
        kept = chain.from_iterable(self._batches.values())
        return next((Kept(*one) for one in kept if one[1].number == number), None)


def _us(seconds: float) -> int:
    return max(0, round(seconds * 1e6))


def _times(from_s: float, to_s: float, first: Batch, last: Batch) -> dict[str, int]:
    """Stages one after another; of a request in several batches, its runs are one stage."""
    packed_s = first.dispatched_s or first.started_s  # packing it failed
    return {
        "queue": _us(first.gathered_s - from_s),
        "pack": _us(packed_s - first.gathered_s),
        "wait_for_engine": _us(first.started_s - packed_s),
        "compute": _us(last.finished_s - first.started_s),
        "answer": _us(to_s - last.finished_s),
        "total": _us(to_s - from_s),
    }


def _in_words(said: dict[str, Any]) -> Iterable[str]:
    times = said["times_us"]
    total = f"{times['total'] / 1000:.2f} ms"
    if "items" in said:
        yield f"It took {total} for {_counted(said['items'], 'item')}: ask for {said['id']}.0 and so on."
        return
    if "batches" not in said:
        slug = said.get("problem")
        why = f": {KINDS[slug].title}" if slug in KINDS else ""
        yield f"It rode in no batch; it was answered with {said['status']} after {total}{why}."
        return
    stages = ("queue", "pack", "wait_for_engine", "compute", "answer")
    parts = ", ".join(f"{name.replace('_', ' ')} {times[name] / 1000:.2f}" for name in stages)
    yield f"It took {total}: {parts} (ms)."
    for batch in said["batches"]:
        others = "" if batch["requests"] is None else f" of {_counted(batch['requests'], 'request')}"
        yield (
            f"It rode in batch {batch['number']} with {_counted(batch['rows'], 'row')}{others}, "
            f"which left because {batch['why']} ({batch['reason']})."
        )
        if "failed" in batch:
            yield "That batch failed, or did not end in time."
    waited = said["waited_for"]
    for wait in waited:
        of_batch = f"batch {wait['batch']} ({_counted(wait['rows'], 'row')})"
        yield f"Before that it waited {wait['us'] / 1000:.2f} ms for the run of {of_batch}."
    if not waited:
        yield "The engine ran nothing else meanwhile."


def _counted(count: int, what: str) -> str:
    return f"{count} {what}" if count == 1 else f"{count} {what}s"


def explain_routes(core: Inference, recent: Recent) -> list[Route]:
    """The route, for Starlette."""

    async def explain(request: Request) -> Response:
        response = json(recent.explain(request.path_params["id"]))
        response.headers["cache-control"] = "no-store"
        return response

    return [Route("/v1/requests/{id}", guarded(core, "admin", explain), methods=["GET"])]
