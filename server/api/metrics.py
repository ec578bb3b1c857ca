"""GET /metrics: Prometheus' text format, or OpenMetrics if `Accept` has it.

The metrics are read from the counters at each scrape, so requests pay nothing for them. The text is made one
family at a time, and the event loop serves requests in between.
"""

import asyncio
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import reduce
from typing import NamedTuple

from prometheus_client import CollectorRegistry, GCCollector, ProcessCollector
from prometheus_client.core import Metric
from prometheus_client.exposition import choose_encoder
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from cobatch import __version__
from cobatch.batcher.batcher import Batcher
from cobatch.batcher.scheduling.priority import DEFAULT
from cobatch.batcher.statistics import PADDING_STEPS, BatchTotals
from cobatch.server.api.routing import compressed_response, guarded
from cobatch.server.http.reply import Reply
from cobatch.server.inference.model import Model
from cobatch.server.inference.served import ServedPipeline
from cobatch.server.inference.service import Inference
from cobatch.server.observability import metric_families as names
from cobatch.server.observability.gpu import Gpu, Gpus
from cobatch.server.observability.metric_families import SHARE_BOUNDS, Family
from cobatch.server.observability.metrics import (
    Series,
    histogram_metric,
    metric,
    sizes_metric,
    times_metric,
)
from cobatch.server.observability.record import INFER_ROUTE
from cobatch.server.observability.traffic import Traffic

METRICS = "/metrics"
STATES = ("loading", "ready", "recovering", "failed", "dead", "draining")
Batchers = Sequence[tuple[str, Batcher]]

_EOF = b"# EOF\n"


def metrics_routes(inference: Inference, gpus: Gpus) -> list[Route]:
    """Return the route. With authentication it needs `admin`, unless the setting `metrics_open` is on."""
    process = CollectorRegistry()
    ProcessCollector(registry=process)
    GCCollector(registry=process)

    async def scrape(request: Request) -> Response:
        await inference.observer.collect()
        encode, content_type = choose_encoder(request.headers.get("accept", ""))
        seen = await asyncio.to_thread(gpus.read) if gpus.available else []
        pieces: list[bytes] = []
        for one in [*families(inference, seen), *process.collect()]:
            pieces.append(encode(_OneFamily(one)).removesuffix(_EOF))
            await asyncio.sleep(0)
        if content_type.startswith("application/openmetrics-text"):
            pieces.append(_EOF)
        headers = ((b"cache-control", b"no-store"),)
        reply = Reply(200, content_type.encode(), (b"".join(pieces),), headers=headers)
        return await compressed_response(inference, request, reply)

    return [Route(METRICS, guarded(inference, "admin", scrape), methods=["GET"])]


class _OneFamily(NamedTuple):
    """One family, as the registry that the encoders expect."""

    metric: Metric

    def collect(self) -> Iterable[Metric]:
        return self


def families(inference: Inference, gpus: Sequence[Gpu]) -> Iterator[Metric]:
    """Yield all metrics of the process."""
    targets = inference.targets
    batchers = [(name, m.batcher) for name, m in inference.models.items() if m.batcher is not None]
    queues = [(name, one.batcher) for name, one in targets.items() if one.batcher is not None]
    yield metric(names.INFO, [((__version__,), 1)])
    yield metric(names.READY, [((), inference.ready)])
    yield from _requests(inference)
    yield from _tenants(inference)
    states = [(name, state_of(model, inference.draining)) for name, model in targets.items()]
    yield metric(names.STATE, [((name, one), one == state) for name, state in states for one in STATES])
    yield from _queues(queues)
    yield from _batches(batchers)
    yield from _padding(batchers)
    yield from _engines(batchers)
    yield metric(names.LOG_DROPPED, [((), inference.observer.log_stream.dropped)])
    lag = inference.observer.lag
    yield times_metric(names.LAG, [((), lag.lags)])
    if lag.cpu_s is not None:
        yield metric(names.LOOP_CPU, [((), lag.cpu_s)])
    fronts = inference.observer.fronts
    if fronts:
        yield metric(names.FRONT_REQUESTS, [((number,), one.requests) for number, one in fronts.items()])
        yield metric(names.FRONT_CONNECTIONS, [((n,), one.connections) for n, one in fronts.items()])
        yield metric(names.FRONT_CPU, [((number,), one.cpu_s) for number, one in fronts.items()])
        yield times_metric(names.FRONT_LAG, [((str(number),), one.lags) for number, one in fronts.items()])
    if gpus:
        yield from _gpus(gpus)


def state_of(model: Model | ServedPipeline, draining: bool) -> str:
    """Return the state of a model or pipeline, one of `STATES`."""
    if model.load_error is not None:
        return "failed"
    if model.batcher is None:
        return "loading"
    if model.dead:
        return "dead"
    if draining:
        return "draining"
    return "ready" if model.ready else "recovering"


def _requests(inference: Inference) -> Iterator[Metric]:
    requests: Counter[tuple[object, ...]] = Counter()
    http: Counter[tuple[object, ...]] = Counter(inference.observer.http)
    durations = []
    for name, target in inference.targets.items():
        traffic = reduce(Traffic.plus, target.traffics)
        durations.append(((name,), traffic.durations))
        requests[name, 200, ""] = traffic.durations.count
        requests.update({(name, *kind): count for kind, count in traffic.problems.items()})
    for model in inference.models.values():
        http[INFER_ROUTE, "POST", 200, ""] += model.infer_traffic.durations.count
        problems = model.infer_traffic.problems
        http.update({(INFER_ROUTE, "POST", *kind): count for kind, count in problems.items()})
    yield metric(names.REQUESTS, requests.items())
    yield times_metric(names.DURATION, durations)
    yield metric(names.HTTP_REQUESTS, http.items())


def _tenants(inference: Inference) -> Iterator[Metric]:
    if inference.auth is None:
        return
    yield metric(names.AUTH, [((result,), count) for result, count in inference.auth.results.items()])
    totals = inference.tenant_totals()
    results = ("answered", "failed", "refused")
    requests = [((name, result), getattr(total, result)) for name, total in totals for result in results]
    yield metric(names.TENANT_REQUESTS, requests)
    yield metric(names.TENANT_ROWS, [((name,), total.rows) for name, total in totals])
    yield metric(names.TENANT_ENGINE, [((name,), total.engine_s) for name, total in totals])
    yield metric(names.TENANT_QUEUE, [((name,), total.queued_rows) for name, total in totals])


def _queues(batchers: Batchers) -> Iterator[Metric]:
    open_ = {name: batcher.open_requests() for name, batcher in batchers}
    for levels, _ in open_.values():
        levels.setdefault(DEFAULT, 0)
    yield metric(names.IN_FLIGHT, [((name,), requests) for name, (_, requests) in open_.items()])
    yield _of_models(names.CANCELLED, batchers, lambda batcher: batcher.counters.cancelled)
    yield _of_models(names.EXPIRED, batchers, lambda batcher: batcher.counters.expired)
    queued = [((name, level), rows) for name, (levels, _) in open_.items() for level, rows in levels.items()]
    yield metric(names.QUEUE_ROWS, queued)
    yield _of_models(names.QUEUE_LIMIT, batchers, lambda batcher: batcher.admission.max_queue_rows)
    yield times_metric(
        names.QUEUE_DELAY, [((name,), batcher.counters.queue_delays) for name, batcher in batchers]
    )
    yield times_metric(names.COMPUTE, [((name,), batcher.counters.run_times) for name, batcher in batchers])


def _batches(batchers: Batchers) -> Iterator[Metric]:
    def seconds(value: Callable[[BatchTotals], float]) -> Callable[[Batcher], float]:
        return lambda batcher: sum(value(totals) for totals in batcher.counters.by_rows.values())

    reasons = [((name, reason), n) for name, b in batchers for reason, n in b.counters.reasons.items()]
    yield metric(names.BATCHES, reasons)
    batches = [
        (name, b.max_batch_size, {rows: totals.batches for rows, totals in b.counters.by_rows.items()})
        for name, b in batchers
    ]
    yield sizes_metric(names.BATCH_ROWS, batches)
    yield _of_models(names.FULL_ROWS, batchers, lambda batcher: batcher.queue.full_rows)
    yield _of_models(names.EXPECTED_RUN, batchers, lambda batcher: batcher.expected_run_s)
    yield _of_models(names.PACKING, batchers, seconds(lambda totals: totals.input_s))
    yield _of_models(names.DELIVERY, batchers, seconds(lambda totals: totals.output_s))


def _padding(batchers: Batchers) -> Iterator[Metric]:
    padded = [(n, b.counters, total) for n, b in batchers if (total := b.counters.padding_total) is not None]
    if not padded:
        return
    shares: list[Series] = []
    for name, counters, _ in padded:
        steps = counters.padding_shares
        buckets = [(bound, sum(steps[: round(bound * PADDING_STEPS) + 1])) for bound in SHARE_BOUNDS]
        total_share = sum(step * n for step, n in enumerate(steps)) / PADDING_STEPS
        shares.append(((name,), buckets, sum(steps), total_share))
    yield histogram_metric(names.PADDING_SHARE, shares)
    yield metric(names.ELEMENTS, [((name,), total.elements) for name, _, total in padded])
    yield metric(names.PADDING_ELEMENTS, [((name,), total.padding) for name, _, total in padded])


def _engines(batchers: Batchers) -> Iterator[Metric]:
    engines = [(name, i, totals) for name, b in batchers for i, totals in enumerate(b.counters.engines)]
    lanes = [(name, lane) for name, batcher in batchers for lane in batcher.lanes]
    yield _of_models(names.ENGINES, batchers, lambda batcher: len(batcher.lanes))
    yield metric(names.BUSY, [((name, i), totals.busy_s) for name, i, totals in engines])
    yield metric(names.RUNS, [((name, i), totals.runs) for name, i, totals in engines])
    yield _of_models(names.FAILED_RUNS, batchers, lambda batcher: batcher.counters.failed_runs)
    yield _of_models(names.HUNG_RUNS, batchers, lambda batcher: batcher.counters.hung)
    yield _of_models(names.ENGINE_ENDS, batchers, lambda batcher: batcher.counters.ended)
    yield _of_models(names.RETRIES, batchers, lambda batcher: batcher.counters.retries)
    yield _of_models(names.SUSPECTS, batchers, lambda batcher: batcher.suspects)
    yield metric(names.SLOTS, [((name, lane.number), lane.engine.slots) for name, lane in lanes])
    yield metric(names.SLOTS_IN_USE, [((name, lane.number), lane.in_slots) for name, lane in lanes])


def _gpus(gpus: Sequence[Gpu]) -> Iterator[Metric]:
    yield metric(names.GPU_INFO, [((gpu.number, gpu.name, gpu.uuid), 1) for gpu in gpus])
    for family, attribute in (
        (names.GPU_MEMORY, "memory_bytes"),
        (names.GPU_MEMORY_USED, "used_bytes"),
        (names.GPU_BUSY, "utilization"),
    ):
        values = [((gpu.number,), getattr(gpu, attribute)) for gpu in gpus]
        yield metric(family, [(labels, value) for labels, value in values if value is not None])


def _of_models(family: Family, batchers: Batchers, value: Callable[[Batcher], float]) -> Metric:
    return metric(family, [((name,), value(batcher)) for name, batcher in batchers])
