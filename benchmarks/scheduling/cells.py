"""Random models under random load: the cells of `benchmarks.scheduling.robustness`.

A cell is a latency profile (how the median grows with the rows, and the tail of the runs), a load, and
the time that requests may take. All of it follows from the number of the cell.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable
from dataclasses import dataclass
from math import ceil, exp, log, pi, sin
from statistics import NormalDist

import numpy as np

from cobatch.batcher.simulator.bound import capacity
from cobatch.batcher.simulator.engine import Disturbance, Profile, undisturbed
from cobatch.batcher.simulator.scenario import Closed, Scenario
from cobatch.batcher.simulator.traffic import Arrivals, Bursty, Caller, Poisson

LOADS = (0.3, 0.6, 0.8, 0.95, 1.2, 2.0)
_LEVELS = (0.0, 0.05, 0.25, 0.5, 0.75, 0.9, 0.95, 0.99, 0.995, 0.999, 1.0)
# Beyond it an event loop has no time to read the requests, and the engine is not what limits a server.
_MOST_PER_S = 100_000.0
_THINK_MS = 0.3  # of clients in a closed loop: their part of a request, and the sockets
_LEAST_CLOSED_RUN_S = 0.005
_LEAST_DEADLINE_S = 0.005
_BURST_RUNS = 50  # the mean length of a burst, in full runs

Rng = np.random.Generator


@dataclass(frozen=True)
class Drift:
    """Run times that change: `factor` times as long from `at_s` on, or in waves of that period."""

    factor: float
    at_s: float
    waves: bool

    def __call__(self, began_s: float, run_s: float) -> float:
        if self.waves:
            return run_s * exp(log(self.factor) * sin(2 * pi * began_s / self.at_s))
        return run_s * self.factor if began_s >= self.at_s else run_s


@dataclass(frozen=True)
class Stalls:
    """An engine that stands still now and then, whatever runs: the starts, ascending, and each length."""

    starts_s: tuple[float, ...]
    length_s: float

    def __call__(self, began_s: float, run_s: float) -> float:
        end_s = began_s + run_s
        before = max(0, bisect_right(self.starts_s, began_s) - 1)
        for start_s in self.starts_s[before:]:
            if start_s >= end_s:
                break
            end_s += max(0.0, start_s + self.length_s - max(began_s, start_s))
        return end_s - began_s


@dataclass(frozen=True)
class Cell:
    """A scenario with the words for it."""

    number: int
    curve: str
    tail: str
    drift: str
    traffic: str
    load: float
    deadline_ms: float | None
    full_ms: float
    scenario: Scenario

    @property
    def name(self) -> str:
        """All of it in a line."""
        deadline = "none" if self.deadline_ms is None else f"{self.deadline_ms:.3g} ms"
        about = f"{self.curve}, {self.tail}, {self.drift}; {self.traffic} {self.load:g}; deadline {deadline}"
        return f"{self.number}: {about}; {self.scenario.batch_rows} rows {self.full_ms:.3g} ms"


def cell(number: int, requests: int, repeat: int = 0) -> Cell:
    """Return a cell. `repeat`: the same with other chance."""
    rng = np.random.default_rng([number, 11])
    max_rows = int(rng.choice([8, 16, 32, 64, 128]))
    curve, median_us = _curve(rng, max_rows)
    tail, spread = _tail(rng)
    sizes = sorted(
        {1 << n for n in range(max_rows.bit_length())} | {3 << n for n in range(9) if 3 << n < max_rows}
    )
    base_us = median_us(1)
    runs = {n: {q: spread(q, median_us(n), base_us) for q in _LEVELS} for n in sizes}
    deadline_runs = float(np.exp(rng.uniform(np.log(2.5), np.log(20)))) if rng.random() < 0.5 else None
    profile = Profile(f"cell {number}", runs)
    most, rows = capacity(profile, max_rows)
    kind = str(rng.choice(["poisson", "bursty", "closed"], p=[0.5, 0.3, 0.2]))
    # A server's part of a request and its timers are not in the model: its times are to be far above them.
    least_s = _LEAST_CLOSED_RUN_S if kind == "closed" else 0.0
    least_s = max(least_s, _LEAST_DEADLINE_S / deadline_runs if deadline_runs else 0.0)
    slower = max(1.0, most / _MOST_PER_S, least_s / profile.mean_s(rows))
    runs = {n: {q: slower * us for q, us in times.items()} for n, times in runs.items()}
    profile = Profile(f"cell {number}", runs)
    full_s = profile.mean_s(rows)
    deadline_ms = None if deadline_runs is None else 1000 * deadline_runs * full_s
    most, _ = capacity(profile, max_rows, deadline_ms and deadline_ms / 1000)
    load = float(rng.choice(LOADS))
    traffic, arrivals = _traffic(rng, kind, load * most, full_s, max_rows)
    seconds = requests / (load * most if not isinstance(arrivals, Closed) else most)
    drift, disturb = _drift(rng, seconds, full_s)
    scenario = Scenario(
        profile,
        arrivals,
        (Caller(deadline_ms=deadline_ms),),
        seconds=seconds,
        warmup_s=0.2 * seconds,
        disturb=disturb,
        seed=1 + number + 10_000 * repeat,
    )
    return Cell(number, curve, tail, drift, traffic, load, deadline_ms, 1000 * full_s, scenario)


def _curve(rng: Rng, max_rows: int) -> tuple[str, Callable[[int], float]]:
    """Return the median time of a run in us by its rows."""
    one_us = float(np.exp(rng.uniform(np.log(30), np.log(30_000))))
    row = float(np.exp(rng.uniform(np.log(0.01), np.log(1.0))))
    step = int(rng.choice([2, 4, 8, 16]))
    power = float(rng.uniform(1.1, 2.0))
    bend = max_rows * float(rng.uniform(0.1, 0.7))
    curves: dict[str, Callable[[int], float]] = {
        "flat": lambda n: one_us,
        "affine": lambda n: one_us * (1 + row * (n - 1)),
        "stepped": lambda n: one_us * (1 + row * step * (ceil(n / step) - 1)),
        "superlinear": lambda n: one_us * (1 + row * (n - 1)) * max(1.0, n / bend) ** power,
    }
    name = str(rng.choice(list(curves)))
    return name, curves[name]


def _tail(rng: Rng) -> tuple[str, Callable[[float, float, float], float]]:
    """Return the time of a run in us by its quantile, the median of its size and that of one row."""
    sigma = float(rng.uniform(0.05, 0.8))
    share, factor = float(rng.uniform(0.02, 0.3)), float(rng.uniform(1.5, 5.0))
    often = float(np.exp(rng.uniform(np.log(0.002), np.log(0.05))))
    stall = float(np.exp(rng.uniform(np.log(3), np.log(200))))

    def log_normal(level: float, median_us: float, base_us: float) -> float:  # noqa: ARG001
        return median_us * exp(sigma * NormalDist().inv_cdf(min(max(level, 0.001), 0.999)))

    def bimodal(level: float, median_us: float, base_us: float) -> float:  # noqa: ARG001
        return median_us * (factor if level > 1 - share else 1 + 0.1 * (level - 0.5))

    def stalling(level: float, median_us: float, base_us: float) -> float:
        return median_us * (1 + 0.1 * (level - 0.5)) + (stall * base_us if level > 1 - often else 0.0)

    tails = {"log-normal": log_normal, "bimodal": bimodal, "stalling": stalling}
    words = {
        "log-normal": f"log-normal {sigma:.2f}",
        "bimodal": f"{share:.0%} x {factor:.1f}",
        "stalling": f"{often:.1%} + {stall:.0f} runs",
    }
    name = str(rng.choice(["steady", *tails], p=[0.1, 0.3, 0.3, 0.3]))
    if name == "steady":
        return name, lambda level, median_us, base_us: median_us
    return words[name], tails[name]


def _traffic(rng: Rng, kind: str, rate: float, full_s: float, max_rows: int) -> tuple[str, Arrivals | Closed]:
    connections = int(max_rows * rng.choice([0.5, 1, 2, 4]))
    if kind == "closed":
        return f"closed {connections}", Closed(connections, _THINK_MS, retry_ms=full_s * 1000)
    return kind, Poisson(rate) if kind == "poisson" else Bursty(rate, burst_s=_BURST_RUNS * full_s)


def _drift(rng: Rng, seconds: float, full_s: float) -> tuple[str, Disturbance]:
    kind = str(rng.choice(["steady", "step", "waves", "stands still"], p=[0.6, 0.15, 0.1, 0.15]))
    factor = float(np.exp(rng.uniform(np.log(0.4), np.log(2.5))))
    at_s = float(rng.uniform(0.1, 0.6)) * seconds
    gap_s, length_s = float(rng.uniform(20, 200)) * full_s, float(rng.uniform(2, 10)) * full_s
    if kind == "stands still":
        count = ceil(1.5 * seconds / gap_s) + 1
        starts_s = np.cumsum(length_s + rng.exponential(gap_s, count))
        return f"stands still {length_s / gap_s:.0%}", Stalls(tuple(starts_s.tolist()), length_s)
    if kind == "steady":
        return kind, undisturbed
    return f"{kind} x {factor:.1f}", Drift(factor, at_s, kind == "waves")
