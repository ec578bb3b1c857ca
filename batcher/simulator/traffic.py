"""Arrival processes, recorded traces, and the kinds of requests that callers send.

Each process yields the times of requests, ascending; only a trace ends.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import count
from math import pi
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np

_CHUNK = 4096


class Arrivals(Protocol):
    """An arrival process. `rate` is its mean in requests per second."""

    @property
    def rate(self) -> float: ...

    def times(self, rng: np.random.Generator) -> Iterator[float]:
        """Yield seconds since the start, ascending."""
        ...


@dataclass(frozen=True)
class Poisson:
    """Independent callers: exponentially distributed gaps."""

    rate: float

    def times(self, rng: np.random.Generator) -> Iterator[float]:
        start_s = 0.0
        while True:
            chunk = start_s + np.cumsum(rng.exponential(1 / self.rate, _CHUNK))
            start_s = float(chunk[-1])
            yield from chunk.tolist()


@dataclass(frozen=True)
class Constant:
    """A constant rate: equal gaps."""

    rate: float

    def times(self, rng: np.random.Generator) -> Iterator[float]:  # noqa: ARG002 - nothing is random
        return (number / self.rate for number in count(1))


@dataclass(frozen=True)
class Bursty:
    """A Markov-modulated Poisson process: bursts of `factor` times the mean rate, `share` of the time.

    `burst_s` is the mean length of a burst. The rate between bursts keeps the mean.
    """

    rate: float
    factor: float = 3.0
    share: float = 0.2
    burst_s: float = 1.0

    def times(self, rng: np.random.Generator) -> Iterator[float]:
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
        # Thinning: draw at the highest rate, keep each with the probability rate / highest.
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
    """Return the times of a Poisson process within one stretch of time."""
    return np.sort(start_s + length_s * rng.random(rng.poisson(rate * length_s)))


PROCESSES: dict[str, Callable[[float], Arrivals]] = {
    "poisson": Poisson,
    "constant": Constant,
    "bursty": Bursty,
    "diurnal": Diurnal,
}


class Recorded(NamedTuple):
    """A request of a trace; `tenant` is "" where none is given."""

    time_s: float
    rows: int
    tenant: str


class TraceError(Exception):
    """A trace cannot be read; the text says where and why."""


class Trace:
    """A recording, shifted to begin at 0 s. `speed` 2 plays it twice as fast."""

    def __init__(self, requests: list[Recorded], speed: float = 1.0) -> None:
        if not requests:
            raise TraceError("the trace has no requests")
        first_s = requests[0].time_s
        self.requests = [one._replace(time_s=(one.time_s - first_s) / speed) for one in requests]

    @property
    def rate(self) -> float:
        """The mean rate over the trace's duration."""
        return len(self.requests) / max(self.requests[-1].time_s, 1e-9)

    def times(self, rng: np.random.Generator) -> Iterator[float]:  # noqa: ARG002 - nothing is random
        return iter([one.time_s for one in self.requests])


def trace_of(arrivals: str) -> Trace | None:
    """Read the trace that the option `--arrivals` names; None if it names a process. Raises TraceError."""
    if arrivals in PROCESSES:
        return None
    if not Path(arrivals).exists():
        raise TraceError(f"--arrivals: expected {', '.join(PROCESSES)} or a trace file, got {arrivals!r}")
    return read_trace(Path(arrivals))


def read_trace(path: Path, speed: float = 1.0) -> Trace:
    """Read lines of `seconds[,rows[,tenant]]`; skip empty lines, those that begin with # and a heading."""
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


@dataclass(frozen=True)
class Caller:
    """A kind of requests. `share` is its part of all requests, relative to the other callers'.

    `rows` are those of each request. `weight` and the limits belong to the tenant; callers of the same name
    are one tenant.
    """

    name: str = "default"
    share: float = 1.0
    rows: int = 1
    deadline_ms: float | None = None
    priority: int = 0
    weight: float = 1.0
    max_concurrent: int | None = None
    max_queue_rows: int | None = None

    @property
    def timeout_s(self) -> float | None:
        """The deadline in seconds."""
        return None if self.deadline_ms is None else self.deadline_ms / 1000
