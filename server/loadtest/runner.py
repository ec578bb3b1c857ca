"""Runs what was asked for, one trial after another."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field

from cobatch.batcher.simulator.traffic import Trace
from cobatch.server.loadtest.callers import Caller
from cobatch.server.loadtest.capacity import BAD_PART, Capacity, Tried, bad_part, find
from cobatch.server.loadtest.errors import BenchError
from cobatch.server.loadtest.fleet import Fleet
from cobatch.server.loadtest.live import Progress
from cobatch.server.loadtest.messages import Plan, Trial
from cobatch.server.loadtest.options import Asked
from cobatch.server.loadtest.prepare import prepare
from cobatch.server.loadtest.report import per_s
from cobatch.server.loadtest.statistics import Results, results_of
from cobatch.server.loadtest.tally import Tally
from cobatch.server.loadtest.target import Described, statistics
from cobatch.server.settings.values import is_loopback

_ESTIMATE_S = 2.0
_ESTIMATE_CONNECTIONS = 32
_LEAST_REQUESTS = 1000  # of a trial of a search
_LONGEST = 5  # times as long as was asked for, it may take to get them
_START_PART = 0.7  # of what a closed loop gets through
# A trial of a search lasts so many times the limit: a queue that grows by one part in 20 would not show else.
_LIMITS = 20


def trial_s(asked_s: float, rate: float, slo_ms: float) -> float:
    """How long a trial of a search lasts."""
    # p99 of fewer than some hundred requests would be their maximum.
    seconds = min(_LONGEST * asked_s, max(asked_s, _LEAST_REQUESTS / rate))
    return max(seconds, _LIMITS * slo_ms / 1000)


class _Interrupted(Exception):
    """Ctrl-C."""


@dataclass
class Report:
    """All that was found."""

    asked: Asked
    model: Described
    results: list[Results] = field(default_factory=list)
    capacity: Capacity | None = None
    interrupted: bool = False

    @property
    def bad(self) -> bool:
        """Whether an answer was wrong, or none came."""
        wrong = any("wrong answer" in results.total.errors for results in self.results)
        return wrong or not any(results.total.answered for results in self.results)


def run(asked: Asked, progress: Progress) -> Report:
    """Everything. Raises BenchError."""
    plan, model = prepare(asked)
    report = Report(asked, model)
    with ExitStack() as stack:
        fleet = stack.enter_context(Fleet(plan, asked.processes))
        stack.enter_context(progress)
        runner = _Runner(asked, plan, model, fleet, progress, report)
        try:
            if asked.slo_ms is None:
                runner.each()
            else:
                runner.search(asked.slo_ms)
        except (_Interrupted, KeyboardInterrupt):
            report.interrupted = True
    if not report.results:
        raise BenchError("interrupted before anything was measured")
    return report


@dataclass
class _Runner:
    asked: Asked
    plan: Plan
    model: Described
    fleet: Fleet
    progress: Progress
    report: Report
    _trials: int = 0

    def each(self) -> None:
        """A trial at each rate, or the one trial of a closed loop or a trace."""
        asked = self.asked
        rates: Sequence[float | None] = asked.rates
        if not rates:
            rates = [None if asked.trace is None else asked.trace.rate]
        for rate in rates:
            what = f"{asked.connections} connections" if rate is None else per_s(rate)
            self._run(what, rate, asked.seconds)

    def search(self, slo_ms: float) -> None:
        """The capacity."""
        least = _LEAST_REQUESTS / 10 / (_LONGEST * self.asked.seconds)
        start = max(least, self._start())
        self.report.capacity = find(slo_ms, start, least, self.asked.trials, self._attempt)

    def _start(self) -> float:
        if self.asked.rates:
            return self.asked.rates[0]
        connections = max(self.asked.processes, min(_ESTIMATE_CONNECTIONS, self.asked.connections))
        trial = Trial(None, connections, _ESTIMATE_S, self.asked.warmup_s)
        results, _ = self._trial(f"estimate, {connections} connections", trial, None)
        self.progress.say(f"a closed loop gets {results.total.answered_rate:,.0f}/s through")
        return results.total.answered_rate * _START_PART

    def _attempt(self, rate: float, confirms: bool) -> Tried:
        slo_ms = self.asked.slo_ms
        assert slo_ms is not None
        what = f"{'confirming ' if confirms else ''}{per_s(rate)}"
        results, tally = self._run(what, rate, trial_s(self.asked.seconds, rate, slo_ms))
        part = bad_part(tally, slo_ms)
        failed_part = results.total.failed / max(1, results.total.requests)
        p99_ms = results.total.latency_ms["p99"] if failed_part <= BAD_PART else float("inf")
        tried = Tried(rate, part, p99_ms, bool(results.generator.limits), confirms, results)
        held = "held" if tried.held else "did not hold"
        self.progress.say(f"{what}: p99 {p99_ms:,.2f} ms, {part:.2%} too late or failed: {held}")
        return tried

    def _run(self, what: str, rate: float | None, seconds: float) -> tuple[Results, Tally]:
        asked = self.asked
        arrivals = None if rate is None else asked.process(rate)
        if isinstance(arrivals, Trace):
            # All of it, as long as that is no more than was asked for.
            seconds = min(seconds, arrivals.requests[-1].time_s + 1e-6 - asked.warmup_s)
            if seconds <= 0:
                raise BenchError("the trace is over before the warm-up is")
        self._trials += 1
        trial = Trial(arrivals, asked.connections, seconds, asked.warmup_s, self._trials)
        results, tally = self._trial(what, trial, rate)
        if tally.measured_s:
            self.report.results.append(results)
        if self.fleet.interrupted:
            raise _Interrupted
        return results, tally

    def _trial(self, what: str, trial: Trial, rate: float | None) -> tuple[Results, Tally]:
        headers: Mapping[str, str] = self.asked.callers[0].headers
        address = self.plan.address
        tally = Tally(trial, [self._deadline_s(caller) for caller in self.asked.callers])
        before = statistics(address, self.model, headers)
        self.fleet.run(trial, tally, lambda: self.progress.look(what, tally))
        after = statistics(address, self.model, headers)
        counted = after.since(before) if before is not None and after is not None else None
        return results_of(tally, rate, self.plan.names, is_loopback(address.host), counted), tally

    def _deadline_s(self, caller: Caller) -> float | None:
        """Until when an answer is good: in a search no later than the limit."""
        bounds_ms = [one for one in (caller.deadline_ms, self.asked.slo_ms) if one is not None]
        return min(bounds_ms) / 1000 if bounds_ms else None
