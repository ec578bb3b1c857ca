"""GET /metrics: Prometheus' text format, or OpenMetrics for those who ask for it.

A scrape must not hold up requests: the text is made one family after another, and between them the loop does
what there is to do.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable

from prometheus_client import CollectorRegistry, GCCollector, ProcessCollector
from prometheus_client.core import Metric
from prometheus_client.exposition import choose_encoder
from prometheus_client.registry import Collector
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from cobatch.server.api.metrics import Metrics
from cobatch.server.api.routing import as_response, guarded
from cobatch.server.http.compression import compressed
from cobatch.server.http.reply import Reply
from cobatch.server.inference.service import Core
from cobatch.server.observability.gpu import Gpus

METRICS = "/metrics"
_EOF = b"# EOF\n"


class _One(Collector):
    """What the encoders take for a registry, with one family."""

    def __init__(self, metric: Metric) -> None:
        self._metric = metric

    def collect(self) -> Iterable[Metric]:
        return (self._metric,)


def metrics_routes(core: Core, gpus: Gpus) -> list[Route]:
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
