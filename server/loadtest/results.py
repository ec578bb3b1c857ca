"""The results of a trial: rates, percentiles, and how far they can be trusted."""

from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from cobatch.server.loadtest.statistics import Counts, LatencyHistogram, Tally
from cobatch.server.loadtest.target import ServerCounters

_QUANTILES = {"p50": 0.5, "p90": 0.9, "p95": 0.95, "p99": 0.99, "p99.9": 0.999, "p99.99": 0.9999}
_DECIMALS = 4
_BUSY = 0.9  # of a core: a generator process has one thread
_IDLE = 0.5  # of a core: a process below this was not slow itself
_MACHINE_BUSY = 0.95
_DELAY_SHARE = 0.1  # of the latency's p99
_DELAY_US = 500.0
_DELAYED_REQUESTS = 10  # fewer late wake-ups of the machine are no evidence
_WAITED_SHARE = 0.01
_FEW_ANSWERS = 1000


def per_s(rate: float) -> str:
    """Format a rate."""
    return f"{rate:,.0f}/s" if rate >= 100 else f"{rate:.3g}/s"


class Summary(msgspec.Struct, frozen=True):
    """Requests of all callers or of one. Rates are per second, latencies in milliseconds.

    `answered_rate`: right answers by arrival time, regardless of when they were due. `good_rate`: requests
    due and answered within the deadline; None without a deadline.
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
        return sum(self.errors.values())


class IntervalSummary(msgspec.Struct, frozen=True):
    """An interval that ends at `end_s`; latencies and errors of the requests due in it."""

    end_s: float
    offered_rate: float
    answered_rate: float
    latency_ms: Mapping[str, float]
    mean_batch: float
    largest_batch: int
    errors: Mapping[str, int]


class GeneratorSummary(msgspec.Struct, frozen=True):
    """The generator's own load. `bottlenecks`: reasons why the results are not the server's limits."""

    processes: int
    cpu_shares: Sequence[float]
    connections: int
    send_delay_ms: Mapping[str, float]
    waited_for_connection: int
    machine_busy: float | None
    bottlenecks: Sequence[str]
    notes: Sequence[str]


class Results(msgspec.Struct, frozen=True):
    """One trial. `rate` None: closed loop. `server`: the server's own counts during the trial."""

    rate: float | None
    connections: int
    measured_s: float
    total: Summary
    callers: Sequence[Summary]
    sent_latency_ms: Mapping[str, float]
    mean_batch: float | None
    batches: Mapping[int, int]
    messages: Mapping[str, str]
    generator: GeneratorSummary
    server: Mapping[str, float] | None
    intervals: Sequence[IntervalSummary]
    buckets: Sequence[tuple[float, int]]
    sent_buckets: Sequence[tuple[float, int]] = ()

    @property
    def load(self) -> str:
        return f"{self.connections} connections" if self.rate is None else per_s(self.rate)

    def errors(self) -> list[tuple[str, int, str]]:
        """Return (kind, count, the server's first message) of the errors."""
        return [(kind, count, self.messages.get(kind, "")) for kind, count in self.total.errors.items()]

    def as_json(self) -> dict[str, Any]:
        return _rounded(msgspec.to_builtins(self, str_keys=True))  # type: ignore[no-any-return]


def summarise(
    tally: Tally,
    rate: float | None,
    names: Sequence[str],
    local: bool,
    before: ServerCounters | None,
    after: ServerCounters | None,
) -> Results:
    """Compute the results.

    `names`: of the callers; `local`: the server runs on this machine; `before`, `after`: its counters.
    """
    seconds = tally.measured_s or 1e-9
    with_deadline = [deadline_s is not None for deadline_s in tally.deadlines_s]
    callers = [
        _summary(name, counts, seconds, deadline)
        for name, counts, deadline in zip(names, tally.callers, with_deadline, strict=True)
    ]
    total = tally.total
    # Each answer of a batch of n rows stands for 1/n of the batch.
    answers, batches = sum(tally.batches.values()), sum(n / rows for rows, n in tally.batches.items())
    done = [tally.done[number] for number in sorted(tally.done)]
    return Results(
        rate=rate,
        connections=tally.trial.connections,
        measured_s=tally.measured_s,
        total=_summary("all", total, seconds, any(with_deadline)),
        callers=callers if len(callers) > 1 else (),
        sent_latency_ms=_percentiles(tally.send_latency),
        mean_batch=answers / batches if batches else None,
        batches=dict(sorted(tally.batches.items())),
        messages=dict(tally.messages),
        generator=GeneratorSummary(
            processes=len(done),
            cpu_shares=[one.cpu_s / one.took_s if one.took_s else 0.0 for one in done],
            connections=sum(one.connections for one in done),
            send_delay_ms=_percentiles(tally.send_delay),
            waited_for_connection=tally.waited,
            machine_busy=tally.machine_busy,
            bottlenecks=bottlenecks(tally),
            notes=notes(tally, local),
        ),
        server=None if before is None or after is None else _server(before, after),
        intervals=_intervals(tally),
        buckets=total.latency.buckets(),
        sent_buckets=tally.send_latency.buckets(),
    )


def _summary(name: str, counts: Counts, seconds: float, deadline: bool) -> Summary:
    return Summary(
        name=name,
        requests=counts.due,
        answered=counts.latency.count,
        offered_rate=counts.due / seconds,
        answered_rate=counts.answered / seconds,
        good_rate=counts.good / seconds if deadline else None,
        latency_ms=_percentiles(counts.latency),
        errors=dict(counts.errors.most_common()),
    )


def _percentiles(latency: LatencyHistogram) -> dict[str, float]:
    quantiles_us = {name: latency.quantile_us(q) for name, q in _QUANTILES.items()}
    values_us = {"mean": latency.mean_us, "min": latency.min_us, **quantiles_us, "max": latency.max_us}
    return {name: us / 1000 for name, us in values_us.items()}


def _server(before: ServerCounters, after: ServerCounters) -> dict[str, float] | None:
    counters = {name: after[name] - before[name] for name in after}
    if not counters["executions"]:
        return None
    requests = counters["succeeded"] or 1
    return {
        "inferences": counters["inferences"],
        "executions": counters["executions"],
        "mean_batch": counters["inferences"] / counters["executions"],
        "queue_ms": counters["queue_ns"] / requests / 1e6,
        "compute_ms": counters["compute_ns"] / requests / 1e6,
    }


def _intervals(tally: Tally) -> list[IntervalSummary]:
    each_s = tally.intervals.each_s
    count = round(tally.trial.lasts_s / each_s)
    if tally.stopped_s is not None:
        count = int(tally.stopped_s / each_s)
    return [
        IntervalSummary(
            end_s=(number + 1) * each_s,
            offered_rate=counts.due / each_s,
            answered_rate=counts.answered / each_s,
            latency_ms=_percentiles(counts.latency),
            mean_batch=counts.mean_batch,
            largest_batch=max(counts.batches, default=0),
            errors=dict(counts.errors),
        )
        for number, counts in enumerate(map(tally.intervals.__getitem__, range(count)))
    ]


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return round(value, _DECIMALS)
    if isinstance(value, dict):
        return {key: _rounded(one) for key, one in value.items()}
    return [_rounded(one) for one in value] if isinstance(value, list | tuple) else value


def bottlenecks(tally: Tally) -> list[str]:
    """Return the reasons why generator or machine, not the server, set the limit; empty if neither did."""
    reasons = []
    busy = max((one.cpu_s / one.took_s for one in tally.done.values() if one.took_s), default=0.0)
    if busy >= _BUSY:
        reasons.append(
            f"the generator was the bottleneck: a process used {busy:.0%} of a core; raise --processes from "
            f"{len(tally.done)}"
        )
    delay_us, latency_us = tally.send_delay.quantile_us(0.99), tally.total.latency.quantile_us(0.99)
    limit_us = max(_DELAY_US, _DELAY_SHARE * latency_us)
    if delay_us > limit_us and tally.send_delay.above(limit_us) >= _DELAYED_REQUESTS:
        why = "the generator was the bottleneck: it did not keep up"
        if busy < _IDLE:
            why = f"the machine did not schedule the generator in time, which used {busy:.0%} of a core"
        reasons.append(
            f"{why}; 1 % of the requests were sent {delay_us / 1000:.2f} ms late or later, at a p99 of "
            f"{latency_us / 1000:.2f} ms"
        )
    return reasons


def notes(tally: Tally, local: bool) -> list[str]:
    """Return remarks that a reader of the results needs. `local`: the server runs on this machine."""
    remarks = []
    total = tally.total
    if tally.waited > _WAITED_SHARE * total.due:
        remarks.append(
            f"{tally.waited / total.due:.1%} of the requests waited for a connection to be free or opened; "
            f"the wait is in their latency (--connections: {tally.trial.connections})"
        )
    if local and tally.machine_busy is not None and tally.machine_busy >= _MACHINE_BUSY:
        remarks.append(
            "all cores of this machine were busy with the generator, the server and other programs; the "
            "server would do better on its own machine"
        )
    answers = total.latency.count
    if 0 < answers < _FEW_ANSWERS:
        remarks.append(f"{answers} answers are few: p99 depends on the slowest {max(1, answers // 100)}")
    return remarks
