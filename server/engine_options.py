"""From a model's settings to what its engine asks."""

from pathlib import Path

from engines.loader import EngineOptions
from server.settings import ModelSettings


def engine_options(settings: ModelSettings) -> EngineOptions:
    """`batch_buckets` has been checked with the settings."""
    buckets = settings.batch_buckets
    return EngineOptions(
        threads=settings.threads,
        device=settings.device,
        batch_buckets=None if buckets is None else tuple(int(size) for size in buckets.split(",")),
        tensorrt_runtime=settings.tensorrt_runtime,
        cuda_graphs=settings.cuda_graphs,
        plan_cache=None if settings.plan_cache is None else Path(settings.plan_cache).expanduser(),
        plan_host_code=settings.plan_host_code,
    )
