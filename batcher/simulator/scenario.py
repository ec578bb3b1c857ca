"""A scenario, its run, the figures of a run, and an upper bound of what any policy could reach.

**Capacity.** A run of b rows occupies the engine for L(b) with any policy, and none of its rows is answered
in time if L(b) exceeds the deadline. So in the long run a second of the engine yields at most max over b of b
* P(L(b) <= deadline) / E[L(b)] answers in time (runs are renewals; no policy knows L(b) beforehand).

**Bound on a path.** Given times of arrival allow a tighter bound. Give each row that was answered in time an
equal part of its run: at least 1 / capacity seconds, between its arrival and its deadline, and parts do not
overlap. So these rows could be jobs of that length on one machine, each finished between its arrival and its
deadline. For equal jobs with deadlines in the order of arrival, first come first served that skips late jobs
finishes the most (exchange argument: sort the jobs of an optimal schedule by arrival, and swap the first that
differs). N nodes are at most one machine N times as fast. The bound is exact for constant run times, and
holds in the mean for others. It ignores that a batch starts only when its last row has arrived.
"""

from __future__ import annotations

import gc
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from math import inf
from typing import Any

import numpy as np

from cobatch.batcher.simulator.clock import VirtualLoop
from cobatch.batcher.simulator.engine import Profile, RunTimeSampler, SimulatedWorker
from cobatch.batcher.simulator.nodes import (
    ANSWERED,
    EXPIRED,
    FAILED,
    REFUSED,
    CobatchNode,
    Node,
    Records,
    RequestSource,
    Router,
    make_router,
)
from cobatch.batcher.simulator.traffic import Arrivals, Caller, Trace

_STEPS = 200
_PERCENTILES = (50.0, 90.0, 95.0, 99.0, 99.9)
_ROUNDING_S = 1e-9  # sums of times are not exact
_Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Closed:
    """A closed loop in place of arrivals: N callers, each sends its next request `think_ms` after an answer.

    After a refusal a caller retries in `retry_ms`.
    """

    connections: int
    think_ms: float = 0.0
    retry_ms: float = 100.0


@dataclass(frozen=True)
class Scenario:
    """The load, and the nodes that it is sent to.

    The measured `seconds` follow `warmup_s`. `handover_ms` is the delay from the loop to the engine, and
    back. `request_us` is the loop's time for each request, half at its arrival and half at its answer (one
    node only). `max_queue_rows` None means the server's default.
    """

    profile: Profile
    arrivals: Arrivals | Closed
    callers: tuple[Caller, ...] = (Caller(),)
    seconds: float = 60.0
    warmup_s: float = 2.0
    nodes: int = 1
    router: Router = "two-choices"
    max_batch_size: int | None = None
    max_queue_rows: int | None = None
    max_delay_ms: float = 0.0
    latency_target_ms: float | None = None
    slots: int = 2
    handover_ms: float = 0.0
    request_us: float = 0.0
    seed: int = 1

    @property
    def batch_rows(self) -> int:
        """The rows of the largest batch."""
        return self.max_batch_size or self.profile.max_rows

    @property
    def queue_rows(self) -> int:
        """The rows of the longest queue."""
        return self.max_queue_rows or max(1024, 16 * self.batch_rows)

    @property
    def end_s(self) -> float:
        """The end of the simulation."""
        return self.warmup_s + self.seconds

    def times(self) -> Iterator[float]:
        """Yield the times of arrival of an open loop."""
        assert not isinstance(self.arrivals, Closed)
        return self.arrivals.times(np.random.default_rng([self.seed, 0]))


@dataclass
class Run:
    """A finished simulation: `busy_s` of all engines (virtual time), `took_s` its real duration."""

    scenario: Scenario
    records: Records
    open_requests: int
    busy_s: float
    batches: Counter[int]
    reasons: Counter[str]
    took_s: float


MakeNode = Callable[[Scenario, VirtualLoop, RunTimeSampler], Node]


def cobatch_node(scenario: Scenario, loop: VirtualLoop, sampler: RunTimeSampler) -> Node:
    """Make a node with cobatch's own scheduler."""
    worker = SimulatedWorker(
        sampler,
        loop,
        max_batch_size=scenario.batch_rows,
        slots=scenario.slots,
        handover_s=scenario.handover_ms / 1000,
    )
    return CobatchNode(
        worker,
        loop,
        max_queue_rows=scenario.queue_rows,
        max_delay_ms=scenario.max_delay_ms,
        latency_target_ms=scenario.latency_target_ms,
    )


def run(scenario: Scenario, make_node: MakeNode = cobatch_node) -> Run:
    """Run a scenario from an idle start; requests under way at its end stay open. Same seed, same run."""
    loop = VirtualLoop()
    samplers = [RunTimeSampler(scenario.profile, scenario.seed + 1000 * n) for n in range(scenario.nodes)]
    nodes = [make_node(scenario, loop, sampler) for sampler in samplers]
    records = Records(loop, scenario.request_us / 2e6)
    times, send = _traffic(scenario, loop, records, make_router(scenario.router, nodes, scenario.seed))
    began_s = time.perf_counter()
    gc.collect()
    gc.disable()  # a simulation makes many objects and hardly a cycle
    try:
        loop.run(times, send, scenario.end_s)
    finally:
        gc.enable()
    return Run(
        scenario,
        records,
        open_requests=sum(node.open_requests for node in nodes),
        busy_s=sum(sampler.busy_s(loop.now_s) for sampler in samplers),
        batches=sum((node.batches for node in nodes), Counter()),
        reasons=sum((node.reasons for node in nodes), Counter()),
        took_s=time.perf_counter() - began_s,
    )


def _traffic(
    scenario: Scenario, loop: VirtualLoop, records: Records, route: Callable[[], Node]
) -> tuple[Iterator[float], Callable[[], None]]:
    """Return the times of arrival, and the function that sends a request."""
    arrivals = scenario.arrivals
    trace = arrivals if isinstance(arrivals, Trace) else None
    send = partial(_send, RequestSource(scenario.callers, scenario.seed, trace), records, route)
    if not isinstance(arrivals, Closed):
        return scenario.times(), send

    def send_again(accepted: bool) -> None:
        loop.call_later((arrivals.think_ms if accepted else arrivals.retry_ms) / 1000, send)

    records.on_end = send_again
    return iter([n * 1e-5 for n in range(arrivals.connections)]), send


def _send(make: RequestSource, records: Records, route: Callable[[], Node]) -> None:
    request = make(records)
    records.arrive(request)
    request.node = node = route()
    refusal = node.submit(request)
    if refusal is not None:
        records.refuse(request, refusal)


@dataclass
class Totals:
    """Counts and rates of the requests that ended in the measured time, of one tenant or of all.

    `goodput` counts answers within the deadline per second. `rows_share` is the part of all rows answered.
    `latency_ms` maps percentiles to milliseconds, of answers only.
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
    """The figures of a run. Rates are requests per second.

    `bound` is the highest goodput that any policy could have reached, and `capacity` the highest at any load;
    None where requests differ in rows or deadline. `utilisation` is the part of the time that engines ran.
    Batches and reasons count from the start of the simulation.
    """

    offered: float | None
    total: Totals
    tenants: dict[str, Totals]
    bound: float | None
    capacity: float | None
    utilisation: float
    mean_batch: float
    batches: dict[int, int]
    reasons: dict[str, int]
    refusals: dict[str, int]
    arrived: int
    open_requests: int
    took_s: float

    def as_json(self) -> dict[str, Any]:
        """Return all figures as a JSON document."""
        return asdict(self)


def results_of(run: Run) -> Results:
    """Return the figures of a run."""
    scenario, records = run.scenario, run.records.arrays()
    measured = {name: values[records["ends"] >= scenario.warmup_s] for name, values in records.items()}
    answered_rows = int(measured["rows"][measured["outcomes"] == ANSWERED].sum())
    numbers: dict[str, list[int]] = {}
    for number, caller in enumerate(scenario.callers):
        numbers.setdefault(caller.name, []).append(number)

    def totals(callers: Iterable[int]) -> Totals:
        chosen = np.isin(measured["callers"], list(callers))
        return _totals({key: values[chosen] for key, values in measured.items()}, scenario, answered_rows)

    best = bounds(scenario)
    rows = sum(size * count for size, count in run.batches.items())
    return Results(
        offered=None if isinstance(scenario.arrivals, Closed) else scenario.arrivals.rate,
        total=totals(range(len(scenario.callers))),
        tenants={name: totals(callers) for name, callers in numbers.items()},
        bound=best[0],
        capacity=best[1],
        utilisation=run.busy_s / scenario.end_s / scenario.nodes,
        mean_batch=rows / max(1, run.batches.total()),
        batches=dict(sorted(run.batches.items())),
        reasons=dict(run.reasons.most_common()),
        refusals=dict(run.records.refusals.most_common()),
        arrived=run.records.arrived,
        open_requests=run.open_requests,
        took_s=run.took_s,
    )


def _totals(part: dict[str, _Array], scenario: Scenario, answered_rows: int) -> Totals:
    outcomes, latencies = part["outcomes"], part["latencies"]
    limits = np.array([inf if one.timeout_s is None else one.timeout_s for one in scenario.callers])
    answered = outcomes == ANSWERED
    good = int((answered & (latencies <= limits[part["callers"]] + _ROUNDING_S)).sum())
    count = {outcome: int((outcomes == outcome).sum()) for outcome in (ANSWERED, EXPIRED, FAILED, REFUSED)}
    times_ms = latencies[answered] * 1000
    percentiles = np.percentile(times_ms, _PERCENTILES) if len(times_ms) else np.zeros(len(_PERCENTILES))
    return Totals(
        ended=len(outcomes),
        answered=count[ANSWERED],
        goodput=good / scenario.seconds,
        late=count[ANSWERED] - good,
        expired=count[EXPIRED],
        failed=count[FAILED],
        refused=count[REFUSED],
        rows_share=float(part["rows"][answered].sum()) / max(1, answered_rows),
        latency_ms=dict(zip([f"p{level:g}" for level in _PERCENTILES], percentiles.tolist(), strict=True)),
    )


def bounds(scenario: Scenario) -> tuple[float | None, float | None]:
    """Return the highest goodput and the capacity, if all requests have one row and the same deadline."""
    caller = scenario.callers[0]
    if any((one.rows, one.deadline_ms) != (1, caller.deadline_ms) for one in scenario.callers):
        return None, None
    most = scenario.nodes * capacity(scenario.profile, scenario.batch_rows, caller.timeout_s)[0]
    if isinstance(scenario.arrivals, Closed):
        return most, most
    answered = path_bound(scenario.times(), most, caller.timeout_s, scenario.warmup_s, scenario.end_s)
    return answered / scenario.seconds, most


def capacity(profile: Profile, max_batch_size: int, deadline_s: float | None = None) -> tuple[float, int]:
    """Return the most rows per second that one engine can answer in time, and the batch size for that."""
    best, best_rows = 0.0, 1
    for rows in range(1, min(max_batch_size, profile.max_rows) + 1):
        rate = rows * _share_in_time(profile, rows, deadline_s) / profile.mean_s(rows)
        if rate > best:
            best, best_rows = rate, rows
    return best, best_rows


def _share_in_time(profile: Profile, rows: int, deadline_s: float | None) -> float:
    """Return the part of runs that take no longer than the deadline."""
    if deadline_s is None or profile.quantile_s(rows, 1.0) <= deadline_s:
        return 1.0
    levels = [(step + 0.5) / _STEPS for step in range(_STEPS)]
    return sum(profile.quantile_s(rows, level) <= deadline_s for level in levels) / _STEPS


def path_bound(
    times: Iterable[float], rate: float, deadline_s: float | None, begin_s: float, end_s: float
) -> int:
    """Count the one-row requests at these times that can be answered in time within [begin_s, end_s)."""
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
