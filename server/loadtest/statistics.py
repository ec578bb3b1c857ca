"""What came of a trial, as figures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from cobatch.server.loadtest.histogram import Histogram
from cobatch.server.loadtest.intervals import Interval
from cobatch.server.loadtest.tally import Count, Tally
from cobatch.server.loadtest.target import Statistics
from cobatch.server.loadtest.verdict import limits, notes

_QUANTILES = {"p50": 0.5, "p90": 0.9, "p95": 0.95, "p99": 0.99, "p99.9": 0.999, "p99.99": 0.9999}
_ROUND = 4


@dataclass(frozen=True)
class Figures:
    """Of all requests, or of one caller's. Rates are per second, latencies milliseconds.

    `answered_rate`: right answers by when they came, whenever they were due. `good_rate`: those within the
    deadline, of what was due; None where nobody has one.
    """

    name: str
    requests: int
    answered: int
    offered_rate: float
    answered_rate: float
    good_rate: float | None
    latency_ms: Mapping[str, float]
    errors: Mapping[str, int]

    @property
    def failed(self) -> int:
        """Requests without a right answer."""
        return sum(self.errors.values())


@dataclass(frozen=True)
class Moment:
    """An interval that ends at `s`; latencies are of what was due in it."""

    s: float
    offered_rate: float
    answered_rate: float
    latency_ms: Mapping[str, float]
    mean_batch: float
    most_batch: int
    errors: Mapping[str, int]


@dataclass(frozen=True)
class Generator:
    """What is to be known of who measured. `limits`: why the figures are its own and not the server's."""

    processes: int
    cpu_shares: Sequence[float]
    connections: int
    late_ms: Mapping[str, float]
    waited_for_connection: int
    machine_busy: float | None
    limits: Sequence[str]
    notes: Sequence[str]


@dataclass(frozen=True)
class Results:
    """One trial. `rate` None: a closed loop. `server`: what the server counted meanwhile."""

    rate: float | None
    connections: int
    measured_s: float
    total: Figures
    callers: Sequence[Figures]
    sent_latency_ms: Mapping[str, float]
    mean_batch: float | None
    batches: Mapping[int, int]
    said: Mapping[str, str]
    generator: Generator
    server: Mapping[str, float] | None
    moments: Sequence[Moment]
    buckets: Sequence[tuple[float, int]]
    sent_buckets: Sequence[tuple[float, int]] = field(default=())

    def errors_said(self) -> list[tuple[str, int, str]]:
        """Each kind of error, how often it was, and what the server said the first time."""
        return [(kind, count, self.said.get(kind, "")) for kind, count in self.total.errors.items()]

    def as_json(self) -> dict[str, Any]:
        """For a file."""
        document: dict[str, Any] = asdict(self)
        document["batches"] = {str(rows): count for rows, count in self.batches.items()}
        return _rounded(document)  # type: ignore[no-any-return]


def results_of(
    tally: Tally, rate: float | None, names: Sequence[str], local: bool, server: Statistics | None
) -> Results:
    """Sum up. `local`: the server is on this machine."""
    seconds = tally.measured_s or 1e-9
    deadlines_s = tally.deadlines_s
    callers = [
        _figures(name, one, seconds, deadline_s is not None)
        for name, one, deadline_s in zip(names, tally.callers, deadlines_s, strict=True)
    ]
    whole = tally.total
    total = _figures("all", whole, seconds, any(one is not None for one in deadlines_s))
    # Each batch of n rows is told by the n that were in it, so an answer stands for 1/n of a batch.
    told, batches = sum(tally.batches.values()), sum(n / rows for rows, n in tally.batches.items())
    done = [tally.done[number] for number in sorted(tally.done)]
    return Results(
        rate=rate,
        connections=tally.trial.connections,
        measured_s=tally.measured_s,
        total=total,
        callers=callers if len(callers) > 1 else (),
        sent_latency_ms=_latency(tally.sent_latency),
        mean_batch=told / batches if batches else None,
        batches=dict(sorted(tally.batches.items())),
        said=dict(tally.said),
        generator=Generator(
            processes=len(done),
            cpu_shares=[one.cpu_s / one.took_s if one.took_s else 0.0 for one in done],
            connections=sum(one.connections for one in done),
            late_ms=_latency(tally.late),
            waited_for_connection=tally.waited,
            machine_busy=tally.machine_busy,
            limits=limits(tally),
            notes=notes(tally, local),
        ),
        server=None if server is None or not server.executions else _server(server),
        moments=_moments(tally),
        buckets=whole.latency.buckets(),
        sent_buckets=tally.sent_latency.buckets(),
    )


def _figures(name: str, of: Count, seconds: float, deadline: bool) -> Figures:
    return Figures(
        name=name,
        requests=of.due,
        answered=of.latency.count,
        offered_rate=of.due / seconds,
        answered_rate=of.answered / seconds,
        good_rate=of.good / seconds if deadline else None,
        latency_ms=_latency(of.latency),
        errors=dict(of.errors.most_common()),
    )


def _latency(of: Histogram) -> dict[str, float]:
    found = {name: of.quantile_us(part) / 1000 for name, part in _QUANTILES.items()}
    return {"mean": of.mean_us / 1000, "min": of.least_us / 1000, **found, "max": of.most_us / 1000}


def _server(counted: Statistics) -> dict[str, float]:
    requests = counted.succeeded or 1
    return {
        "inferences": counted.inferences,
        "executions": counted.executions,
        "mean_batch": counted.inferences / counted.executions,
        "queue_ms": counted.queue_ns / requests / 1e6,
        "compute_ms": counted.compute_ns / requests / 1e6,
    }


def _moments(tally: Tally) -> list[Moment]:
    each_s = tally.intervals.each_s
    last = round(tally.trial.lasts_s / each_s)
    if tally.stopped_s is not None:
        last = int(tally.stopped_s / each_s)
    return [_moment((number + 1) * each_s, tally.intervals[number], each_s) for number in range(last)]


def _moment(end_s: float, one: Interval, seconds: float) -> Moment:
    return Moment(
        s=end_s,
        offered_rate=one.due / seconds,
        answered_rate=one.answered / seconds,
        latency_ms=_latency(one.latency),
        mean_batch=one.rows / one.with_rows if one.with_rows else 0.0,
        most_batch=one.most_rows,
        errors=dict(one.errors),
    )


def _rounded(value: Any) -> Any:
    """Floats with as many digits as they mean something with."""
    if isinstance(value, float):
        return round(value, _ROUND)
    if isinstance(value, dict):
        return {key: _rounded(one) for key, one in value.items()}
    return [_rounded(one) for one in value] if isinstance(value, list | tuple) else value
