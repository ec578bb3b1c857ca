"""A simulated engine: it takes the time that a latency profile says, and computes nothing.

A latency profile is a JSON file with the run times of a model by batch size, measured by `cobatch profile` or
made from published figures (the folder profiles). `runs` has for each batch size quantiles in microseconds
("p0" the fastest, "p50", "p95", ...). Run times are drawn from them, with linear interpolation between
quantiles and between sizes.
"""

from __future__ import annotations

import json
from bisect import bisect_right
from collections import deque
from collections.abc import Callable, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any, cast

import numpy as np

from cobatch.batcher.simulator.clock import VirtualLoop
from cobatch.engines.base import Array, Engine, RowShapes, Signature, batch_sizes
from cobatch.engines.worker import Deliver, Job, Outcome

_INCLUDED = Path(__file__).with_name("profiles")


class ProfileError(Exception):
    """A profile cannot be read; the text says why."""


class Profile:
    """Run times by batch size: `runs` maps rows to quantiles (0 to 1) to microseconds.

    Every size has the same quantiles. `approximate` says how the profile differs from a measurement, "" for a
    measured one.
    """

    def __init__(
        self,
        name: str,
        runs: Mapping[int, Mapping[float, float]],
        *,
        source: str = "",
        approximate: str = "",
    ) -> None:
        self.name = name
        self.source = source
        self.approximate = approximate
        self.runs = {rows: dict(sorted(quantiles.items())) for rows, quantiles in sorted(runs.items())}
        if not self.runs or 0 in self.runs or len({tuple(q) for q in self.runs.values()}) != 1:
            raise ProfileError("a profile needs sizes of at least one row, with the same quantiles each")
        self.sizes = list(self.runs)
        self.max_rows = self.sizes[-1]
        # Beyond the outermost quantiles times are constant: nothing is known about them.
        self._levels = [0.0, *next(iter(self.runs.values())), 1.0]
        self._times: dict[int, list[float]] = {}

    def quantile_s(self, rows: int, level: float) -> float:
        """Return the quantile `level` (0 to 1) of the run time."""
        times, levels = self._times_of(rows), self._levels
        index = min(bisect_right(levels, level), len(levels) - 1)
        low, high = levels[index - 1], levels[index]
        part = (level - low) / (high - low) if high > low else 0.0
        return times[index - 1] + part * (times[index] - times[index - 1])

    def mean_s(self, rows: int) -> float:
        """Return the mean run time."""
        points = pairwise(zip(self._levels, self._times_of(rows), strict=True))
        return sum((b - a) * (x + y) / 2 for (a, x), (b, y) in points)

    def _times_of(self, rows: int) -> list[float]:
        """Return the seconds at each of `_levels`."""
        if rows not in self._times:
            seconds = [us / 1e6 for us in self._interpolated(rows)]
            self._times[rows] = [seconds[0], *seconds, seconds[-1]]
        return self._times[rows]

    def _interpolated(self, rows: int) -> list[float]:
        sizes = self.sizes
        index = bisect_right(sizes, rows)
        if index == 0 or sizes[index - 1] == rows or len(sizes) == 1:
            return list(self.runs[sizes[max(0, index - 1)]].values())
        index = min(index, len(sizes) - 1)
        left, right = sizes[index - 1], sizes[index]
        part = (rows - left) / (right - left)
        pairs = zip(self.runs[left].values(), self.runs[right].values(), strict=True)
        return [low + part * (high - low) for low, high in pairs]

    def as_json(self) -> dict[str, Any]:
        """Return the content of the profile's file."""
        runs = [
            {"rows": rows, "us": {f"p{level * 100:g}": round(us, 3) for level, us in quantiles.items()}}
            for rows, quantiles in self.runs.items()
        ]
        return {"name": self.name, "source": self.source, "approximate": self.approximate, "runs": runs}


def included() -> list[str]:
    """Return the names of the profiles that come with cobatch."""
    return sorted(path.stem for path in _INCLUDED.glob("*.json"))


def load_profile(name_or_file: str) -> Profile:
    """Load an included profile by its name, or a file. Raises ProfileError."""
    names = included()
    path = _INCLUDED / f"{name_or_file}.json" if name_or_file in names else Path(name_or_file)
    try:
        document = json.loads(path.read_text())
        runs = {
            int(run["rows"]): {float(name[1:]) / 100: float(us) for name, us in run["us"].items()}
            for run in document["runs"]
        }
        about = {name: str(document.get(name, "")) for name in ("source", "approximate")}
        return Profile(str(document["name"]), runs, **about)
    except OSError as error:
        raise ProfileError(
            f"{name_or_file}: {error.strerror}, and no included profile ({', '.join(names)})"
        ) from None
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ProfileError(f"{name_or_file} is not a latency profile: {error!r}") from None


Disturbance = Callable[[float, float], float]


def undisturbed(began_s: float, run_s: float) -> float:  # noqa: ARG001
    """Return the time of a run by itself."""
    return run_s


class RunTimeSampler:
    """Draws run times. All policies of a comparison draw the same numbers in the same order.

    `disturb(began_s, run_s)` returns how long a run takes that began then and takes `run_s` by itself.
    """

    def __init__(self, profile: Profile, seed: int, disturb: Disturbance = undisturbed) -> None:
        self.profile = profile
        self._disturb = disturb
        self._rng = np.random.default_rng([seed, 2])
        self._total_s = 0.0
        self._ends_s = 0.0

    def run_s(self, rows: int, began_s: float) -> float:
        """Return the time of the next run, which begins at `began_s`."""
        run_s = self._disturb(began_s, self.profile.quantile_s(rows, self._rng.random()))
        self._total_s += run_s
        self._ends_s = began_s + run_s
        return run_s

    def busy_s(self, now_s: float) -> float:
        """Return the time spent in runs until now."""
        return self._total_s - max(0.0, self._ends_s - now_s)


class _SimulatedEngine:
    """The part of an engine that the batcher uses: sizes, slots, and no inputs to pack."""

    signature = Signature(inputs=(), outputs=(), fixed_batch=None)

    def __init__(self, max_batch_size: int, slots: int) -> None:
        self.max_batch_size = max_batch_size
        self.slots = slots

    def inputs(self, slot: int, rows: int, row_shapes: RowShapes) -> tuple[Array, ...]:  # noqa: ARG002
        return ()


class SimulatedWorker:
    """Runs batches one after another, as `engines.worker.Worker` does.

    `handover_s` is the delay from the loop to the engine, and from the engine to the loop. The engine does
    not wait for a busy loop: runs start and end at their own times, however late the loop calls back.
    """

    def __init__(
        self,
        sampler: RunTimeSampler,
        loop: VirtualLoop,
        *,
        max_batch_size: int,
        slots: int,
        handover_s: float = 0.0,
    ) -> None:
        self.engine = cast("Engine", _SimulatedEngine(max_batch_size, slots))
        self.deliver: Deliver | None = None
        self.warmup_us = {
            rows: sampler.profile.quantile_s(rows, 0.0) * 1e6 for rows in batch_sizes(None, max_batch_size)
        }
        self._loop = loop
        self._sampler = sampler
        self._handover_s = handover_s
        self._waiting: deque[Job] = deque()
        self._busy = False

    def submit(self, job: Job) -> None:
        """Run this job after those submitted before."""
        at_s = self._loop.now_s
        if self._handover_s:
            at_s += self._handover_s
            self._loop.call_at(at_s, self._arrive, job, at_s)
        else:
            self._arrive(job, at_s)

    def _arrive(self, job: Job, at_s: float) -> None:
        self._waiting.append(job)
        if not self._busy:
            self._start(at_s)

    def _start(self, at_s: float) -> None:
        self._busy = True
        job = self._waiting.popleft()
        end_s = at_s + self._sampler.run_s(job.rows, at_s)
        self._loop.call_at(end_s, self._end, job, at_s, end_s)

    def _end(self, job: Job, started_s: float, ended_s: float) -> None:
        outcome = Outcome((), None, started_s, ended_s)
        if self._waiting:
            self._start(ended_s)
        else:
            self._busy = False
        assert self.deliver is not None
        if self._handover_s:
            self._loop.call_at(ended_s + self._handover_s, self.deliver, job, outcome)
        else:
            self.deliver(job, outcome)
