"""Metrics of batched functions (`cobatch.batched`), for an application of its own.

    from prometheus_client import REGISTRY
    REGISTRY.register(FunctionCollector(embed, Model.classify))

Everything that serves that registry, as `prometheus_client.make_asgi_app()`, has them then.
"""

from collections.abc import Iterator
from typing import Any

from prometheus_client.core import Metric
from prometheus_client.registry import Collector

from cobatch.batcher.library.function import Batched, BatchedMethod
from cobatch.server.observability import metric_families as names
from cobatch.server.observability.metrics import metric, sizes_metric, times_metric


class FunctionCollector(Collector):
    """Collects the statistics of batched functions and methods; their names should differ."""

    def __init__(self, *functions: Batched[Any, Any] | BatchedMethod[Any, Any, Any]) -> None:
        self._functions = functions

    def collect(self) -> Iterator[Metric]:
        """Yield all metrics."""
        all_ = [function.statistics() for function in self._functions]
        for family, attribute in (
            (names.CALLS, "accepted"),
            (names.CALLS_FAILED, "failed"),
            (names.CALLS_EXPIRED, "expired"),
            (names.CALLS_CANCELLED, "cancelled"),
            (names.CALLS_QUEUED, "queued"),
            (names.FULL_BATCH, "full_batch_size"),
            (names.FAILED_BATCHES, "failed_batches"),
        ):
            yield metric(family, [((one.name,), getattr(one, attribute)) for one in all_])
        refusals = [((one.name, reason), n) for one in all_ for reason, n in one.refusals.items()]
        yield metric(names.CALLS_REFUSED, refusals)
        yield sizes_metric(
            names.BATCH_SIZE, [(one.name, one.max_batch_size, one.batch_sizes) for one in all_]
        )
        yield times_metric(names.CALL_QUEUE_DELAY, [((one.name,), one.queue_delays) for one in all_])
        yield times_metric(names.BATCH_RUN, [((one.name,), one.run_times) for one in all_])
