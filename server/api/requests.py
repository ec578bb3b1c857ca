"""GET /v1/requests/ID: where the time of a recent request went, and why its batch was dispatched."""

import time
from collections import Counter
from collections.abc import Callable, Iterable
from datetime import UTC, datetime
from itertools import accumulate, pairwise
from typing import Any

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from cobatch.batcher.request import Batch
from cobatch.batcher.scheduling.policy import REASONS
from cobatch.server.api.routing import guarded, json
from cobatch.server.http.problem import KINDS, Problem
from cobatch.server.http.request_id import place_of
from cobatch.server.inference.service import Inference
from cobatch.server.observability.history import History
from cobatch.server.observability.record import RequestRecord, StepTimes

_STAGES = ("queue", "pack", "wait_for_engine", "compute", "answer")


class Explainer:
    """Explains requests from the history. `clock` is the server's monotonic clock."""

    def __init__(self, history: History, clock: Callable[[], float] = time.monotonic) -> None:
        self._history = history
        self._clock = clock

    def explain(self, request_id: str) -> dict[str, Any]:
        """Return the explanation of a request. Raises Problem if the request is unknown."""
        result = self._by_record(self._history.record(request_id))
        if result is None:
            item = self._history.item(request_id)
            result = self._by_place(item.decode()) if isinstance(item, bytes) else self._by_record(item)
        result = result or self._by_place(request_id)
        if result is None:
            detail = f"request {request_id!r} is unknown, or no longer kept"
            raise Problem("unknown-request", detail, id=request_id)
        return result | {"id": request_id}

    def _by_place(self, request_id: str) -> dict[str, Any] | None:
        """Explain a request whose id names its batch and row."""
        place = place_of(request_id)
        kept = None if place is None else self._history.batch(place[0])
        if place is None or kept is None:
            return None
        rows = kept.rows or [1] * len(kept.queued_s)
        firsts = [0, *accumulate(rows)][:-1]
        if place[1] not in firsts:
            return None
        index = firsts.index(place[1])
        result: dict[str, Any] = {"id": request_id, "model": kept.model, "rows": rows[index]}
        if not kept.batch.failed:
            result["status"] = 200
        if kept.tenants:
            result["tenant"] = kept.tenants[index]
        return self._complete(result, kept.queued_s[index], kept.batch.answered_s, [kept.batch])

    def _by_record(self, record: RequestRecord | None) -> dict[str, Any] | None:
        if record is None:
            return None
        result: dict[str, Any] = {"id": record.request_id, "method": record.method, "path": record.path}
        optional: dict[str, Any] = {"model": record.model, "tenant": record.tenant}
        optional |= {"status": record.status, "problem": record.slug, "rows": record.rows}
        optional |= {"items": len(self._history.items(record.request_id))}
        result |= {name: value for name, value in optional.items() if value}
        if record.steps:
            result["steps"] = [_step(step, record.received_s) for step in record.steps]
        batch = record.batch
        batches = [] if batch is None else list(batch.joined) or [batch]
        return self._complete(result, record.enqueued_s or record.received_s, record.answered_s, batches)

    def _complete(
        self, result: dict[str, Any], from_s: float, to_s: float, batches: list[Batch]
    ) -> dict[str, Any]:
        """Add the time, the stages, the batches and the sentences."""
        arrived = datetime.fromtimestamp(time.time() - self._clock() + from_s, UTC)
        result["time"] = arrived.isoformat(timespec="milliseconds")
        result["times_us"] = _times(from_s, to_s, batches)
        if batches:
            result["batches"] = [self._describe(one) for one in batches]
            result["waited_for"] = self._waited_for(result.get("model", ""), from_s, batches[0])
        result["in_words"] = list(_sentences(result))
        return result

    def _describe(self, batch: Batch) -> dict[str, Any]:
        kept = self._history.batch(batch.number)
        result: dict[str, Any] = {
            "number": batch.number,
            "rows": batch.rows,
            "requests": None if kept is None else len(kept.queued_s),
            "reason": batch.reason,
            "why": REASONS.get(batch.reason, batch.reason),
            "engine": batch.engine,
            "slot": batch.slot,
            "compute_us": _us(batch.finished_s - batch.started_s),
        }
        if batch.failed:
            result["failed"] = True
        if kept is not None and kept.tenants:
            shares: Counter[str] = Counter()
            for tenant, rows in zip(kept.tenants, kept.rows or [1] * len(kept.tenants), strict=True):
                shares[tenant] += rows
            result["tenants"] = shares
        return result

    def _waited_for(self, model: str, from_s: float, batch: Batch) -> list[dict[str, Any]]:
        """Return the runs of other batches between the request's arrival and its own batch's run."""
        return [
            {"batch": one.number, "rows": one.rows, "us": _us(overlap_s)}
            for one in self._history.batches(model)
            if one is not batch
            and one.engine == batch.engine
            and (overlap_s := min(one.finished_s, batch.started_s) - max(one.started_s, from_s)) > 0
        ]


def _us(seconds: float) -> int:
    return max(0, round(seconds * 1e6))


def _times(from_s: float, to_s: float, batches: list[Batch]) -> dict[str, int]:
    """Return consecutive stages; the runs of a request in several batches are one stage."""
    total = {"total": _us(to_s - from_s)}
    if not batches:
        return total
    first, finished_s = batches[0], max(one.finished_s for one in batches)
    packed_s = first.dispatched_s or first.started_s  # 0: packing failed
    ends_s = (first.gathered_s, packed_s, first.started_s, finished_s, to_s)
    stages = zip(_STAGES, pairwise((from_s, *ends_s)), strict=True)
    return {name: _us(end_s - begin_s) for name, (begin_s, end_s) in stages} | total


def _step(step: StepTimes, received_s: float) -> dict[str, Any]:
    """Return a step of a pipeline; `after_us`: from the request's arrival to its call."""
    result: dict[str, Any] = {
        "model": step.model,
        "rows": step.rows,
        "after_us": _us(step.called_s - received_s),
    }
    if step.kind:
        return result | {"problem": step.kind, "total_us": _us(step.finished_s - step.called_s)}
    queue_us, compute_us = _us(step.dispatched_s - step.called_s), _us(step.finished_s - step.started_s)
    return result | {"queue_us": queue_us, "compute_us": compute_us}


def _of_step(step: dict[str, Any]) -> str:
    lead = (
        f"After {step['after_us'] / 1000:.2f} ms its step {step['model']} with {_count(step['rows'], 'row')}"
    )
    if "problem" in step:
        return f"{lead} failed ({step['problem']}), {step['total_us'] / 1000:.2f} ms later."
    return f"{lead} queued for {step['queue_us'] / 1000:.2f} ms and ran for {step['compute_us'] / 1000:.2f}."


def _sentences(result: dict[str, Any]) -> Iterable[str]:
    times = result["times_us"]
    total = f"{times['total'] / 1000:.2f} ms"
    if "items" in result:
        yield f"It took {total} for {_count(result['items'], 'item')}: ask for {result['id']}.0 and so on."
        return
    if "batches" not in result:
        slug = result.get("problem")
        why = f": {KINDS[slug].title}" if slug in KINDS else ""
        yield f"It ran in no batch; it was answered with {result['status']} after {total}{why}."
        yield from map(_of_step, result.get("steps", ()))
        return
    stages = ", ".join(f"{name.replace('_', ' ')} {times[name] / 1000:.2f}" for name in _STAGES)
    yield f"It took {total}: {stages} (ms)."
    for batch in result["batches"]:
        of_requests = "" if batch["requests"] is None else f" of {_count(batch['requests'], 'request')}"
        yield (
            f"It ran in batch {batch['number']} with {_count(batch['rows'], 'row')}{of_requests}, "
            f"dispatched because {batch['why']} ({batch['reason']})."
        )
        if "failed" in batch:
            yield "That batch failed, or did not end in time."
    for wait in result["waited_for"]:
        of_batch = f"batch {wait['batch']} ({_count(wait['rows'], 'row')})"
        yield f"Before that it waited {wait['us'] / 1000:.2f} ms for the run of {of_batch}."
    if not result["waited_for"]:
        yield "The engine ran nothing else in the meantime."
    yield from map(_of_step, result.get("steps", ()))


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def request_routes(inference: Inference, history: History) -> list[Route]:
    """Return the route, for Starlette."""
    explainer = Explainer(history)

    async def explain(request: Request) -> Response:
        await inference.observer.collect()
        response = json(explainer.explain(request.path_params["id"]))
        response.headers["cache-control"] = "no-store"
        return response

    return [Route("/v1/requests/{id}", guarded(inference, "admin", explain), methods=["GET"])]
