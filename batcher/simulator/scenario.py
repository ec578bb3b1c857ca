"""A scenario, its run, and the figures of a run."""

import asyncio
import gc
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import inf
from typing import cast

import numpy as np

from cobatch.batcher.batcher import Batcher
from cobatch.batcher.errors import BatcherError
from cobatch.batcher.simulator.bound import capacity, path_bound
from cobatch.batcher.simulator.clock import VirtualLoop
from cobatch.batcher.simulator.engine import (
    Disturbance,
    Profile,
    RunTimeSampler,
    SimulatedWorker,
    undisturbed,
)
from cobatch.batcher.simulator.nodes import (
    ANSWERED,
    EXPIRED,
    FAILED,
    REFUSED,
    Entries,
    Node,
    Records,
    Router,
    SimulatedRequest,
    make_requests,
    make_router,
)
from cobatch.batcher.simulator.traffic import Arrivals, Caller, Trace

_PERCENTILES = (50.0, 90.0, 95.0, 99.0, 99.9)
_ROUNDING_S = 1e-9  # sums of times are not exact


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
    node only). `max_queue_rows` None means the server's default. `disturb` changes run times as time passes;
    bound and capacity are those without it.
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
    disturb: Disturbance = undisturbed
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


class CobatchNode:
    """A node with the production batcher."""

    def __init__(self, scenario: Scenario, loop: VirtualLoop, sampler: RunTimeSampler) -> None:
        worker = SimulatedWorker(
            sampler,
            loop,
            max_batch_size=scenario.batch_rows,
            slots=scenario.slots,
            handover_s=scenario.handover_ms / 1000,
        )
        self._batcher = Batcher(
            "simulated",
            [worker],
            max_queue_rows=scenario.queue_rows,
            max_delay_ms=scenario.max_delay_ms,
            latency_target_ms=scenario.latency_target_ms,
            loop=cast("asyncio.AbstractEventLoop", loop),
            clock=loop.time,
        )
        self.open_requests = 0

    def submit(self, request: SimulatedRequest) -> str | None:
        try:
            self._batcher.submit(request)
        except BatcherError as error:
            return error.reason
        self.open_requests += 1
        return None

    @property
    def batches(self) -> Counter[int]:
        return Counter({rows: totals.batches for rows, totals in self._batcher.counters.by_rows.items()})

    @property
    def reasons(self) -> Counter[str]:
        return self._batcher.counters.reasons


def run(scenario: Scenario, make_node: MakeNode = CobatchNode) -> Run:
    """Run a scenario from an idle start; requests under way at its end stay open. Same seed, same run."""
    loop = VirtualLoop()
    samplers = [
        RunTimeSampler(scenario.profile, scenario.seed + 1000 * n, scenario.disturb)
        for n in range(scenario.nodes)
    ]
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
    requests = make_requests(records, scenario.callers, scenario.seed, trace)

    def send() -> None:
        request = next(requests)
        records.arrive(request)
        request.node = node = route()
        refusal = node.submit(request)
        if refusal is not None:
            records.refuse(request, refusal)

    if not isinstance(arrivals, Closed):
        return scenario.times(), send

    def send_again(accepted: bool) -> None:
        loop.call_later((arrivals.think_ms if accepted else arrivals.retry_ms) / 1000, send)

    records.on_end = send_again
    return iter([n * 1e-5 for n in range(arrivals.connections)]), send


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


def results_of(run: Run) -> Results:
    """Return the figures of a run."""
    scenario, entries = run.scenario, run.records.array()
    measured = entries[entries["end_s"] >= scenario.warmup_s]
    names = np.array([caller.name for caller in scenario.callers])
    bound, most = bounds(scenario)
    rows = sum(size * count for size, count in run.batches.items())
    return Results(
        offered=None if isinstance(scenario.arrivals, Closed) else scenario.arrivals.rate,
        total=_totals(measured, measured, scenario),
        tenants={
            name: _totals(measured[names[measured["caller"]] == name], measured, scenario)
            for name in dict.fromkeys(names.tolist())
        },
        bound=bound,
        capacity=most,
        utilisation=run.busy_s / scenario.end_s / scenario.nodes,
        mean_batch=rows / max(1, run.batches.total()),
        batches=dict(sorted(run.batches.items())),
        reasons=dict(run.reasons.most_common()),
        refusals=dict(run.records.refusals.most_common()),
        arrived=run.records.arrived,
        open_requests=run.open_requests,
        took_s=run.took_s,
    )


def _totals(part: Entries, measured: Entries, scenario: Scenario) -> Totals:
    limits = np.array([inf if one.timeout_s is None else one.timeout_s for one in scenario.callers])
    answers = part[part["outcome"] == ANSWERED]
    good = int((answers["latency_s"] <= limits[answers["caller"]] + _ROUNDING_S).sum())
    count = np.bincount(part["outcome"], minlength=4).tolist()
    times_ms = answers["latency_s"] * 1000
    percentiles = np.percentile(times_ms, _PERCENTILES) if len(times_ms) else np.zeros(len(_PERCENTILES))
    all_rows = measured["rows"][measured["outcome"] == ANSWERED].sum()
    return Totals(
        ended=len(part),
        answered=count[ANSWERED],
        goodput=good / scenario.seconds,
        late=count[ANSWERED] - good,
        expired=count[EXPIRED],
        failed=count[FAILED],
        refused=count[REFUSED],
        rows_share=float(answers["rows"].sum() / max(1, all_rows)),
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
