"""Which request is sent next, and when."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import cycle, islice, takewhile

import numpy as np

from cobatch.batcher.simulator.traffic import Trace
from cobatch.server.loadtest.messages import Plan, Prepared, Trial

_CHUNK = 4096

Due = tuple[float, Prepared]


def schedule(plan: Plan, trial: Trial, number: int, processes: int) -> Iterator[Due]:
    """Seconds from the start, and what is due then, in this one of several processes.

    The requests are dealt out in turn, so that together the processes send the very same load as one would.
    """
    arrivals = trial.arrivals
    assert arrivals is not None
    times = arrivals.times(np.random.default_rng([plan.seed, trial.seed, 0]))
    dealt = zip(times, choices(plan, trial), strict=False)
    return takewhile(lambda due: due[0] < trial.lasts_s, islice(dealt, number, None, processes))


def choices(plan: Plan, trial: Trial, number: int = 0) -> Iterator[Prepared]:
    """Requests, each caller's as often as its share wants, with the inputs in turn."""
    in_turn = {key: cycle(_turned(requests, number)) for key, requests in plan.requests.items()}
    if isinstance(trial.arrivals, Trace):
        callers = {name: caller for caller, name in enumerate(plan.names)}
        for one in trial.arrivals.requests:
            yield next(in_turn[callers[one.tenant] if one.tenant else 0, one.rows])
        return
    by_caller = [in_turn[caller, rows] for caller, rows in enumerate(plan.rows)]
    if len(by_caller) == 1:
        yield from by_caller[0]
    shares = np.cumsum(plan.shares)
    rng = np.random.default_rng([plan.seed, trial.seed, 1, number])
    while True:
        drawn = np.searchsorted(shares, rng.random(_CHUNK) * shares[-1], side="right")
        for caller in drawn.tolist():
            yield next(by_caller[caller])


def _turned(requests: Sequence[Prepared], number: int) -> list[Prepared]:
    at = number % len(requests)
    return [*requests[at:], *requests[:at]]
