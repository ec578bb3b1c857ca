"""When requests come: each process gives their times, in order, without end unless it is a recording.

Who calls, with what: the requests of a scenario, one after another.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import repeat
from math import pi
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, Protocol

import numpy as np

from cobatch.batcher.request import Request
from cobatch.batcher.tenant import Tenant

if TYPE_CHECKING:
    from cobatch.batcher.simulator.nodes import Node, Records


_CHUNK = 4096


class Arrivals(Protocol):
    """A process. `rate`: its mean, in requests per second."""

    @property
    def rate(self) -> float: ...

    def times(self, rng: np.random.Generator) -> Iterator[float]:
        """Seconds since the start, never falling."""
        ...


@dataclass(frozen=True)
class Poisson:
    """Many callers who know nothing of each other."""

    rate: float

    def times(self, rng: np.random.Generator) -> Iterator[float]:
        """Seconds since the start."""
        start_s = 0.0
        while True:
            chunk = start_s + np.cumsum(rng.exponential(1 / self.rate, _CHUNK))
            start_s = float(chunk[-1])
            yield from chunk.tolist()


@dataclass(frozen=True)
class Even:
    """A clock's ticks."""

    rate: float

    def times(self, rng: np.random.Generator) -> Iterator[float]:  # noqa: ARG002 - nothing is random
        """Seconds since the start."""
        number = 0
        while True:
            number += 1
            yield number / self.rate


@dataclass(frozen=True)
class Bursty:
    """A Markov-modulated Poisson process: bursts of `factor` times the mean rate, `share` of the time.

    `burst_s`: how long a burst is in the mean. The rate between bursts keeps the mean.
    """

    rate: float
    factor: float = 3.0
    share: float = 0.2
    burst_s: float = 1.0

    def times(self, rng: np.random.Generator) -> Iterator[float]:
        """Seconds since the start."""
        calm = max(0.0, self.rate * (1 - self.share * self.factor) / (1 - self.share))
        calm_s = self.burst_s * (1 - self.share) / self.share
        start_s, bursts = 0.0, False
        while True:
            rate = self.factor * self.rate if bursts else calm
            length_s = rng.exponential(self.burst_s if bursts else calm_s)
            yield from _poisson(rng, rate, start_s, length_s).tolist()
            start_s += length_s
            bursts = not bursts


@dataclass(frozen=True)
class Diurnal:
    """Day and night: the rate swings by `swing` (0 to 1) around its mean, once in `period_s`."""

    rate: float
    swing: float = 0.8
    period_s: float = 60.0

    def times(self, rng: np.random.Generator) -> Iterator[float]:
        """Seconds since the start: thinned from a process at the highest rate."""
        start_s, length_s = 0.0, self.period_s / 100
        highest = self.rate * (1 + self.swing)
        while True:
            times = _poisson(rng, highest, start_s, length_s)
            rates = self.rate * (1 - self.swing * np.cos(2 * pi * times / self.period_s))
            yield from times[rng.random(len(times)) * highest < rates].tolist()
            start_s += length_s


def _poisson(
    rng: np.random.Generator, rate: float, start_s: float, length_s: float
) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    """The times of a stretch: as many as fall into it, anywhere in it."""
    return np.sort(start_s + length_s * rng.random(rng.poisson(rate * length_s)))


class Recorded(NamedTuple):
    """A request of a trace; `tenant` "" where none is given."""

    time_s: float
    rows: int
    tenant: str


class TraceError(Exception):
    """A trace cannot be read; the text says where and why."""


class Trace:
    """A recording, its clock set to 0 at the first request. `speed` 2 plays it twice as fast."""

    def __init__(self, requests: list[Recorded], speed: float = 1.0) -> None:
        if not requests:
            raise TraceError("the trace has no requests")
        first_s = requests[0].time_s
        self.requests = [one._replace(time_s=(one.time_s - first_s) / speed) for one in requests]

    @property
    def rate(self) -> float:
        """Its mean over the time that it lasts."""
        return len(self.requests) / max(self.requests[-1].time_s, 1e-9)

    def times(self, rng: np.random.Generator) -> Iterator[float]:  # noqa: ARG002 - nothing is random
        """Seconds since the first."""
        return iter([one.time_s for one in self.requests])


def read_trace(path: Path, speed: float = 1.0) -> Trace:
    """Lines of `seconds[,rows[,tenant]]`; empty lines, those with # and a heading are passed over."""
    requests = []
    try:
        lines = path.read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise TraceError(f"{path}: {error}") from None
    for number, line in enumerate(lines, 1):
        fields = [field.strip() for field in line.split(",")]
        if not line.strip() or line.startswith("#") or (number == 1 and not _is_number(fields[0])):
            continue
        rows = fields[1] if len(fields) > 1 and fields[1] else "1"
        if not _is_number(fields[0]) or not rows.isdigit() or int(rows) < 1:
            raise TraceError(f"{path}, line {number}: expected seconds[,rows[,tenant]], got {line[:80]!r}")
        requests.append(Recorded(float(fields[0]), int(rows), fields[2] if len(fields) > 2 else ""))
    requests.sort(key=lambda one: one.time_s)
    return Trace(requests, speed)


def _is_number(text: str) -> bool:
    try:
        return float(text) >= 0
    except ValueError:
        return False


_SHAPES = ((1,),)


@dataclass(frozen=True)
class Caller:
    """Requests that are alike. `share`: its part of all requests, beside the other callers'.

    `rows`: of each request. `weight` and the limits are the tenant's; callers of one name are one tenant.
    """

    name: str = "default"
    share: float = 1.0
    rows: int = 1
    deadline_ms: float | None = None
    priority: int = 0
    weight: float = 1.0
    max_concurrent: int | None = None
    max_queue_rows: int | None = None


class SimulatedRequest(Request):
    """A request that tells the records when it is done. `came_s`: when it should have come."""

    __slots__ = ("caller", "came_s", "node", "records")

    def __init__(self, caller: int, rows: int, records: Records) -> None:
        super().__init__(rows, _SHAPES, ())
        self.caller = caller
        self.records = records
        self.came_s = 0.0
        self.node: Node

    def done(self) -> None:
        self.node.open_requests -= 1
        self.records.done(self)


class Traffic:
    """Makes the requests: `times` as `VirtualLoop.run` wants them, and `request` for each.

    `arrivals` None: when they come is decided elsewhere.
    """

    def __init__(self, arrivals: Arrivals | None, callers: Sequence[Caller], seed: int) -> None:
        self.callers = callers
        self._arrivals = arrivals
        self._seed = seed
        self._rng = np.random.default_rng([seed, 1])
        tenants = {one.name: _tenant(one) for one in callers}
        # One caller without a name of its own is nobody in particular, as where there is no auth.
        nobody = len(tenants) == 1 and "default" in tenants
        self._tenants = [None if nobody else tenants[one.name] for one in callers]
        self._timeouts_s = [None if one.deadline_ms is None else one.deadline_ms / 1000 for one in callers]
        self._next = self._recorded(arrivals) if isinstance(arrivals, Trace) else self._drawn()

    def times(self) -> Iterator[float]:
        """When requests come."""
        assert self._arrivals is not None
        return self._arrivals.times(np.random.default_rng([self._seed, 0]))

    def request(self, records: Records) -> SimulatedRequest:
        """The next one."""
        caller, rows = next(self._next)
        request = SimulatedRequest(caller, rows, records)
        request.tenant = self._tenants[caller]
        request.timeout_s = self._timeouts_s[caller]
        request.priority = self.callers[caller].priority
        return request

    def _drawn(self) -> Iterator[tuple[int, int]]:
        rows = [one.rows for one in self.callers]
        if len(rows) == 1:
            yield from repeat((0, rows[0]))
        shares = np.cumsum([one.share for one in self.callers])
        while True:
            drawn = np.searchsorted(shares, self._rng.random(_CHUNK) * shares[-1], side="right")
            for caller in drawn.tolist():
                yield caller, rows[caller]

    def _recorded(self, trace: Trace) -> Iterator[tuple[int, int]]:
        numbers = {one.name: number for number, one in enumerate(self.callers)}
        for one in trace.requests:
            caller = numbers.get(one.tenant) if one.tenant else 0
            if caller is None:
                raise TraceError(f"the trace has a tenant {one.tenant!r} that is not described")
            yield caller, one.rows


def _tenant(caller: Caller) -> Tenant:
    return Tenant(
        caller.name,
        weight=caller.weight,
        max_concurrent=caller.max_concurrent,
        max_queue_rows=caller.max_queue_rows,
    )
