"""The most that any policy could answer in time: an upper bound, with its reasons.

**Capacity.** A run of b rows holds the engine for L(b), whatever the policy, and none of its rows is answered
in time if L(b) is longer than the deadline. So in the long run a second of the engine yields at most
max over b of b * P(L(b) <= deadline) / E[L(b)] answers in time (each run is a renewal; no policy knows
L(b) beforehand).

**A path.** For given times of arrival there is more to say. Give each row that was answered in time an
equal part of its run: at least 1 / capacity seconds, within the time from its arrival to its deadline, and
parts do not overlap. So these rows could all be jobs of that length on one machine, each finished between
its arrival and its deadline. Of equal jobs whose deadlines come in the order of their arrivals, first come
first served, leaving out each that would be late, finishes as many as can be (exchange argument: in an
optimal schedule put jobs in order of arrival, and swap the first that differs). N nodes are at most one
machine N times as fast. Exact for runs that always take the same time, in the mean for others. What it
does not count: a batch starts only when its last row is there.

A scenario, and running it.

A run in figures.
"""

from __future__ import annotations

import gc
import inspect
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field
from functools import partial
from math import inf
from typing import Any

import numpy as np

from benchmarks.scheduling.baselines import Baseline, Clipper, FixedWindow, SizeOrTimeout, TritonLike
from cobatch.batcher.simulator.clock import VirtualLoop
from cobatch.batcher.simulator.engine import Clockwork, Profile, SimulatedWorker
from cobatch.batcher.simulator.nodes import (
    ANSWERED,
    EXPIRED,
    FAILED,
    REFUSED,
    CobatchNode,
    Node,
    Records,
    Router,
    make_router,
)
from cobatch.batcher.simulator.traffic import Arrivals, Caller, SimulatedRequest, Traffic

_STEPS = 200


def capacity(profile: Profile, max_batch_size: int, deadline_s: float | None = None) -> tuple[float, int]:
    """Rows per second of one engine that can be in time at all, and the batch size for that."""
    best, best_rows = 0.0, 1
    for rows in range(1, min(max_batch_size, profile.max_rows) + 1):
        rate = rows * _in_time(profile, rows, deadline_s) / profile.mean_s(rows)
        if rate > best:
            best, best_rows = rate, rows
    return best, best_rows


def _in_time(profile: Profile, rows: int, deadline_s: float | None) -> float:
    """The part of runs that take no longer than the deadline."""
    if deadline_s is None or profile.quantile_s(rows, 1.0) <= deadline_s:
        return 1.0
    levels = [(step + 0.5) / _STEPS for step in range(_STEPS)]
    return sum(profile.quantile_s(rows, level) <= deadline_s for level in levels) / _STEPS


def path_bound(
    times: Iterable[float], rate: float, deadline_s: float | None, begin_s: float, end_s: float
) -> int:
    """How many of the one-row requests that come at these times can be answered in time, in this stretch."""
    each_s = 1 / rate
    limit_s = inf if deadline_s is None else deadline_s
    free_s, answered = 0.0, 0
    for time_s in times:
        if time_s >= end_s:
            break
        done_s = max(free_s, time_s) + each_s
        if done_s <= time_s + limit_s:
            free_s = done_s
            answered += begin_s <= done_s < end_s
    return answered


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


Array = np.ndarray[Any, Any]
PERCENTILES = (50.0, 90.0, 95.0, 99.0, 99.9)


@dataclass
class Figures:
    """Of all callers, or of those of one name, in the measured time: what ended in it.

    Rates per second. `goodput`: answered within the deadline (without one: answered). `rows_share`: its
    part of all rows that were answered. `latency_ms`: percentile to milliseconds, of what was answered.
    """

    ended: int
    answered: int
    goodput: float
    late: int
    expired: int
    failed: int
    refused: int
    rows_share: float
    latency_ms: dict[str, float]


@dataclass
class Results:
    """`total`, and `tenants` by name. `bound`: the most goodput that any policy could have reached, and
    `capacity` the most at any load; in requests per second, None where requests differ. `utilisation`: the
    part of the time that engines ran. Batches and reasons count from the start of the simulation."""

    policy: str
    offered: float | None
    total: Figures
    tenants: dict[str, Figures]
    bound: float | None
    capacity: float | None
    utilisation: float
    mean_batch: float
    batches: dict[int, int]
    reasons: dict[str, int]
    refusals: dict[str, int]
    came: int
    open_requests: int
    took_s: float

    def as_json(self) -> dict[str, Any]:
        """All of it."""
        return asdict(self)


def results_of(run: Run) -> Results:
    """The figures of a run."""
    scenario = run.scenario
    records = run.records.arrays()
    inside = records["ends"] >= scenario.warmup_s
    measured = {name: values[inside] for name, values in records.items()}
    names: dict[str, list[int]] = {}
    for number, caller in enumerate(scenario.callers):
        names.setdefault(caller.name, []).append(number)
    limits = np.array([np.inf if c.deadline_ms is None else c.deadline_ms / 1000 for c in scenario.callers])
    answered_rows = int(measured["rows"][measured["fates"] == ANSWERED].sum())

    def figures(callers: list[int]) -> Figures:
        chosen = np.isin(measured["callers"], callers)
        part = {name: values[chosen] for name, values in measured.items()}
        return _figures(part, limits, scenario.seconds, answered_rows)

    best = bounds(scenario)
    rows = sum(size * count for size, count in run.batches.items())
    return Results(
        policy=scenario.policy,
        offered=None if isinstance(scenario.arrivals, Closed) else scenario.arrivals.rate,
        total=figures(list(range(len(scenario.callers)))),
        tenants={name: figures(numbers) for name, numbers in names.items()},
        bound=best[0],
        capacity=best[1],
        utilisation=run.busy_s / run.end_s / scenario.nodes,
        mean_batch=rows / max(1, run.batches.total()),
        batches=dict(sorted(run.batches.items())),
        reasons=dict(run.reasons.most_common()),
        refusals=dict(run.records.refusals.most_common()),
        came=run.records.came,
        open_requests=run.open_requests,
        took_s=run.took_s,
    )


def _figures(part: dict[str, Array], limits: Array, seconds: float, answered_rows: int) -> Figures:
    fates, latencies = part["fates"], part["latencies"]
    answered = fates == ANSWERED
    # A nanosecond: sums of times are not exact.
    good = answered & (latencies <= limits[part["callers"]] + 1e-9)
    count = {fate: int((fates == fate).sum()) for fate in (ANSWERED, EXPIRED, FAILED, REFUSED)}
    times_ms = latencies[answered] * 1000
    found = np.percentile(times_ms, PERCENTILES).tolist() if len(times_ms) else [0.0] * len(PERCENTILES)
    return Figures(
        ended=len(fates),
        answered=count[ANSWERED],
        goodput=float(good.sum()) / seconds,
        late=count[ANSWERED] - int(good.sum()),
        expired=count[EXPIRED],
        failed=count[FAILED],
        refused=count[REFUSED],
        rows_share=float(part["rows"][answered].sum()) / max(1, answered_rows),
        latency_ms={f"p{level:g}": value for level, value in zip(PERCENTILES, found, strict=True)},
    )


def bounds(scenario: Scenario) -> tuple[float | None, float | None]:
    """The most goodput, and the capacity, where all requests are of one row and one deadline."""
    kinds = {(caller.rows, caller.deadline_ms) for caller in scenario.callers}
    if len(kinds) > 1 or kinds.pop()[0] != 1:
        return None, None
    deadline_ms = scenario.callers[0].deadline_ms
    deadline_s = None if deadline_ms is None else deadline_ms / 1000
    most = scenario.nodes * capacity(scenario.profile, scenario.batch_rows, deadline_s)[0]
    if isinstance(scenario.arrivals, Closed):
        return most, most
    times = Traffic(scenario.arrivals, scenario.callers, scenario.seed).times()
    end_s = scenario.warmup_s + scenario.seconds
    answered = path_bound(times, most, deadline_s, scenario.warmup_s, end_s)
    return answered / scenario.seconds, most
