"""Search for the capacity: the highest rate at which p99 stays within a limit, with a confidence.

A trial holds if at least 99 % of its requests get the right answer within the limit. A failure counts as
late; otherwise a server that refuses requests would have unlimited capacity. Requests of one trial are not
independent (one long queue delays thousands), so treating each as a coin toss would claim far too much.
Trials are independent: the rate found is tried again with other send times, and the statement is about
trials. If all n of n hold, the probability p that a trial holds is at least the p with p^n = alpha, with
confidence 1 - alpha (the bound of Clopper and Pearson, 1934). If a rate cannot be confirmed a lower one is
tried and the first success is reported, so alpha is 0.025 for the first rate and half the previous for each
next: 0.05 in all.

During the search a trial that does not hold is repeated once, so that one disturbance does not mislead it.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import inf, sqrt

from cobatch.server.loadtest.statistics import Tally

VIOLATION_LIMIT = 0.01  # share of requests that may be late or fail
_ALPHA = 0.05
# The search ends at this ratio of the lowest rate that does not hold to the highest that does.
_PRECISION = 1.05
_BACKOFFS = (0, 0.03, 0.06, 0.12, 0.24, 0.48)  # below the rate found: the rates to confirm, in order


@dataclass(frozen=True)
class CapacityTrial:
    """A trial at a rate.

    `violations`: share of requests that were late or failed; `p99_ms`: inf if too many failed; `limited`: the
    generator was the bottleneck; `confirms`: it repeats the rate found by the search.
    """

    rate: float
    violations: float
    p99_ms: float
    limited: bool
    confirms: bool

    @property
    def held(self) -> bool:
        """True if p99 was within the limit."""
        return self.violations <= VIOLATION_LIMIT


@dataclass(frozen=True)
class Capacity:
    """The result of a search. `rate` None: no rate was confirmed.

    `failed_rate`: the lowest that did not hold; `confirmed`: the trials at `rate`; `limited`: the generator,
    not the server, set the limit; `rejected`: number of higher rates that could not be confirmed.
    """

    slo_ms: float
    rate: float | None
    failed_rate: float | None
    confirmed: Sequence[CapacityTrial]
    limited: bool
    trials: Sequence[CapacityTrial]
    rejected: int = 0

    def sentence(self) -> str:
        limit, last = f"p99 within {self.slo_ms:g} ms", self.trials[-1]
        if self.rate is None:
            blame = " Requests were not sent in time." if self.limited else ""
            if last.confirms:
                return (
                    f"No rate could be confirmed with {limit}: trials at the same rate differed, down to "
                    f"{last.rate:,.1f} per second. Make trials longer with --seconds.{blame}"
                )
            p99 = "out of reach because too many failed" if last.p99_ms == inf else f"{last.p99_ms:,.2f} ms"
            return f"No rate was found with {limit}: at {last.rate:,.1f} per second p99 was {p99}.{blame}"
        n = len(self.confirmed)
        p99s = [trial.p99_ms for trial in self.confirmed]
        text = (
            f"{self.rate:,.0f} requests per second with {limit}: {n} of {n} trials held (p99 {min(p99s):.2f} "
            f"to {max(p99s):.2f} ms), so with 95 % confidence at least {holding_share(n, self.rejected):.0%} "
            "of such trials do."
        )
        if self.limited:
            return f"At least {text} More could not be offered in time; the server may take it."
        return text if self.failed_rate is None else f"{text} {self.failed_rate:,.0f} did not hold."


def holding_share(trials: int, rejected: int) -> float:
    """Return the least share of trials that hold, with 95 % confidence, if all of `trials` held.

    `rejected`: number of rates that were tried to be confirmed before this one.
    """
    return float((_ALPHA / 2 ** (rejected + 1)) ** (1 / trials))


def violation_share(tally: Tally, slo_ms: float) -> float:
    """Return the share of a trial's requests that were late or failed."""
    total = tally.total
    failed = sum(total.errors.values())
    return (failed + total.latency.above(slo_ms * 1000)) / total.due if total.due else 1.0


def search(
    slo_ms: float,
    start_rate: float,
    lowest_rate: float,
    trials: int,
    run: Callable[[float, bool], CapacityTrial],
) -> Capacity:
    """Search from `start_rate`, not below `lowest_rate`, then confirm the rate found with this many trials.

    `run(rate, confirms)` runs a trial.
    """
    done: list[CapacityTrial] = []

    def attempt(rate: float, confirms: bool = False) -> CapacityTrial:
        done.append(run(rate, confirms))
        return done[-1]

    def attempt_twice(rate: float) -> CapacityTrial:
        first = attempt(rate)
        return first if first.held else attempt(rate)

    good, bad, limited = _bracket(start_rate, lowest_rate, attempt_twice)
    if good is None:
        return Capacity(slo_ms, None, bad, (), limited, done)
    for rejected, backoff in enumerate(_BACKOFFS):
        rate = good * (1 - backoff)
        confirmed: list[CapacityTrial] = []
        while len(confirmed) < trials and all(trial.held for trial in confirmed):
            confirmed.append(attempt(rate, confirms=True))
        if confirmed[-1].held:
            return Capacity(slo_ms, rate, bad, confirmed, limited, done, rejected)
        bad, limited = rate, confirmed[-1].limited
    return Capacity(slo_ms, None, bad, (), limited, done)


def _bracket(
    rate: float, lowest_rate: float, attempt: Callable[[float], CapacityTrial]
) -> tuple[float | None, float | None, bool]:
    """Return the highest rate that held, the lowest that did not, and if the generator caused the latter."""
    good: float | None = None
    bad: float | None = None
    limited = False
    while good is None or bad is None or bad / good > _PRECISION:
        trial = attempt(rate)
        if trial.held:
            good = rate
        else:
            bad, limited = rate, trial.limited
        if good is not None:
            rate = good * 1.5 if bad is None else sqrt(good * bad)
        elif rate <= lowest_rate:
            break
        else:
            rate = max(lowest_rate, rate / 2)
    return good, bad, limited
