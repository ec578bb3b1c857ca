"""A run in figures."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from cobatch.batcher.simulator.bound import capacity, path_bound
from cobatch.batcher.simulator.records import ANSWERED, EXPIRED, FAILED, REFUSED
from cobatch.batcher.simulator.scenario import Closed, Run, Scenario
from cobatch.batcher.simulator.traffic import Traffic

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
