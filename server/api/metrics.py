"""The metrics as they are now, read from the counters when somebody asks: a request pays for none of this.

`Metrics.families` makes them one after another; `server.api.metrics` has them turned into text.

GET /metrics: Prometheus' text format, or OpenMetrics for those who ask for it.

A scrape must not hold up requests: the text is made one family after another, and between them the loop does
what there is to do.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TypeVar

import numpy as np
from prometheus_client import CollectorRegistry, GCCollector, ProcessCollector
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    InfoMetricFamily,
    Metric,
)
from prometheus_client.exposition import choose_encoder
from prometheus_client.registry import Collector
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from cobatch import __version__
from cobatch.batcher.batcher import Batcher
from cobatch.batcher.durations import EDGES_S, DurationHistogram
from cobatch.batcher.scheduling.priority import DEFAULT
from cobatch.batcher.statistics import PADDING_STEPS
from cobatch.server.api.routing import as_response, guarded
from cobatch.server.http.compression import compressed
from cobatch.server.http.reply import Reply
from cobatch.server.inference.model import Model
from cobatch.server.inference.service import Inference
from cobatch.server.observability import metric_families as names
from cobatch.server.observability.gpu import Gpu, Gpus
from cobatch.server.observability.metric_families import SHARE_BOUNDS, TIME_BOUNDS, Family
from cobatch.server.observability.record import INFER_ROUTE

STATES = ("loading", "ready", "recovering", "failed", "dead", "draining")
# One row of a table: the labels' values, and the value.
Rows = Iterable[tuple[tuple[object, ...], float]]
T = TypeVar("T", bound=CounterMetricFamily | GaugeMetricFamily)
_AT = np.searchsorted(EDGES_S, TIME_BOUNDS) + 1


class Metrics:
    """Of one process."""

    def __init__(self, core: Inference) -> None:
        self._core = core

    def families(self, gpus: Sequence[Gpu]) -> Iterator[Metric]:
        """All that there are."""
        yield _info(names.INFO, [(__version__,)])
        yield _gauge(names.READY, [((), self._core.ready)])
        yield from self._requests()
        yield from self._callers()
        loaded = [(name, m.batcher) for name, m in self._core.models.items() if m.batcher is not None]
        yield from self._states()
        yield from _queues(loaded, self._core.models)
        yield from _batches(loaded)
        yield from _padding(loaded)
        yield from _engines(loaded)
        yield from self._loop()
        if gpus:
            yield from _gpus(gpus)

    def _requests(self) -> Iterator[Metric]:
        requests: Counter[tuple[object, ...]] = Counter()
        http: Counter[tuple[object, ...]] = Counter(self._core.observer.http)
        durations = []
        for name, model in self._core.models.items():
            traffic = model.all_traffic
            durations.append(((name,), traffic.durations))
            requests[name, 200, ""] = traffic.durations.count
            for (status, slug), count in traffic.problems.items():
                requests[name, status, slug] = count
        for model in self._core.models.values():
            infer = model.infer_traffic
            http[INFER_ROUTE, "POST", 200, ""] += infer.durations.count
            for (status, slug), count in infer.problems.items():
                http[INFER_ROUTE, "POST", status, slug] += count
        yield _counter(names.REQUESTS, requests.items())
        yield _times(names.DURATION, durations)
        yield _counter(names.HTTP_REQUESTS, http.items())

    def _callers(self) -> Iterator[Metric]:
        core = self._core
        if core.auth is None:
            return
        yield _counter(names.AUTH, [((result,), count) for result, count in core.auth.results.items()])
        totals = core.tenant_totals()
        words: tuple[tuple[str, Callable[[Any], int]], ...] = (
            ("answered", lambda total: total.answered),
            ("failed", lambda total: total.failed),
            ("refused", lambda total: total.refused),
        )
        yield _counter(
            names.TENANT_REQUESTS,
            [((name, word), count(total)) for name, total in totals for word, count in words],
        )
        yield _counter(names.TENANT_ROWS, [((name,), total.rows) for name, total in totals])
        yield _counter(names.TENANT_ENGINE, [((name,), total.engine_s) for name, total in totals])
        yield _gauge(names.TENANT_QUEUE, [((name,), total.queued_rows) for name, total in totals])

    def _states(self) -> Iterator[Metric]:
        models = self._core.models.items()
        states = {name: state_of(model, self._core.draining) for name, model in models}
        yield _gauge(
            names.STATE,
            [((name, word), word == state) for name, state in states.items() for word in STATES],
        )

    def _loop(self) -> Iterator[Metric]:
        lag = self._core.observer.lag
        yield _times(names.LAG, [((), lag.lags)])
        if lag.cpu_s is not None:
            yield _counter(names.LOOP_CPU, [((), lag.cpu_s)])


def state_of(model: Model, draining: bool) -> str:
    """Which of `STATES` a model is in."""
    if model.load_error is not None:
        return "failed"
    if model.batcher is None:
        return "loading"
    if model.dead:
        return "dead"
    if draining:
        return "draining"
    return "ready" if model.ready else "recovering"


Loaded = Sequence[tuple[str, Batcher]]


def _queues(loaded: Loaded, models: dict[str, Model]) -> Iterator[Metric]:
    open_ = {name: batcher.open_requests() for name, batcher in loaded}
    for levels, _ in open_.values():
        levels.setdefault(DEFAULT, 0)
    counters = [(name, batcher.counters) for name, batcher in loaded]
    yield _gauge(names.IN_FLIGHT, [((name,), requests) for name, (_, requests) in open_.items()])
    yield _counter(names.CANCELLED, [((name,), c.cancelled) for name, c in counters])
    yield _counter(names.EXPIRED, [((name,), c.expired) for name, c in counters])
    yield _gauge(
        names.QUEUE_ROWS,
        [((name, level), rows) for name, (levels, _) in open_.items() for level, rows in levels.items()],
    )
    yield _gauge(names.QUEUE_LIMIT, [((name,), models[name].settings.max_queue_rows) for name, _ in loaded])
    yield _times(names.QUEUE_DELAY, [((name,), c.queue_delays) for name, c in counters])


def _batches(loaded: Loaded) -> Iterator[Metric]:
    counters = [(name, batcher.counters) for name, batcher in loaded]
    yield _counter(
        names.BATCHES, [((name, reason), n) for name, c in counters for reason, n in c.reasons.items()]
    )
    yield _batch_rows(loaded)
    yield _gauge(names.FULL_ROWS, [((name,), batcher.full_rows) for name, batcher in loaded])
    yield _times(names.COMPUTE, [((name,), c.run_times) for name, c in counters])
    yield _counter(names.PACKING, [((n,), sum(f.input_s for f in c.by_rows.values())) for n, c in counters])
    yield _counter(names.DELIVERY, [((n,), sum(f.output_s for f in c.by_rows.values())) for n, c in counters])


def _batch_rows(loaded: Loaded) -> Metric:
    """Cut at the powers of two up to the largest batch."""
    family = _histogram(names.BATCH_ROWS)
    for name, batcher in loaded:
        bounds = [1 << power for power in range((batcher.max_batch_size - 1).bit_length())]
        by_rows = [(rows, figures.batches) for rows, figures in batcher.counters.by_rows.items()]
        upto = [sum(n for rows, n in by_rows if rows <= bound) for bound in [*bounds, batcher.max_batch_size]]
        buckets = [
            (str(float(bound)), float(n))
            for bound, n in zip([*bounds, batcher.max_batch_size], upto, strict=True)
        ]
        buckets.append(("+Inf", float(sum(n for _, n in by_rows))))
        family.add_metric([name], buckets, float(sum(rows * n for rows, n in by_rows)))
    return family


def _padding(loaded: Loaded) -> Iterator[Metric]:
    padded = [(n, b.counters, total) for n, b in loaded if (total := b.counters.padding_total) is not None]
    if not padded:
        return
    family = _histogram(names.PADDING_SHARE)
    for name, counters, _ in padded:
        steps = counters.padding_shares
        upto = [sum(steps[: round(bound * PADDING_STEPS) + 1]) for bound in SHARE_BOUNDS]
        buckets = [(str(float(bound)), float(n)) for bound, n in zip(SHARE_BOUNDS, upto, strict=True)]
        buckets.append(("+Inf", float(sum(steps))))
        family.add_metric([name], buckets, sum(step * n for step, n in enumerate(steps)) / PADDING_STEPS)
    yield family
    yield _counter(names.ELEMENTS, [((name,), total.elements) for name, _, total in padded])
    yield _counter(names.PADDING_ELEMENTS, [((name,), total.padding) for name, _, total in padded])


def _engines(loaded: Loaded) -> Iterator[Metric]:
    counters = [(name, batcher.counters) for name, batcher in loaded]
    engines = [(name, i, figures) for name, c in counters for i, figures in enumerate(c.engines)]
    lanes = [(name, lane) for name, batcher in loaded for lane in batcher.all_lanes]
    yield _gauge(names.ENGINES, [((name,), batcher.lanes) for name, batcher in loaded])
    yield _counter(names.BUSY, [((name, i), figures.busy_s) for name, i, figures in engines])
    yield _counter(names.RUNS, [((name, i), figures.runs) for name, i, figures in engines])
    yield _counter(names.FAILED_RUNS, [((name,), c.failed_runs) for name, c in counters])
    yield _counter(names.HUNG_RUNS, [((name,), c.hung) for name, c in counters])
    yield _counter(names.RETRIES, [((name,), c.retries) for name, c in counters])
    yield _gauge(names.SLOTS, [((name, lane.number), lane.engine.slots) for name, lane in lanes])
    yield _gauge(names.SLOTS_IN_USE, [((name, lane.number), lane.in_slots) for name, lane in lanes])


def _gpus(gpus: Sequence[Gpu]) -> Iterator[Metric]:
    yield _info(names.GPU_INFO, [(gpu.number, gpu.name, gpu.uuid) for gpu in gpus])
    figures: tuple[tuple[Family, Callable[[Gpu], float | None]], ...] = (
        (names.GPU_MEMORY, lambda gpu: gpu.memory_bytes),
        (names.GPU_MEMORY_USED, lambda gpu: gpu.used_bytes),
        (names.GPU_BUSY, lambda gpu: gpu.utilization),
    )
    for family, figure in figures:
        said = [(gpu.number, figure(gpu)) for gpu in gpus]
        yield _gauge(family, [((number,), value) for number, value in said if value is not None])


def _counter(family: Family, rows: Rows) -> Metric:
    return _filled(CounterMetricFamily(family.name, family.help, labels=family.labels), rows)


def _gauge(family: Family, rows: Rows) -> Metric:
    return _filled(GaugeMetricFamily(family.name, family.help, labels=family.labels), rows)


def _filled(metric: T, rows: Rows) -> T:
    for labels, value in rows:
        metric.add_metric([str(label) for label in labels], float(value))
    return metric


def _info(family: Family, rows: Iterable[tuple[object, ...]]) -> Metric:
    metric = InfoMetricFamily(family.name, family.help, labels=family.labels)
    for labels in rows:
        metric.add_metric([str(label) for label in labels], {})
    return metric


def _histogram(family: Family) -> HistogramMetricFamily:
    return HistogramMetricFamily(family.name, family.help, labels=family.labels)


def _times(family: Family, rows: Iterable[tuple[tuple[str, ...], DurationHistogram]]) -> Metric:
    metric = _histogram(family)
    for labels, samples in rows:
        upto = np.cumsum(samples.counts())
        buckets = [
            (str(float(bound)), float(upto[at - 1])) for bound, at in zip(TIME_BOUNDS, _AT, strict=True)
        ]
        metric.add_metric(labels, [*buckets, ("+Inf", float(upto[-1]))], samples.sum_s)
    return metric


METRICS = "/metrics"
_EOF = b"# EOF\n"


class _One(Collector):
    """What the encoders take for a registry, with one family."""

    def __init__(self, metric: Metric) -> None:
        self._metric = metric

    def collect(self) -> Iterable[Metric]:
        return (self._metric,)


def metrics_routes(core: Inference, gpus: Gpus) -> list[Route]:
    """The route. Where callers are known it needs `admin`, unless `metrics_open` lets everybody read it."""
    metrics = Metrics(core)
    process = CollectorRegistry()
    ProcessCollector(registry=process)
    GCCollector(registry=process)

    async def scrape(request: Request) -> Response:
        encode, content_type = choose_encoder(request.headers.get("accept", ""))
        seen = await asyncio.to_thread(gpus.read) if gpus.some else []
        pieces: list[bytes] = []
        for metric in [*metrics.families(seen), *process.collect()]:
            pieces.append(encode(_One(metric)).removesuffix(_EOF))
            await asyncio.sleep(0)
        if content_type.startswith("application/openmetrics-text"):
            pieces.append(_EOF)
        reply = Reply(
            200, content_type.encode(), (b"".join(pieces),), headers=((b"cache-control", b"no-store"),)
        )
        accept = request.headers.get("accept-encoding", "").encode("latin-1")
        return as_response(await compressed(reply, accept, core.settings.server.compress_min_bytes))

    return [Route(METRICS, guarded(core, "admin", scrape), methods=["GET"])]
