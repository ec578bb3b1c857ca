"""A scenario, and running it."""

from __future__ import annotations

import gc
import inspect
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from benchmarks.scheduling.baselines import Baseline, Clipper, FixedWindow, SizeOrTimeout, TritonLike
from cobatch.batcher.simulator.arrivals import Arrivals
from cobatch.batcher.simulator.clock import VirtualLoop
from cobatch.batcher.simulator.engine import Clockwork, SimulatedWorker
from cobatch.batcher.simulator.nodes import CobatchNode, Node, Router, make_router
from cobatch.batcher.simulator.profile import Profile
from cobatch.batcher.simulator.records import Records
from cobatch.batcher.simulator.traffic import Caller, SimulatedRequest, Traffic

COBATCH = "cobatch"
_BASELINES: dict[str, Callable[..., Baseline]] = {
    "fixed-window": FixedWindow,
    "size-or-timeout": SizeOrTimeout,
    "triton": TritonLike,
    "clipper": Clipper,
}
_GIVEN = ("max_batch_size", "max_queue_rows")  # a scenario has them for every policy
POLICIES = (COBATCH, *_BASELINES)


@dataclass(frozen=True)
class Closed:
    """Instead of arrivals: so many callers, each of whom sends its next request `think_ms` after the last
    answer. One that was refused asks again after `retry_ms`."""

    connections: int
    think_ms: float = 0.0
    retry_ms: float = 100.0


@dataclass(frozen=True)
class Scenario:
    """What is simulated. `settings` are the policy's own (`window_ms`, say; cobatch's: `max_delay_ms`...).

    `seconds` are measured after `warmup_s` that are not. `handover_ms`: between the loop and the engine,
    there and back each. `request_us`: what the loop is busy with for each request, half of it when it comes
    and half when it is answered; one node only. `max_queue_rows` None: the server's default.
    """

    profile: Profile
    arrivals: Arrivals | Closed
    callers: tuple[Caller, ...] = (Caller(),)
    policy: str = COBATCH
    settings: dict[str, Any] = field(default_factory=dict)
    seconds: float = 60.0
    warmup_s: float = 2.0
    nodes: int = 1
    router: Router = "two-choices"
    max_batch_size: int | None = None
    max_queue_rows: int | None = None
    slots: int = 2
    handover_ms: float = 0.0
    request_us: float = 0.0
    seed: int = 1

    @property
    def batch_rows(self) -> int:
        """The largest batch."""
        return self.max_batch_size or self.profile.max_rows

    @property
    def queue_rows(self) -> int:
        """The longest queue."""
        return self.max_queue_rows or max(1024, 16 * self.batch_rows)


@dataclass
class Run:
    """What happened. `took_s`: real seconds; `busy_s`: virtual ones in which engines ran, all together."""

    scenario: Scenario
    records: Records
    end_s: float
    open_requests: int
    busy_s: float
    batches: Counter[int]
    reasons: Counter[str]
    took_s: float


def run(scenario: Scenario) -> Run:
    """Run it from an idle start to its end, where what is open stays open. Same seed, same run."""
    loop = VirtualLoop()
    clockworks = [Clockwork(scenario.profile, scenario.seed + 1000 * n) for n in range(scenario.nodes)]
    nodes = [_make_node(scenario, loop, clockwork) for clockwork in clockworks]
    route = make_router(scenario.router, nodes, scenario.seed)
    records = Records(loop, scenario.request_us / 2e6)
    end_s = scenario.warmup_s + scenario.seconds
    times, send = _traffic(scenario, loop, records, route)
    began_s = time.perf_counter()
    gc.collect()
    gc.disable()  # a simulation makes many objects and hardly a cycle
    try:
        loop.run(times, send, end_s)
    finally:
        gc.enable()
    return Run(
        scenario,
        records,
        end_s,
        sum(node.open_requests for node in nodes),
        sum(clockwork.busy_until(loop.now_s) for clockwork in clockworks),
        sum((node.batches for node in nodes), Counter()),
        sum((node.reasons for node in nodes), Counter()),
        time.perf_counter() - began_s,
    )


def _make_node(scenario: Scenario, loop: VirtualLoop, clockwork: Clockwork) -> Node:
    handover_s = scenario.handover_ms / 1000
    if scenario.policy == COBATCH:
        worker = SimulatedWorker(
            scenario.profile,
            max_batch_size=scenario.batch_rows,
            slots=scenario.slots,
            loop=loop,
            clockwork=clockwork,
            handover_s=handover_s,
        )
        return CobatchNode(worker, loop, **{"max_queue_rows": scenario.queue_rows, **scenario.settings})
    make = _BASELINES[scenario.policy]
    settings: dict[str, Any] = {"max_batch_size": scenario.batch_rows, "handover_s": handover_s}
    if make is not FixedWindow:
        settings["max_queue_rows"] = scenario.queue_rows
    return make(loop, clockwork, **{**settings, **scenario.settings})


def _traffic(
    scenario: Scenario, loop: VirtualLoop, records: Records, route: Callable[[], Node]
) -> tuple[Iterator[float], Callable[[], None]]:
    """When requests come, and what to do then."""
    arrivals = scenario.arrivals
    if not isinstance(arrivals, Closed):
        traffic = Traffic(arrivals, scenario.callers, scenario.seed)
        return traffic.times(), partial(_send, traffic.request, records, route)
    drawn = Traffic(None, scenario.callers, scenario.seed)
    send = partial(_send, drawn.request, records, route)

    def again(request: SimulatedRequest, accepted: bool) -> None:  # noqa: ARG001 - they are all alike
        loop.call_later((arrivals.think_ms if accepted else arrivals.retry_ms) / 1000, send)

    records.on_end = again
    return iter([n * 1e-5 for n in range(arrivals.connections)]), send


def _send(make: Callable[[Records], SimulatedRequest], records: Records, route: Callable[[], Node]) -> None:
    request = make(records)
    records.comes(request)
    request.node = node = route()
    why_not = node.submit(request)
    if why_not is not None:
        records.refused(request, why_not)


def settings_of(policy: str) -> tuple[dict[str, Any], list[str]]:
    """A policy's settings with their types, and those that must be given."""
    make = CobatchNode if policy == COBATCH else _BASELINES[policy]
    parameters = inspect.signature(make).parameters.values()
    found = [one for one in parameters if one.kind is one.KEYWORD_ONLY and one.name != "handover_s"]
    needed = [one.name for one in found if one.default is one.empty and one.name not in _GIVEN]
    return {one.name: one.annotation for one in found}, needed
