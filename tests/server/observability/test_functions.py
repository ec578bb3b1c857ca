"""Metrics of batched functions in a registry of another application."""

from __future__ import annotations

import asyncio

import pytest
from prometheus_client import CollectorRegistry
from prometheus_client.exposition import generate_latest
from prometheus_client.parser import text_string_to_metric_families

from cobatch import QueueFull, batched
from cobatch.server.observability.functions import FunctionCollector
from cobatch.server.observability.metric_families import FUNCTION_FAMILIES
from tests.support.library.gated import Gated, blocked, queued


class Model:
    @batched()
    def same(self, items: list[int]) -> list[int]:
        return items


async def test_a_registry_shows_the_statistics_of_functions_and_methods() -> None:
    function = Gated(is_open=False)
    double = batched(name="double", max_batch_size=4, max_queue=2)(function)
    registry = CollectorRegistry()
    registry.register(FunctionCollector(double, Model.same))

    def value(name: str, labels: dict[str, str]) -> float | None:
        return registry.get_sample_value(f"cobatch_function_{name}", labels)

    first = await blocked(function, double, 0)
    calls = [asyncio.ensure_future(double(n)) for n in (1, 2)]
    await queued(double.statistics, 2)
    with pytest.raises(QueueFull):
        await double(3)
    assert value("calls_queued", {"function": "double"}) == 2
    function.gate.set()
    await asyncio.gather(first, *calls)
    await Model().same(1)
    assert value("calls_total", {"function": "double"}) == 3
    assert value("calls_refused_total", {"function": "double", "reason": "queue"}) == 1
    assert value("calls_total", {"function": "Model.same"}) == 1
    assert value("batch_size_bucket", {"function": "double", "le": "1.0"}) == 1
    assert value("batch_size_sum", {"function": "double"}) == 3
    assert value("run_seconds_count", {"function": "double"}) == 2
    families = text_string_to_metric_families(generate_latest(registry).decode())
    assert {family.name for family in families} == {family.name for family in FUNCTION_FAMILIES}
