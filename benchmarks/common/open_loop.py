"""Requests as bytes, sent at given times by the generator of `cobatch bench`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile

import numpy as np

from cobatch.batcher.simulator.traffic import Poisson, Recorded, Trace
from cobatch.server.loadtest.fleet import Fleet
from cobatch.server.loadtest.messages import Address, Plan, PreparedRequest, Trial
from cobatch.server.loadtest.options import Caller
from cobatch.server.loadtest.statistics import Counts, Tally

_MAX_CONNECTIONS = 16_384  # enough to send each request when it is due
_TIMEOUT_S = 10.0


@dataclass(frozen=True, slots=True)
class Load:
    """Requests as raw bytes, sent in turn at these times from the start."""

    requests: Sequence[bytes]
    times_s: Sequence[float]


def drive(address: str, *loads: Load, deadline_s: float | None = None, processes: int = 1) -> list[Counts]:
    """Send all loads together, and return the counts of each. Latency counts from a request's due time."""
    host, _, port = address.rpartition(":")
    names = [str(number) for number in range(len(loads))]
    sent = [Recorded(at, 1, name) for name, load in zip(names, loads, strict=True) for at in load.times_s]
    sent.sort(key=lambda one: one.time_s)
    plan = Plan(
        address=Address(host, int(port)),
        requests={
            (number, 1): [PreparedRequest(one, number, 0) for one in load.requests]
            for number, load in enumerate(loads)
        },
        callers=[Caller(name) for name in names],
        timeout_s=_TIMEOUT_S,
    )
    trace = Trace(sent)
    # The trial ends after the last request is due.
    trial = Trial(trace, _MAX_CONNECTIONS, trace.requests[-1].time_s + 1e-6)
    tally = Tally(trial, [deadline_s] * len(loads))
    with Fleet(plan, processes) as fleet:
        fleet.run(trial, tally, lambda: None)
    if fleet.interrupted:
        raise KeyboardInterrupt
    return tally.callers


def constant(rate: float, seconds: float) -> list[float]:
    """Return times at a constant rate."""
    return [number / rate for number in range(int(rate * seconds))]


def poisson(rate: float, seconds: float, seed: Sequence[int]) -> list[float]:
    """Return the times of a Poisson process."""
    times = Poisson(rate).times(np.random.default_rng(seed))
    return list(takewhile(lambda time_s: time_s < seconds, times))
