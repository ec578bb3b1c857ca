"""The highest rate at which the latency holds, and how sure that is.

A trial holds when at least 99 of 100 of its requests got the right answer within the limit: a failure is a
request that took too long, or else a server that refuses would seem to have endless capacity. Requests of one
trial hang together (one long queue makes thousands late), so to count them as if each were a throw of a coin
would claim far too much. What is independent are trials: the rate that a search has found is tried again some
times, with other moments of sending each time, and the statement is about trials. If all n of n hold, the
chance p that one holds is at least the p with p^n = alpha, or we have seen what has a chance of alpha at most
(Clopper and Pearson's bound, 1934). Where a rate cannot be confirmed a lower one is tried, and the first that
is lucky is named: so alpha is 0.025 for the first, half of that for the second and so on, which is 0.05 at
most for all of them together.

While it searches, a trial that does not hold is tried once more: a disturbance would send the search astray.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import inf, sqrt

from cobatch.server.loadtest.statistics import Results
from cobatch.server.loadtest.tally import Tally

BAD_PART = 0.01
_DOUBT = 0.05
_NEAR = 1.05  # the search ends where what holds and what does not are this near
_BACKS = (0, 0.03, 0.06, 0.12, 0.24, 0.48)  # below what the search found: the rates to confirm, one by one


@dataclass(frozen=True)
class Tried:
    """A trial.

    `bad_part`: of the requests that were too late or failed; `p99_ms`: inf where too many failed; `limited`:
    by the generator; `confirms`: it was no part of the search, but after it.
    """

    rate: float
    bad_part: float
    p99_ms: float
    limited: bool
    confirms: bool
    results: Results

    @property
    def held(self) -> bool:
        """Whether the latency did."""
        return self.bad_part <= BAD_PART


@dataclass(frozen=True)
class Capacity:
    """What was found. `rate` None: nothing that could be confirmed.

    `failed_rate`: the lowest that did not hold; `confirmed`: the trials at `rate`; `limited`: the generator,
    not the server, is why there is no more; `before`: how many higher rates could not be confirmed.
    """

    slo_ms: float
    rate: float | None
    failed_rate: float | None
    confirmed: Sequence[Tried]
    limited: bool
    tried: Sequence[Tried]
    before: int = 0

    def sentence(self) -> str:
        """The statement, for a person."""
        limit = f"p99 within {self.slo_ms:g} ms"
        if self.rate is None:
            return self._nothing(limit)
        n = len(self.confirmed)
        p99s = [one.p99_ms for one in self.confirmed]
        text = (
            f"{self.rate:,.0f} requests per second with {limit}: {n} of {n} trials held (p99 {min(p99s):.2f} "
            f"to {max(p99s):.2f} ms), so with 95 % confidence at least {sure_part(n, self.before):.0%} "
            "of such trials do."
        )
        if self.limited:
            return f"At least {text} The generator could not offer more; the server may take it."
        return text if self.failed_rate is None else f"{text} {self.failed_rate:,.0f} did not hold."

    def _nothing(self, limit: str) -> str:
        last = self.tried[-1]
        blame = " The generator was the bottleneck." if self.limited else ""
        if not last.confirms:
            p99 = "out of reach, so many failed" if last.p99_ms == inf else f"{last.p99_ms:,.2f} ms"
            return f"No rate was found with {limit}: at {last.rate:,.1f} per second p99 was {p99}.{blame}"
        return (
            f"No rate could be confirmed with {limit}: some trials held, others with the same rate did not, "
            f"down to {last.rate:,.1f} per second. Trials are longer with --seconds.{blame}"
        )


def sure_part(trials: int, before: int) -> float:
    """If all of so many trials held: the least part of trials that hold, with 95 % confidence.

    `before`: how many rates had the chance to be named before this one.
    """
    return float((_DOUBT / 2 ** (before + 1)) ** (1 / trials))


def bad_part(tally: Tally, slo_ms: float) -> float:
    """The part of a trial's requests that were too late or failed."""
    total = tally.total
    failed = sum(total.errors.values())
    return (failed + total.latency.over(slo_ms * 1000)) / total.due if total.due else 1.0


def find(
    slo_ms: float, start: float, least: float, trials: int, run: Callable[[float, bool], Tried]
) -> Capacity:
    """Search from `start` on, down to `least` at most, then confirm with so many trials.

    `run` makes a trial at a rate; it is told whether that is to confirm.
    """
    tried: list[Tried] = []

    def attempt(rate: float, confirms: bool = False) -> Tried:
        tried.append(run(rate, confirms))
        return tried[-1]

    def attempt_twice(rate: float) -> Tried:
        first = attempt(rate)
        return first if first.held else attempt(rate)

    good, bad, limited = _bracket(start, least, attempt_twice)
    if good is None:
        return Capacity(slo_ms, None, bad, (), limited, tried)
    for before, back in enumerate(_BACKS):
        rate = good * (1 - back)
        confirmed: list[Tried] = []
        while len(confirmed) < trials and all(one.held for one in confirmed):
            confirmed.append(attempt(rate, confirms=True))
        if confirmed[-1].held:
            return Capacity(slo_ms, rate, bad, confirmed, limited, tried, before)
        bad, limited = rate, confirmed[-1].limited
    return Capacity(slo_ms, None, bad, (), limited, tried)


def _bracket(
    start: float, least: float, attempt: Callable[[float], Tried]
) -> tuple[float | None, float | None, bool]:
    """The highest rate that held and the lowest that did not; whether the generator is why it did not."""
    good: float | None = None
    bad: float | None = None
    limited = False
    rate = start
    while good is None or bad is None or bad / good > _NEAR:
        tried = attempt(rate)
        if tried.held:
            good = rate
        else:
            bad, limited = rate, tried.limited
        if good is not None:
            rate = good * 1.5 if bad is None else sqrt(good * bad)
        elif rate <= least:
            break
        else:
            rate = max(least, rate / 2)
    return good, bad, limited
