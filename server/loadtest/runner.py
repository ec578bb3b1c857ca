"""Run a load test: one trial after another."""

from collections.abc import Sequence
from math import inf

from cobatch.batcher.simulator.traffic import Trace
from cobatch.server.loadtest.capacity import VIOLATION_LIMIT, Capacity, CapacityTrial, search, violation_share
from cobatch.server.loadtest.fleet import Fleet
from cobatch.server.loadtest.messages import Plan, Trial
from cobatch.server.loadtest.options import BenchError, Options
from cobatch.server.loadtest.report import Progress, Report
from cobatch.server.loadtest.requests import prepare
from cobatch.server.loadtest.results import Results, per_s, summarise
from cobatch.server.loadtest.statistics import Tally
from cobatch.server.loadtest.target import read_counters
from cobatch.server.settings.values import is_loopback

_ESTIMATE_S = 2.0
_ESTIMATE_CONNECTIONS = 32
_START_SHARE = 0.7  # of the closed loop's throughput: where the search starts
_SEARCH_REQUESTS = 1000  # at least, in a trial of a search: p99 of a few hundred would be their maximum
_LONGEST_TRIAL = 5  # times --seconds, to reach that number of requests
_LIMITS_PER_TRIAL = 20  # times --slo-ms: in a shorter trial a queue that grows by 5 % would not show


def search_trial_s(seconds: float, rate: float, slo_ms: float) -> float:
    """Return the length of a trial of a search. `seconds`: as set by --seconds."""
    enough_s = min(_LONGEST_TRIAL * seconds, max(seconds, _SEARCH_REQUESTS / rate))
    return max(enough_s, _LIMITS_PER_TRIAL * slo_ms / 1000)


def run(options: Options, progress: Progress) -> Report:
    """Run the load test. Raises BenchError."""
    plan, model = prepare(options)
    report = Report(options, model)
    with Fleet(plan, options.processes) as fleet, progress:
        runner = _Runner(plan, fleet, progress, report)
        try:
            if options.slo_ms is None:
                runner.run_rates()
            else:
                report.capacity = runner.search(options.slo_ms)
        except KeyboardInterrupt:
            report.interrupted = True
    if not report.results:
        raise BenchError("interrupted before anything was measured")
    return report


class _Runner:
    def __init__(self, plan: Plan, fleet: Fleet, progress: Progress, report: Report) -> None:
        self._plan, self._fleet, self._progress, self._report = plan, fleet, progress, report
        self._options = report.options
        self._trials = 0

    def run_rates(self) -> None:
        """Run a trial at each rate, or the single trial of a closed loop or a trace."""
        options = self._options
        single = None if options.trace is None else options.trace.rate
        rates: Sequence[float | None] = options.rates or [single]
        for rate in rates:
            load = f"{options.connections} connections" if rate is None else per_s(rate)
            self._run(load, rate, options.seconds)

    def search(self, slo_ms: float) -> Capacity:
        """Search for the capacity."""

        def attempt(rate: float, confirms: bool) -> CapacityTrial:
            load = f"{'confirming ' if confirms else ''}{per_s(rate)}"
            results, tally = self._run(load, rate, search_trial_s(options.seconds, rate, slo_ms))
            failures = results.total.failed / max(1, results.total.requests)
            p99_ms = results.total.latency_ms["p99"] if failures <= VIOLATION_LIMIT else inf
            violations, limited = violation_share(tally, slo_ms), bool(results.generator.bottlenecks)
            trial = CapacityTrial(rate, violations, p99_ms, limited, confirms)
            text = f"{load}: p99 {p99_ms:,.2f} ms, {violations:.2%} too late or failed"
            self._progress.say(f"{text}: {'held' if trial.held else 'did not hold'}")
            return trial

        options = self._options
        lowest_rate = _SEARCH_REQUESTS / 10 / (_LONGEST_TRIAL * options.seconds)
        start_rate = max(lowest_rate, options.rates[0] if options.rates else self._estimate())
        return search(slo_ms, start_rate, lowest_rate, options.trials, attempt)

    def _estimate(self) -> float:
        """Return the rate to start the search at, from a closed loop."""
        options = self._options
        connections = max(options.processes, min(_ESTIMATE_CONNECTIONS, options.connections))
        trial = Trial(None, connections, _ESTIMATE_S, options.warmup_s)
        results, _ = self._run_trial(f"estimate, {connections} connections", trial, None)
        self._progress.say(f"closed-loop throughput: {results.total.answered_rate:,.0f}/s")
        return results.total.answered_rate * _START_SHARE

    def _run(self, load: str, rate: float | None, seconds: float) -> tuple[Results, Tally]:
        options = self._options
        arrivals = None if rate is None else options.process(rate)
        if isinstance(arrivals, Trace):
            # The whole trace, unless --seconds is shorter; the last request is due within the trial.
            seconds = min(seconds, arrivals.requests[-1].time_s + 1e-6 - options.warmup_s)
            if seconds <= 0:
                raise BenchError("the trace is over before the warm-up is")
        self._trials += 1
        trial = Trial(arrivals, options.connections, seconds, options.warmup_s, self._trials)
        results, tally = self._run_trial(load, trial, rate)
        if tally.measured_s:
            self._report.results.append(results)
        if self._fleet.interrupted:
            raise KeyboardInterrupt
        return results, tally

    def _run_trial(self, load: str, trial: Trial, rate: float | None) -> tuple[Results, Tally]:
        callers, address, model = self._options.callers, self._plan.address, self._report.model
        # In a search, the latency limit is a deadline too.
        limits_ms = [min(one.deadline_ms or inf, self._options.slo_ms or inf) for one in callers]
        tally = Tally(trial, [None if limit_ms == inf else limit_ms / 1000 for limit_ms in limits_ms])
        before = read_counters(address, model, callers[0].headers)
        self._fleet.run(trial, tally, lambda: self._progress.update(load, tally))
        after = read_counters(address, model, callers[0].headers)
        names = [caller.name for caller in callers]
        results = summarise(tally, rate, names, is_loopback(address.host), before, after)
        return results, tally
